"""Fast paths behind `geometry_joint_mae`: the same results as the reference there, index for index.

`DEVICES` holds the operators that each device type has here; the geometry uses plain torch for all others. Everything
is registered as a torch operator, so that `torch.compile` sees one node and not an unrolled loop.
"""

import logging
from importlib.util import find_spec

import torch


logger = logging.getLogger(__name__)
INTERFACE = 2  # of the functions below; raised when they change, since copies of the geometry call them from the Hub
DEVICES: dict[str, set[str]] = {}

try:
    from . import cpu as _cpu
except ImportError:
    _cpu = None
    logger.info("numba is not installed: sampling and neighbours on the CPU use plain torch, several times slower.")
else:
    DEVICES["cpu"] = {"farthest_point_sample", "knn", "nearest_both_ways"}
if find_spec("triton") is not None:
    DEVICES["cuda"] = {"farthest_point_sample", "knn", "group_nearest", "nearest_distances", "splat_depth"}


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


@torch.library.custom_op("jointmae_hf::nearest_both_ways", mutates_args=(), device_types="cpu")
def nearest_both_ways(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest point of the other set, both ways: `(n, a, 3)` and `(n, b, 3)` to `(n, a)` and `(n, b)`."""
    return _cpu.nearest_both_ways(first, second)


@nearest_both_ways.register_fake
def _(first, second):
    return first.new_empty(first.shape[:-1], dtype=torch.int64), second.new_empty(second.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("jointmae_hf::group_nearest", mutates_args=(), device_types="cuda")
def group_nearest(
    points: torch.Tensor, centers: torch.Tensor, k: int, point_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours as from `knn`, and their coordinates `(batch, num_groups, k, 3)` relative to their centre."""
    return _gpu().group_nearest(points, centers, k, point_mask)


@group_nearest.register_fake
def _(points, centers, k, point_mask):
    shape = (*centers.shape[:2], k)
    return centers.new_empty(shape, dtype=torch.int64), centers.new_empty(*shape, 3)


@torch.library.custom_op("jointmae_hf::nearest_distances", mutates_args=(), device_types="cuda")
def nearest_distances(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared distances to the nearest point of the other set, both ways, then its indices; differentiable once."""
    return _gpu().nearest_distances(first, second)


@nearest_distances.register_fake
def _(first, second):
    sizes = first.shape[:-1], second.shape[:-1]
    distances = [first.new_empty(size) for size in sizes]
    return *distances, *[first.new_empty(size, dtype=torch.int64) for size in sizes]


@torch.library.custom_op("jointmae_hf::nearest_distances_backward", mutates_args=(), device_types="cuda")
def nearest_distances_backward(
    first: torch.Tensor,
    second: torch.Tensor,
    to_second: torch.Tensor,
    to_first: torch.Tensor,
    first_grad: torch.Tensor,
    second_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both sets, given those of `nearest_distances`."""
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
