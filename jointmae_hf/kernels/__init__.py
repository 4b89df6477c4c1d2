"""Fast paths behind `geometry_joint_mae`: the same results as the reference there, index for index.

`DEVICES` holds the operators that each device type has here; the geometry uses plain torch for all others. Everything
is registered as a torch operator, so that `torch.compile` sees one node and not an unrolled loop.
"""

import logging
from importlib.util import find_spec

import torch


logger = logging.getLogger(__name__)
INTERFACE = 3  # of the functions below; raised when they change, since copies of the geometry call them from the Hub
DEVICES: dict[str, set[str]] = {}

try:
    from . import cpu as _cpu
except ImportError:
    _cpu = None
else:
    DEVICES["cpu"] = {"farthest_point_sample", "knn", "group_nearest", "multiscale_groups", "nearest_distances"}
if find_spec("triton") is not None:
    DEVICES["cuda"] = {"farthest_point_sample", "knn", "group_nearest", "nearest_distances", "splat_depth"}


_MANY_POINTS = 1 << 14  # in a batch; with fewer, plain torch is hardly noticed
_hinted: set[str] = set()


def hint(device_type: str, num_points: int):
    """Says once, where it matters, that kernels for a device could be installed."""
    package = {"cpu": "numba", "cuda": "triton"}.get(device_type)
    if package is None or device_type in DEVICES or device_type in _hinted or num_points < _MANY_POINTS:
        return
    _hinted.add(device_type)
    logger.warning(
        "%s is not installed: sampling and neighbours of %d points run in plain torch, many times slower. "
        "`pip install %s` makes them fast, with the same results.",
        package,
        num_points,
        '"jointmae-hf[fast]"' if package == "numba" else package,
    )


def _gpu():
    """The GPU kernels, imported when first used: a machine without a GPU never pays for Triton."""
    from . import gpu

    return gpu


@torch.library.custom_op("jointmae_hf::farthest_point_sample", mutates_args=(), device_types="cpu")
def farthest_point_sample(points: torch.Tensor, num_samples: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    """`(batch, num_points, 3)` float32 to int64 indices `(batch, num_samples)`."""
    return _cpu.farthest_point_sample(points, num_samples, point_mask)


@farthest_point_sample.register_kernel("cuda")
def _(points, num_samples, point_mask):
    return _gpu().farthest_point_sample(points, num_samples, point_mask)


@farthest_point_sample.register_fake
def _(points, num_samples, point_mask):
    return points.new_empty(points.shape[0], num_samples, dtype=torch.int64)


@torch.library.custom_op("jointmae_hf::knn", mutates_args=(), device_types="cpu")
def knn(queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    """`(batch, num_queries, 3)` and `(batch, num_points, 3)` float32 to int64 indices `(batch, num_queries, k)`."""
    return _cpu.knn(queries, points, k, point_mask)


@knn.register_kernel("cuda")
def _(queries, points, k, point_mask):
    return _gpu().knn(queries, points, k, point_mask)


@knn.register_fake
def _(queries, points, k, point_mask):
    return queries.new_empty(queries.shape[0], queries.shape[1], k, dtype=torch.int64)


@torch.library.custom_op("jointmae_hf::group_nearest", mutates_args=(), device_types="cpu")
def group_nearest(
    points: torch.Tensor, centers: torch.Tensor, k: int, point_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours as from `knn`, and their coordinates `(batch, num_groups, k, 3)` relative to their centre."""
    return _cpu.group_nearest(points, centers, k, point_mask)


@group_nearest.register_kernel("cuda")
def _(points, centers, k, point_mask):
    return _gpu().group_nearest(points, centers, k, point_mask)


@group_nearest.register_fake
def _(points, centers, k, point_mask):
    shape = (*centers.shape[:2], k)
    return centers.new_empty(shape, dtype=torch.int64), centers.new_empty(*shape, 3)


@torch.library.custom_op("jointmae_hf::multiscale_groups", mutates_args=(), device_types="cpu")
def multiscale_groups(
    points: torch.Tensor,
    num_centers: list[int],
    num_neighbors: list[int],
    num_groups: list[int],
    point_mask: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Sampled indices `(batch, num_centers[0])`; then of scale after scale, finest first, the indices of neighbours and
    their coordinates relative to the centre, flat: `(slots,)` and `(slots, 3)`.
    """
    return _cpu.multiscale_groups(points, num_centers, num_neighbors, num_groups, point_mask, visible)


@multiscale_groups.register_fake
def _(points, num_centers, num_neighbors, num_groups, point_mask, visible):
    batch_size = points.shape[0]
    slots = batch_size * sum(groups * k for groups, k in zip(num_groups, num_neighbors, strict=True))
    indices = points.new_empty(slots, dtype=torch.int64)
    return points.new_empty(batch_size, num_centers[0], dtype=torch.int64), indices, points.new_empty(slots, 3)


@torch.library.custom_op("jointmae_hf::nearest_distances", mutates_args=(), device_types="cpu")
def nearest_distances(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared distances to the nearest point of the other set, both ways, then its indices; differentiable once."""
    return _cpu.nearest_distances(first, second)


@nearest_distances.register_kernel("cuda")
def _(first, second):
    return _gpu().nearest_distances(first, second)


@nearest_distances.register_fake
def _(first, second):
    sizes = first.shape[:-1], second.shape[:-1]
    distances = [first.new_empty(size) for size in sizes]
    return *distances, *[first.new_empty(size, dtype=torch.int64) for size in sizes]


@torch.library.custom_op("jointmae_hf::nearest_distances_backward", mutates_args=(), device_types="cpu")
def nearest_distances_backward(
    first: torch.Tensor,
    second: torch.Tensor,
    to_second: torch.Tensor,
    to_first: torch.Tensor,
    first_grad: torch.Tensor,
    second_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both sets, given those of `nearest_distances`."""
    return _cpu.nearest_distances_backward(first, second, to_second, to_first, first_grad, second_grad)


@nearest_distances_backward.register_kernel("cuda")
def _(first, second, to_second, to_first, first_grad, second_grad):
    return _gpu().nearest_distances_backward(first, second, to_second, to_first, first_grad, second_grad)


@nearest_distances_backward.register_fake
def _(first, second, to_second, to_first, first_grad, second_grad):
    return first.new_empty(first.shape), second.new_empty(second.shape)


def _save_nearest(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[2:])


def _nearest_gradients(ctx, first_grad, second_grad, *_):
    return nearest_distances_backward(*ctx.saved_tensors, first_grad, second_grad)


nearest_distances.register_autograd(_nearest_gradients, setup_context=_save_nearest)


@torch.library.custom_op("jointmae_hf::splat_depth", mutates_args=(), device_types="cuda")
def splat_depth(
    projected: torch.Tensor, image_size: int, splat_size: int, point_mask: torch.Tensor | None
) -> torch.Tensor:
    """Pixel row, column and depth `(batch, num_points, 3)` to depth images `(batch, 1, image_size, image_size)`."""
    return _gpu().splat_depth(projected, image_size, splat_size, point_mask)


@splat_depth.register_fake
def _(projected, image_size, splat_size, point_mask):
    return projected.new_empty(projected.shape[0], 1, image_size, image_size)
