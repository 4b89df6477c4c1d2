"""Procedural shapes: an endless source of point clouds that look like the parts in a catalogue.

A shape is a composition of 1 to 9 primitives, added or taken away one after the other, then perhaps bent. Its recipe
is drawn by `procedural_recipes`; this module turns recipes into points that lie evenly on the surface.

Notable choices:

- A cloud is a function of (seed, index): the first `num_points` of an endless stream of candidates that lie on the
  surface of the composition. It depends neither on the other clouds of the batch nor on its size, on threads, workers
  or processes; and a smaller cloud is the beginning of a larger one, up to normalisation.
- Every primitive is a cross-section swept along a profile: a circle or a regular polygon, and a rectangle with rounded
  or cut corners. So there is one sampler and one implicit function, and no branch on what a primitive is. Copies are
  sampled by their frames, but tested for by folding space onto one of them.
- Arithmetic is that which IEEE 754 rounds exactly (no library's sine, no sum of floats in an order of its choice), so
  results do not depend on how an operator was vectorised. Square roots are the exception: torch's on a CPU may be off
  in the last bit, so points made there and on a GPU may differ by that.
- Evenness is exact for the composition: what stretches the area of a primitive is paid back by rejection. A bend moves
  the points with the surface, so there the density follows the stretch.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..kernels import DEVICES
from .procedural_recipes import (
    BEND,
    BULGE,
    MAX_PRIMITIVES,
    TAPER,
    TWIST,
    WAVES,
    compose,
    copy_frames,
    draw_recipes,
    mix_bits,
    num_copies,
    own_frame,
)


HAS_KERNEL = "cuda" in DEVICES  # whether a GPU makes shapes by one kernel, from tables
# Candidates are drawn from a table of patches with entries in proportion to their areas. The stride, near the golden
# section of its size, visits all entries and leaves the beginning of any stretch of candidates balanced.
_TABLE_SIZE = 2048
_TABLE_STRIDE = 1265
_SEGMENTS = 8  # of a profile: outer and inner wall, top and bottom, four corners
# Where the numbers of candidates begin in the stream of a shape; its recipe uses those before.
_FIRST_CANDIDATE = 1 << 16
# Candidates of a round: enough work for an operator, few enough to stay in the cache of a core.
_ROUND_SIZE = {"cpu": 1 << 16, "cuda": 1 << 23}
# Of whose first candidates, a balanced choice from all patches, fewer are kept than this, of that shape nearly all was
# taken away: it gets it back. One that keeps none of so many for each point and some millions more has no surface.
_TRIAL, _LEAST_KEPT = _TABLE_SIZE, _TABLE_SIZE // 24
_MOST_CANDIDATES = 64
# Share of the size of a shape within which two surfaces count as one.
_TOLERANCE = 4e-6
_TINY = 1e-30
_FAR = 1e9
# sin(2 pi r) = r * polynomial(r^2) for |r| <= 1/4, to 4e-9; our fit.
_SINE = (39.536706036103595, -76.54978228946068, 81.60100407307, -41.341655031413, 6.283185160089461)


def procedural_clouds(
    indices: Sequence[int], num_points: int = 1024, seed: int = 0, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """
    The clouds of procedural shapes.

    Args:
        indices: numbers of the shapes, 0 to 2 ** 63 - 1, in any order.
        num_points: points of each cloud.
        seed: which sequence of shapes, 0 to 2 ** 63 - 1.
        device: where to make them.

    Returns:
        float32 `(shapes, num_points, 3)`, centred on the mean, the farthest point at distance 1.

    Raises:
        ValueError: if the seed, an index or `num_points` is out of range.
    """
    if num_points < 1:
        raise ValueError(f"`num_points` is {num_points}, expected 1 or more.")
    recipes = draw_recipes(indices, seed)
    return finish_clouds(recipes, surface_points(recipes, num_points, device))


class ProceduralShapes(IterableDataset):
    """
    Endless procedural clouds, one after the other; the workers of a data loader and the processes of a run share them.

    Args:
        num_points: points of each cloud.
        seed: which sequence of shapes.
        start: number of shapes to leave out, to go on where an earlier run ended.
        num_processes, process_index: which processes there are, and which this is.
        device: where to make them.
        block_size: clouds that are made at a time; changes nothing but speed.
    """

    def __init__(
        self,
        num_points: int = 1024,
        seed: int = 0,
        start: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        device: str | torch.device = "cpu",
        block_size: int = 64,
    ):
        self.num_points = num_points
        self.seed = seed
        self.start = start
        self.num_processes = num_processes
        self.process_index = process_index
        self.device = device
        self.block_size = block_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields `points`, float32 `(num_points, 3)`, and `index`, the number of the shape."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        stride = self.num_processes * workers
        first = self.start + self.process_index + self.num_processes * number
        while True:
            indices = range(first, first + stride * self.block_size, stride)
            clouds = procedural_clouds(indices, self.num_points, self.seed, self.device)
            for index, points in zip(indices, clouds, strict=True):
                yield {"points": points, "index": index}
            first = indices.stop


def surface_points(
    recipes: np.ndarray,
    num_points: int,
    device: str | torch.device = "cpu",
    tables: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Points evenly over the surfaces of compositions, before they are bent, turned and normalised.

    Args:
        recipes: `RECIPE` records `(shapes,)`.
        num_points: points of each shape.
        device: where to compute.
        tables: what [`shape_tables`] makes of the recipes, if that was done before; of use on a GPU.

    Returns:
        float32 `(3, shapes, num_points)`, in units of the recipe.
    """
    device = torch.device(device)
    sample = _sample_by_kernel if device.type == "cuda" and HAS_KERNEL else _sample_in_turn
    points, emptied = sample(recipes, num_points, device, _LEAST_KEPT, tables)
    if len(emptied):
        whole = recipes[emptied]
        whole["primitives"]["present"] &= ~whole["primitives"]["subtracts"]
        points[:, _tensor(emptied, device)], _ = sample(whole, num_points, device, 0)
    return points


def finish_clouds(recipes: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """
    Bends, turns and normalises the points of compositions.

    Args:
        recipes: `RECIPE` records `(shapes,)`.
        points: `(3, shapes, num_points)` from [`surface_points`].

    Returns:
        float32 `(shapes, num_points, 3)`.
    """
    device = points.device
    axes = recipes["axes"] / recipes["radius"][:, None, None]
    shift = -(axes @ recipes["middle"][:, :, None])
    points = torch.stack(_transform(_columns(np.concatenate([axes, shift], axis=2), device), points))
    for which, deform in _DEFORMATIONS.items():
        rows = np.flatnonzero(recipes["deformation"] == which)
        if len(rows):
            amounts = _columns(recipes["amounts"][rows], device)
            rows = _tensor(rows, device)
            points[:, rows] = torch.stack(deform(*points[:, rows], *amounts))
    turn = recipes["orientation"] @ recipes["axes"].transpose(0, 2, 1)
    points = torch.stack(_transform(_columns(np.concatenate([turn, np.zeros_like(shift)], axis=2), device), points))
    # Sums of whole numbers do not depend on their order.
    mean = (points * 2.0**24).round().to(torch.int64).sum(2, keepdim=True).double() / (2.0**24 * points.shape[2])
    x, y, z = points - mean.float()
    radius = (x * x + y * y + z * z).amax(1, keepdim=True).sqrt()
    return torch.stack([x / radius, y / radius, z / radius], dim=2)


# ---- Sampling


def shape_tables(recipes: np.ndarray) -> dict[str, torch.Tensor]:
    """
    Recipes in the form in which candidates are drawn and tested, on the CPU.

    Args:
        recipes: `RECIPE` records `(shapes,)`.

    Returns:
        key: int32 `(shapes, 2)`.
        entries: int32 `(shapes * _TABLE_SIZE,)`, the patch of each entry.
        patches: float32 `(len(_PATCH), patches)`.
        frames: float32 `(12, copies)`, from each copy of a primitive to the shape.
        tests: float32 `(MAX_PRIMITIVES, numbers, shapes, 1)`, see `_OUTER` and on.
        adds: boolean `(MAX_PRIMITIVES, shapes, 1)`.
        tolerance: float32 `(shapes, 1)`.
        slots: int32 `(shapes,)`, places of primitives that are used.
    """
    primitives = recipes["primitives"]
    frames, owner = copy_frames(primitives.reshape(-1))
    first_copy = np.searchsorted(owner, np.arange(primitives.size)).reshape(primitives.shape)
    patches, entries = _patch_table(primitives, first_copy)
    cpu = torch.device("cpu")
    return {
        "key": _tensor(recipes["key"], cpu),
        "entries": _tensor(entries, cpu),
        "patches": _float(patches, cpu),
        "frames": _float(frames.reshape(-1, 12).T, cpu),
        "tests": _float(_test_table(primitives).transpose(2, 0, 1)[..., None], cpu),
        "adds": _tensor(~primitives["subtracts"].T[..., None], cpu),
        "tolerance": _float(_TOLERANCE * recipes["radius"][:, None], cpu),
        "slots": _tensor(_used_slots(primitives).astype(np.int32), cpu),
    }


def _used_slots(primitives: np.ndarray) -> np.ndarray:
    """How many places of primitives each shape uses, those that are left out included."""
    return MAX_PRIMITIVES - primitives["present"][:, ::-1].argmax(1)


def _sample_by_kernel(
    recipes: np.ndarray,
    num_points: int,
    device: torch.device,
    least_kept: int,
    tables: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """
    Points `(3, shapes, num_points)`, by one kernel that draws until it is done; and the shapes of whose first
    candidates fewer are kept than `least_kept`, which have no points.
    """
    from ..kernels.shapes import most_shapes, sample_surfaces

    shapes = most_shapes(num_points)
    if len(recipes) > shapes:
        tables = None
    points, found = torch.empty(3, len(recipes), num_points, device=device), []
    for start in range(0, len(recipes), shapes):
        rows = slice(start, start + shapes)
        of_rows = shape_tables(recipes[rows]) if tables is None else tables
        of_rows = {name: table.to(device, non_blocking=True) for name, table in of_rows.items()}
        points[:, rows], count = sample_surfaces(of_rows, num_points, least_kept, _limit(num_points))
        found.append(count.cpu().numpy())
    found = np.concatenate(found) if found else np.empty(0, dtype=np.int32)
    _check_found((found >= 0) & (found < num_points), recipes)
    return points, np.flatnonzero(found < 0)


def _sample_in_turn(
    recipes: np.ndarray,
    num_points: int,
    device: torch.device,
    least_kept: int,
    tables: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """The same operator by operator, some shapes after the other; `tables` are made anew."""
    # Tests go over the primitives in turn, so shapes that have many come first.
    order = np.argsort(-_used_slots(recipes["primitives"]), kind="stable")
    shapes = max(1, _ROUND_SIZE["cpu" if device.type == "cpu" else "cuda"] // num_points)
    points, emptied = torch.empty(3, len(recipes), num_points, device=device), [np.empty(0, dtype=np.int64)]
    for start in range(0, len(order), shapes):
        rows = order[start : start + shapes]
        points[:, _tensor(rows, device)], without = _sample(recipes[rows], num_points, device, least_kept)
        emptied.append(rows[without])
    return points, np.concatenate(emptied)


def _limit(num_points: int) -> int:
    """Candidates after which a shape has no surface."""
    return _MOST_CANDIDATES * num_points + (1 << 22)


def _check_found(incomplete: np.ndarray, recipes: np.ndarray):
    if incomplete.any():
        raise RuntimeError(f"the shapes with the keys {recipes['key'][incomplete].tolist()} have no surface.")


def _sample(
    recipes: np.ndarray, num_points: int, device: torch.device, least_kept: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Points `(3, shapes, num_points)`: rounds of candidates until every shape has its points; and those without."""
    composition = _Composition(recipes, device)
    points = torch.empty(3, len(recipes) * (num_points + 1), device=device)  # a last place for what is too much
    rows, found, drawn = np.arange(len(recipes)), np.zeros(len(recipes), dtype=np.int64), 0
    count = first = max(num_points * 5 // 4 + 1, _TRIAL)
    emptied = np.zeros(len(recipes), dtype=bool)
    while len(rows):
        candidates, keep = composition.select(rows).draw(drawn, count)
        if drawn == 0:
            emptied = (keep[:, :_TRIAL].sum(1) < least_kept).cpu().numpy()
        place = keep.cumsum(1) + _tensor(found[rows, None], device)
        found[rows], drawn = place[:, -1].cpu().numpy(), drawn + count
        place = (place - (num_points + 1)).clamp_(max=0) * keep + _tensor(rows[:, None] * (num_points + 1), device)
        place = place.add_(num_points).view(-1)
        for values, coordinate in zip(points, candidates, strict=True):
            values.scatter_(0, place, coordinate.view(-1))
        incomplete = (found < num_points) & ~emptied
        if drawn > _limit(num_points):
            _check_found(incomplete, recipes)
        rows = np.flatnonzero(incomplete)
        if len(rows):  # the next round is to satisfy most, in no more work than the first
            missing = (num_points - found[rows]) * drawn / np.maximum(found[rows], 1)
            count = int(np.clip(1.05 * np.quantile(missing, 0.75), first // 8 + 1, first * len(recipes) / len(rows)))
    return points.view(3, len(recipes), num_points + 1)[:, :, :num_points], np.flatnonzero(emptied)


class _Composition:
    """
    Recipes in the form in which candidates are drawn and tested.

    Args:
        recipes: `RECIPE` records `(shapes,)`, those with the most primitives first.
        device: where to compute.

    Attributes:
        key, entries, patches, frames, tests, adds, tolerance: see [`shape_tables`].
        offset: int32 `(shapes, 1)`, where the entries of a shape begin.
        num_primitives: int64 `(shapes,)`.
        ringed, gridded: boolean `(MAX_PRIMITIVES, shapes)`, primitives with copies around an axis, and on a grid.
    """

    def __init__(self, recipes: np.ndarray, device: torch.device):
        primitives = recipes["primitives"]
        self.device = device
        for name, table in shape_tables(recipes).items():
            setattr(self, name, table.to(device))
        self.offset = torch.arange(0, len(self.entries), _TABLE_SIZE, dtype=torch.int32, device=device)[:, None]
        self.num_primitives = _used_slots(primitives)
        self.ringed = primitives["ring"].T > 1
        self.gridded = (primitives["counts"] > 1).any(2).T

    def select(self, rows: np.ndarray) -> "_Composition":
        """The same with some of the shapes, in the same order."""
        if len(rows) == len(self.num_primitives):
            return self
        chosen, there = copy.copy(self), _tensor(rows, self.device)
        for name in ("key", "offset", "tolerance"):
            setattr(chosen, name, getattr(self, name).index_select(0, there))
        chosen.tests, chosen.adds = self.tests.index_select(2, there), self.adds.index_select(1, there)
        for name in ("num_primitives", "ringed", "gridded"):
            setattr(chosen, name, getattr(self, name)[..., rows])
        return chosen

    def draw(self, start: int, count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Candidates `start` to `start + count` of each shape, and which of them are on its surface."""
        points, primitive, keep = self._candidates(start, count)
        keep &= self._is_visible(points, primitive)
        return points, keep

    def _candidates(self, start: int, count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """
        Points evenly over the surfaces of all copies of all primitives, once those that are not kept are left out.

        Returns:
            x, y and z, float32 `(shapes, count)`; the primitive that each lies on, as float32; and what is kept.
        """
        number = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
        first, step = self.key[:, :1], self.key[:, 1:]
        entry = (first + number * _TABLE_STRIDE).bitwise_and_(_TABLE_SIZE - 1)
        patch = self.entries.index_select(0, (self.offset + entry).view(-1))
        (
            primitive, first_copy, copies_per_entry, first_entry, radius, z, along_radius, along_z, is_arc, stretch,
            sides, is_circle, slant, density,
        ) = (values.index_select(0, patch).view(entry.shape) for values in self.patches)  # fmt: skip
        counter = first + (number * 2 + _FIRST_CANDIDATE) * step
        along, fine = _two_uniforms(mix_bits(counter))
        around, chance = _two_uniforms(mix_bits(counter.add_(step)))
        fine += entry
        fine -= first_entry
        fine *= copies_per_entry
        instance = fine.floor_().add_(first_copy).to(torch.int32).view(-1)

        # Along the profile: evenly in area on a straight segment, evenly in angle on an arc.
        width = radius * 2
        width += along_radius
        root = along * along_radius
        root *= width
        root += radius * radius
        root = root.clamp_(min=0).sqrt_()
        root += radius
        straight = along * width
        straight /= root.add_(_TINY)
        along *= 0.25
        cosine, sine = _cosine(along), _cosine(0.25 - along)
        radius += along_radius * (is_arc * (cosine - straight)).add_(straight)
        z += along_z * (is_arc * (sine - straight)).add_(straight)
        along_radius *= (is_arc * sine.sub_(1)).add_(1)
        along_z *= (is_arc * cosine.sub_(1)).add_(1)

        # Around the axis: an angle, or a side and a place on it.
        side = around * sides
        number = side.floor()
        is_circle *= around
        is_circle += number
        turn = is_circle.div_(sides)
        cosine, sine = _cosine(turn), _cosine(turn - 0.25)
        off = side.sub_(number).mul_(2).sub_(1).mul_(slant).mul_(radius)
        x = radius * cosine - off * sine
        y = (radius * sine).add_(off.mul_(cosine)).mul_(stretch)

        # The area that a step along the profile and one around the axis span.
        along_radius *= stretch
        along_radius *= along_radius
        sine *= along_z
        cosine *= along_z
        cosine *= stretch
        area = along_radius.add_(sine.mul_(sine)).add_(cosine.mul_(cosine)).sqrt_()
        area *= is_arc.mul_(radius.sub_(1)).add_(1)
        keep = chance < area.mul_(density)

        frame = [values.index_select(0, instance).view(entry.shape) for values in self.frames]
        return _transform(frame, (x, y, z)), primitive, keep

    def _is_visible(self, points: tuple[torch.Tensor, ...], primitive: torch.Tensor) -> torch.Tensor:
        """
        Which points are on the surface of the composition.

        Added, a point must be outside of what the primitives before its own make, taken away, inside; and no later
        primitive may cover it or take it away. Of surfaces that coincide the earliest counts.
        """
        solid = torch.zeros_like(primitive, dtype=torch.bool)
        visible = torch.ones_like(solid)
        wanted = torch.zeros_like(solid)
        for slot in range(self.num_primitives[0]):
            shapes = int((self.num_primitives > slot).sum())
            number, adds = primitive[:shapes], self.adds[slot, :shapes]
            later = number > slot
            margin = (number - slot).clamp_(-1, 1)
            margin *= self.tolerance[:shapes]
            inside = self._distance(slot, [values[:shapes] for values in points]) <= margin
            visible[:shapes] &= ~(inside & (number < slot))
            wanted[:shapes] |= (number == slot) & ~adds
            inside &= later
            solid[:shapes] |= inside & adds
            solid[:shapes] &= ~(inside & ~adds)
        return visible.logical_and_(solid == wanted)

    def _distance(self, slot: int, points: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        The implicit function of a primitive: negative inside, positive outside, the distance to its surface in units
        near to it.
        """
        shapes = len(points[0])
        test = self.tests[slot, :, :shapes]
        points = _transform(test[_OUTER], points)
        for where, unfold in ((self.ringed, _leave_ring), (self.gridded, _leave_grid)):
            rows = np.flatnonzero(where[slot, :shapes])
            if len(rows):
                rows = _tensor(rows, self.device)
                moved = unfold(test.index_select(1, rows), [values.index_select(0, rows) for values in points])
                for values, of_copies in zip(points, moved, strict=True):
                    values.index_copy_(0, rows, of_copies)
        x, y, z = points
        parity, circle, cosine_1, sine_1, cosine_2, sine_2 = test[_CROSS_SECTION]
        center, half_width, slope, half_height, corner_ratio, corner, twice_cut = test[_PROFILE]
        # Distance from the axis to the farthest of the lines along the sides; all are mirrored in y, even ones in x.
        radius = (x * x).add_(y * y).sqrt_().mul_(circle)
        x = torch.maximum(x, x * parity)
        y.abs_()
        torch.maximum(radius, x, out=radius)
        torch.maximum(radius, (x * cosine_1).add_(y * sine_1), out=radius)
        torch.maximum(radius, (x * cosine_2).add_(y * sine_2), out=radius)
        # A rectangle with corners, in the half-plane of z and the distance from the axis.
        across = radius.sub_(center).abs_().sub_(half_width).sub_(z * slope)
        up = z.abs_().sub_(half_height).mul_(corner_ratio)
        inner = torch.maximum(across, up).clamp_(max=0).sub_(corner)
        across.clamp_(min=0)
        up.clamp_(min=0)
        both = (across * up).mul_(twice_cut)
        return across.mul_(across).add_(up.mul_(up)).add_(both).sqrt_().add_(inner)


_PATCH = (
    "primitive", "first_copy", "copies_per_entry", "first_entry", "radius", "z", "along_radius", "along_z", "is_arc",
    "stretch", "sides", "is_circle", "slant", "density",
)  # fmt: skip
# Rows of the table of tests.
_OUTER, _RING, _GRID, _CROSS_SECTION, _PROFILE = (
    slice(*ends) for ends in ((0, 12), (12, 25), (25, 43), (43, 49), (49, 56))
)


def _leave_ring(test: torch.Tensor, points: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Moves points as if each were at the first copy around an axis, not at the one in whose sector it is."""
    copies, *frame = test[_RING]
    x, y, z = points
    # Copies keep clear of the borders of their sectors, so it does no harm if a border is off by a rounding.
    turn = torch.atan2(y, x).mul_(copies / (2 * math.pi)).round_().div_(copies)
    cosine, sine = _cosine(turn), _cosine(turn - 0.25)
    return _transform(frame, (cosine * x + sine * y, cosine * y - sine * x, z))


def _leave_grid(test: torch.Tensor, points: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Moves points as if each were in the middle cell of the grid, not in its own."""
    halves, pitches, rates, frame = test[_GRID].split([2, 2, 2, 12])
    moved = []
    for values, half, pitch, rate in zip(points, halves, pitches, rates, strict=False):
        number = (values * rate).add_(half).round_().clamp_(min=0)
        number = torch.minimum(number, 2 * half).sub_(half)
        moved.append(values - number.mul_(pitch))
    return _transform(frame, (*moved, points[2]))


def _patch_table(primitives: np.ndarray, first_copy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Cuts primitives into patches, one for each segment of their profiles.

    Candidates are even in the numbers along and around a patch. How far the area they stand for falls short of the
    greatest of that patch, and a patch's area of its entries, is made up for by `density`.

    Args:
        primitives: `PRIMITIVE` records `(shapes, MAX_PRIMITIVES)`.
        first_copy: `(shapes, MAX_PRIMITIVES)`, number of the first copy of each.

    Returns:
        float64 `(len(_PATCH), patches)`, and the entries, int32 `(shapes * _TABLE_SIZE,)`.
    """
    center, half_width, half_height, slope, stretch, sides, cut = (
        primitives[name] for name in ("center", "half_width", "half_height", "slope", "stretch", "sides", "cut")
    )
    corner_width, corner_height = np.moveaxis(primitives["corner"], -1, 0)
    rise = slope * half_height
    top, bottom = half_width + rise, half_width - rise
    hollow = center > 0
    zero, high = np.zeros_like(center), half_height + corner_height
    outer, inner = center + half_width, center - half_width
    top_from, bottom_from = np.where(hollow, center - top, 0.0), np.where(hollow, center - bottom, 0.0)
    # Where each segment begins, as radius and height, and how it goes on. Corners end at the level of the caps.
    segments = [
        (center + bottom + corner_width, -half_height, 2 * rise, 2 * half_height),
        (center - bottom - corner_width, -half_height, -2 * rise, 2 * half_height),
        (top_from, high, center + top - top_from, zero),
        (bottom_from, -high, center + bottom - bottom_from, zero),
        *(
            (middle + cut * to, sign * half_height, np.where(cut, -to, to), sign * corner_height)
            for middle, to in ((outer, corner_width), (inner, -corner_width))
            for sign in (1, -1)
        ),
    ]
    radius, height, along_radius, along_height = np.moveaxis(
        np.array(segments), 0, -1
    )  # (shapes, primitives, segments)
    exists = np.repeat(primitives["present"][..., None], _SEGMENTS, axis=2)
    exists[..., [1, 6, 7]] &= hollow[..., None]
    is_arc = np.zeros_like(radius)
    is_arc[..., 4:] = ~cut[..., None]

    def spread(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[..., None], radius.shape)

    regular = np.maximum(sides, 3)
    slant = np.where(sides > 0, np.tan(np.pi / regular), 0.0)
    perimeter = np.where(sides > 0, 2 * sides * slant, 2 * np.pi)
    widest = np.maximum(stretch, 1.0)[..., None]
    across, up = stretch[..., None] * np.abs(along_radius), widest * np.abs(along_height)
    greatest = np.where(is_arc > 0, np.maximum(across, up), np.hypot(across, up))
    farthest = np.where(is_arc > 0, np.maximum(radius, radius + along_radius), 1.0)
    mean_radius = np.where(is_arc > 0, np.pi / 2 * farthest, radius + along_radius / 2)
    copies = num_copies(primitives)
    weight = (exists * greatest * mean_radius * (perimeter * copies)[..., None]).reshape(len(primitives), -1)
    weight = np.maximum(weight, 0.0)

    some = weight > 0
    free = _TABLE_SIZE - some.sum(1, keepdims=True)
    count = np.floor(weight / weight.sum(1, keepdims=True) * free).astype(np.int64) + some
    count[np.arange(len(count)), weight.argmax(1)] += _TABLE_SIZE - count.sum(1)
    share = weight / np.maximum(count, 1)
    share /= share.max(1, keepdims=True)
    density = share.reshape(radius.shape) / np.maximum(greatest * farthest, _TINY)
    last_entry = np.cumsum(count, axis=1).reshape(radius.shape)
    count = count.reshape(radius.shape)
    properties = [
        spread(np.broadcast_to(np.arange(MAX_PRIMITIVES), primitives.shape)),
        spread(first_copy),
        spread(copies) / np.maximum(count, 1) * (1 - 1e-6),
        last_entry - count,
        radius,
        height,
        along_radius,
        along_height,
        is_arc,
        spread(stretch),
        spread(np.maximum(sides, 1)),
        spread(sides == 0),
        spread(slant),
        density,
    ]
    entries = np.repeat(np.arange(count.size, dtype=np.int32), count.reshape(-1))
    return np.stack(properties).reshape(len(_PATCH), -1), entries


def _test_table(primitives: np.ndarray) -> np.ndarray:
    """The numbers of the implicit functions of primitives, float64 `(56, *primitives.shape)`, see `_OUTER` and on."""
    flat = primitives.reshape(-1)
    own, array, frame = own_frame(flat), flat["array"], flat["frame"]
    ringed, gridded = flat["ring"] > 1, (flat["counts"] > 1).any(1)
    # A point goes back by `outer` as far as there is no copying, then by `inner` to the grid, then by `own`.
    to_grid = np.where(gridded[:, None, None], array, compose(array, own))
    outer = _inverse(np.where(ringed[:, None, None], frame, compose(frame, to_grid)))
    inner, own = _inverse(to_grid), _inverse(own)
    stretch = flat["stretch"]
    outer[:, 1] /= np.where(ringed | gridded, 1.0, stretch)[:, None]
    inner[:, 1] /= np.where(gridded, 1.0, stretch)[:, None]
    own[:, 1] /= stretch[:, None]

    sides, (corner_width, corner_height) = flat["sides"], flat["corner"].T
    # The sides of polygons whose normals lie from 0 to 90 degrees, those of odd ones from 0 to 180: three at most.
    angles = np.where(sides > 0, 2 * np.pi / np.maximum(sides, 3), 0.0)
    other_angles = np.where((sides == 5) | (sides == 8), 2 * angles, angles)
    rounded = corner_height > 0
    return np.concatenate(
        [
            outer.reshape(-1, 12).T,
            [flat["ring"]],
            inner.reshape(-1, 12).T,
            (flat["counts"].T - 1) / 2,
            flat["pitch"].T,
            1 / flat["pitch"].T,
            own.reshape(-1, 12).T,
            [np.where(sides % 2 == 0, -1.0, 1.0), sides == 0],
            [np.cos(angles), np.sin(angles), np.cos(other_angles), np.sin(other_angles)],
            [flat["center"], np.where(flat["present"], flat["half_width"], -_FAR), flat["slope"], flat["half_height"]],
            [np.where(rounded, corner_width / np.where(rounded, corner_height, 1.0), 1.0), corner_width],
            [2.0 * flat["cut"]],
        ]
    ).reshape(-1, *primitives.shape)


def _inverse(frames: np.ndarray) -> np.ndarray:
    """Frames `(n, 3, 4)` that undo rigid ones."""
    back = frames[:, :, :3].transpose(0, 2, 1)
    return np.concatenate([back, -(back * frames[:, None, :, 3]).sum(2, keepdims=True)], axis=2)


# ---- Arithmetic


def _transform(frame: Sequence[torch.Tensor], points: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Points, as x, y and z, under a 3 x 4 matrix given number by number."""
    x, y, z = points
    return tuple(
        (x * frame[row]).add_(y * frame[row + 1]).add_(z * frame[row + 2]).add_(frame[row + 3]) for row in (0, 4, 8)
    )


def _cosine(turns: torch.Tensor) -> torch.Tensor:
    """cos(2 pi turns)."""
    rest = (turns - turns.round()).abs_().neg_().add_(0.25)
    square = rest * rest
    value = square * _SINE[0]
    for coefficient in _SINE[1:-1]:
        value = value.add_(coefficient).mul_(square)
    return value.add_(_SINE[-1]).mul_(rest)


def _two_uniforms(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A number in (0, 1) of 20 bits and one of 12."""
    coarse = (bits >> 12).bitwise_and_(0xFFFFF).float()
    fine = bits.bitwise_and_(0xFFF).float()
    return coarse.add_(0.5).mul_(2.0**-20), fine.add_(0.5).mul_(2.0**-12)


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _float(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return _tensor(values.astype(np.float32), device)


def _columns(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of shapes, `(shapes, ...)`, as columns `(numbers, shapes, 1)`."""
    return _float(values.reshape(len(values), math.prod(values.shape[1:])).T, device)[..., None]


# ---- Deformations: x, y, z `(shapes, num_points)` and amounts `(shapes, 1)`, in the frame where z is the long axis


def _taper(x, y, z, amount, *_):
    grow = 1 + amount * z
    return x * grow, y * grow, z


def _bulge(x, y, z, amount, *_):
    grow = 1 + amount * (1 - z * z)
    return x * grow, y * grow, z


def _twist(x, y, z, turns, *_):
    cosine, sine = _cosine(turns * z), _cosine(turns * z - 0.25)
    return cosine * x - sine * y, sine * x + cosine * y, z


def _bend(x, y, z, begin, length, curvature, *_):
    """Along z, a stretch is wound up around an axis along x, and what comes after it goes straight on."""
    wound = torch.minimum((z - begin).clamp(min=0), length)
    rest = z - begin - wound
    radius = 1 / (2 * math.pi * curvature)
    cosine, sine = _cosine(curvature * wound), _cosine(curvature * wound - 0.25)
    return x, radius - (radius - y) * cosine + rest * sine, (radius - y) * sine + rest * cosine


def _waves(x, y, z, *amounts):
    moved = [x, y, z]
    for wave in (amounts[:7], amounts[7:]):
        swing = _cosine(wave[0] * x + wave[1] * y + wave[2] * z + wave[3])
        moved = [values + shift * swing for values, shift in zip(moved, wave[4:], strict=True)]
    return tuple(moved)


_DEFORMATIONS = {TAPER: _taper, BULGE: _bulge, TWIST: _twist, BEND: _bend, WAVES: _waves}
