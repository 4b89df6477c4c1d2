"""Kernels against the reference in plain torch: the same indices, whatever the input."""

import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
        "grid": torch.cartesian_prod(*[torch.arange(8.0)] * 3)[torch.randperm(512, generator=generator)][None],
        "far away": 1e6 + torch.randn(2, 300, 3, generator=generator),
        "beyond float32": 1e25 * torch.randn(2, 100, 3, generator=generator),
    }[kind]


KINDS = ["random", "duplicates", "collinear", "huge", "equal", "grid", "far away", "beyond float32"]


def surface(*shape: int, seed: int = 0) -> torch.Tensor:
    points = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=-1) + 0.01 * points


def assert_same(plain_torch, function, *arguments):
    """The same with and without kernels, bit for bit."""
    outputs, expected = function(*arguments), plain_torch(function, *arguments)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)


def test_the_cpu_has_kernels():
    assert "cpu" in kernels.DEVICES and geometry.kernels is kernels


# Where squared distances overflow, the reference cannot tell a far point from padding.
@pytest.mark.parametrize(
    ("kind", "masked"), [(k, m) for k in KINDS for m in (False, True) if (k, m) != ("beyond float32", True)]
)
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


# Around a leaf of 32 points, a node of 1,024 and a block of 32,768 below the top.
@pytest.mark.parametrize("num_points", [1, 31, 32, 33, 1023, 1024, 1025, 32767, 32769])
def test_sizes_around_those_of_the_tree(num_points, plain_torch):
    points = surface(2, num_points)
    assert_same(plain_torch, geometry.farthest_point_sample, points, 12)
    for k in {1, min(33, num_points), min(200, num_points)}:
        assert_same(plain_torch, geometry.knn, points[:, :5] + 0.01, points, k)


def test_all_points_are_neighbors(plain_torch):
    points = clouds("duplicates")
    assert_same(plain_torch, geometry.knn, points[:, :7], points, points.shape[1])


def test_neighbors_come_with_their_offsets(plain_torch):
    points = clouds("random")
    mask = torch.rand(points.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.4
    for point_mask in (None, mask, torch.zeros_like(mask)):
        assert_same(plain_torch, geometry.group_nearest, points, points[:, 3:90] + 0.01, 9, point_mask)


@pytest.mark.parametrize("num_visible", [None, 0, 1, 3, 16])
@pytest.mark.parametrize("kind", ["random", "duplicates", "grid"])
def test_groups_of_all_scales(kind, num_visible, plain_torch):
    points = clouds(kind)
    generator = torch.Generator().manual_seed(2)
    orders = torch.rand(points.shape[0], 16, generator=generator).argsort(1)
    visible = None if num_visible is None else orders[:, :num_visible]
    for mask in (None, torch.rand(points.shape[:2], generator=generator) > 0.4):
        arguments = points, [128, 64, 16], [16, 8, 7], mask, visible
        assert_same(plain_torch, geometry.multiscale_groups, *arguments)


def test_groups_of_all_scales_are_those_of_each_scale():
    points = clouds("random")
    centers, indices, offsets = geometry.multiscale_groups(points, [100, 25], [16, 5])
    torch.testing.assert_close(
        centers, geometry.gather_points(points, geometry.farthest_point_sample(points, 100)), rtol=0, atol=0
    )
    for scale, finer in enumerate((points, centers)):
        expected = geometry.group_nearest(finer, centers[:, : (100, 25)[scale]], (16, 5)[scale])
        torch.testing.assert_close((indices[scale], offsets[scale]), expected, rtol=0, atol=0)


def test_children_of_visible_groups_lie_group_by_group():
    points, visible = clouds("random"), torch.tensor([[3, 0], [1, 2], [7, 4]])
    centers, indices, offsets = geometry.multiscale_groups(points, [100, 25], [16, 5], None, visible)
    assert offsets[0].shape == (3, 10, 16, 3) and indices[1].flatten(1).tolist() == [list(range(10))] * 3
    children = geometry.knn(geometry.gather_points(centers, visible), centers, 5)
    group_centers = geometry.gather_points(centers, children.flatten(1))
    expected = geometry.group_points(points, group_centers, indices[0])
    torch.testing.assert_close(offsets[0], expected, rtol=0, atol=0)


def test_threads_share_the_groups_of_one_cloud(plain_torch):
    points, before = surface(1, 4096), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(plain_torch, geometry.multiscale_groups, points, [3000, 2000], [16, 8])
        visible = torch.arange(0, 2000, 7)[None]  # with more children than a thread takes alone
        assert_same(plain_torch, geometry.multiscale_groups, points, [3000, 2000], [16, 9], None, visible)
    finally:
        torch.set_num_threads(before)


def test_groups_have_a_gradient():
    points = clouds("random").requires_grad_()
    geometry.multiscale_groups(points, [20, 5], [4, 3])[2][0].square().sum().backward()
    assert points.grad.abs().sum() > 0


@pytest.mark.parametrize(("num_neighbors", "visible"), [([501, 3], None), ([4, 21], None), ([4, 3], [[5]] * 3)])
def test_groups_that_cannot_be_are_refused(num_neighbors, visible):
    visible = None if visible is None else torch.tensor(visible)
    with pytest.raises((ValueError, IndexError), match="choose neighbours|visible"):
        geometry.multiscale_groups(clouds("random"), [20, 5], num_neighbors, None, visible)


def distance_and_gradients(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    distance = geometry.chamfer_distance(first, second)
    weight = torch.arange(1, distance.numel() + 1).view_as(distance)
    return distance.detach(), *torch.autograd.grad((distance * weight).sum(), (first, second))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "beyond float32"])
def test_chamfer_distance_is_the_same_with_kernels(kind, plain_torch):
    points = clouds(kind)
    first, second = points[:, :60].unflatten(1, (3, 20)), points[:, 20:50].unsqueeze(1).expand(-1, 3, -1, -1)
    outputs = distance_and_gradients(first, second)
    expected = plain_torch(distance_and_gradients, first, second)
    torch.testing.assert_close(outputs[0], expected[0], rtol=0, atol=0)
    for output, other in zip(outputs[1:], expected[1:], strict=True):
        torch.testing.assert_close(output, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


# Up to 65,536 pairs both ways at once, beyond with trees.
@pytest.mark.parametrize("sizes", [(1, 1), (1, 33), (256, 256), (257, 256), (300, 2000), (2, 40000)])
@pytest.mark.parametrize("kind", ["surface", "grid"])
def test_nearest_points_of_sets_of_any_size(kind, sizes, plain_torch):
    first, second = surface(2, sizes[0], seed=1), surface(2, sizes[1], seed=2)
    if kind == "grid":
        first, second = (first * 3).round(), (second * 3).round()
    distances = geometry.pairwise_squared_distance(first, second)
    expected = distances.amin(-1), distances.amin(-2), distances.argmin(-1), distances.argmin(-2)
    torch.testing.assert_close(kernels.nearest_distances(first, second), expected, rtol=0, atol=0)


def test_large_clouds_are_exact(plain_torch):
    points = surface(1, 100_000)
    assert_same(plain_torch, geometry.farthest_point_sample, points, 24)
    assert_same(plain_torch, geometry.knn, points[:, ::9000], points, 32)


def test_memory_of_large_clouds_grows_with_the_points_only():
    points = surface(1, 300_000)
    geometry.knn(points[:, :100], points, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sampled = geometry.farthest_point_sample(points, 4000)
    geometry.group_nearest(points, geometry.gather_points(points, sampled), 32)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # All distances would take 4.8 GB; the tree takes 8 MB and the results 2 MB.
    assert grown < 100_000 * (1 if sys.platform == "linux" else 1024)


def test_threads_of_python_may_call_the_kernels_at_once():
    inputs = [surface(4, 700, seed=seed) for seed in range(12)]

    def grouped(points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        centers, indices, offsets = geometry.multiscale_groups(points, [128, 32], [16, 8])
        return centers, *indices, *offsets, geometry.knn(points, centers, 5)

    expected, before = [grouped(points) for points in inputs], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(4) as threads:
            for outputs in zip(threads.map(grouped, inputs), expected, strict=True):
                torch.testing.assert_close(*outputs, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_indices_of_points_that_are_not_finite_stay_within_the_cloud():
    points = clouds("random")
    points[0, 5], points[1, 7:90, 1], points[2] = torch.nan, torch.inf, torch.nan
    sampled = geometry.farthest_point_sample(points, 600)
    _, indices, _ = geometry.multiscale_groups(points, [40, 10], [50, 4])
    found = [sampled, geometry.knn(points, points, 300), indices[0], *kernels.nearest_distances(points, points)[2:]]
    assert all(index.min() >= 0 and index.max() < 500 for index in found)


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
    torch.library.opcheck(kernels.group_nearest, (points, points[:, :20].contiguous(), 5, mask), test_utils=checks)
    for visible, groups in ((None, [40, 9]), (torch.arange(3).repeat(3, 1), [6, 3])):
        arguments = points, [40, 9], [4, 2], groups, mask, visible
        torch.library.opcheck(kernels.multiscale_groups, arguments, test_utils=checks)
    for second in (points[:, ::5], points + 0.1):
        pair = points.clone().requires_grad_(), second.clone().requires_grad_()
        torch.library.opcheck(kernels.nearest_distances, pair, test_utils=(*checks, "test_autograd_registration"))


def test_without_numba_the_package_falls_back_to_torch_and_says_so_once():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, jointmae_hf\n"
        "from jointmae_hf.geometry_joint_mae import farthest_point_sample, kernels\n"
        "assert 'cpu' not in kernels.DEVICES\n"
        "print(farthest_point_sample(torch.eye(3)[None], 3).shape)\n"
        "print('large', file=sys.stderr)\n"
        "for _ in range(2): farthest_point_sample(torch.rand(8, 2048, 3), 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "torch.Size([1, 3])" in done.stdout, done.stderr
    quiet, _, hint = done.stderr.partition("large")
    assert "numba" not in quiet and hint.count("numba is not installed") == 1
