"""GPU kernels in Triton: sampling, neighbours, Chamfer with its gradient, depth splatting.

Notable choices:

- Nothing is contracted: by default `dx * dx + dy * dy` becomes a fused multiply-add, whose sums differ in the last bit
  from those of the reference, and the last bit decides between close neighbours.
- A distance and an index make one int64 key: one minimum finds the nearest point and, among equals, the lowest index.
- A launch depends on shapes only and nothing is read back: all of this can be captured in a CUDA graph.
- No float is added atomically: every run gives the same bits.
"""

import torch
import triton
import triton.language as tl


ON_CHIP_POINTS = 16384  # times x, y, z and distance: all the registers of one multiprocessor
POINTS_OF_WARP = 256  # of such a cloud, in at most 16 warps
# Of larger clouds: as many buckets as this, of so many points at least and at most, and the warps that share a cloud.
NUM_BUCKETS, BUCKET_SIZES, BUCKET_WARPS = 256, (128, 4096), 8
# Rows and columns of a tile of distances, and its warps. Triton spreads a row over all of them, and several would wait
# for each other at every neighbour that enters a list.
NEIGHBOR_TILE, NEAREST_TILE, TILE_WARPS = (4, 256), (16, 32), 1

_LOW_BITS = tl.constexpr(0xFFFFFFFF)
_LARGEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


def _launch(kernel: triton.JITFunction, programs: int, *arguments, num_warps: int, **sizes: int):
    """
    Starts a kernel on the device of its first argument, without contraction.

    `enable_fp_fusion=False` forbids it to the code generator and, as `--fmad=false`, to ptxas. torch.compile drops
    this option from kernels that it can see, so they are called from opaque operators only.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=1, enable_fp_fusion=False, **sizes)


@triton.jit
def _load_points(points, index, inside):
    """x, y and z of rows of a cloud `(n, 3)`."""
    x = tl.load(points + 3 * index, mask=inside, other=0.0)
    y = tl.load(points + 3 * index + 1, mask=inside, other=0.0)
    z = tl.load(points + 3 * index + 2, mask=inside, other=0.0)
    return x, y, z


@triton.jit
def _squared_norm(dx, dy, dz):
    return dx * dx + dy * dy + dz * dz


@triton.jit
def _key(distance, index):
    """Sorts by distance, then by index: the bits of a non-negative float sort as its value does."""
    return (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index


# ---- Farthest point sampling


@triton.jit
def _middle(values, real):
    return (tl.min(tl.where(real, values, float("inf"))) + tl.max(tl.where(real, values, float("-inf")))) * 0.5


@triton.jit
def _repeat_from_start(sampled, num_distinct, num_samples, SAMPLES: tl.constexpr):
    """Fills the places that are left where there are more samples than points."""
    tl.debug_barrier()  # what is read here was written by another thread
    place = tl.arange(0, SAMPLES)
    left = (place >= num_distinct) & (place < num_samples)
    tl.store(sampled + place, tl.load(sampled + place % num_distinct, mask=left), mask=left)


@triton.jit
def _sample_on_chip(points, point_mask, sampled, num_points, num_samples, POINTS: tl.constexpr, SAMPLES: tl.constexpr):
    """One cloud; coordinates and distances stay in registers from the first sample to the last."""
    cloud = tl.program_id(0).to(tl.int64)
    points += 3 * cloud * num_points
    sampled += cloud * num_samples
    index = tl.arange(0, POINTS)
    real = index < num_points
    if point_mask is not None:
        real = real & (tl.load(point_mask + cloud * num_points + index, mask=real, other=0) != 0)
    x, y, z = _load_points(points, index, real)
    from_middle = _squared_norm(x - _middle(x, real), y - _middle(y, real), z - _middle(z, real))
    pick = tl.argmax(tl.where(real, from_middle, -1.0), 0, tie_break_left=True)
    tl.store(sampled, pick)
    distance = tl.where(real, float("inf"), -1.0)
    num_distinct = tl.minimum(num_samples, tl.maximum(tl.sum(real.to(tl.int32)), 1))
    for sample in range(1, num_distinct):
        last_x, last_y, last_z = _load_points(points, pick, True)
        distance = tl.minimum(distance, _squared_norm(x - last_x, y - last_y, z - last_z))
        pick = tl.argmax(distance, 0, tie_break_left=True)
        tl.store(sampled + sample, pick)
    _repeat_from_start(sampled, num_distinct, num_samples, SAMPLES)


@triton.jit
def _gap(low, high, value):
    """How far a coordinate lies outside of an interval."""
    return tl.maximum(tl.maximum(low - value, value - high), 0.0)


@triton.jit
def _sample_in_buckets(
    points,
    order,
    coordinates,
    boxes,
    distances,
    num_real,
    sampled,
    num_points,
    num_samples,
    num_buckets,
    BUCKET: tl.constexpr,
    BUCKETS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """
    One cloud in buckets of neighbouring points; distances are in memory, the farthest point of each bucket on chip.

    A bucket is left alone when its box is farther from the new sample than its farthest point is from the samples
    before. The distance to a box is rounded just as those to the points in it, so it exceeds none of them.
    """
    cloud = tl.program_id(0).to(tl.int64)
    stored = num_buckets * BUCKET
    points += 3 * cloud * num_points
    order += cloud * stored
    coordinates += 3 * cloud * stored
    boxes += 6 * cloud * num_buckets
    distances += cloud * stored
    sampled += cloud * num_samples
    num_real = tl.load(num_real + cloud)

    bucket = tl.arange(0, BUCKETS)
    used = bucket * BUCKET < num_real
    low_x, low_y, low_z = _load_points(boxes, 2 * bucket, used)
    high_x, high_y, high_z = _load_points(boxes, 2 * bucket + 1, used)
    farthest = _key(tl.where(used, float("inf"), -1.0), bucket)
    slot = tl.arange(0, BUCKET)
    pick = tl.load(sampled)
    num_distinct = tl.minimum(num_samples, tl.maximum(num_real, 1))
    for sample in range(1, num_distinct):
        last_x, last_y, last_z = _load_points(points, pick, True)
        bound = _squared_norm(_gap(low_x, high_x, last_x), _gap(low_y, high_y, last_y), _gap(low_z, high_z, last_z))
        reached = used & (bound <= (farthest >> 32).to(tl.int32).to(tl.float32, bitcast=True))
        current = tl.min(tl.where(reached, bucket, BUCKETS))
        while current < BUCKETS:
            at = current * BUCKET + slot
            x = tl.load(coordinates + at)
            y = tl.load(coordinates + stored + at)
            z = tl.load(coordinates + 2 * stored + at)
            distance = tl.minimum(tl.load(distances + at), _squared_norm(x - last_x, y - last_y, z - last_z))
            tl.store(distances + at, distance)
            # The complement of the index makes the lowest one the largest key.
            key = _key(distance, _LOW_BITS - tl.load(order + at))
            farthest = tl.where(bucket == current, tl.max(key), farthest)
            reached = reached & (bucket > current)
            current = tl.min(tl.where(reached, bucket, BUCKETS))
            tl.debug_barrier()  # a later sample reads these distances again
        pick = _LOW_BITS - (tl.max(farthest) & _LOW_BITS)
        tl.store(sampled + sample, pick)
    _repeat_from_start(sampled, num_distinct, num_samples, SAMPLES)


def _curve_order(points: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Indices `(batch, num_points)` along a Morton curve of 1024 cells a side, padding last."""
    outside = ~real.unsqueeze(-1)
    low = points.masked_fill(outside, torch.inf).amin(1, keepdim=True)
    extent = (points.masked_fill(outside, -torch.inf).amax(1, keepdim=True) - low).amax(-1, keepdim=True)
    cell = ((points - low) * (1023 / extent.clamp_min(1e-30))).clamp(0, 1023).long()
    for shift, bits in ((16, 0x30000FF), (8, 0x300F00F), (4, 0x30C30C3), (2, 0x9249249)):
        cell = (cell | cell << shift) & bits  # spreads ten bits to every third place
    code = cell[..., 0] | cell[..., 1] << 1 | cell[..., 2] << 2
    return code.masked_fill(~real, torch.iinfo(torch.int64).max).argsort(1)


def _farthest_from_middle(points: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Index `(batch,)` of the point farthest from the middle of the bounding box."""
    outside = ~real.unsqueeze(-1)
    middle = (points.masked_fill(outside, torch.inf).amin(1) + points.masked_fill(outside, -torch.inf).amax(1)) / 2
    dx, dy, dz = (points - middle.unsqueeze(1)).unbind(-1)
    return (dx * dx + dy * dy + dz * dz).masked_fill(~real, -1.0).argmax(1)


def _sample_large(points: torch.Tensor, sampled: torch.Tensor, point_mask: torch.Tensor | None):
    """
    Sampling of clouds that do not fit on chip, exact, with memory linear in the number of points.

    A sample costs a look at all boxes and a visit to the buckets that the ball around it, up to the nearest sample
    before, touches: on a surface in `b` buckets about `pi * b / s` of them at sample `s`, and later the few about it.
    Counted for 2,048 of 1,000,000 points on a sphere: 17,000 visits of 4,096 points, 3.5 % of 2,048 passes over all.
    """
    batch_size, num_points, _ = points.shape
    bucket = min(max(triton.next_power_of_2(num_points // NUM_BUCKETS), BUCKET_SIZES[0]), BUCKET_SIZES[1])
    num_buckets = triton.cdiv(num_points, bucket)
    real = torch.ones_like(points[..., 0], dtype=torch.bool) if point_mask is None else point_mask
    sampled[:, 0] = _farthest_from_middle(points, real)
    num_real = real.sum(1, dtype=torch.int32)
    order = torch.nn.functional.pad(_curve_order(points, real), (0, num_buckets * bucket - num_points))
    coordinates = points.gather(1, order.unsqueeze(-1).expand(-1, -1, 3)).transpose(1, 2).contiguous()
    padding = torch.arange(order.shape[1], device=points.device) >= num_real.unsqueeze(1)  # (batch, stored)
    distances = points.new_full(padding.shape, torch.inf).masked_fill(padding, -1.0)
    low = coordinates.masked_fill(padding.unsqueeze(1), torch.inf).unflatten(2, (num_buckets, bucket)).amin(3)
    high = coordinates.masked_fill(padding.unsqueeze(1), -torch.inf).unflatten(2, (num_buckets, bucket)).amax(3)
    boxes = torch.stack([low, high], dim=1).permute(0, 3, 1, 2).contiguous()  # (batch, buckets, 2, 3)
    _launch(
        _sample_in_buckets,
        batch_size,
        points,
        order,
        coordinates,
        boxes,
        distances,
        num_real,
        sampled,
        num_points,
        sampled.shape[1],
        num_buckets,
        BUCKET=bucket,
        BUCKETS=triton.next_power_of_2(num_buckets),
        SAMPLES=triton.next_power_of_2(sampled.shape[1]),
        num_warps=BUCKET_WARPS,
    )


def farthest_point_sample(points: torch.Tensor, num_samples: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    points, point_mask = points.contiguous(), None if point_mask is None else point_mask.contiguous()
    batch_size, num_points, _ = points.shape
    sampled = points.new_empty(batch_size, num_samples, dtype=torch.int64)
    if num_points > ON_CHIP_POINTS:
        _sample_large(points, sampled, point_mask)
        return sampled
    size = triton.next_power_of_2(num_points)
    _launch(
        _sample_on_chip,
        batch_size,
        points,
        point_mask,
        sampled,
        num_points,
        num_samples,
        POINTS=size,
        SAMPLES=triton.next_power_of_2(num_samples),
        num_warps=min(max(size // POINTS_OF_WARP, 1), 16),
    )
    return sampled


# ---- Neighbours


@triton.jit
def _nearest_k(
    queries,
    points,
    point_mask,
    neighbors,
    offsets,
    num_queries,
    num_points,
    k,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    The nearest points of a block of queries: a running list of the best, from which nearer points displace the worst.

    Tile after tile of points, the nearest left of each tile enters its query's list until none is nearer than the
    worst there. The longer the list has been running, the fewer enter.
    """
    blocks = tl.cdiv(num_queries, ROWS)
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < num_queries
    points += 3 * cloud * num_points
    query_x, query_y, query_z = _load_points(queries + 3 * cloud * num_queries, row, inside)
    slot = tl.arange(0, SLOTS)
    # Empty slots hold different keys, so that one of them at a time is displaced. Rows outside take in nothing.
    best = tl.where(inside[:, None], _LARGEST - 1 - slot.to(tl.int64)[None, :], -1)
    worst = tl.max(best, 1)
    for begin in range(0, num_points, COLUMNS):
        index = begin + tl.arange(0, COLUMNS)
        stored = index < num_points
        x, y, z = _load_points(points, index, stored)
        distance = _squared_norm(
            query_x[:, None] - x[None, :], query_y[:, None] - y[None, :], query_z[:, None] - z[None, :]
        )
        if point_mask is not None:
            real = tl.load(point_mask + cloud * num_points + index, mask=stored, other=0) != 0
            distance = tl.where(real[None, :], distance, float("inf"))
        key = tl.where(stored[None, :], _key(distance, index[None, :]), _LARGEST)
        nearest = tl.min(key, 1)
        while tl.max((nearest < worst).to(tl.int32), 0) > 0:
            best = tl.where(best == worst[:, None], tl.minimum(nearest, worst)[:, None], best)
            worst = tl.max(best, 1)
            key = tl.where(key == nearest[:, None], _LARGEST, key)
            nearest = tl.min(key, 1)
    best = tl.sort(best)
    index = best & _LOW_BITS
    wanted = inside[:, None] & (slot < k)[None, :]
    if point_mask is not None:
        real = tl.load(point_mask + cloud * num_points + index, mask=wanted, other=0) != 0
        index = tl.where(real, index, (tl.min(best, 1) & _LOW_BITS)[:, None])
    at = (cloud * num_queries + row)[:, None] * k + slot[None, :]
    tl.store(neighbors + at, index, mask=wanted)
    if offsets is not None:
        x, y, z = _load_points(points, index, wanted)
        tl.store(offsets + 3 * at, x - query_x[:, None], mask=wanted)
        tl.store(offsets + 3 * at + 1, y - query_y[:, None], mask=wanted)
        tl.store(offsets + 3 * at + 2, z - query_z[:, None], mask=wanted)


def _neighbors(
    queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None, offsets: torch.Tensor | None
) -> torch.Tensor:
    """Indices `(batch, num_queries, k)`; fills `offsets`, where given, with the neighbours relative to their query."""
    batch_size, num_queries, _ = queries.shape
    neighbors = points.new_empty(batch_size, num_queries, k, dtype=torch.int64)
    rows, columns = NEIGHBOR_TILE
    slots = triton.next_power_of_2(k)
    rows = max(1, min(rows, 1024 // slots))
    _launch(
        _nearest_k,
        batch_size * triton.cdiv(num_queries, rows),
        queries.contiguous(),
        points.contiguous(),
        None if point_mask is None else point_mask.contiguous(),
        neighbors,
        offsets,
        num_queries,
        points.shape[1],
        k,
        SLOTS=slots,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=TILE_WARPS,
    )
    return neighbors


def knn(queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    return _neighbors(queries, points, k, point_mask, None)


def group_nearest(
    points: torch.Tensor, centers: torch.Tensor, k: int, point_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = centers.new_empty(*centers.shape[:2], k, 3)
    return _neighbors(centers, points, k, point_mask, groups), groups


# ---- Chamfer distance


@triton.jit
def _nearest(first, second, distances, indices, num_first, num_second, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each point of the first set of a pair, the nearest of the second."""
    blocks = tl.cdiv(num_first, ROWS)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < num_first
    first_x, first_y, first_z = _load_points(first + 3 * pair * num_first, row, inside)
    nearest = tl.full((ROWS, COLUMNS), _LARGEST, tl.int64)
    for begin in range(0, num_second, COLUMNS):
        index = begin + tl.arange(0, COLUMNS)
        stored = index < num_second
        x, y, z = _load_points(second + 3 * pair * num_second, index, stored)
        distance = _squared_norm(
            first_x[:, None] - x[None, :], first_y[:, None] - y[None, :], first_z[:, None] - z[None, :]
        )
        nearest = tl.minimum(nearest, tl.where(stored[None, :], _key(distance, index[None, :]), _LARGEST))
    nearest = tl.min(nearest, 1)
    at = pair * num_first + row
    tl.store(distances + at, (nearest >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=inside)
    tl.store(indices + at, nearest & _LOW_BITS, mask=inside)


@triton.jit
def _nearest_gradient(
    first,
    second,
    to_second,
    to_first,
    first_grad,
    second_grad,
    gradient,
    num_first,
    num_second,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    Gradient of a block of the first set: through its own distances, and through those of which it is the nearest.

    The second part is gathered: each point looks for itself among the nearest of the other set.
    """
    blocks = tl.cdiv(num_first, ROWS)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < num_first
    at = pair * num_first + row
    second += 3 * pair * num_second
    first_x, first_y, first_z = _load_points(first + 3 * pair * num_first, row, inside)
    near_x, near_y, near_z = _load_points(second, tl.load(to_second + at, mask=inside, other=0), inside)
    own_scale = 2.0 * tl.load(first_grad + at, mask=inside, other=0.0)
    gradient_x = own_scale * (first_x - near_x)
    gradient_y = own_scale * (first_y - near_y)
    gradient_z = own_scale * (first_z - near_z)
    for begin in range(0, num_second, COLUMNS):
        index = begin + tl.arange(0, COLUMNS)
        stored = index < num_second
        x, y, z = _load_points(second, index, stored)
        nearest = tl.load(to_first + pair * num_second + index, mask=stored, other=-1)
        scale = 2.0 * tl.load(second_grad + pair * num_second + index, mask=stored, other=0.0)
        scale = tl.where(nearest[None, :] == row[:, None], scale[None, :], 0.0)
        gradient_x += tl.sum(scale * (first_x[:, None] - x[None, :]), 1)
        gradient_y += tl.sum(scale * (first_y[:, None] - y[None, :]), 1)
        gradient_z += tl.sum(scale * (first_z[:, None] - z[None, :]), 1)
    tl.store(gradient + 3 * at, gradient_x, mask=inside)
    tl.store(gradient + 3 * at + 1, gradient_y, mask=inside)
    tl.store(gradient + 3 * at + 2, gradient_z, mask=inside)


def _launch_tiles(kernel: triton.JITFunction, first: torch.Tensor, second: torch.Tensor, *others: torch.Tensor):
    """One program for each block of the first sets `(pairs, n, 3)`, tiles no larger than the sets need."""
    rows, columns = NEAREST_TILE
    rows = min(rows, triton.next_power_of_2(first.shape[1]))
    columns = min(columns, triton.next_power_of_2(second.shape[1]))
    _launch(
        kernel,
        first.shape[0] * triton.cdiv(first.shape[1], rows),
        first,
        second,
        *others,
        first.shape[1],
        second.shape[1],
        ROWS=rows,
        COLUMNS=columns,
        num_warps=TILE_WARPS,
    )


def _nearest_one_way(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distances = first.new_empty(first.shape[:2])
    indices = first.new_empty(first.shape[:2], dtype=torch.int64)
    _launch_tiles(_nearest, first, second, distances, indices)
    return distances, indices


def nearest_distances(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = first.contiguous(), second.contiguous()
    first_distances, to_second = _nearest_one_way(first, second)
    second_distances, to_first = _nearest_one_way(second, first)
    return first_distances, second_distances, to_second, to_first


def nearest_distances_backward(
    first: torch.Tensor,
    second: torch.Tensor,
    to_second: torch.Tensor,
    to_first: torch.Tensor,
    first_grad: torch.Tensor,
    second_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = first.contiguous(), second.contiguous()
    first_grad, second_grad = first_grad.contiguous(), second_grad.contiguous()
    of_first, of_second = torch.empty_like(first), torch.empty_like(second)
    _launch_tiles(_nearest_gradient, first, second, to_second, to_first, first_grad, second_grad, of_first)
    _launch_tiles(_nearest_gradient, second, first, to_first, to_second, second_grad, first_grad, of_second)
    return of_first, of_second


# ---- Depth images


@triton.jit
def _round_to_pixel(value, last):
    """Nearest pixel, halves to the even one as torch rounds, clamped to the image."""
    value = tl.minimum(tl.maximum(value, 0.0), last)
    whole = value.to(tl.int32)
    rest = value - whole.to(tl.float32)
    return whole + ((rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))).to(tl.int32)


@triton.jit
def _scatter_depth(projected, point_mask, image, num_points, side, POINTS: tl.constexpr):
    """Raises the pixel under each point to its depth. The bits of non-negative floats compare as integers."""
    blocks = tl.cdiv(num_points, POINTS)
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * POINTS + tl.arange(0, POINTS)
    real = point < num_points
    row, column, depth = _load_points(projected + 3 * cloud * num_points, point, real)
    if point_mask is not None:
        real = real & (tl.load(point_mask + cloud * num_points + point, mask=real, other=0) != 0)
    pixel = _round_to_pixel(row, side - 1.0) * side + _round_to_pixel(column, side - 1.0)
    depth = tl.minimum(tl.maximum(depth, 0.0), 1.0)
    image += cloud * side * side
    tl.atomic_max(image + pixel, depth.to(tl.int32, bitcast=True), mask=real & (depth > 0.0), sem="relaxed")


@triton.jit
def _maximum_of_window(image, splatted, side, SPLAT: tl.constexpr, PIXELS: tl.constexpr):
    """The nearest of the points whose squares cover a pixel."""
    blocks = tl.cdiv(side * side, PIXELS)
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    row, column = pixel // side, pixel % side
    image += cloud * side * side
    depth = tl.zeros((PIXELS,), tl.float32)
    for down in range(-(SPLAT // 2), SPLAT // 2 + 1):
        for right in range(-(SPLAT // 2), SPLAT // 2 + 1):
            near_row, near_column = row + down, column + right
            inside = (near_row >= 0) & (near_row < side) & (near_column >= 0) & (near_column < side)
            depth = tl.maximum(depth, tl.load(image + near_row * side + near_column, mask=inside, other=0.0))
    tl.store(splatted + cloud * side * side + pixel, depth, mask=row < side)


def splat_depth(
    projected: torch.Tensor, image_size: int, splat_size: int, point_mask: torch.Tensor | None
) -> torch.Tensor:
    batch_size, num_points, _ = projected.shape
    image = projected.new_zeros(batch_size, 1, image_size, image_size)
    _launch(
        _scatter_depth,
        batch_size * triton.cdiv(num_points, 256),
        projected.contiguous(),
        None if point_mask is None else point_mask.contiguous(),
        image.view(torch.int32),
        num_points,
        image_size,
        POINTS=256,
        num_warps=4,
    )
    if splat_size == 1:
        return image
    splatted = torch.empty_like(image)
    programs = batch_size * triton.cdiv(image_size * image_size, 512)
    _launch(_maximum_of_window, programs, image, splatted, image_size, SPLAT=splat_size, PIXELS=512, num_warps=4)
    return splatted
