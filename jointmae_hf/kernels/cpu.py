"""CPU kernels in numba: sampling, neighbours, grouping and Chamfer on one tree, exact to the index.

Notable choices:

- The tree: points sorted along a Morton curve, 32 to a leaf, 32 leaves to a node, 32 nodes to a block of the top, each
  with its bounding box. It takes some 15 ns a point to build, and whatever looks for near or far points skips most.
- A box is left alone when it is farther than what has been found. The distance to a box is rounded just as those to
  the points in it, so it exceeds none of them, and nothing is lost.
- Arithmetic is in the order of the reference and without contraction, so that indices are the same. A distance and an
  index make one int64 key: keys sort by distance and, among equals, by index.
- 32 distances or boxes are looked at in one loop that LLVM turns into SIMD, and answer with one bit each. Minima and
  maxima are those of bits, which sort as non-negative floats do: of floats it makes no SIMD here.
- Threads come from a pool of our own and not from numba's, which may not be entered from two Python threads at once.
"""

import os
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


WIDTH = 32  # points of a leaf, leaves of a node, nodes of a block of the top: the bits of a mask
_LEAF, _NODE = 4 * WIDTH, 7 * WIDTH  # x, y, z, distance; low x, y, z, high x, y, z, largest distance
_MORTON_CELLS = 1024  # a side
# Neighbours are chosen from this many times as many points about the query, then from what else is near enough.
_FIRST_LOOK, _NEAR_FIRST = 3, np.float32(0.1)
_PAIRS_BY_FORCE = 1 << 16  # up to so many pairs of points, two sets are compared without a tree
_QUERIES_OF_THREAD = 512  # at least, so that the work outweighs the handing over

_INF = np.float32(np.inf)
_NOBODY = np.int32(0x7FFFFFFF)  # index of padding, higher than any other
_LAST_KEY = np.int64(0x7F8000007FFFFFFE)  # of an infinite distance: above the keys of all points, below padding's
_NO_KEY = np.int64(0x7FFFFFFFFFFFFFFF)
_OCTAVES = np.int64(8 << 23) << 32  # eight halvings of the distance in a key
_BIT, _NO_BIT = np.uint32(1), np.uint32(0)
_INF_BITS, _LOWEST_BITS = np.int32(0x7F800000), np.int32(-(1 << 31))
_NO_MASK = np.zeros((0, 0), dtype=np.bool_)
_NO_OFFSETS = np.zeros((0, 0, 0, 0), dtype=np.float32)
_NO_INDICES = np.zeros((0, 0), dtype=np.int64)

# leaves and nodes are flat: what belongs to one lies together at constant distances, or it would not become SIMD.
Tree = namedtuple("Tree", ["order", "leaves", "nodes", "top", "num_points"])


def _jit(fastmath: set[str] | bool = False, entry: bool = False) -> Callable:
    """Compiles a function when first called. Only an entry may be called from Python, where others would crash."""

    def compiled(function):
        options = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": fastmath}
        options |= {"no_cpython_wrapper": not entry, "no_cfunc_wrapper": True}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder to keep the machine code in
            return njit(**options)(function)

    return compiled


# No NaN reaches the kernels, and the sign of a zero distance does not matter: all that is needed to use SIMD minima.
_simd = {"nnan", "nsz"}


@intrinsic
def _lowest_bit(typing_context, mask):
    """Place of the lowest bit that is set; 32 if none is."""

    def code(context, builder, signature, arguments):
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

    return types.int64(types.uint32), code


@intrinsic
def _bits_of(typing_context, value):
    return types.int32(types.float32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@intrinsic
def _float_of(typing_context, bits):
    return types.float32(types.int32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.FloatType())


@_jit()
def _key(distance, index):
    return (np.int64(_bits_of(distance)) << 32) | np.int64(index)


@_jit()
def _distance_of(key):
    return _float_of(np.int32(key >> 32))


@_jit()
def _fill(values, value):
    """What NumPy would do in one line, and take seconds to compile."""
    for i in range(values.shape[0]):
        values[i] = value


# ---- The tree


@_jit(_simd)
def _bounding_box(points, order):
    low_x = low_y = low_z = _INF
    high_x = high_y = high_z = -_INF
    for i in order:
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        low_x, high_x = min(low_x, x), max(high_x, x)
        low_y, high_y = min(low_y, y), max(high_y, y)
        low_z, high_z = min(low_z, z), max(high_z, z)
    return low_x, low_y, low_z, high_x, high_y, high_z


@_jit()
def _spread(cell):
    """Moves ten bits to every third place."""
    cell = (cell | cell << 16) & 0x30000FF
    cell = (cell | cell << 8) & 0x300F00F
    cell = (cell | cell << 4) & 0x30C30C3
    return (cell | cell << 2) & 0x9249249


@_jit(_simd)
def _curve_codes(points, low_x, low_y, low_z, scale):
    """Morton codes; what overflows gets some code or other, which only costs time."""
    codes = np.empty(points.shape[0], dtype=np.int32)
    zero, last = np.float32(0.0), np.float32(_MORTON_CELLS - 1)
    for i in range(points.shape[0]):
        x = np.int32(min(max((points[i, 0] - low_x) * scale, zero), last))
        y = np.int32(min(max((points[i, 1] - low_y) * scale, zero), last))
        z = np.int32(min(max((points[i, 2] - low_z) * scale, zero), last))
        codes[i] = _spread(x) | _spread(y) << 1 | _spread(z) << 2
    return codes


@_jit()
def _sort_by_digit(codes, order, shift, sorted_codes, sorted_order):
    """One stable pass of a radix sort."""
    places = np.zeros(_MORTON_CELLS, dtype=np.int32)
    for code in codes:
        places[(code >> shift) & (_MORTON_CELLS - 1)] += 1
    total = np.int32(0)
    for digit in range(_MORTON_CELLS):
        count = places[digit]
        places[digit] = total
        total += count
    for i in range(codes.shape[0]):
        digit = (codes[i] >> shift) & (_MORTON_CELLS - 1)
        place = places[digit]
        places[digit] = place + 1
        sorted_codes[place] = codes[i]
        sorted_order[place] = order[i]


@_jit()
def _curve_order(points, order):
    """Indices along a Morton curve, those of one cell from the lowest up."""
    low_x, low_y, low_z, high_x, high_y, high_z = _bounding_box(points, order)
    extent = max(max(high_x - low_x, high_y - low_y), max(high_z - low_z, np.float32(1e-30)))
    scale = np.float32(_MORTON_CELLS - 1) / extent
    codes = _curve_codes(points, low_x, low_y, low_z, scale)
    for i in range(order.shape[0]):  # padding is left out; the others move down
        codes[i] = codes[order[i]]
    codes = codes[: order.shape[0]]
    other_codes = np.empty_like(codes)
    other_order = np.empty_like(order)
    _sort_by_digit(codes, order, 0, other_codes, other_order)
    _sort_by_digit(other_codes, other_order, 10, codes, order)
    _sort_by_digit(codes, order, 20, other_codes, other_order)
    return other_order


@_jit()
def _real_indices(num_points, real):
    indices = np.empty(num_points, dtype=np.int32)
    count = 0
    for i in range(num_points):
        indices[count] = i
        count += 1 if real.shape[0] == 0 or real[i] else 0
    return indices[:count]


@_jit(_simd)
def _build(points, real):
    """
    The tree of the points `(n, 3)` for which `real` is true; of all if it is empty.

    Padding of a leaf is infinitely far; padding of a node or of the top has a box that is.
    """
    order = _curve_order(points, _real_indices(points.shape[0], real))
    num_points = order.shape[0]
    num_leaves = (num_points + WIDTH - 1) // WIDTH
    num_nodes = (num_leaves + WIDTH - 1) // WIDTH
    stored = np.full(num_leaves * WIDTH, _NOBODY, dtype=np.int32)
    leaves = np.full(num_leaves * _LEAF, _INF, dtype=np.float32)
    nodes = np.full(num_nodes * _NODE, _INF, dtype=np.float32)
    top = np.full((num_nodes + WIDTH - 1) // WIDTH * _NODE, _INF, dtype=np.float32)
    for leaf in range(num_leaves):
        block = leaves[leaf * _LEAF : (leaf + 1) * _LEAF]
        node = nodes[leaf // WIDTH * _NODE : (leaf // WIDTH + 1) * _NODE]
        members = order[leaf * WIDTH : min((leaf + 1) * WIDTH, num_points)]
        for i in range(members.shape[0]):
            stored[leaf * WIDTH + i] = members[i]
            for axis in range(3):
                block[axis * WIDTH + i] = points[members[i], axis]
        child = leaf % WIDTH
        for axis in range(3):
            low, high = _INF, -_INF
            for value in block[axis * WIDTH : axis * WIDTH + members.shape[0]]:
                low, high = min(low, value), max(high, value)
            node[axis * WIDTH + child] = low
            node[(axis + 3) * WIDTH + child] = high
    for index in range(num_nodes):
        node = nodes[index * _NODE : (index + 1) * _NODE]
        block = top[index // WIDTH * _NODE : (index // WIDTH + 1) * _NODE]
        children = min(WIDTH, num_leaves - index * WIDTH)
        for axis in range(3):
            low, high = _INF, -_INF
            for child in range(children):
                low = min(low, node[axis * WIDTH + child])
                high = max(high, node[(axis + 3) * WIDTH + child])
            block[axis * WIDTH + index % WIDTH] = low
            block[(axis + 3) * WIDTH + index % WIDTH] = high
    return Tree(stored, leaves, nodes, top, num_points)


@_jit()
def _tree_of(points, mask, cloud):
    if mask.shape[0] == 0:
        return _build(points[cloud], np.empty(0, dtype=np.bool_))
    return _build(points[cloud], mask[cloud])


@_jit()
def _leaf(tree, index):
    return tree.leaves[index * _LEAF : (index + 1) * _LEAF]


@_jit()
def _node(nodes, index):
    return nodes[index * _NODE : (index + 1) * _NODE]


@_jit(_simd)
def _box_distance(node, child, x, y, z):
    zero = np.float32(0.0)
    dx = max(max(node[child] - x, x - node[3 * WIDTH + child]), zero)
    dy = max(max(node[WIDTH + child] - y, y - node[4 * WIDTH + child]), zero)
    dz = max(max(node[2 * WIDTH + child] - z, z - node[5 * WIDTH + child]), zero)
    return dx * dx + dy * dy + dz * dz


@_jit(_simd)
def _boxes_within(node, x, y, z, limit):
    """Bits of the children whose box is not farther than a limit."""
    bits = _NO_BIT
    for child in range(WIDTH):
        bits |= (_BIT << np.uint32(child)) if _box_distance(node, child, x, y, z) <= limit else _NO_BIT
    return np.uint32(bits)


@_jit(_simd)
def _nearest_box(node, x, y, z):
    """The child whose box is nearest, and its distance."""
    nearest = _INF_BITS
    for child in range(WIDTH):
        nearest = min(nearest, _bits_of(_box_distance(node, child, x, y, z)))
    distance = _float_of(nearest)
    return _lowest_bit(_boxes_within(node, x, y, z, distance)), distance


@_jit()
def _nearest_leaf(tree, x, y, z):
    """A leaf near a query: that of the nearest box in the node of the nearest box."""
    num_leaves = tree.order.shape[0] // WIDTH
    nearest, distance = 0, _INF
    for block in range(tree.top.shape[0] // _NODE):
        child, to_child = _nearest_box(_node(tree.top, block), x, y, z)
        if to_child < distance:
            nearest, distance = block * WIDTH + child, to_child
    nearest = min(nearest, (num_leaves - 1) // WIDTH)
    child, _ = _nearest_box(_node(tree.nodes, nearest), x, y, z)
    return min(nearest * WIDTH + child, num_leaves - 1)


# ---- Farthest point sampling


@_jit(_simd)
def _lower(leaf, x, y, z):
    """Lowers the distances in a leaf to those from a new sample; returns the largest that is left."""
    largest = _LOWEST_BITS
    for i in range(WIDTH):
        dx = leaf[i] - x
        dy = leaf[WIDTH + i] - y
        dz = leaf[2 * WIDTH + i] - z
        distance = min(leaf[3 * WIDTH + i], dx * dx + dy * dy + dz * dz)
        leaf[3 * WIDTH + i] = distance
        largest = max(largest, _bits_of(distance))
    return _float_of(largest)


@_jit(_simd)
def _boxes_reached(node, x, y, z):
    """Bits of the children that a new sample may bring nearer to the samples."""
    bits = _NO_BIT
    for child in range(WIDTH):
        reached = _box_distance(node, child, x, y, z) < node[6 * WIDTH + child]
        bits |= (_BIT << np.uint32(child)) if reached else _NO_BIT
    return np.uint32(bits)


@_jit(_simd)
def _largest(node):
    """Four at a time, since LLVM unrolls this short loop into one chain."""
    a = b = c = d = _LOWEST_BITS
    for child in range(6 * WIDTH, _NODE, 4):
        a, b = max(a, _bits_of(node[child])), max(b, _bits_of(node[child + 1]))
        c, d = max(c, _bits_of(node[child + 2])), max(d, _bits_of(node[child + 3]))
    return _float_of(max(max(a, b), max(c, d)))


@_jit(_simd)
def _children_at(node, distance):
    bits = _NO_BIT
    for child in range(WIDTH):
        bits |= (_BIT << np.uint32(child)) if node[6 * WIDTH + child] == distance else _NO_BIT
    return np.uint32(bits)


@_jit(_simd)
def _first_at(leaf, order, distance):
    """The lowest index of a leaf with this distance."""
    first = _NOBODY
    for i in range(WIDTH):
        index = order[i]
        first = min(first, index if leaf[3 * WIDTH + i] == distance else _NOBODY)
    return first


@_jit()
def _set_distances(tree, distance):
    """Gives all points, leaves and nodes this distance from the samples, and padding one below all others."""
    padding = np.float32(-1.0)
    num_leaves = tree.order.shape[0] // WIDTH
    for leaf in range(num_leaves):
        _fill(_leaf(tree, leaf)[3 * WIDTH :], distance)
    for i in range(tree.num_points - (num_leaves - 1) * WIDTH, WIDTH):
        _leaf(tree, num_leaves - 1)[3 * WIDTH + i] = padding
    num_nodes = tree.nodes.shape[0] // _NODE
    for node in range(num_nodes):
        for child in range(WIDTH):
            real = node * WIDTH + child < num_leaves
            _node(tree.nodes, node)[6 * WIDTH + child] = distance if real else padding
    for block in range(tree.top.shape[0] // _NODE):
        for child in range(WIDTH):
            real = block * WIDTH + child < num_nodes
            _node(tree.top, block)[6 * WIDTH + child] = distance if real else padding


@_jit()
def _add_sample(tree, x, y, z):
    """Lowers the distances from the samples, and returns the point that is now the farthest from them."""
    farthest = np.float32(-2.0)
    for block in range(tree.top.shape[0] // _NODE):
        top = _node(tree.top, block)
        nodes = _boxes_reached(top, x, y, z)
        while nodes:
            child = _lowest_bit(nodes)
            nodes &= nodes - _BIT
            index = block * WIDTH + child
            node = _node(tree.nodes, index)
            leaves = _boxes_reached(node, x, y, z)
            while leaves:
                leaf = _lowest_bit(leaves)
                leaves &= leaves - _BIT
                node[6 * WIDTH + leaf] = _lower(_leaf(tree, index * WIDTH + leaf), x, y, z)
            top[6 * WIDTH + child] = _largest(node)
        farthest = max(farthest, _largest(top))
    first = _NOBODY
    for block in range(tree.top.shape[0] // _NODE):
        nodes = _children_at(_node(tree.top, block), farthest)
        while nodes:
            index = block * WIDTH + _lowest_bit(nodes)
            nodes &= nodes - _BIT
            leaves = _children_at(_node(tree.nodes, index), farthest)
            while leaves:
                leaf = index * WIDTH + _lowest_bit(leaves)
                leaves &= leaves - _BIT
                order = tree.order[leaf * WIDTH : (leaf + 1) * WIDTH]
                first = min(first, _first_at(_leaf(tree, leaf), order, farthest))
    return first


@_jit()
def _sample(points, tree, sampled):
    """Fills `sampled` with indices of one cloud."""
    if tree.num_points == 0:
        _fill(sampled, 0)
        return
    half = np.float32(0.5)
    low_x, low_y, low_z, high_x, high_y, high_z = _bounding_box(points, tree.order[: tree.num_points])
    x, y, z = (low_x + high_x) * half, (low_y + high_y) * half, (low_z + high_z) * half
    distinct = min(sampled.shape[0], tree.num_points)
    for sample in range(distinct):
        if sample < 2:  # the middle of the box is no sample: it only tells where to start
            _set_distances(tree, _INF)
        # A point that is not finite has no place in the order: any is as good, as long as it is one of the cloud.
        pick = min(np.int64(_add_sample(tree, x, y, z)), points.shape[0] - 1)
        sampled[sample] = pick
        x, y, z = points[pick, 0], points[pick, 1], points[pick, 2]
    for sample in range(distinct, sampled.shape[0]):
        sampled[sample] = sampled[sample - distinct]


@_jit(entry=True)
def _sample_clouds(points, mask, sampled, begin, end):
    for cloud in range(begin, end):
        _sample(points[cloud], _tree_of(points, mask, cloud), sampled[cloud])


# ---- Neighbours


@_jit(_simd)
def _points_within(leaf, x, y, z, limit):
    """Bits of the points of a leaf that are not farther than a limit."""
    bits = _NO_BIT
    for i in range(WIDTH):
        dx = x - leaf[i]
        dy = y - leaf[WIDTH + i]
        dz = z - leaf[2 * WIDTH + i]
        bits |= (_BIT << np.uint32(i)) if dx * dx + dy * dy + dz * dz <= limit else _NO_BIT
    return np.uint32(bits)


@_jit()
def _key_in(leaf, order, i, x, y, z):
    dx = x - leaf[i]
    dy = y - leaf[WIDTH + i]
    dz = z - leaf[2 * WIDTH + i]
    return _key(dx * dx + dy * dy + dz * dz, order[i])


@_jit(_simd)
def _write_keys(leaf, order, x, y, z, keys):
    for i in range(WIDTH):
        keys[i] = _key_in(leaf, order, i, x, y, z)


@_jit()
def _count_up_to(keys, limit):
    count = 0
    for i in range(keys.shape[0]):
        count += np.int64(keys[i] <= limit)
    return count


@_jit()
def _padded(keys, count):
    """A view of whole vectors, filled up."""
    padded = (count + 31) // 32 * 32
    _fill(keys[count:padded], _NO_KEY)
    return keys[:padded]


@_jit()
def _keep_smallest(keys, count, k, spare):
    """
    Keeps the `k` smallest of `count` keys and at most `spare` others; returns how many, and a key that none exceeds.

    Halves an interval of keys, whose upper half is the bits of a distance, until few enough are below its end.
    """
    view = _padded(keys, count)
    high = np.int64(0)
    for i in range(count):
        high = max(high, keys[i])
    low = max(np.int64(-1), high - _OCTAVES)
    if _count_up_to(view, low) >= k:
        high, low = low, np.int64(-1)
    below = _count_up_to(view, high)
    while below > k + spare and high - low > 1:
        middle = low + (high - low) // 2
        up_to_middle = _count_up_to(view, middle)
        if up_to_middle >= k:
            high, below = middle, up_to_middle
        else:
            low = middle
    kept = 0
    for i in range(count):
        key = keys[i]
        keys[kept] = key
        kept += np.int64(key <= high)
    return kept, high


@_jit()
def _scratch(k):
    """Room for the keys of a query."""
    return np.empty((_FIRST_LOOK + 1) * k + 6 * WIDTH, dtype=np.int64)


@_jit()
def _query(tree, x, y, z, k, keys, neighbors):
    """Fills `neighbors` with the indices of the `k` nearest points, or of all there are and then of the nearest."""
    if tree.num_points == 0:
        _fill(neighbors, 0)
        return
    num_leaves = tree.order.shape[0] // WIDTH
    wanted = min(k, tree.num_points)
    spare = k // 4 + 2
    full = max(_FIRST_LOOK * k, k + WIDTH)

    # All points of the leaves about the nearest one give a first limit.
    looked = min((_FIRST_LOOK * k + WIDTH - 1) // WIDTH, num_leaves)
    first = max(0, min(_nearest_leaf(tree, x, y, z) - looked // 2, num_leaves - looked))
    for i in range(looked):
        leaf = first + i
        order = tree.order[leaf * WIDTH : (leaf + 1) * WIDTH]
        _write_keys(_leaf(tree, leaf), order, x, y, z, keys[i * WIDTH : (i + 1) * WIDTH])
    count = min(looked * WIDTH, tree.num_points - first * WIDTH)  # padding comes last
    last_key = _LAST_KEY
    if count > wanted + spare:
        count, last_key = _keep_smallest(keys, count, wanted, spare)
    limit = _distance_of(last_key)

    # Then whatever else is within it, nearer boxes first.
    seen = np.float32(-1.0)
    for turn in range(2):
        radius = limit * _NEAR_FIRST if turn == 0 else limit
        for block in range(tree.top.shape[0] // _NODE):
            nodes = _boxes_within(_node(tree.top, block), x, y, z, radius)
            while nodes:
                index = block * WIDTH + _lowest_bit(nodes)
                nodes &= nodes - _BIT
                if index * WIDTH >= num_leaves:
                    break
                node = _node(tree.nodes, index)
                leaves = _boxes_within(node, x, y, z, radius)
                while leaves:
                    child = _lowest_bit(leaves)
                    leaves &= leaves - _BIT
                    leaf = index * WIDTH + child
                    if leaf >= num_leaves:
                        break
                    if first <= leaf < first + looked:
                        continue
                    to_box = _box_distance(node, child, x, y, z)
                    if to_box <= seen or to_box > limit:
                        continue
                    members, order = _leaf(tree, leaf), tree.order[leaf * WIDTH : (leaf + 1) * WIDTH]
                    near = _points_within(members, x, y, z, limit)
                    while near:
                        key = _key_in(members, order, _lowest_bit(near), x, y, z)
                        near &= near - _BIT
                        keys[count] = key
                        count += np.int64(key <= last_key)
                    if count > full:
                        count, last_key = _keep_smallest(keys, count, wanted, spare)
                        limit = _distance_of(last_key)
        if turn == 0:
            seen = radius
            if count > wanted + spare:
                count, last_key = _keep_smallest(keys, count, wanted, spare)
                limit = _distance_of(last_key)

    _write_sorted(keys, count, wanted, neighbors)


@_jit()
def _write_sorted(keys, count, wanted, neighbors):
    """The indices of the smallest keys in their order: the place of a key is the number of smaller ones."""
    view = _padded(keys, count)
    _fill(neighbors, keys[0] & 0xFFFFFFFF)
    for i in range(count):
        key = keys[i]
        place = 0
        for j in range(view.shape[0]):
            place += np.int64(view[j] < key)
        if place < wanted:
            neighbors[place] = key & 0xFFFFFFFF
    _fill(neighbors[wanted:], neighbors[0])


@_jit()
def _write_offsets(points, x, y, z, neighbors, offsets):
    for j in range(neighbors.shape[0]):
        offsets[j, 0] = points[neighbors[j], 0] - x
        offsets[j, 1] = points[neighbors[j], 1] - y
        offsets[j, 2] = points[neighbors[j], 2] - z


@_jit(entry=True)
def _query_rows(queries, points, mask, neighbors, offsets, begin, end):
    """Neighbours, and offsets if there is room for them, of a range of all queries."""
    num_queries, k = neighbors.shape[1:]
    keys = _scratch(k)
    for cloud in range(begin // num_queries, (end - 1) // num_queries + 1):
        tree = _tree_of(points, mask, cloud)
        start = cloud * num_queries
        for q in range(max(begin - start, 0), min(end - start, num_queries)):
            x, y, z = queries[cloud, q, 0], queries[cloud, q, 1], queries[cloud, q, 2]
            _query(tree, x, y, z, k, keys, neighbors[cloud, q])
            if offsets.shape[0] > 0:
                _write_offsets(points[cloud], x, y, z, neighbors[cloud, q], offsets[cloud, q])


# ---- Multi-scale grouping


@_jit(entry=True)
def _group_rows(points, mask, visible, scales, sampled, indices, offsets, begin, end):
    """
    All scales of the clouds in a range of all finest groups.

    Threads that share a cloud all sample it and group its coarse scales, alike, and share its finest groups. Rows of
    `scales` are: centres, neighbours, groups, whether these are the children of the groups above, and where the
    results of this scale begin in `indices` and `offsets`.
    """
    num_scales, num_groups, most = scales.shape[0], scales[0, 2], 0
    for scale in range(num_scales):
        most = max(most, scales[scale, 1])
    keys = _scratch(most)
    centers = np.empty((sampled.shape[1], 3), dtype=np.float32)
    picked = np.empty(sampled.shape[1], dtype=np.int64)
    for cloud in range(begin // num_groups, (end - 1) // num_groups + 1):
        tree = _tree_of(points, mask, cloud)
        _sample(points[cloud], tree, picked)
        for i in range(picked.shape[0]):
            sampled[cloud, i] = picked[i]
            for axis in range(3):
                centers[i, axis] = points[cloud, picked[i], axis]
        groups = visible[cloud] if visible.shape[0] > 0 else np.arange(scales[-1, 0])
        for scale in range(num_scales - 1, 0, -1):
            k, count, chosen = scales[scale, 1], scales[scale, 2], scales[scale - 1, 3]
            finer = centers[: scales[scale - 1, 0]]
            members = _build(finer, np.empty(0, dtype=np.bool_))
            children = np.empty(count * k, dtype=np.int64)
            start = scales[scale, 4] + cloud * count * k
            for g in range(count):
                x, y, z = centers[groups[g], 0], centers[groups[g], 1], centers[groups[g], 2]
                row = children[g * k : (g + 1) * k]
                _query(members, x, y, z, k, keys, row)
                _write_offsets(finer, x, y, z, row, offsets[start + g * k : start + (g + 1) * k])
            for i in range(count * k):
                indices[start + i] = i if chosen else children[i]
            groups = children if chosen else np.arange(scales[scale - 1, 0])
        k, start = scales[0, 1], cloud * num_groups
        for g in range(max(begin - start, 0), min(end - start, num_groups)):
            x, y, z = centers[groups[g], 0], centers[groups[g], 1], centers[groups[g], 2]
            row = indices[(start + g) * k : (start + g + 1) * k]
            _query(tree, x, y, z, k, keys, row)
            _write_offsets(points[cloud], x, y, z, row, offsets[(start + g) * k : (start + g + 1) * k])


# ---- Chamfer distance


@_jit(_simd)
def _nearest_in(leaf, order, x, y, z):
    """Key of the nearest point of a leaf."""
    bits = _INF_BITS
    for i in range(WIDTH):
        dx = x - leaf[i]
        dy = y - leaf[WIDTH + i]
        dz = z - leaf[2 * WIDTH + i]
        bits = min(bits, _bits_of(dx * dx + dy * dy + dz * dz))
    nearest, first = _float_of(bits), _NOBODY
    for i in range(WIDTH):
        dx = x - leaf[i]
        dy = y - leaf[WIDTH + i]
        dz = z - leaf[2 * WIDTH + i]
        index = order[i]
        first = min(first, index if dx * dx + dy * dy + dz * dz == nearest else _NOBODY)
    return _key(nearest, first)


@_jit(entry=True)
def _nearest_rows(queries, points, distances, indices, begin, end):
    """The nearest point of the other set, for a range of all queries."""
    num_queries = queries.shape[1]
    for pair in range(begin // num_queries, (end - 1) // num_queries + 1):
        tree = _build(points[pair], np.empty(0, dtype=np.bool_))
        num_leaves = tree.order.shape[0] // WIDTH
        start = pair * num_queries
        for q in range(max(begin - start, 0), min(end - start, num_queries)):
            x, y, z = queries[pair, q, 0], queries[pair, q, 1], queries[pair, q, 2]
            first = _nearest_leaf(tree, x, y, z)
            best = _nearest_in(_leaf(tree, first), tree.order[first * WIDTH : (first + 1) * WIDTH], x, y, z)
            for block in range(tree.top.shape[0] // _NODE):
                nodes = _boxes_within(_node(tree.top, block), x, y, z, _distance_of(best))
                while nodes:
                    index = block * WIDTH + _lowest_bit(nodes)
                    nodes &= nodes - _BIT
                    if index * WIDTH >= num_leaves:
                        break
                    node = _node(tree.nodes, index)
                    leaves = _boxes_within(node, x, y, z, _distance_of(best))
                    while leaves:
                        child = _lowest_bit(leaves)
                        leaves &= leaves - _BIT
                        leaf = index * WIDTH + child
                        if leaf >= num_leaves:
                            break
                        if leaf != first and _box_distance(node, child, x, y, z) <= _distance_of(best):
                            order = tree.order[leaf * WIDTH : (leaf + 1) * WIDTH]
                            best = min(best, _nearest_in(_leaf(tree, leaf), order, x, y, z))
            distances[pair, q] = _distance_of(best)
            indices[pair, q] = min(best & 0xFFFFFFFF, points.shape[1] - 1)


@_jit(_simd)
def _nearest_both_ways(block, x, y, z, row):
    """
    The place of the nearest of 32 points and its distance; notes the row with those to which it is the nearest so far.

    The block holds x, y, z, the distance of the nearest row, and its number, exact in float32.
    """
    least = _INF_BITS
    for i in range(WIDTH):
        dx = x - block[i]
        dy = y - block[WIDTH + i]
        dz = z - block[2 * WIDTH + i]
        distance = dx * dx + dy * dy + dz * dz
        least = min(least, _bits_of(distance))
        before, row_before = block[3 * WIDTH + i], block[4 * WIDTH + i]
        block[4 * WIDTH + i] = row if distance < before else row_before
        block[3 * WIDTH + i] = min(distance, before)
    nearest, bits = _float_of(least), _NO_BIT
    for i in range(WIDTH):
        dx = x - block[i]
        dy = y - block[WIDTH + i]
        dz = z - block[2 * WIDTH + i]
        bits |= (_BIT << np.uint32(i)) if dx * dx + dy * dy + dz * dz == nearest else _NO_BIT
    return _lowest_bit(np.uint32(bits)), nearest


@_jit(entry=True)
def _nearest_of_pairs(first, second, forward, backward, to_second, to_first, begin, end):
    """Both ways at once, for sets so small that a tree does not pay."""
    size = 5 * WIDTH
    num_second = second.shape[1]
    num_blocks = (num_second + WIDTH - 1) // WIDTH
    blocks = np.empty(num_blocks * size, dtype=np.float32)
    for pair in range(begin, end):
        for i in range(num_blocks * WIDTH):
            block = blocks[i // WIDTH * size : (i // WIDTH + 1) * size]
            for axis in range(3):
                block[axis * WIDTH + i % WIDTH] = second[pair, i, axis] if i < num_second else _INF
            block[3 * WIDTH + i % WIDTH] = _INF
            block[4 * WIDTH + i % WIDTH] = np.float32(0.0)
        for row in range(first.shape[1]):
            x, y, z = first[pair, row, 0], first[pair, row, 1], first[pair, row, 2]
            best, place = _INF, 0
            for b in range(num_blocks):
                i, nearest = _nearest_both_ways(blocks[b * size : (b + 1) * size], x, y, z, np.float32(row))
                if nearest < best:
                    best, place = nearest, b * WIDTH + i
            forward[pair, row] = best
            to_second[pair, row] = min(place, num_second - 1)
        for i in range(num_second):
            block = blocks[i // WIDTH * size : (i // WIDTH + 1) * size]
            backward[pair, i] = block[3 * WIDTH + i % WIDTH]
            to_first[pair, i] = np.int64(block[4 * WIDTH + i % WIDTH])


@_jit()
def _add_gradient(points, others, nearest, weights, gradient, other_gradient):
    """Of squared distances to the nearest point, on both its ends."""
    for i in range(points.shape[0]):
        scale = np.float32(2.0) * weights[i]
        for axis in range(3):
            slope = scale * (points[i, axis] - others[nearest[i], axis])
            gradient[i, axis] += slope
            other_gradient[nearest[i], axis] -= slope


@_jit(entry=True)
def _gradient_of_pairs(
    first, second, to_second, to_first, weights, other_weights, gradient, other_gradient, begin, end
):
    for n in range(begin, end):
        _add_gradient(first[n], second[n], to_second[n], weights[n], gradient[n], other_gradient[n])
        _add_gradient(second[n], first[n], to_first[n], other_weights[n], other_gradient[n], gradient[n])


# ---- Threads and tensors


class _Pool:
    """Threads of this process; made when first used, and again in a forked child, which inherits none."""

    def __init__(self):
        self.threads: tuple[int, int, ThreadPoolExecutor | None] = (0, 0, None)  # process, number, executor

    def run(self, function: Callable[[int, int], None], count: int, grain: int = 1):
        """Calls `function(begin, end)` for parts of `range(count)` of at least `grain`, one for each torch thread."""
        workers = min(torch.get_num_threads(), count // max(grain, 1))
        if workers <= 1:
            return function(0, count) if count > 0 else None
        process, size, executor = self.threads
        if process != os.getpid() or size < workers - 1:
            executor = ThreadPoolExecutor(workers - 1, thread_name_prefix="jointmae_hf")
            self.threads = os.getpid(), workers - 1, executor
        bounds = [count * i // workers for i in range(workers + 1)]
        parts = [executor.submit(function, a, b) for a, b in zip(bounds[1:], bounds[2:], strict=False)]
        function(0, bounds[1])
        for part in parts:
            part.result()


_pool = _Pool()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _mask_array(point_mask: torch.Tensor | None, points: np.ndarray) -> np.ndarray:
    """The mask, checked: compiled code does not look where an array ends."""
    if point_mask is None:
        return _NO_MASK
    if point_mask.dtype != torch.bool or point_mask.shape != points.shape[:2]:
        raise ValueError(
            f"`point_mask` is of {point_mask.dtype} and shape {tuple(point_mask.shape)}, expected torch.bool and "
            f"{points.shape[:2]}."
        )
    return _array(point_mask)


def _check_batch(first: np.ndarray, second: np.ndarray):
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"clouds have shapes {first.shape} and {second.shape}, expected the same number of them.")


def farthest_point_sample(points: torch.Tensor, num_samples: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    points = _array(points)
    mask = _mask_array(point_mask, points)
    sampled = np.empty((points.shape[0], num_samples), dtype=np.int64)
    _pool.run(lambda begin, end: _sample_clouds(points, mask, sampled, begin, end), points.shape[0])
    return torch.from_numpy(sampled)


def _neighbors(
    queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None, offsets: np.ndarray
) -> torch.Tensor:
    queries, points = _array(queries), _array(points)
    mask = _mask_array(point_mask, points)
    _check_batch(queries, points)
    neighbors = np.empty((*queries.shape[:2], k), dtype=np.int64)
    count = queries.shape[0] * queries.shape[1]
    _pool.run(
        lambda begin, end: _query_rows(queries, points, mask, neighbors, offsets, begin, end),
        count if k > 0 else 0,
        min(_QUERIES_OF_THREAD, queries.shape[1]),
    )
    return torch.from_numpy(neighbors)


def knn(queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    return _neighbors(queries, points, k, point_mask, _NO_OFFSETS)


def group_nearest(
    points: torch.Tensor, centers: torch.Tensor, k: int, point_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = np.empty((*centers.shape[:2], k, 3), dtype=np.float32)
    return _neighbors(centers, points, k, point_mask, offsets), torch.from_numpy(offsets)


def multiscale_groups(
    points: torch.Tensor,
    num_centers: list[int],
    num_neighbors: list[int],
    num_groups: list[int],
    point_mask: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    points = _array(points)
    mask = _mask_array(point_mask, points)
    visible = _NO_INDICES if visible is None else _array(visible)
    if visible.size > 0 and visible.shape != (points.shape[0], num_groups[-1]):
        raise ValueError(f"`visible` has shape {visible.shape}, expected {(points.shape[0], num_groups[-1])}.")
    if visible.size > 0 and not 0 <= visible.min() <= visible.max() < num_centers[-1]:
        raise IndexError(f"`visible` holds indices outside of the {num_centers[-1]} coarsest centres.")
    batch_size = points.shape[0]
    sizes = [batch_size * groups * k for groups, k in zip(num_groups, num_neighbors, strict=True)]
    chosen = [groups != centers for groups, centers in zip(num_groups, num_centers, strict=True)]
    starts = [sum(sizes[:scale]) for scale in range(len(sizes))]
    scales = np.array([num_centers, num_neighbors, num_groups, chosen, starts], dtype=np.int64).T.copy()
    sampled = np.empty((batch_size, num_centers[0]), dtype=np.int64)
    indices = np.empty(sum(sizes), dtype=np.int64)
    offsets = np.empty((sum(sizes), 3), dtype=np.float32)
    if num_groups[0] == 0:  # nothing to group, but the centres are wanted
        return farthest_point_sample(torch.from_numpy(points), num_centers[0], point_mask), *map(
            torch.from_numpy, (indices, offsets)
        )
    _pool.run(
        lambda begin, end: _group_rows(points, mask, visible, scales, sampled, indices, offsets, begin, end),
        batch_size * num_groups[0],
        min(2 * _QUERIES_OF_THREAD, num_groups[0]),
    )
    return torch.from_numpy(sampled), torch.from_numpy(indices), torch.from_numpy(offsets)


def nearest_distances(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = _array(first), _array(second)
    _check_batch(first, second)
    forward, backward = np.empty(first.shape[:2], dtype=np.float32), np.empty(second.shape[:2], dtype=np.float32)
    to_second, to_first = np.empty(first.shape[:2], dtype=np.int64), np.empty(second.shape[:2], dtype=np.int64)
    if first.shape[1] * second.shape[1] <= _PAIRS_BY_FORCE:
        outputs = forward, backward, to_second, to_first
        _pool.run(lambda begin, end: _nearest_of_pairs(first, second, *outputs, begin, end), first.shape[0])
    else:
        for queries, points, distances, indices in (
            (first, second, forward, to_second),
            (second, first, backward, to_first),
        ):
            _pool.run(
                lambda begin, end, sets=(queries, points, distances, indices): _nearest_rows(*sets, begin, end),
                queries.shape[0] * queries.shape[1],
                min(_QUERIES_OF_THREAD, queries.shape[1]),
            )
    return tuple(torch.from_numpy(output) for output in (forward, backward, to_second, to_first))


def nearest_distances_backward(
    first: torch.Tensor,
    second: torch.Tensor,
    to_second: torch.Tensor,
    to_first: torch.Tensor,
    first_grad: torch.Tensor,
    second_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = [_array(tensor) for tensor in (first, second, to_second, to_first, first_grad, second_grad)]
    gradients = np.zeros(first.shape, dtype=np.float32), np.zeros(second.shape, dtype=np.float32)
    _pool.run(lambda begin, end: _gradient_of_pairs(*inputs, *gradients, begin, end), first.shape[0])
    return torch.from_numpy(gradients[0]), torch.from_numpy(gradients[1])
