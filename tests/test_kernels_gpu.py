"""GPU kernels against the reference in plain torch: the same indices and images, the same losses within rounding.

On a machine with a GPU these tests run there. Elsewhere one test runs this file in Triton's interpreter, in a process
of its own, since Triton reads TRITON_INTERPRET when it is imported; and what the interpreter cannot see is compiled.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from jointmae_hf import geometry_joint_mae as geometry
from jointmae_hf import kernels
from jointmae_hf.data import procedural
from jointmae_hf.data.procedural_recipes import draw_recipes


triton = pytest.importorskip("triton")
gpu = importlib.import_module("jointmae_hf.kernels.gpu")
shapes = importlib.import_module("jointmae_hf.kernels.shapes")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KINDS = ["random", "duplicates", "collinear", "huge", "equal"]
CASES = [*((kind, "unmasked") for kind in KINDS), *(("random", mask) for mask in ("some", "few", "none"))]

runs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in Triton's interpreter")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

if INTERPRETED:  # this process serves nothing else
    for name in (*kernels.DEVICES["cuda"], "nearest_distances_backward"):
        getattr(kernels, name).register_kernel("cpu")(getattr(gpu, name))
    kernels.DEVICES["cpu"] = kernels.DEVICES["cuda"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small inputs, all that the interpreter can do, fill several blocks and leave the last one incomplete."""
    monkeypatch.setattr(gpu, "NEIGHBOR_TILE", (4, 16))
    monkeypatch.setattr(gpu, "NEAREST_TILE", (8, 16))
    monkeypatch.setattr(gpu, "BUCKET_SIZES", (8, 8))


@pytest.fixture
def plain_torch(monkeypatch):
    """Calls a geometry function without kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "kernels", None)
            return function(*arguments)

    return call


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def clouds(kind: str, num_points: int = 21, batch_size: int = 2) -> torch.Tensor:
    points = random(batch_size, num_points, 3)
    return {
        "random": points,
        "duplicates": points.round(),
        "collinear": points[..., :1] * torch.tensor([1.0, 2.0, -1.0], device=DEVICE),
        "huge": 1e6 * points,
        "equal": torch.ones_like(points),
    }[kind]


def masks(num_points: int, batch_size: int = 2) -> dict[str, torch.Tensor | None]:
    """All real, some padding, three real points, none."""
    some = random(batch_size, num_points, seed=1) > 0
    few = torch.zeros_like(some)
    few[:, [2, 5, num_points - 1]] = True
    return {"unmasked": None, "some": some, "few": few, "none": torch.zeros_like(some)}


def assert_equal(output, expected):
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this is the run that it starts")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# ---- Sampling


@runs_kernels
@pytest.mark.parametrize(("kind", "mask"), CASES)
def test_sampling_on_chip(kind, mask, plain_torch):
    points = clouds(kind)
    for num_samples in (1, points.shape[1] + 4):
        arguments = geometry.farthest_point_sample, points, num_samples, masks(points.shape[1])[mask]
        assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


@runs_kernels
@pytest.mark.parametrize(("kind", "mask"), CASES)
def test_sampling_of_large_clouds(kind, mask, plain_torch, monkeypatch):
    monkeypatch.setattr(gpu, "ON_CHIP_POINTS", 0)
    points = clouds(kind)
    arguments = geometry.farthest_point_sample, points, 7, masks(points.shape[1])[mask]
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


@runs_kernels
def test_sampling_repeats_a_large_cloud_of_few_points(plain_torch, monkeypatch):
    monkeypatch.setattr(gpu, "ON_CHIP_POINTS", 0)
    arguments = geometry.farthest_point_sample, clouds("random", 3, 1), 11
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


@runs_kernels
def test_buckets_hold_points_that_are_near_each_other(monkeypatch):
    monkeypatch.setattr(gpu, "ON_CHIP_POINTS", 0)
    launched = {}
    monkeypatch.setattr(gpu, "_launch", lambda kernel, programs, *arguments, **sizes: launched.update(all=arguments))
    near, far = clouds("random", 32, 1), 1000.0 + clouds("random", 32, 1)
    geometry.farthest_point_sample(torch.stack([near, far], dim=2).flatten(1, 2), 8)
    boxes = launched["all"][3]  # (1, buckets, 2, 3)
    assert boxes.shape[1] == 8 and (boxes[:, :, 1] - boxes[:, :, 0]).max() < 10


# ---- Neighbours


@runs_kernels
@pytest.mark.parametrize(("kind", "mask"), CASES)
def test_neighbors(kind, mask, plain_torch):
    points = clouds(kind)
    arguments = geometry.knn, points[:, 3:8] + 0.01, points, 5, masks(points.shape[1])[mask]
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


@runs_kernels
@pytest.mark.parametrize("k", [1, 21])
def test_one_neighbor_and_all_points(k, plain_torch):
    points = clouds("duplicates")
    arguments = geometry.knn, points[:, :2], points, k
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


@runs_kernels
@pytest.mark.parametrize("mask", ["unmasked", "few"])
def test_neighbors_come_with_their_offsets(mask, plain_torch):
    points = clouds("random")
    arguments = geometry.group_nearest, points, points[:, 3:8] + 0.01, 3, masks(points.shape[1])[mask]
    for output, expected in zip(arguments[0](*arguments[1:]), plain_torch(*arguments), strict=True):
        assert_equal(output, expected)


@runs_kernels
def test_offsets_of_neighbors_have_a_gradient():
    points = clouds("random").requires_grad_()
    geometry.group_nearest(points, points[:, :4], 5)[1].square().sum().backward()
    assert points.grad.abs().sum() > 0


@runs_kernels
def test_memory_layout_of_the_input_does_not_matter(plain_torch):
    points = clouds("random").transpose(1, 2).contiguous().transpose(1, 2)
    mask = masks(2 * points.shape[1])["some"][:, ::2]
    for arguments in (
        (geometry.farthest_point_sample, points, 9, mask),
        (geometry.knn, points[:, ::5], points, 4, mask),
        (geometry.chamfer_distance, points[:, ::2], points[:, 5:9]),
        (geometry.project_depth, points, projection(points), 16, 3, mask),
    ):
        assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


# ---- Chamfer distance


def distance_and_gradients(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    distance = geometry.chamfer_distance(first, second)
    weight = torch.arange(1, distance.numel() + 1, device=DEVICE).view_as(distance)
    return distance.detach(), *torch.autograd.grad((distance * weight).sum(), (first, second))


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [*((kind, (11, 6)) for kind in KINDS), ("random", (3, 21)), ("random", (8, 8)), ("random", (1, 1))],
)
def test_chamfer_distance_and_its_gradient(kind, sizes, plain_torch):
    points = clouds(kind, sum(sizes), 2).unsqueeze(1)
    arguments = distance_and_gradients, points[..., : sizes[0], :], points[..., sizes[0] :, :]
    for output, expected in zip(arguments[0](*arguments[1:]), plain_torch(*arguments), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@runs_kernels
def test_chamfer_gradient_is_that_of_finite_differences():
    first, second = clouds("random", 9), clouds("random", 7)
    step, direction = 1e-3, random(*first.shape, seed=3)
    weight = torch.arange(1, 3, device=DEVICE)
    high = geometry.chamfer_distance(first + step * direction, second)
    low = geometry.chamfer_distance(first - step * direction, second)
    slope = ((high - low) * weight).sum() / (2 * step)
    gradient = distance_and_gradients(first, second)[1]
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-3)


@runs_kernels
def test_chamfer_distance_of_a_single_pair(plain_torch):
    arguments = geometry.chamfer_distance, clouds("random")[0, :9], clouds("random")[1]
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


# ---- Depth images


def projection(points: torch.Tensor, view: int = 0, image_size: int = 16) -> torch.Tensor:
    return geometry.view_projection(points, torch.full(points.shape[:1], view, device=DEVICE), image_size)


@runs_kernels
@pytest.mark.parametrize("view", [0, 1, 2])
@pytest.mark.parametrize("splat_size", [1, 3, 5])
@pytest.mark.parametrize("mask", ["unmasked", "some", "none"])
def test_depth_image(view, splat_size, mask, plain_torch):
    points = clouds("random", 300)
    matrix = projection(points, view)
    matrix[1, :2] *= 1.7  # of the second cloud, points lie outside of the image on every side
    arguments = geometry.project_depth, points, matrix, 16, splat_size, masks(300)[mask]
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


@runs_kernels
def test_points_between_two_pixels_go_to_the_even_one(plain_torch):
    points = torch.cartesian_prod(*[torch.arange(-1.5, 9.0)] * 2, torch.tensor([0.25, 1.5, -1.0]))
    matrix = torch.eye(3, 4).unsqueeze(0).to(DEVICE)
    arguments = geometry.project_depth, points.unsqueeze(0).to(DEVICE), matrix, 8, 1
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


# ---- Operators


@runs_kernels
def test_geometry_uses_the_kernels(monkeypatch):
    launched, points = [], clouds("random")
    monkeypatch.setattr(gpu, "_launch", lambda kernel, *arguments, **keywords: launched.append(kernel.__name__))
    geometry.farthest_point_sample(points, 2)
    geometry.knn(points, points, 2)
    geometry.group_nearest(points, points, 2)
    geometry.chamfer_distance(points, points)
    geometry.project_depth(points, projection(points), 16)
    expected = ["_sample_on_chip", *["_nearest_k"] * 2, *["_nearest"] * 2, "_scatter_depth", "_maximum_of_window"]
    assert launched == expected


@runs_kernels
def test_operators_can_be_traced():
    points, mask = clouds("random", 8), masks(8)["some"]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernels.farthest_point_sample, (points, 4, mask), test_utils=checks)
    torch.library.opcheck(kernels.knn, (points[:, :3], points, 2, None), test_utils=checks)
    torch.library.opcheck(kernels.group_nearest, (points, points[:, :3], 2, mask), test_utils=checks)
    torch.library.opcheck(kernels.splat_depth, (points, 8, 3, mask), test_utils=checks)
    pair = points[:, ::3].requires_grad_(), points[:, 5:].requires_grad_()
    torch.library.opcheck(kernels.nearest_distances, pair, test_utils=checks)


def losses(points: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything that a step of pre-training asks of the geometry."""
    centers = geometry.gather_points(points, geometry.farthest_point_sample(points, 2))
    _, groups = geometry.group_nearest(points, centers, 3)
    image = geometry.project_depth(points, projection(points), 16)
    return geometry.chamfer_distance(groups + offsets, groups).mean(), image


@runs_kernels
def test_compiled_in_one_graph():
    points, offsets = clouds("random", 8), random(2, 2, 3, 3, seed=2).requires_grad_()
    expected, image = losses(points, offsets)
    loss, compiled_image = torch.compile(losses, fullgraph=True, backend="aot_eager")(points, offsets)
    torch.testing.assert_close(loss, expected)
    assert_equal(compiled_image, image)
    gradients = [torch.autograd.grad(value, offsets)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@needs_gpu
def test_captured_in_a_cuda_graph():
    points, offsets = clouds("random", 3000), random(2, 2, 3, 3, seed=2)
    losses(points, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, image = losses(points, offsets)
    points.copy_(clouds("random", 3001)[:, 1:])
    graph.replay()
    expected = losses(points, offsets)
    assert_equal((loss, image), expected)


@needs_gpu
@pytest.mark.parametrize(("num_points", "num_samples"), [(16384, 300), (16385, 300), (200_000, 64)])
def test_sampling_at_full_size(num_points, num_samples, plain_torch, monkeypatch):
    monkeypatch.undo()
    arguments = geometry.farthest_point_sample, clouds("random", num_points), num_samples
    assert_equal(arguments[0](*arguments[1:]), plain_torch(*arguments))


# ---- Procedural shapes


def surfaces(recipes, num_points: int) -> torch.Tensor:
    """By the kernel, in the interpreter too."""
    points, emptied = procedural._sample_by_kernel(recipes, num_points, torch.device(DEVICE), procedural._LEAST_KEPT)
    assert not len(emptied)
    return points


def assert_same_surfaces(found: torch.Tensor, recipes):
    """Square roots of torch on a CPU may be off by a rounding, so once in a long time a point is kept or not."""
    expected = procedural.surface_points(recipes, found.shape[2])
    differs = ((found.cpu() - expected).abs() > 1e-5).any(0).any(1)
    assert differs.float().mean() < 0.01


@pytest.fixture
def short_trial(monkeypatch):
    """The interpreter takes long for many candidates."""
    monkeypatch.setattr(procedural, "_TRIAL", 256)
    monkeypatch.setattr(procedural, "_LEAST_KEPT", 10)


@runs_kernels
@pytest.mark.parametrize(("num_shapes", "num_points"), [(12, 40), (1, 1), (2, 257)])
def test_procedural_shapes(num_shapes, num_points, short_trial):
    recipes = draw_recipes(range(num_shapes), seed=3)
    assert_same_surfaces(surfaces(recipes, num_points), recipes)


@runs_kernels
def test_procedural_shapes_of_several_launches(short_trial, monkeypatch):
    recipes = draw_recipes(range(5), seed=3)
    together = surfaces(recipes, 8)
    monkeypatch.setattr(shapes, "_MOST_SHAPES", 2)
    assert_equal(surfaces(recipes, 8), together)


@runs_kernels
def test_a_procedural_shape_of_which_nothing_is_left(short_trial):
    recipes = draw_recipes(range(100), seed=1)
    recipes = recipes[(recipes["primitives"]["present"].sum(1) == 1) & (recipes["layout"] == 0)][:3]
    whole = surfaces(recipes, 8)
    recipes["primitives"][1:, 1] = recipes["primitives"][1:, 0]
    for name in ("half_width", "half_height", "corner", "size"):
        recipes["primitives"][name][1:, 1] *= 3
    recipes["primitives"]["subtracts"][1:, 1] = True
    points, emptied = procedural._sample_by_kernel(recipes, 8, torch.device(DEVICE), procedural._LEAST_KEPT)
    assert emptied.tolist() == [1, 2]
    assert_equal(points[:, 0], whole[:, 0])


@needs_gpu
def test_procedural_shapes_at_full_size():
    recipes = draw_recipes(range(2000), seed=4)
    assert_same_surfaces(procedural.surface_points(recipes, 1024, DEVICE), recipes)
    clouds = procedural.procedural_clouds(range(500), 1024, 4, DEVICE)
    differs = ((clouds.cpu() - procedural.procedural_clouds(range(500), 1024, 4)).abs() > 1e-4).any(2).any(1)
    assert differs.float().mean() < 0.01


# ---- Code for the device


@pytest.fixture
def compiled(monkeypatch) -> Callable[..., list[str]]:
    """Makes the PTX of every kernel that a call would launch, for a GPU that need not be there."""

    def call(function, *arguments):
        codes = []

        def compile_only(kernel, *arguments, **keywords):
            types = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"}
            given = dict(zip(kernel.arg_names, arguments, strict=False))
            sizes = {name: value for name, value in keywords.items() if name in kernel.arg_names}
            options = {name: value for name, value in keywords.items() if name not in sizes}
            constants = sizes | {name: None for name, value in given.items() if value is None}
            signature = {
                name: types[value.dtype] if torch.is_tensor(value) else "i32" for name, value in given.items()
            }
            signature |= dict.fromkeys(constants, "constexpr")
            source = triton.compiler.ASTSource(kernel, signature, constants)
            target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
            codes.append(triton.compile(source, target=target, options=options).asm["ptx"])

        with monkeypatch.context() as patch:
            patch.setattr(triton.JITFunction, "__getitem__", lambda kernel, grid: partial(compile_only, kernel))
            function(*arguments)
        return codes

    return call


@needs_compiler
@pytest.mark.parametrize("function", ["sampling", "large", "neighbors", "nearest", "gradient", "depth", "shapes"])
def test_compiled_kernels_contract_nothing(function, compiled, monkeypatch):
    """The interpreter takes what the compiler does not, and it never contracts a product into a sum."""
    points = torch.zeros(2, 40, 3)
    mask, index, distance = torch.ones(2, 40, dtype=torch.bool), torch.zeros(2, 40, dtype=torch.int64), points[..., 0]
    if function == "large":
        monkeypatch.setattr(gpu, "ON_CHIP_POINTS", 0)
    codes = {
        "sampling": lambda: compiled(gpu.farthest_point_sample, points, 20, mask),
        "large": lambda: compiled(gpu.farthest_point_sample, points, 20, mask),
        "neighbors": lambda: compiled(gpu.group_nearest, points, points, 3, mask),
        "nearest": lambda: compiled(gpu.nearest_distances, points, points[:, :9]),
        "gradient": lambda: compiled(
            gpu.nearest_distances_backward, points, points[:, :9], index, index[:, :9], distance, distance[:, :9]
        ),
        "depth": lambda: compiled(gpu.splat_depth, points, 16, 3, mask),
        "shapes": lambda: compiled(
            shapes.sample_surfaces, procedural.shape_tables(draw_recipes(range(3))), 64, 85, 1 << 22
        ),
    }[function]()
    assert codes
    for code in codes:
        assert "fma." not in code
