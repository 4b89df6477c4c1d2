"""CPU kernels in numba: one pass over contiguous coordinates, parallel over clouds, no Python loop over samples.

Arithmetic is in the order of the reference and without contraction, so that indices are the same. Threads come from a
pool of our own and not from numba's, which may not be entered from two Python threads at once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numba import njit


_NO_MASK = np.zeros((0, 0), dtype=np.bool_)
_jit = partial(njit, nogil=True, cache=True, error_model="numpy", boundscheck=False)
# No NaN reaches the kernels, and the sign of a zero distance does not matter: all that is needed to use SIMD minima.
_simd = {"nnan", "nsz"}


@_jit()
def _columns(points):
    x = np.ascontiguousarray(points[:, 0])
    y = np.ascontiguousarray(points[:, 1])
    z = np.ascontiguousarray(points[:, 2])
    return x, y, z


@_jit(fastmath=_simd)
def _closer(x, y, z, cx, cy, cz, distance):
    """Lowers each distance to that of a new centre; returns the largest that is left."""
    largest = np.float32(-2.0)
    for i in range(x.shape[0]):
        dx = x[i] - cx
        dy = y[i] - cy
        dz = z[i] - cz
        d = min(distance[i], dx * dx + dy * dy + dz * dz)
        distance[i] = d
        largest = max(largest, d)
    return largest


@_jit()
def _first_index(values, value):
    for i in range(values.shape[0]):
        if values[i] == value:
            return i
    return 0


@_jit()
def _sample_clouds(points, mask, num_samples, out, begin, end):
    half = np.float32(0.5)
    for b in range(begin, end):
        x, y, z = _columns(points[b])
        num_points = x.shape[0]
        distance = np.full(num_points, np.float32(np.inf))
        available = num_points
        low = np.full(3, np.float32(np.inf))
        high = np.full(3, np.float32(-np.inf))
        for i in range(num_points):
            if mask.shape[0] > 0 and not mask[b, i]:
                distance[i] = np.float32(-1.0)
                available -= 1
            else:
                low[0], high[0] = min(low[0], x[i]), max(high[0], x[i])
                low[1], high[1] = min(low[1], y[i]), max(high[1], y[i])
                low[2], high[2] = min(low[2], z[i]), max(high[2], z[i])
        start = distance.copy()
        middle = (low + high) * half
        farthest = _closer(x, y, z, middle[0], middle[1], middle[2], start)
        pick = _first_index(start, farthest)
        distinct = max(1, min(num_samples, available))
        out[b, 0] = pick
        for s in range(1, distinct):
            farthest = _closer(x, y, z, x[pick], y[pick], z[pick], distance)
            pick = _first_index(distance, farthest)
            out[b, s] = pick
        for s in range(distinct, num_samples):
            out[b, s] = out[b, s - distinct]


@_jit()
def _distances(x, y, z, qx, qy, qz, distance):
    for i in range(x.shape[0]):
        dx = qx - x[i]
        dy = qy - y[i]
        dz = qz - z[i]
        distance[i] = dx * dx + dy * dy + dz * dz


@_jit()
def _neighbors_of_clouds(queries, points, mask, k, out, begin, end):
    best = np.empty(k, dtype=np.float32)
    index = np.empty(k, dtype=np.int64)
    for b in range(begin, end):
        x, y, z = _columns(points[b])
        num_points = x.shape[0]
        distance = np.empty(num_points, dtype=np.float32)
        for q in range(queries.shape[1]):
            _distances(x, y, z, queries[b, q, 0], queries[b, q, 1], queries[b, q, 2], distance)
            found = 0
            worst = np.float32(np.inf)
            for i in range(num_points):
                d = distance[i]
                # Strictly closer than the last of a full list: an equal one with a higher index does not get in.
                if d < worst or found < k:
                    if mask.shape[0] > 0 and not mask[b, i]:
                        continue
                    j = found if found < k else k - 1
                    while j > 0 and d < best[j - 1]:
                        best[j] = best[j - 1]
                        index[j] = index[j - 1]
                        j -= 1
                    best[j] = d
                    index[j] = i
                    if found < k:
                        found += 1
                    if found == k:
                        worst = best[k - 1]
            for j in range(k):
                out[b, q, j] = index[j] if j < found else (index[0] if found > 0 else 0)


@_jit()
def _nearest_of_pairs(first, second, to_second, to_first, begin, end):
    column = np.empty(second.shape[1], dtype=np.float32)
    for n in range(begin, end):
        x, y, z = _columns(second[n])
        distance = np.empty(x.shape[0], dtype=np.float32)
        column[:] = np.float32(np.inf)
        for i in range(first.shape[1]):
            _distances(x, y, z, first[n, i, 0], first[n, i, 1], first[n, i, 2], distance)
            nearest = 0
            for j in range(x.shape[0]):
                if distance[j] < distance[nearest]:
                    nearest = j
                if distance[j] < column[j]:
                    column[j] = distance[j]
                    to_first[n, j] = i
            to_second[n, i] = nearest


class _Pool:
    """Threads of this process; made when first used, and again in a forked child, which inherits none."""

    def __init__(self):
        self.owner, self.size, self.executor = None, 0, None

    def run(self, function: Callable[[int, int], None], count: int):
        """Calls `function(begin, end)` for parts of `range(count)`, as many parts as torch has threads."""
        workers = min(torch.get_num_threads(), count)
        if workers <= 1:
            return function(0, count)
        if self.owner != os.getpid() or self.size < workers:
            self.owner, self.size = os.getpid(), workers
            self.executor = ThreadPoolExecutor(workers, thread_name_prefix="jointmae_hf")
        bounds = [count * i // workers for i in range(workers + 1)]
        for done in [self.executor.submit(function, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]:
            done.result()


_pool = _Pool()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _mask_array(point_mask: torch.Tensor | None) -> np.ndarray:
    return _NO_MASK if point_mask is None else _array(point_mask)


def farthest_point_sample(points: torch.Tensor, num_samples: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    points, mask = _array(points), _mask_array(point_mask)
    out = np.empty((points.shape[0], num_samples), dtype=np.int64)
    _pool.run(lambda begin, end: _sample_clouds(points, mask, num_samples, out, begin, end), points.shape[0])
    return torch.from_numpy(out)


def knn(queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    queries, points, mask = _array(queries), _array(points), _mask_array(point_mask)
    out = np.empty((queries.shape[0], queries.shape[1], k), dtype=np.int64)
    _pool.run(lambda begin, end: _neighbors_of_clouds(queries, points, mask, k, out, begin, end), points.shape[0])
    return torch.from_numpy(out)


def nearest_both_ways(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = _array(first), _array(second)
    to_second = np.zeros(first.shape[:2], dtype=np.int64)
    to_first = np.zeros(second.shape[:2], dtype=np.int64)
    _pool.run(lambda begin, end: _nearest_of_pairs(first, second, to_second, to_first, begin, end), first.shape[0])
    return torch.from_numpy(to_second), torch.from_numpy(to_first)
