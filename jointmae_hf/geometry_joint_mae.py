# Copyright 2026 The jointmae_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Geometry of Joint-MAE in plain torch: sampling, neighbours, grouping, projection, Chamfer.

Notable choices:

- Everything runs in float32, whatever autocast says, and on any device.
- Squared distances are sums of squared differences, never the expanded `a^2 - 2ab + b^2`, which loses the digits that
  decide between close neighbours.
- Ties go to the lower index, so that a faster kernel can be held to exactly the same indices.
- Sampling starts at the point farthest from the centre of the bounding box: the result does not depend on the order of
  the points (as far as no two points are equally far).
"""

import re
from collections.abc import Sequence

import torch
from torch import nn


try:  # the same results, faster; absent where these files are loaded from the Hub without the package
    from jointmae_hf import kernels
except ImportError:
    kernels = None
if getattr(kernels, "INTERFACE", None) != 3:  # these files may have been saved by another release of the package
    kernels = None


# Third axis of each view is the depth; the three cyclic permutations (x, y, z), (z, x, y), (y, z, x).
VIEW_AXES = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
MIN_DEPTH = 0.2
_EPS = 1e-6
# Of clouds flatter than this along a view, in units of the unit sphere's radius, depth in the image tells nothing.
_FLAT = 0.02
# Before torch 2.13, whatever is compiled counts as being exported (https://github.com/pytorch/pytorch/issues/176347).
_COMPILING_COUNTS_AS_EXPORTING = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 13)
# Features of so few centres are spread by a product with the matrix of all weights, most of them 0: it costs less than
# gathering, whose backward pass adds up row by row.
_FEW_CENTERS = 64


def _is_exporting() -> bool:
    """Whether plain operators are wanted, as an exported graph must consist of them."""
    if _COMPILING_COUNTS_AS_EXPORTING and torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting()


def _has_kernel(operator: str, points: torch.Tensor) -> bool:
    """Whether a kernel can take these float32 points."""
    if kernels is None or points.dtype != torch.float32 or _is_exporting() or torch.jit.is_tracing():
        return False
    if operator in kernels.DEVICES.get(points.device.type, ()):
        return True
    if not torch.compiler.is_compiling():
        kernels.hint(points.device.type, points.shape[:-1].numel())
    return False


def gather_points(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    Gathers rows of each sample.

    Args:
        values: `(batch, num_points, channels)`.
        indices: integer tensor `(batch, ...)` into the points.

    Returns:
        `(batch, ..., channels)`.
    """
    batch_size, num_points, channels = values.shape
    first = torch.arange(batch_size, device=indices.device).unsqueeze(1) * num_points
    # An embedding copies whole rows; `gather` takes number by number, several times as long on a CPU.
    rows = nn.functional.embedding(indices.flatten(1) + first, values.reshape(-1, channels))
    return rows.view(*indices.shape, channels)


def group_points(points: torch.Tensor, centers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    Gathers the neighbourhood of each centre, in coordinates relative to that centre.

    Args:
        points: `(batch, num_points, 3)`.
        centers: `(batch, num_groups, 3)`.
        indices: `(batch, num_groups, k)` into the points, as [`knn`] returns them.

    Returns:
        `(batch, num_groups, k, 3)`.
    """
    return gather_points(points, indices) - centers.unsqueeze(2)


def _squared_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared distance of broadcastable coordinates `(..., d)`, summed in a fixed order."""
    difference = first - second
    total = difference[..., 0] * difference[..., 0]
    for axis in range(1, difference.shape[-1]):
        total = total + difference[..., axis] * difference[..., axis]
    return total


def pairwise_squared_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Squared distances between all pairs, `(..., n, d)` and `(..., m, d)` to `(..., n, m)`, without a cube in memory.
    """
    total = None
    for axis in range(first.shape[-1]):
        difference = first[..., :, None, axis] - second[..., None, :, axis]
        total = difference * difference if total is None else total + difference * difference
    return total


@torch.no_grad()
def farthest_point_sample(
    points: torch.Tensor, num_samples: int, point_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Farthest point sampling, greedy and therefore nested: the first `n` of the result are the result for `n` samples.

    Starts at the point farthest from the centre of the bounding box. When more samples are asked for than there are
    points, the sequence is repeated from its start.

    Args:
        points: `(batch, num_points, 3)`, any unit.
        num_samples: number of points to pick.
        point_mask: optional boolean `(batch, num_points)`, true for real points; padding is never picked.

    Returns:
        int64 indices `(batch, num_samples)`.
    """
    points = points.float()
    if _has_kernel("farthest_point_sample", points):
        return kernels.farthest_point_sample(points, num_samples, point_mask)
    batch_size, num_points, _ = points.shape
    num_distinct = min(num_samples, num_points)
    low, high = bounding_box(points, point_mask)
    distance = _squared_distance(points, ((low + high) / 2).unsqueeze(1))  # (batch, num_points)
    if point_mask is not None:
        distance = distance.masked_fill(~point_mask, -1.0)
    x, y, z = points.unbind(-1)
    picked = [distance.argmax(1, keepdim=True)]
    distance = torch.where(distance < 0, distance, torch.full_like(distance, torch.inf))
    for _ in range(num_distinct - 1):
        last = picked[-1]
        dx, dy, dz = x - x.gather(1, last), y - y.gather(1, last), z - z.gather(1, last)
        distance = torch.minimum(distance, dx * dx + dy * dy + dz * dz)
        picked.append(distance.argmax(1, keepdim=True))
    indices = torch.cat(picked, dim=1)
    if point_mask is None and num_distinct == num_samples:
        return indices
    available = (
        torch.full((batch_size, 1), num_points, device=points.device)
        if point_mask is None
        else point_mask.sum(1, keepdim=True)
    )
    order = torch.arange(num_samples, device=points.device).unsqueeze(0) % available.clamp(1, num_distinct)
    return indices.gather(1, order)


@torch.no_grad()
def knn(
    queries: torch.Tensor,
    points: torch.Tensor,
    k: int,
    point_mask: torch.Tensor | None = None,
    chunk_size: int = 1 << 24,
) -> torch.Tensor:
    """
    Indices of the `k` nearest points of each query, nearest first, ties to the lower index.

    Args:
        queries: `(batch, num_queries, 3)`.
        points: `(batch, num_points, 3)` in the same unit.
        k: number of neighbours.
        point_mask: optional boolean `(batch, num_points)`, true for real points. Where fewer than `k` are real, the
            nearest one is repeated.
        chunk_size: at most this many distances are held in memory at once.

    Returns:
        int64 indices `(batch, num_queries, k)`.

    Raises:
        ValueError: if there are fewer than `k` points.
    """
    num_points = points.shape[1]
    _check_neighbors(k, num_points)
    queries, points = queries.float(), points.float()
    if _has_kernel("knn", points):
        return kernels.knn(queries, points, k, point_mask)
    rows = max(1, chunk_size // max(1, queries.shape[0] * num_points))
    chunks = []
    for part in queries.split(rows, dim=1):
        distance = pairwise_squared_distance(part, points)  # (batch, rows, num_points)
        if point_mask is not None:
            distance = distance.masked_fill(~point_mask.unsqueeze(1), torch.inf)
        chunks.append(_smallest(distance, k))
    indices = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
    if point_mask is not None:
        real = point_mask.unsqueeze(1).expand(-1, indices.shape[1], -1).gather(2, indices)
        indices = torch.where(real, indices, indices[..., :1])
    return indices


def _check_neighbors(k: int, num_points: int):
    if k > num_points:
        raise ValueError(f"`k` is {k}, but there are only {num_points} points to choose neighbours from.")


def _smallest(distance: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` smallest of non-negative distances, in order, ties to the lower index."""
    if _is_exporting():
        return distance.topk(k, dim=-1, largest=False).indices  # ONNX defines its ties the same way
    # The bits of a non-negative float sort as its value does; the index below them decides ties.
    index = torch.arange(distance.shape[-1], device=distance.device)
    key = (distance.contiguous().view(torch.int32).to(torch.int64) << 32) | index
    return key.topk(k, dim=-1, largest=False).values & 0xFFFFFFFF


def group_nearest(
    points: torch.Tensor, centers: torch.Tensor, k: int, point_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The neighbourhood of each centre: [`knn`] and [`group_points`] in one step, in float32.

    Args:
        points: `(batch, num_points, 3)`.
        centers: `(batch, num_groups, 3)` in the same unit.
        k: number of neighbours.
        point_mask: optional boolean `(batch, num_points)`, true for real points; see [`knn`].

    Returns:
        int64 indices `(batch, num_groups, k)`, and the coordinates `(batch, num_groups, k, 3)` of these points
        relative to their centre.

    Raises:
        ValueError: if there are fewer than `k` points.
    """
    _check_neighbors(k, points.shape[1])
    points, centers = points.float(), centers.float()
    differentiated = torch.is_grad_enabled() and (points.requires_grad or centers.requires_grad)
    if _has_kernel("group_nearest", points) and not differentiated:
        return kernels.group_nearest(points, centers, k, point_mask)
    indices = knn(centers, points, k, point_mask)
    return indices, group_points(points, centers, indices)


def neighborhood_moments(
    points: torch.Tensor, sizes: Sequence[int], point_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The shape of the surroundings of every point: covariance and mean of its nearest points, for several sizes.

    Args:
        points: `(batch, num_points, 3)`, without gradient.
        sizes: numbers of nearest points, growing; a cloud of fewer takes all.
        point_mask: optional boolean `(batch, num_points)`, true for real points.

    Returns:
        float32 `(batch, num_points, 10 * len(sizes))`. For each size the covariance over its trace, less that of a
        ball (xx, yy, zz, xy, xz, yz); the logarithm of the root of the trace, over the root of the share of the cloud
        that these points are, so that it does not depend on the density of a surface (at least -3); the mean relative
        to the point, over the root of the trace. Points that are all equal have the covariance of a ball.
    """
    points = points.detach().float()
    batch_size, num_points = points.shape[:2]
    offsets = group_nearest(points, points, min(max(sizes), num_points), point_mask)[1]
    counts = points.new_full((batch_size, 1, 1), num_points)
    if point_mask is not None:
        counts = point_mask.sum(1).clamp_min(1).view(-1, 1, 1).float()
        real = torch.arange(offsets.shape[2], device=points.device) < counts  # the others repeat the nearest
        offsets = offsets * real.unsqueeze(-1)
    axes = offsets.unbind(-1)
    ball = points.new_tensor([1 / 3, 1 / 3, 1 / 3, 0, 0, 0])
    sums, start, moments = 0, 0, []
    for size in sizes:
        x, y, z = (axis[:, :, start:size].contiguous() for axis in axes)
        sums = sums + torch.stack([term.sum(-1) for term in (x, y, z, *_products(x, y, z))], dim=-1)
        start, taken = size, counts.clamp_max(size)
        mean, second = (sums / taken).split([3, 6], dim=-1)
        covariance = second - torch.stack(_products(*mean.unbind(-1)), dim=-1)
        trace = covariance[..., :3].sum(-1, keepdim=True)
        spread = trace.clamp_min(1e-12)
        shape = torch.where(trace > 1e-12, covariance / spread - ball, 0.0)
        extent = ((spread * counts / taken).log() / 2).clamp_min(-3)
        moments += [shape, extent, mean / spread.sqrt()]
    return torch.cat(moments, dim=-1)


def _products(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
    """Of all pairs of coordinates."""
    return [x * x, y * y, z * z, x * y, x * z, y * z]


def multiscale_groups(
    points: torch.Tensor,
    num_centers: list[int],
    num_neighbors: list[int],
    point_mask: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """
    Groups of groups: points are sampled once; each scale, finest first, has the neighbourhoods of its centres.

    The centres of a scale are the first of the finest ones. Their neighbours are points at the finest scale, and the
    centres of the scale below at the others. Where only some coarsest groups are `visible`, a scale below holds only
    the children of the groups above it, group by group and repeated where groups share one, as long as these are fewer
    than all of its groups.

    Args:
        points: `(batch, num_points, 3)`.
        num_centers: of each scale, finest first, not increasing.
        num_neighbors: of each scale; at a coarser one at most as many as there are centres in the scale below.
        point_mask: optional boolean `(batch, num_points)`, true for real points.
        visible: optional int64 `(batch, visible)` in `0..num_centers[-1] - 1`, the coarsest groups that are wanted.

    Returns:
        finest centres `(batch, num_centers[0], 3)`; for each scale int64 indices `(batch, groups, k)`, into the points
        at the finest scale and into the groups of the scale below at the others; and for each scale float32
        coordinates `(batch, groups, k, 3)` relative to the centre of the group.

    Raises:
        ValueError: if a scale has fewer points or centres below it than neighbours.
    """
    _check_neighbors(num_neighbors[0], points.shape[1])
    for k, finer in zip(num_neighbors[1:], num_centers[:-1], strict=True):
        _check_neighbors(k, finer)
    points = points.float()
    num_groups = [num_centers[-1] if visible is None else visible.shape[1]]
    for k, finer in zip(num_neighbors[:0:-1], num_centers[-2::-1], strict=True):
        num_groups.insert(0, min(num_groups[0] * k, finer))
    differentiated = torch.is_grad_enabled() and points.requires_grad
    if _has_kernel("multiscale_groups", points) and not differentiated:
        sampled, indices, offsets = kernels.multiscale_groups(
            points, num_centers, num_neighbors, num_groups, point_mask, visible
        )
        shapes = [(points.shape[0], groups, k) for groups, k in zip(num_groups, num_neighbors, strict=True)]
        sizes = [batch_size * groups * k for batch_size, groups, k in shapes]
        return (
            gather_points(points, sampled),
            [part.view(shape) for part, shape in zip(indices.split(sizes), shapes, strict=True)],
            [part.view(*shape, 3) for part, shape in zip(offsets.split(sizes), shapes, strict=True)],
        )
    centers = gather_points(points, farthest_point_sample(points, num_centers[0], point_mask))
    indices, offsets, wanted = [], [], visible
    for scale in range(len(num_centers) - 1, -1, -1):
        group_centers = centers[:, : num_centers[scale]] if wanted is None else gather_points(centers, wanted)
        finer, mask = (points, point_mask) if scale == 0 else (centers[:, : num_centers[scale - 1]], None)
        children, relative = group_nearest(finer, group_centers, num_neighbors[scale], mask)
        wanted = None
        if scale > 0 and num_groups[scale - 1] < num_centers[scale - 1]:
            wanted = children.flatten(1)
            children = torch.arange(wanted.shape[1], device=points.device).view(1, *children.shape[1:])
            children = children.repeat(points.shape[0], 1, 1)
        indices.insert(0, children)
        offsets.insert(0, relative)
    return centers, indices, offsets


def bounding_box(points: torch.Tensor, point_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest coordinates `(batch, 3)` each of `(batch, num_points, 3)`, padding left out."""
    if point_mask is None:
        return points.amin(1), points.amax(1)
    outside = ~point_mask.unsqueeze(-1)
    return points.masked_fill(outside, torch.inf).amin(1), points.masked_fill(outside, -torch.inf).amax(1)


@torch.no_grad()
def view_projection(
    points: torch.Tensor, view: torch.Tensor, image_size: int, point_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The affine map from a point to (pixel row, pixel column, depth) of an orthographic view of each cloud.

    The larger side of the object in the image plane spans `image_size - 3` pixels and the object is centred. The
    viewer is on the positive side of the third axis: depth is 1 at the nearest point and 0.2 at the farthest. Cells as
    in public code of the line (I2P-MAE); the depth range is ours.

    Args:
        points: `(batch, num_points, 3)`.
        view: int64 `(batch,)` in 0..2, the cyclic permutation (x, y, z), (z, x, y) or (y, z, x) whose first two axes
            are row and column.
        image_size: height and width in pixels.
        point_mask: optional boolean `(batch, num_points)`.

    Returns:
        float32 `(batch, 3, 4)`: rows are pixel row, pixel column, depth; the last column is the offset.
    """
    points = points.float()
    low, high = bounding_box(points, point_mask)
    # Row by row `VIEW_AXES`, computed: a table could not be copied to the device within a CUDA graph.
    axes = (torch.arange(3, device=points.device) - view.unsqueeze(1)) % 3  # (batch, 3)
    permutation = nn.functional.one_hot(axes, 3).to(points.dtype)  # (batch, 3, 3)
    low, high = low.gather(1, axes), high.gather(1, axes)
    extent = high - low
    pixels = (image_size - 3) / extent[:, :2].amax(1, keepdim=True).clamp_min(_EPS)
    per_depth = (1.0 - MIN_DEPTH) / extent[:, 2:].clamp_min(_EPS)
    scale = torch.cat([pixels, pixels, per_depth], dim=1)  # (batch, 3)
    middle = (low + high)[:, :2] / 2
    offset = torch.cat([(image_size - 1) / 2 - middle * pixels, 1.0 - high[:, 2:] * per_depth], dim=1)
    return torch.cat([permutation * scale.unsqueeze(-1), offset.unsqueeze(-1)], dim=-1)


def project_points(points: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """
    Applies a projection, differentiable in the points.

    Args:
        points: `(batch, ..., 3)`.
        projection: `(batch, 3, 4)` from [`view_projection`].

    Returns:
        float32 `(batch, ..., 3)`: pixel row, pixel column, depth.
    """
    flat = points.float().flatten(1, -2)
    with torch.autocast(flat.device.type, enabled=False):
        mapped = torch.matmul(flat, projection[..., :3].float().transpose(1, 2)) + projection[:, None, :, 3].float()
    return mapped.view(points.shape)


@torch.no_grad()
def project_depth(
    points: torch.Tensor,
    projection: torch.Tensor,
    image_size: int,
    splat_size: int = 5,
    point_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Draws the depth image of a cloud: each point covers a square of pixels, the nearest wins, the background is 0.

    Args:
        points: `(batch, num_points, 3)`.
        projection: `(batch, 3, 4)` from [`view_projection`].
        image_size: height and width in pixels.
        splat_size: odd side of the square, in pixels.
        point_mask: optional boolean `(batch, num_points)`.

    Returns:
        float32 `(batch, 1, image_size, image_size)` in [0, 1].
    """
    projected = project_points(points, projection)
    if _has_kernel("splat_depth", projected):
        return kernels.splat_depth(projected, image_size, splat_size, point_mask)
    row, column, depth = projected.unbind(-1)
    last = image_size - 1
    pixel = row.round().clamp(0, last).long() * image_size + column.round().clamp(0, last).long()
    depth = depth.clamp(0.0, 1.0)
    if point_mask is not None:
        depth = depth.masked_fill(~point_mask, 0.0)
    image = torch.zeros(points.shape[0], image_size * image_size, device=points.device)
    image = image.scatter_reduce(1, pixel, depth, reduce="amax")
    image = image.view(-1, 1, image_size, image_size)
    # A square splat in which the nearest point wins is a maximum over a window.
    return nn.functional.max_pool2d(image, splat_size, stride=1, padding=splat_size // 2)


def patch_index(projected: torch.Tensor, image_size: int, patch_size: int) -> torch.Tensor:
    """
    Row and column of the patch under projected points.

    Args:
        projected: `(batch, n, 3)` from [`project_points`].
        image_size: image side in pixels.
        patch_size: patch side in pixels.

    Returns:
        int64 `(batch, n, 2)`.
    """
    pixel = projected[..., :2].round().clamp(0, image_size - 1)
    return torch.div(pixel, patch_size, rounding_mode="floor").long()


def chamfer_distance(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Chamfer distance (L2) of pairs of clouds: the mean squared distance to the nearest point, one way plus the other.

    The nearest indices are found without gradient; the gradient flows through the distances to them, which is the
    gradient of the exact expression wherever that has one.

    Args:
        predicted: `(..., n, 3)`.
        target: `(..., m, 3)` in the same unit.

    Returns:
        float32 (float64 for float64 inputs) `(...)`.
    """
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    predicted, target = predicted.to(dtype), target.to(dtype)
    if _has_kernel("nearest_distances", predicted) and predicted.shape[:-2] == target.shape[:-2]:
        forward, backward, _, _ = kernels.nearest_distances(_pairs(predicted), _pairs(target))
        return (forward.mean(-1) + backward.mean(-1)).view(predicted.shape[:-2])
    with torch.no_grad():
        distance = pairwise_squared_distance(predicted, target)
        to_target, to_predicted = distance.argmin(-1), distance.argmin(-2)
    nearest_target = target.gather(-2, to_target.unsqueeze(-1).expand(*to_target.shape, target.shape[-1]))
    nearest_predicted = predicted.gather(
        -2, to_predicted.unsqueeze(-1).expand(*to_predicted.shape, predicted.shape[-1])
    )
    forward = _squared_distance(predicted, nearest_target).mean(-1)
    backward = _squared_distance(nearest_predicted, target).mean(-1)
    return forward + backward


def _pairs(sets: torch.Tensor) -> torch.Tensor:
    """`(..., n, 3)` to `(pairs, n, 3)`."""
    return sets.reshape(sets.shape[:-2].numel(), *sets.shape[-2:])


def sample_depth(pixel_values: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """
    Bilinear depth of an image under projected points, differentiable in pixel row and column.

    Args:
        pixel_values: `(batch, 1, height, width)`.
        projected: `(batch, n, 3)` from [`project_points`].

    Returns:
        float32 `(batch, n)`; 0 outside the image.
    """
    height, width = pixel_values.shape[-2:]
    row, column = projected[..., 0], projected[..., 1]
    top, left = row.detach().floor(), column.detach().floor()
    row_fraction, column_fraction = row - top, column - left
    image = pixel_values.float().flatten(1)

    def pixel(at_row: torch.Tensor, at_column: torch.Tensor) -> torch.Tensor:
        inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
        index = at_row.long().clamp(0, height - 1) * width + at_column.long().clamp(0, width - 1)
        return image.gather(1, index) * inside

    upper = pixel(top, left) * (1 - column_fraction) + pixel(top, left + 1) * column_fraction
    lower = pixel(top + 1, left) * (1 - column_fraction) + pixel(top + 1, left + 1) * column_fraction
    return upper * (1 - row_fraction) + lower * row_fraction


def depth_consistency(points: torch.Tensor, projection: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    How far points stand in front of what a depth image shows: squared, per point, 0 for points at or behind it.

    A point may hide behind the visible surface, which the image cannot contradict, but not stand before it nor beside
    the silhouette, where the background has depth 0. The gradient reaches all three coordinates: the depth directly,
    row and column through the slope of the image. Ours; the paper only names a cross-reconstruction loss.

    Depth in an image spans the extent of its cloud. That of a sheet seen from above is nothing but noise, so below an
    extent of 0.02 the excess is measured as if it were 0.02.

    Args:
        points: `(batch, n, 3)`, of clouds in the unit sphere.
        projection: `(batch, 3, 4)` that made the image.
        pixel_values: `(batch, 1, height, width)` depth image.

    Returns:
        float32 `(batch, n)` in squared units of image depth.
    """
    projected = project_points(points, projection)
    excess = projected[..., 2] - sample_depth(pixel_values, projected)
    per_depth = projection[:, 2, :3].abs().amax(-1, keepdim=True)
    flatness = ((1.0 - MIN_DEPTH) / _FLAT / per_depth).clamp_max(1.0)
    return (excess.clamp_min(0.0) * flatness).square()


def interpolate_features(
    points: torch.Tensor, centers: torch.Tensor, features: torch.Tensor, k: int = 3
) -> torch.Tensor:
    """
    Spreads features of centres to points, weighted by the inverse squared distance of the `k` nearest (PointNet++).

    Args:
        points: `(batch, num_points, 3)`.
        centers: `(batch, num_centers, 3)`.
        features: `(batch, num_centers, channels)`.

    Returns:
        `(batch, num_points, channels)`.
    """
    indices = knn(points, centers, min(k, centers.shape[1]))
    distance = _squared_distance(gather_points(centers.float(), indices), points.float().unsqueeze(2))
    weight = 1.0 / distance.clamp_min(1e-8)
    weight = (weight / weight.sum(-1, keepdim=True)).to(features.dtype)
    if centers.shape[1] <= _FEW_CENTERS:
        matrix = weight.new_zeros(*weight.shape[:2], centers.shape[1]).scatter_(2, indices, weight)
        return matrix @ features
    return (gather_points(features, indices) * weight.unsqueeze(-1)).sum(2)
