"""Procedural shapes: what they depend on, where their points lie, how they are distributed."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from jointmae_hf.data import procedural
from jointmae_hf.data.procedural import ProceduralShapes, procedural_clouds, surface_points
from jointmae_hf.data.procedural_recipes import (
    BEND,
    CAPSULE,
    CONE,
    DEFORMATION_WEIGHTS,
    DEFORMATIONS,
    ELLIPSOID,
    KINDS,
    LAYOUT_WEIGHTS,
    LAYOUTS,
    MAX_PRIMITIVES,
    NONE,
    ROLES,
    SPHERE,
    TORUS,
    TUBE,
    VERSION,
    copy_frames,
    draw_recipes,
    num_copies,
    shape_keys,
)


def half_widths(primitive, z):
    """The half-width of a profile without corners at heights, and its distance from the axis."""
    return primitive["half_width"] + primitive["slope"] * z


def signed_distance(primitive, points) -> np.ndarray:
    """
    Below 0 inside a primitive, above outside; from its kind and sizes alone, in float64.

    Args:
        primitive: one record.
        points: `(n, 3)` in its own frame.
    """
    x, y, z = points.T
    width, depth, height = primitive["size"]
    kind, sides = primitive["kind"], int(primitive["sides"])
    y = y * (width / depth)
    radius = np.hypot(x, y)
    if sides:
        angles = 2 * np.pi * np.arange(sides) / sides
        radius = (x[:, None] * np.cos(angles) + y[:, None] * np.sin(angles)).max(1)
        width = width if sides == 4 else width * np.cos(np.pi / sides)
    if kind in (SPHERE, ELLIPSOID):
        return np.sqrt((radius / width) ** 2 + (z / height) ** 2) - 1
    if kind == TORUS:
        return np.hypot(radius - (width - height), z) - height
    if kind == CAPSULE:
        return np.hypot(radius, np.maximum(np.abs(z) - (height - width), 0)) - width
    if kind == TUBE:
        wall = 2 * primitive["half_width"]
        return np.maximum(np.maximum(radius - width, width - wall - radius), np.abs(z) - height)
    if kind == CONE:
        return np.maximum(radius - half_widths(primitive, z), np.abs(z) - height)
    distance = np.maximum(radius - width, np.abs(z) - height)  # box, cylinder, prism
    corner = primitive["corner"][0]
    into = np.stack([radius - (width - corner), np.abs(z) - (height - corner)])
    if primitive["cut"]:
        return np.maximum(distance, into.sum(0) - corner)
    in_corner = (into > 0).all(0)
    return np.where(in_corner, np.hypot(*into) - corner, distance)


def composed_distance(recipe, points) -> np.ndarray:
    """Below 0 inside a composition, above outside: all copies of its primitives, one after the other."""
    distance = np.full(len(points), np.inf)
    for primitive in recipe["primitives"][recipe["primitives"]["present"]]:
        frames, _ = copy_frames(primitive[None])
        for frame in frames:
            own = signed_distance(primitive, (points - frame[:, 3]) @ frame[:, :3])
            distance = np.maximum(distance, -own) if primitive["subtracts"] else np.minimum(distance, own)
    return distance


def of_recipes(recipes, num_points=256) -> np.ndarray:
    return surface_points(recipes, num_points).permute(1, 2, 0).double().numpy()


# ---- What a cloud depends on


def test_a_cloud_depends_on_seed_and_index_alone(monkeypatch):
    indices = [3, 2**40 + 17, 500, 12, 0, 77, 2**63 - 1]
    together = procedural_clouds(indices, 96, seed=5)
    assert together.shape == (7, 96, 3) and together.dtype == torch.float32
    for row, index in enumerate(indices):
        assert torch.equal(procedural_clouds([index], 96, seed=5)[0], together[row])
    assert torch.equal(procedural_clouds(indices[::-1], 96, seed=5), together.flip(0))
    assert not torch.equal(procedural_clouds(indices, 96, seed=6), together)
    assert len({cloud.numpy().tobytes() for cloud in together}) == 7
    monkeypatch.setattr(procedural, "_ROUND_SIZE", {"cpu": 200})
    assert torch.equal(procedural_clouds(indices, 96, seed=5), together)


def test_threads_change_nothing():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = procedural_clouds(range(40), 1024)
        torch.set_num_threads(3)
        assert torch.equal(procedural_clouds(range(40), 1024), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_smaller_cloud_is_the_beginning_of_a_larger_one():
    recipes = draw_recipes(range(64), seed=2)
    assert torch.equal(surface_points(recipes, 40), surface_points(recipes, 3000)[:, :, :40])


def test_shapes_change_with_the_version_only():
    assert VERSION == 2, "write down the new shapes"
    recipes = draw_recipes(range(8))
    assert recipes["primitives"]["present"].sum(1).tolist() == [7, 9, 4, 4, 4, 7, 5, 9]
    assert recipes["primitives"]["kind"][:, 1].tolist() == [0, 4, 0, 5, 0, 3, 0, 0]
    assert recipes["deformation"].tolist() == [1, 3, 1, 0, 0, 3, 0, 0]


def test_no_shapes_are_no_clouds():
    assert procedural_clouds([], 16).shape == (0, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], 0), "`num_points` is 0"),
        (([3, -4], 8), "`indices` holds -4"),
        (([0], 8, -1), "`seed` is -1"),
        (([0], 8, 2**63), "`seed` is 9223372036854775808"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        procedural_clouds(*arguments)


def test_no_two_shapes_share_their_random_numbers():
    keys = shape_keys(7, np.arange(100_000))
    assert len(np.unique(keys[:, 0])) == len(keys) and (keys[:, 1] % 2 == 1).all()


# ---- Workers and processes


def test_a_dataset_yields_the_clouds_of_its_numbers():
    shapes = iter(ProceduralShapes(32, seed=4, start=10, block_size=3))
    items = [next(shapes) for _ in range(7)]
    assert [item["index"] for item in items] == list(range(10, 17))
    assert torch.equal(torch.stack([item["points"] for item in items]), procedural_clouds(range(10, 17), 32, seed=4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_processes_share_the_shapes_without_overlap(num_workers):
    seen = []
    for process in range(2):
        shapes = ProceduralShapes(16, seed=4, start=100, num_processes=2, process_index=process, block_size=5)
        loader = DataLoader(shapes, batch_size=None, num_workers=num_workers)
        for item, _ in zip(loader, range(20), strict=False):
            seen.append(item["index"])
            assert torch.equal(item["points"], procedural_clouds([item["index"]], 16, seed=4)[0])
    assert sorted(seen) == list(range(100, 140))


# ---- Where the points lie


def test_no_surface_point_is_inside_or_off_the_composition():
    recipes = draw_recipes(range(300), seed=1)
    present = recipes["primitives"][recipes["primitives"]["present"]]
    assert set(present["kind"]) == set(range(len(KINDS))) and set(present["role"]) == set(range(len(ROLES)))
    for recipe, points in zip(recipes, of_recipes(recipes), strict=True):
        assert np.abs(composed_distance(recipe, points)).max() < 1e-5 * recipe["radius"]


def test_points_are_on_every_primitive_that_is_not_hidden():
    """Nothing is left out: with one primitive, the points fill its box."""
    recipes = draw_recipes(range(4000), seed=1)
    recipes = recipes[(recipes["primitives"]["present"].sum(1) == 1) & (recipes["layout"] == 0)][:60]
    for recipe, points in zip(recipes, of_recipes(recipes, 1024), strict=True):
        primitive = recipe["primitives"][0]
        assert (np.abs(points).max(0) > 0.8 * primitive["extent"]).all(), KINDS[primitive["kind"]]


def area_samples(recipe, generator, num_lines=3000, num_steps=300) -> np.ndarray:
    """
    Points evenly over a surface, found without its parametrisation: where random straight lines cross it (Crofton).
    """
    radius = 1.8 * recipe["radius"]
    direction = generator.normal(size=(num_lines, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    off = generator.normal(size=(num_lines, 3))
    off -= direction * (off * direction).sum(1, keepdims=True)
    off *= radius * np.sqrt(generator.random((num_lines, 1))) / np.linalg.norm(off, axis=1, keepdims=True)
    steps = np.linspace(-radius, radius, num_steps)
    points = recipe["middle"] + off[:, None] + direction[:, None] * steps[:, None]  # (lines, steps, 3)
    inside = composed_distance(recipe, points.reshape(-1, 3)).reshape(num_lines, num_steps) < 0
    line, step = np.nonzero(inside[:, 1:] != inside[:, :-1])
    return (points[line, step] + points[line, step + 1]) / 2


def unevenness(recipe, points, generator) -> float:
    """Chi-squared by degrees of freedom of the numbers of points and of `area_samples` in cells: about 1 if even."""
    expected = area_samples(recipe, generator)
    seeds = points[:24]
    found, wanted = (
        np.bincount(((cloud[:, None] - seeds) ** 2).sum(2).argmin(1), minlength=len(seeds))
        for cloud in (points[24:], expected)
    )
    ratio = np.sqrt(wanted.sum() / found.sum())
    return float(((ratio * found - wanted / ratio) ** 2 / (found + wanted)).sum() / (len(seeds) - 1))


def test_points_lie_evenly_on_compositions():
    recipes = draw_recipes(range(400), seed=3)
    primitives = recipes["primitives"]
    # Lines must not step over walls, so nothing thin; and few copies, for speed.
    sizes = np.where(primitives["present"], primitives["size"].min(2), np.inf).min(1) / recipes["radius"]
    walls = np.where(primitives["present"] & (primitives["center"] > 0), primitives["half_width"], np.inf).min(1)
    copies = (num_copies(primitives) * primitives["present"]).sum(1)
    plain = (np.minimum(sizes, walls / recipes["radius"]) > 0.04) & (copies < 10)
    recipes = recipes[plain & (primitives["present"].sum(1) > 1)][:6]
    assert len(recipes) == 6 and recipes["primitives"]["subtracts"].any(1).sum() > 1
    generator = np.random.default_rng(0)
    clouds = of_recipes(recipes, 3000)
    values = [unevenness(recipe, points, generator) for recipe, points in zip(recipes, clouds, strict=True)]
    assert max(values) < 3 and np.mean(values) < 1.6, values


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_points_lie_evenly_on_each_kind(kind):
    recipes = draw_recipes(range(6000), seed=3)
    first = recipes["primitives"][:, 0]
    alone = (recipes["primitives"]["present"].sum(1) == 1) & first["present"] & (first["kind"] == kind)
    thick = (first["size"].min(1) > 0.1 * first["size"].max(1)) & (
        (first["center"] == 0) | (first["half_width"] + first["corner"][:, 0] > 0.05 * first["size"].max(1))
    )
    recipes = recipes[alone & thick][:1]
    assert len(recipes) == 1
    generator = np.random.default_rng(0)
    for recipe, points in zip(recipes, of_recipes(recipes, 3000), strict=True):
        assert unevenness(recipe, points, generator) < 2.5


def test_of_surfaces_that_coincide_one_counts():
    recipes = draw_recipes(range(300), seed=1)
    recipes = recipes[(recipes["primitives"]["present"].sum(1) == 1) & (recipes["layout"] == 0)][:20]
    recipes["primitives"][:, 1] = recipes["primitives"][:, 0]
    composition = procedural._Composition(recipes, torch.device("cpu"))
    points, primitive, keep = composition._candidates(0, 1000)
    visible = composition._is_visible(points, primitive)
    assert (primitive[keep] == 1).float().mean() > 0.4
    assert torch.equal(visible[keep], primitive[keep] == 0)


def test_a_shape_of_which_nothing_is_left_gets_back_what_was_taken_away():
    recipes = draw_recipes(range(200), seed=1)
    alone = (recipes["primitives"]["present"].sum(1) == 1) & (recipes["layout"] == 0)
    recipes = recipes[alone & (recipes["deformation"] == NONE)][:3]
    whole = surface_points(recipes, 64)
    recipes["primitives"][:, 1] = recipes["primitives"][:, 0]
    for name in ("half_width", "half_height", "corner", "size"):
        recipes["primitives"][name][:, 1] *= 3
    recipes["primitives"]["subtracts"][:, 1] = True
    assert torch.equal(surface_points(recipes, 64), whole)


def test_what_a_shape_gets_back_does_not_depend_on_the_others():
    recipes = draw_recipes(range(3000), seed=1)
    takes = recipes["primitives"]["subtracts"].any(1) & (recipes["primitives"]["present"].sum(1) > 3)
    recipes = recipes[takes][:40]
    # A box that takes all.
    first = (recipes["primitives"]["subtracts"] & recipes["primitives"]["present"]).argmax(1)
    for name in ("half_width", "half_height"):
        recipes["primitives"][name][np.arange(40), first] = 1e3
    together = surface_points(recipes, 32)
    alone = torch.cat([surface_points(recipes[i : i + 1], 32) for i in range(40)], dim=1)
    assert torch.equal(together, alone)


def test_a_shape_without_surface_is_named(monkeypatch):
    recipes = draw_recipes(range(200), seed=1)
    recipes = recipes[(recipes["primitives"]["present"].sum(1) == 1) & (recipes["layout"] == 0)][:3]
    recipes["primitives"][1, 1] = recipes["primitives"][1, 0]
    recipes["primitives"]["subtracts"][1, 1] = True
    for name in ("half_width", "half_height", "corner", "size"):
        recipes["primitives"][name][1, 1] *= 3
    monkeypatch.setattr(procedural, "_limit", lambda num_points: 10_000)
    with pytest.raises(RuntimeError, match=re.escape(f"keys [{recipes['key'][1].tolist()}] have no surface")):
        procedural._sample_in_turn(recipes, 64, torch.device("cpu"), least_kept=0)


# ---- Deformation and normalisation


def test_clouds_are_centered_and_fill_the_unit_sphere():
    clouds = procedural_clouds(range(600), 128, seed=8)
    assert clouds.isfinite().all()
    torch.testing.assert_close(clouds.mean(1), torch.zeros(600, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(clouds.norm(dim=2).amax(1), torch.ones(600))
    # Neither collapsed onto a line nor onto one place.
    extent = (clouds.amax(1) - clouds.amin(1)).sort(dim=1).values
    assert (extent[:, 2] > 0.9).all() and (extent[:, 1] > 0.01).all()


def test_a_bend_keeps_lengths_along_the_middle():
    z = torch.linspace(-1, 1, 2001)[None].double()
    zero = torch.zeros_like(z)
    bent = torch.stack(procedural._DEFORMATIONS[BEND](zero, zero, z, *torch.tensor([[-0.3], [0.9], [0.4]]).double()))
    steps = (bent[:, 0, 1:] - bent[:, 0, :-1]).norm(dim=0)
    torch.testing.assert_close(steps, torch.full_like(steps, 1e-3), atol=1e-6, rtol=0)
    # 0.9 long at 0.4 turns by the unit: 0.36 of a turn.
    ends = bent[1:, 0, [0, -2]] - bent[1:, 0, [1, -1]]
    angle = torch.acos((ends[:, 0] * ends[:, 1]).sum() / ends.norm(dim=0).prod())
    assert float(angle) == pytest.approx(2 * np.pi * 0.36, abs=1e-4)


def test_deformations_change_shapes_and_nothing_else_does():
    recipes = draw_recipes(range(300), seed=9)
    straight = recipes.copy()
    straight["deformation"] = NONE
    points = surface_points(recipes, 64)
    moved = procedural.finish_clouds(recipes, points.clone()) - procedural.finish_clouds(straight, points.clone())
    changed = moved.abs().amax((1, 2)).numpy() > 1e-3
    np.testing.assert_array_equal(changed, recipes["deformation"] != NONE)


# ---- The distribution


def test_everything_that_can_be_drawn_is_drawn_as_often_as_its_weight_says():
    recipes = draw_recipes(range(6000), seed=0)
    primitives = recipes["primitives"]
    for found, weights in (
        (recipes["layout"], LAYOUT_WEIGHTS),
        (recipes["deformation"], DEFORMATION_WEIGHTS),
    ):
        share = np.bincount(found, minlength=len(weights)) / len(recipes)
        np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=0.02)
    assert len(DEFORMATION_WEIGHTS) == len(DEFORMATIONS) and len(LAYOUT_WEIGHTS) == len(LAYOUTS)
    present = primitives[primitives["present"]]
    assert np.bincount(present["kind"], minlength=len(KINDS)).min() > 0.01 * len(present)
    assert np.bincount(present["role"], minlength=len(ROLES)).min() > 0.01 * len(present)
    assert set(primitives["present"].sum(1)) == set(range(1, MAX_PRIMITIVES + 1))
    assert set(present["sides"]) == {0, 3, 4, 5, 6, 8}
    assert 0.1 < present["subtracts"].mean() < 0.4
    for name in ("lies", "cut"):
        assert 0.01 < present[name].mean() < 0.5
    assert (present["ring"] > 1).any() and (present["counts"] > 1).any(0).all() and (present["stretch"] < 1).any()


def test_thin_parts_and_long_ones_occur():
    clouds = procedural_clouds(range(400), 256, seed=0)
    spread = torch.linalg.svdvals(clouds - clouds.mean(1, keepdim=True))
    assert (spread[:, 2] < 0.1 * spread[:, 0]).float().mean() > 0.05
    assert (spread[:, 1] < 0.2 * spread[:, 0]).float().mean() > 0.05
