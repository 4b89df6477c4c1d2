"""Fast paths behind `geometry_joint_mae`: the same results as the reference there, index for index.

`DEVICES` holds the device types that have kernels here; the geometry uses plain torch on all others. Everything is
registered as a torch operator, so that `torch.compile` sees one node and not an unrolled loop.
"""

import logging

import torch


logger = logging.getLogger(__name__)
INTERFACE = 1  # of the functions below; raised when they change, since copies of the geometry call them from the Hub
DEVICES: set[str] = set()

try:
    from . import cpu as _cpu
except ImportError:
    _cpu = None
    logger.info("numba is not installed: sampling and neighbours on the CPU use plain torch, several times slower.")
else:
    DEVICES.add("cpu")


@torch.library.custom_op("jointmae_hf::farthest_point_sample", mutates_args=(), device_types="cpu")
def farthest_point_sample(points: torch.Tensor, num_samples: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    """`(batch, num_points, 3)` float32 to int64 indices `(batch, num_samples)`."""
    return _cpu.farthest_point_sample(points, num_samples, point_mask)


@farthest_point_sample.register_fake
def _(points, num_samples, point_mask):
    return points.new_empty(points.shape[0], num_samples, dtype=torch.int64)


@torch.library.custom_op("jointmae_hf::knn", mutates_args=(), device_types="cpu")
def knn(queries: torch.Tensor, points: torch.Tensor, k: int, point_mask: torch.Tensor | None) -> torch.Tensor:
    """`(batch, num_queries, 3)` and `(batch, num_points, 3)` float32 to int64 indices `(batch, num_queries, k)`."""
    return _cpu.knn(queries, points, k, point_mask)


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
