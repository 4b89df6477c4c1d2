"""Kernels against the reference in plain torch: the same indices, whatever the input."""

import subprocess
import sys

import pytest
import torch

from jointmae_hf import geometry_joint_mae as geometry
from jointmae_hf import kernels


@pytest.fixture
def plain_torch(monkeypatch):
    """Calls a geometry function without kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "kernels", None)
            return function(*arguments)

    return call


def clouds(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return {
        "random": torch.randn(3, 500, 3, generator=generator),
        "duplicates": torch.randint(0, 4, (3, 300, 3), generator=generator).float(),
        "collinear": torch.rand(2, 200, 1, generator=generator) * torch.tensor([1.0, 2.0, -1.0]),
        "huge": 1e6 * torch.randn(2, 300, 3, generator=generator),
        "equal": torch.ones(2, 64, 3),
    }[kind]


KINDS = ["random", "duplicates", "collinear", "huge", "equal"]


def test_the_cpu_has_kernels():
    assert "cpu" in kernels.DEVICES and geometry.kernels is kernels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_pick_the_same_indices(kind, masked, plain_torch):
    points = clouds(kind)
    mask = torch.rand(points.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    for num_samples in (1, 50, points.shape[1] + 7):
        arguments = geometry.farthest_point_sample, points, num_samples, mask
        sampled = arguments[0](*arguments[1:])
        torch.testing.assert_close(sampled, plain_torch(*arguments), rtol=0, atol=0)
    queries = geometry.gather_points(points, sampled[:, :40]) + 0.01
    for k in (1, 16):
        arguments = geometry.knn, queries, points, k, mask
        torch.testing.assert_close(arguments[0](*arguments[1:]), plain_torch(*arguments), rtol=0, atol=0)


def test_kernels_repeat_the_nearest_where_few_points_are_real(plain_torch):
    points = clouds("random")
    mask = torch.zeros(points.shape[:2], dtype=torch.bool)
    mask[:, 17:22] = True
    arguments = geometry.knn, points[:, :9], points, 8, mask
    torch.testing.assert_close(arguments[0](*arguments[1:]), plain_torch(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_chamfer_distance_is_the_same_with_kernels(kind, plain_torch):
    points = clouds(kind)
    first, second = points[:, :60].unflatten(1, (3, 20)), points[:, 20:50].unsqueeze(1).expand(-1, 3, -1, -1)
    arguments = geometry.chamfer_distance, first, second
    torch.testing.assert_close(arguments[0](*arguments[1:]), plain_torch(*arguments), rtol=0, atol=0)


def test_results_do_not_depend_on_the_number_of_threads():
    points, before = clouds("random"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = geometry.farthest_point_sample(points, 100), geometry.knn(points, points, 8)
        torch.set_num_threads(3)
        shared = geometry.farthest_point_sample(points, 100), geometry.knn(points, points, 8)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, shared, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_operators_can_be_traced():
    points = clouds("random")
    mask = torch.ones(points.shape[:2], dtype=torch.bool)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.farthest_point_sample, (points, 40, mask), test_utils=checks)
    torch.library.opcheck(kernels.knn, (points[:, :20].contiguous(), points, 5, None), test_utils=checks)
    torch.library.opcheck(kernels.nearest_both_ways, (points, points.clone()), test_utils=checks)


def test_without_numba_the_package_falls_back_to_torch():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, jointmae_hf\n"
        "from jointmae_hf.geometry_joint_mae import farthest_point_sample, kernels\n"
        "assert 'cpu' not in kernels.DEVICES\n"
        "print(farthest_point_sample(torch.eye(3)[None], 3).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "torch.Size([1, 3])" in done.stdout, done.stderr
