"""Recipes of procedural shapes: which primitives, how large, what is attached where, how the whole is bent.

A shape is a base and up to eight features, each attached to a part before it the way parts of machines are: on a face,
in rows, around an axis, through the body or into it. `FEATURES` is the distribution, one row a feature; the code below
it turns fractions into lengths.

Notable choices:

- A recipe is a function of (seed, index) alone: its numbers are a hash of both, and nothing looks at the other rows.
- Recipes are made on the CPU in float64, so every device gets the same ones. They are small; points are what is many.
- Copies belong to a primitive: it may stand on a grid, and the grid around an axis. What is attached to a copied
  primitive is copied with it. Copies never overlap: each stays in its cell of the grid and in its sector of the ring.
- Lengths follow the part that a feature is attached to. The unit is the half-width of the base.
- Arrays are `(primitives, shapes)` while a recipe is drawn, and what does not depend on another part is drawn for all
  primitives at once: the time goes into calls of numpy, not into numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np


VERSION = 2  # another one wherever (seed, index) would give another shape
MAX_PRIMITIVES = 9
KINDS = ("box", "sphere", "cylinder", "cone", "torus", "capsule", "ellipsoid", "prism", "tube")
BOX, SPHERE, CYLINDER, CONE, TORUS, CAPSULE, ELLIPSOID, PRISM, TUBE = range(len(KINDS))
LAYOUTS = ("solid", "open", "wireframe")  # open: the base is left out, what is attached to it stays
SOLID, OPEN, WIREFRAME = range(len(LAYOUTS))
REACHES = ("outward", "inward", "through", "loose")
_OUTWARD, _INWARD, _THROUGH, _LOOSE = range(len(REACHES))
DEFORMATIONS = ("none", "taper", "bulge", "twist", "bend", "waves")
NONE, TAPER, BULGE, TWIST, BEND, WAVES = range(len(DEFORMATIONS))

# One primitive. Its axis is its own z. Its cross-section is a circle or a regular polygon, stretched along y; its
# profile, in the half-plane of z and the distance from the axis (of polygons: to a side), is a rectangle with rounded
# or cut corners. Frames are a rotation and, in the last column, a shift. From the primitive to the shape a point goes
# through a turn of z to x if it lies, `element`, its place on the grid, `array`, its turn in the ring, and `frame`.
PRIMITIVE = np.dtype(
    [
        ("role", "i1"),  # index into ROLES
        ("kind", "i1"),  # index into KINDS
        ("present", "?"),
        ("subtracts", "?"),  # taken away from what the primitives before it make
        ("parent", "i1"),  # what it is attached to
        ("size", "f8", 3),  # half-sizes along its own axes
        ("sides", "i1"),  # of the cross-section; 0 is a circle
        ("stretch", "f8"),  # of the cross-section along y
        ("center", "f8"),  # distance of the profile's middle from the axis; 0 where no hole runs along it
        ("half_width", "f8"),  # of the profile without its corners
        ("half_height", "f8"),
        ("slope", "f8"),  # growth of the half-width with z; only without corners
        ("corner", "f8", 2),  # width and height of the corners
        ("cut", "?"),  # corners are cut rather than rounded
        ("lies", "?"),
        ("element", "f8", (3, 4)),
        ("extent", "f8", 3),  # half-sizes of its box along the axes of `element`
        ("counts", "i4", 2),  # copies on the grid along x and y
        ("pitch", "f8", 2),  # and their distance
        ("array", "f8", (3, 4)),
        ("ring", "i4"),  # copies around z
        ("frame", "f8", (3, 4)),
    ],
    align=True,
)
# One shape. Deformations act where the middle of its box is 0, its longest half-size 1 and along z, its shortest y.
RECIPE = np.dtype(
    [
        ("key", "i4", 2),  # of its random numbers, see `shape_keys`
        ("layout", "i1"),  # index into LAYOUTS
        ("primitives", PRIMITIVE, MAX_PRIMITIVES),
        ("middle", "f8", 3),
        ("radius", "f8"),
        ("axes", "f8", (3, 3)),
        ("deformation", "i1"),  # index into DEFORMATIONS
        ("amounts", "f8", 14),
        ("orientation", "f8", (3, 3)),
    ],
    align=True,
)


@dataclass(frozen=True)
class Feature:
    """
    A way in which a primitive is attached to another.

    Pairs are the ends of a range; height, width and depth are drawn evenly on a log scale, all else evenly.

    Args:
        name: what it is called.
        weight: how often it is drawn, relative to the others.
        kinds: what it is made of, with weights.
        height: how far it reaches outward, or beyond both faces, as a multiple of the part's mean half-size (their
            geometric mean); inward, as a share of the part.
        width, depth: the share of a copy's cell that it fills along the edges of the face; without `depth`, one share
            for both.
        faces: weights of the part's top, bottom and four sides.
        reach: `"outward"` from the face, `"inward"` from it, `"through"` the part, or `"loose"`: anywhere in any pose.
        subtracts: whether it is taken away.
        columns, rows: copies along the edges of the face.
        ring: copies around the part's axis.
        square: probability that its width and depth are made equal.
        spread: 0 in the middle of the face, 1 out to its edge; below 0 counts as 0.
        lies: probability that its axis lies along the face.
        leans: probability that it leans.
    """

    name: str
    weight: float
    kinds: dict[str, float]
    height: tuple[float, float]
    width: tuple[float, float]
    depth: tuple[float, float] | None = None
    faces: tuple[float, float, float] = (1, 0, 0)
    reach: str = "outward"
    subtracts: bool = False
    columns: tuple[int, int] = (1, 1)
    rows: tuple[int, int] = (1, 1)
    ring: tuple[int, int] = (1, 1)
    square: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)
    lies: float = 0.0
    leans: float = 0.0


_ANY = {
    "box": 4,
    "cylinder": 4,
    "prism": 2,
    "cone": 2,
    "tube": 2,
    "sphere": 1,
    "ellipsoid": 2,
    "capsule": 2,
    "torus": 1,
}
_PIN = {"box": 4, "cylinder": 4, "capsule": 1, "prism": 1, "cone": 1}
_HOLE = {"cylinder": 5, "box": 3, "prism": 1}
_ROD = {"cylinder": 4, "capsule": 2, "box": 1, "prism": 1, "tube": 1}

# fmt: off
FEATURES = (
    Feature("boss", 14, _ANY, (0.15, 2.0), (0.25, 1.0), faces=(5, 1, 4), square=0.7, spread=(-0.8, 0.8), lies=0.15,
            leans=0.12),
    Feature("flange", 5, {"box": 3, "cylinder": 3, "prism": 1}, (0.05, 0.25), (1.1, 2.2), faces=(1, 1, 0), square=0.3),
    Feature("pins", 9, _PIN, (0.2, 2.0), (0.12, 0.6), faces=(2, 2, 1), columns=(2, 10), rows=(1, 4), square=0.9,
            spread=(0.8, 1.0)),
    Feature("fins", 6, {"box": 5, "cylinder": 1}, (0.2, 1.5), (0.12, 0.5), (0.7, 1.0), faces=(3, 0, 1),
            columns=(3, 10), spread=(0.9, 1.0)),
    Feature("legs", 6, _PIN, (0.4, 3.0), (0.15, 0.6), faces=(1, 3, 0), columns=(2, 2), rows=(2, 2), square=0.7,
            spread=(0.8, 1.0)),
    Feature("walls", 7, {"box": 1}, (0.4, 2.5), (0.05, 0.25), (0.6, 1.0), faces=(4, 1, 1), columns=(1, 2),
            spread=(1.0, 1.0)),
    Feature("leads", 7, {"box": 4, "cylinder": 1}, (0.15, 1.0), (0.2, 0.65), (0.05, 0.3), faces=(0, 0, 1),
            columns=(1, 10), ring=(2, 2), spread=(0.8, 1.0)),
    Feature("axle", 7, _ROD, (0.1, 2.5), (0.04, 0.4), faces=(1, 0, 1), reach="through", square=1.0,
            spread=(-1.0, 0.6)),
    Feature("studs", 5, _ANY, (0.15, 1.5), (0.5, 0.95), faces=(3, 1, 0), ring=(3, 12), square=0.7),
    Feature("teeth", 6, {"box": 4, "cylinder": 2, "cone": 1, "capsule": 1, "prism": 1, "ellipsoid": 1}, (0.1, 1.2),
            (0.4, 0.9), (0.4, 1.0), faces=(0, 0, 1), ring=(3, 16)),
    Feature("holes", 9, _HOLE, (0.05, 0.1), (0.2, 0.75), faces=(2, 0, 1), reach="through", subtracts=True,
            columns=(1, 4), rows=(1, 3), square=0.8, spread=(-0.6, 1.0)),
    Feature("ring_holes", 5, _HOLE, (0.05, 0.1), (0.5, 0.9), reach="through", subtracts=True, ring=(3, 12),
            square=0.8),
    Feature("shell", 9, {"box": 1}, (0.5, 0.97), (0.75, 0.95), faces=(4, 1, 1), reach="inward", subtracts=True),
    Feature("groove", 6, {"box": 4, "cylinder": 1, "prism": 1}, (0.05, 0.7), (0.15, 0.6), (1.1, 1.3), faces=(3, 0, 1),
            reach="inward", subtracts=True, columns=(1, 5), spread=(-0.5, 1.0), lies=0.2),
    Feature("notches", 3, _HOLE, (0.04, 0.15), (0.4, 0.8), (0.5, 1.2), faces=(0, 0, 1), reach="inward",
            subtracts=True, ring=(3, 16)),
    Feature("loop", 3, {"torus": 1}, (0.4, 1.5), (0.06, 0.25), (0.4, 1.0), faces=(1, 0, 1), spread=(-0.8, 0.8),
            lies=1.0),
    Feature("loose", 8, _ANY, (0.2, 1.2), (0.2, 1.0), (0.1, 1.0), reach="loose", square=0.5),
    Feature("cut", 2, _ANY, (0.2, 0.8), (0.2, 0.8), reach="loose", subtracts=True, square=0.5),
    # Drawn by the wireframe layout only: the edges of the base, a third of them at a time.
    Feature("edges", 0, {"capsule": 2, "cylinder": 1, "box": 1}, (1.0, 1.0), (1.0, 1.0), reach="through",
            columns=(2, 2), rows=(2, 2), square=1.0, spread=(1.0, 1.0)),
)
# fmt: on
ROLES = ("base", *(feature.name for feature in FEATURES))

# Weights of 1 to 9 primitives, of the layouts, and of what a base is.
COUNT_WEIGHTS = (7, 13, 17, 17, 14, 11, 9, 6, 6)
LAYOUT_WEIGHTS = (91, 3, 6)
BASE_WEIGHTS = (40, 4, 21, 5, 4, 5, 6, 8, 7)
# Half-heights of bases of half-width 1 - plates, blocks, towers, wires - and their weights.
BASE_HEIGHTS = ((0.03, 0.25), (0.3, 1.5), (1.5, 8.0), (10.0, 40.0))
BASE_HEIGHT_WEIGHTS = (32, 38, 25, 5)
DEFORMATION_WEIGHTS = (64, 7, 6, 6, 9, 8)
# As built, turned by right angles, turned anyhow.
ORIENTATION_WEIGHTS = (50, 32, 18)
EDGE_THICKNESS = (0.015, 0.08)

# The numbers of sides that each kind is drawn from: prisms, pyramids among cones, square and hexagonal tubes, picture
# frames among tori. 0 is a circle.
_SIDES = (
    (4,),
    (0,),
    (0,),
    (0, 0, 0, 0, 4),
    (0,) * 9 + (4,),
    (0,),
    (0,),
    (3, 3, 3, 5, 6, 6, 6, 6, 8, 8),
    (0, 0, 0, 4, 6),
)
_ROUND = np.array([0.0, 1.0, 0.85, 0.85, 1.0, 1.0, 0.0, 0.85, 0.9])  # probability of a regular cross-section
_CURVED = np.isin(np.arange(len(KINDS)), (SPHERE, CONE, TORUS, CAPSULE, ELLIPSOID))  # no flat faces
_CLEARANCE = 0.95  # share of its sector that a copy may fill

# Axes (u, v, normal), as columns, of the faces +z, -z, +x, -x, +y, -y, and of the same with u along the other edge.
_FACES = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
        [[0, 0, -1], [-1, 0, 0], [0, 1, 0]],
        [[-1, 0, 0], [0, 0, 1], [0, 1, 0]],
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    ],
    dtype=np.float64,
)
_FACES = np.concatenate([_FACES, _FACES @ [[0, -1, 0], [1, 0, 0], [0, 0, 1]]])
_FACE_ORDER = np.abs(_FACES).argmax(1)  # the coordinates that are u, v and the normal
_IDENTITY = np.eye(3, 4)

# A hash of 32 bits with low bias by Chris Wellons: two multipliers between three shifts.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)


def draw_recipes(indices: Sequence[int], seed: int = 0) -> np.ndarray:
    """
    The recipes of shapes.

    Args:
        indices: numbers of the shapes, 0 to 2 ** 63 - 1, in any order.
        seed: which sequence of shapes, 0 to 2 ** 63 - 1.

    Returns:
        `RECIPE` records `(shapes,)`.

    Raises:
        ValueError: if the seed or an index is out of range.
    """
    indices = np.asarray(indices, dtype=np.int64).reshape(-1)
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` is {seed}, expected 0 to 2 ** 63 - 1.")
    if (indices < 0).any():
        raise ValueError(f"`indices` holds {indices.min()}, expected 0 or more.")
    recipes = np.zeros(len(indices), dtype=RECIPE)
    recipes["key"] = shape_keys(seed, indices)
    draws = _Draws(recipes["key"])
    count = 1 + _choose(COUNT_WEIGHTS, draws.one())
    layout = recipes["layout"] = _choose(LAYOUT_WEIGHTS, draws.one())
    primitives = recipes["primitives"].T  # (primitives, shapes)
    primitives["present"] = np.arange(MAX_PRIMITIVES)[:, None] < np.maximum(count, np.array([1, 2, 4])[layout])
    primitives["present"][0] &= layout == SOLID
    plans = _draw_plans(primitives, layout, draws)
    _draw_base(primitives[0], layout, plans, draws)
    for slot in range(1, MAX_PRIMITIVES):
        _Attachment(primitives, slot, plans)
    _draw_profiles(primitives, draws)
    _draw_deformation(recipes, _measure(recipes), draws)
    recipes["orientation"] = _orientation(*(draws.one() for _ in range(5)))
    return recipes


def mix_bits(bits: Any) -> Any:
    """A one-to-one hash of int32 numbers, arrays or tensors; overflow wraps."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * MULTIPLIERS[0]
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * MULTIPLIERS[1]
    return bits ^ ((bits >> 16) & 0xFFFF)


def shape_keys(seed: int, indices: np.ndarray) -> np.ndarray:
    """
    The keys of the random numbers of shapes: the n-th number of a shape is `mix_bits(start + n * step)`.

    Returns:
        int32 `(shapes, 2)`: start, and odd step. No two of the first 2 ** 32 shapes of a seed share their start.
    """
    keys = np.empty((len(indices), 2), dtype=np.int32)
    for lane, first in enumerate((0x243F6A88, 0x13198A2E)):
        bits = np.full(len(indices), first, dtype=np.int32)
        for word in (np.int64(seed), np.int64(seed) >> 32, indices >> 32, indices):
            bits = mix_bits(bits ^ word.astype(np.int32))
        keys[:, lane] = bits
    keys[:, 1] |= 1
    return keys


def num_copies(primitives: np.ndarray) -> np.ndarray:
    """Copies of each primitive, of the shape of `primitives`."""
    return primitives["ring"] * primitives["counts"][..., 0] * primitives["counts"][..., 1]


def copy_frames(primitives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Where the copies of primitives are.

    Args:
        primitives: `PRIMITIVE` records `(primitives,)`.

    Returns:
        float64 `(copies, 3, 4)`, from the primitive's own frame to the shape; and int64 `(copies,)`, ascending: the
        primitive that each is a copy of.
    """
    turned, turn = _expand(primitives["ring"])
    array = primitives["array"][turned]
    angle = 2 * np.pi * turn / primitives["ring"][turned]
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    around = array.copy()
    around[:, 0] = cosine * array[:, 0] - sine * array[:, 1]
    around[:, 1] = sine * array[:, 0] + cosine * array[:, 1]
    around = compose(primitives["frame"][turned], around)
    own = compose(around, own_frame(primitives)[turned])

    counts, pitch = primitives["counts"][turned], primitives["pitch"][turned]
    placed, number = _expand(counts[:, 0] * counts[:, 1])
    frames = own[placed]
    for axis, step in enumerate(np.divmod(number, counts[placed, 1])):
        step = (step - (counts[placed, axis] - 1) / 2) * pitch[placed, axis]
        frames[:, :, 3] += around[placed, :, axis] * step[:, None]
    return frames, turned[placed]


def own_frame(primitives: np.ndarray) -> np.ndarray:
    """From the primitives' own frames to the cells of their grids: `(primitives, 3, 4)`."""
    frame = primitives["element"].copy()
    lying = np.flatnonzero(primitives["lies"])
    u, v, normal = np.moveaxis(frame[lying, :, :3], 2, 0)
    frame[lying, :, :3] = np.stack([normal, -v, u], axis=2)
    return frame


# ---- The base and its features


def _draw_plans(primitives: np.ndarray, layout: np.ndarray, draws: "_Draws") -> dict[str, np.ndarray]:
    """
    What is drawn for the features without a look at the parts they are attached to: arrays `(primitives, shapes)`.

    Fills in role, parent and number of sides.
    """
    slot = np.arange(MAX_PRIMITIVES)[:, None]
    edges = (layout == WIREFRAME) & (slot >= 1) & (slot <= 3)
    draw = draws.each()
    role = 1 + np.where(
        layout == OPEN,  # what is taken away there might be all there is
        _choose([0 if feature.subtracts else feature.weight for feature in FEATURES], draw),
        _choose([feature.weight for feature in FEATURES], draw),
    )
    role[edges], role[0] = ROLES.index("edges"), 0
    primitives["role"], primitives["subtracts"] = role, _COLUMNS["subtracts"][role]

    def between(name: str, log: bool = False) -> np.ndarray:
        low, high = _COLUMNS[name][:, role]
        return _between(low, high, draws.each(), log)

    # The base, the latest or any part before this one, but nothing that is taken away.
    draw, anywhere = draws.each(), (slot * draws.each()).astype(np.int8)
    parent = np.where(edges | (draw < 0.5), 0, np.where(draw < 0.85, slot - 1, anywhere))
    shapes = np.arange(len(layout))
    for number in range(1, MAX_PRIMITIVES):
        removed = primitives["subtracts"][parent[number], shapes]
        parent[number] = np.where(removed, parent[parent[number], shapes], parent[number])
    primitives["parent"] = parent

    kind = _choose_from(_COLUMNS["kinds"][role], draws.each())
    side = _choose_from(_COLUMNS["faces"][role], draws.each())
    leans, lean = draws.each() < _COLUMNS["leans"][role], _between(-0.9, 0.9, draws.each())
    return {
        "reach": _COLUMNS["reach"][role],
        "edges": np.where(edges, _between(*EDGE_THICKNESS, draws.one(), log=True), 0.0),
        "kind": np.where(role == ROLES.index("shell"), -1, kind),  # that of the part
        "stays_round": draws.each(),
        "sides": draws.each(),
        "amount": between("height", log=True),
        "width": between("width", log=True),
        "depth": between("depth", log=True),
        "square": draws.each() < _COLUMNS["square"][role],
        "side": np.where(edges, 2 * slot - 2, np.where(side == 2, 2 + (4 * draws.each()).astype(int), side)),
        "turned": draws.each() < 0.5,
        "columns": between("columns").astype(int),
        "rows": between("rows").astype(int),
        "ring": between("ring").astype(int),
        "pairs": np.where(_COLUMNS["ring"][1, role] < 3, np.where(draws.each() < 0.6, 2, 4), 0),
        "middle": _between(0.55, 0.85, draws.each()),
        "spread": np.maximum(between("spread"), 0),
        "signs": np.stack([np.sign(draws.each() - 0.5), np.sign(draws.each() - 0.5)], axis=1),
        "lies": draws.each() < _COLUMNS["lies"][role],
        "lean": np.where(leans, lean, 0.0),
        "pose": _orientation(*(draws.each() for _ in range(5))),
        "place": 2 * np.stack([draws.each() for _ in range(3)], axis=2) - 1,
    }


def _draw_base(base: np.ndarray, layout: np.ndarray, plans: dict[str, np.ndarray], draws: "_Draws"):
    wire = layout == WIREFRAME
    base["kind"] = np.where(wire, BOX, _choose(BASE_WEIGHTS, draws.one()))
    low, high = np.array(BASE_HEIGHTS)[_choose(BASE_HEIGHT_WEIGHTS, draws.one())].T
    height = _between(np.where(wire, 0.3, low), np.where(wire, 3.0, high), draws.one(), log=True)
    depth = np.where(draws.one() < 0.4, 1.0, _between(0.2, 1.0, draws.one(), log=True))
    _fit_kind(base, np.ones_like(depth), depth, height, plans["stays_round"][0], plans["sides"][0])
    base["ring"] = base["counts"] = 1
    base["pitch"] = 1.0
    base["frame"] = base["array"] = base["element"] = _IDENTITY


class _Attachment:
    """
    Attaches one feature in every shape: on which face, how many copies, how large and where.

    Lengths `u`, `v` and `n` are along the edges and the normal of the face.
    """

    def __init__(self, primitives: np.ndarray, slot: int, plans: dict[str, np.ndarray]):
        self.part, self.plan = primitives[slot], SimpleNamespace(**{name: plan[slot] for name, plan in plans.items()})
        self.parent = primitives[self.part["parent"], np.arange(primitives.shape[1])]
        self.copied = num_copies(self.parent) > 1
        self.size = np.where(self.copied[:, None], self.parent["extent"], self.parent["size"])
        self._choose_reach()
        self._choose_face()
        self._measure_room()
        self._choose_size()
        self._place()

    def _choose_reach(self):
        """Copies stay in their cells, so what is attached to them stands on them, or is taken away."""
        reach, subtracts = self.plan.reach, self.part["subtracts"]
        self.loose = (reach == _LOOSE) & ~self.copied
        self.through = (reach == _THROUGH) & (subtracts | ~self.copied)
        self.inward = reach == _INWARD
        self.outward = ~(self.loose | self.through | self.inward)

    def _choose_face(self):
        plan, copied, x, y = self.plan, self.copied, self.size[:, 0], self.size[:, 1]
        ring = np.where(copied, 1, plan.ring)
        side = np.where(copied, 0, plan.side)
        around = ring > 1
        self.around_side = around & (side >= 2)
        self.around_top = around & (side < 2)
        # Around the sides of a polygon each side has its own; of what is stretched, only opposite sides are equal.
        sides = self.parent["sides"]
        fitting = np.where(plan.pairs > 0, plan.pairs, np.where(sides > 0, sides, ring))
        fitting = np.where(np.abs(x - y) < 1e-6 * x, fitting, 2)
        self.ring = np.where(self.around_side, fitting, ring)
        self.on_top = side < 2
        self.face = np.where(self.around_side, 2, side) + 6 * (plan.turned & ~around & ~copied)
        self.columns, self.rows = np.where(copied, 1, plan.columns), np.where(copied, 1, plan.rows)
        self.several = self.columns * self.rows * self.ring > 1
        self.half_u, self.half_v, self.half_n = np.take_along_axis(self.size, _FACE_ORDER[self.face], axis=1).T

    def _measure_room(self):
        """How far the feature reaches, how deep its foot is sunk so that nothing floats, and its room on the face."""
        plan, sides, half_u, half_v, half_n = self.plan, self.parent["sides"], self.half_u, self.half_v, self.half_n
        length = plan.amount * np.cbrt(self.size[:, 0] * self.size[:, 1] * self.size[:, 2])
        flat = np.where(self.on_top, ~_CURVED[self.parent["kind"]], sides == 4) & ~(self.parent["lies"] & self.copied)
        sunk = np.where(flat, np.minimum(0.2 * length, 0.5 * half_n), 0.7 * half_n)
        self.sunk = np.where(self.around_side, 0.15 * half_n, sunk)
        reach = np.where(self.inward, 2 * plan.amount * half_n, np.where(self.loose, length, (length + self.sunk) / 2))
        self.reach = np.where(self.through, half_n + np.where(plan.edges > 0, plan.edges, length), reach)

        slit = np.where(self.ring > 2, np.tan(np.pi / np.maximum(self.ring, 3)) * _CLEARANCE, np.inf)
        inner = half_n - np.where(self.inward, self.reach, self.sunk)
        inset = np.where((sides != 4) & self.several, 0.68, 1.0)  # of a square in a circle, roughly
        radius = np.minimum(half_u, half_v)
        self.middle = plan.middle * radius
        room_u = half_u * inset
        room_u = np.where(self.around_side, np.minimum(room_u, inner * slit), room_u)
        room_v = np.where(self.on_top, half_v * inset, half_v)
        between = np.minimum(half_v, (2 * self.middle - radius) * slit)  # its neighbours, where it is nearest the axis
        self.room_u = np.where(self.around_top, radius - self.middle, room_u)
        self.room_v = np.where(self.around_top, between, room_v)

    def _choose_size(self):
        plan, part, parent = self.plan, self.part, self.parent
        widest = np.where(self.copied, 1.0, np.inf)
        depth = np.where(np.isnan(plan.depth), plan.width, plan.depth)
        half_u = np.minimum(plan.width, widest) * self.room_u / self.columns
        half_v = np.minimum(depth, widest) * self.room_v / self.rows
        narrow = np.where(plan.edges > 0, plan.edges, np.minimum(half_u, half_v))
        half_u, half_v = np.where(plan.square, narrow, half_u), np.where(plan.square, narrow, half_v)

        alike = np.where(parent["sides"] == 4, BOX, np.where(parent["sides"] > 0, PRISM, CYLINDER))
        alike = np.where((parent["kind"] == SPHERE) | (parent["kind"] == ELLIPSOID), ELLIPSOID, alike)
        part["kind"] = np.where(plan.kind < 0, alike, plan.kind)
        lies = part["lies"] = plan.lies & ~self.loose & ~self.copied
        x, z = np.where(lies, self.reach, half_u), np.where(lies, half_u, self.reach)
        _fit_kind(part, x, half_v, z, plan.stays_round, plan.sides)
        part["extent"] = np.where(lies[:, None], part["size"][:, ::-1], part["size"])

    def _place(self):
        plan, part, parent, copied = self.plan, self.part, self.parent, self.copied
        half_u, half_v, rise = part["extent"].T
        pitch_u, place_u = _distribute(self.columns, self.room_u, half_u, plan.spread)
        pitch_v, place_v = _distribute(self.rows, self.room_v, half_v, plan.spread)
        place_u = np.where(self.around_top, self.middle, plan.signs[0] * place_u)
        place_v = np.where(self.around_top, 0.0, plan.signs[1] * place_v)
        rise = np.where(self.outward, rise, 0.0)
        foot = np.where(self.through, 0.0, self.half_n - np.where(self.outward, self.sunk, 0.0))
        lean = np.where(self.outward & ~self.several & ~copied, plan.lean, 0.0)
        u, v, normal = np.moveaxis(_FACES[self.face], 2, 0)
        cosine, sine = np.cos(lean)[:, None], np.sin(lean)[:, None]
        up = cosine * normal - sine * v
        place = u * place_u[:, None] + v * place_v[:, None] + normal * foot[:, None] + up * rise[:, None]
        placement = np.stack([u, cosine * v + sine * normal, up, place], axis=2)
        loose = np.flatnonzero(self.loose)
        placement[loose, :, :3], placement[loose, :, 3] = plan.pose[loose], plan.place[loose] * self.size[loose]

        part["counts"][:, 0] = np.where(copied, parent["counts"][:, 0], self.columns)
        part["counts"][:, 1] = np.where(copied, parent["counts"][:, 1], self.rows)
        part["pitch"][:, 0] = np.where(copied, parent["pitch"][:, 0], pitch_u)
        part["pitch"][:, 1] = np.where(copied, parent["pitch"][:, 1], pitch_v)
        part["ring"] = np.where(copied, parent["ring"], self.ring)
        base = np.where(copied[:, None, None], parent["element"], own_frame(parent))
        inherited = copied[:, None, None]
        part["frame"] = np.where(inherited, parent["frame"], compose(parent["frame"], compose(parent["array"], base)))
        part["array"] = np.where(inherited, parent["array"], placement)
        part["element"] = np.where(inherited, compose(base, placement), _IDENTITY)


def _fit_kind(
    part: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, stays_round: np.ndarray, sides: np.ndarray
):
    """Sets the number of sides, and half-sizes that the kind can have: none larger than asked for."""
    kind = part["kind"]
    part["sides"] = _SIDES_TABLE[kind, (sides * _SIDES_TABLE.shape[1]).astype(int)]
    narrow = np.minimum(x, y)
    narrow = np.where(kind == SPHERE, np.minimum(narrow, z), narrow)
    narrow = np.where(kind == CAPSULE, np.minimum(narrow, 0.95 * z), narrow)
    regular = stays_round < _ROUND[kind]
    part["size"][:, 0] = np.where(regular, narrow, x)
    part["size"][:, 1] = np.where(regular, narrow, y)
    z = np.where(kind == TORUS, np.minimum(z, 0.45 * narrow), z)
    part["size"][:, 2] = np.where(kind == SPHERE, narrow, z)


def _distribute(
    count: np.ndarray, room: np.ndarray, half: np.ndarray, spread: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pitch of copies of half-size `half` in a room of half-size `room`; how far a single one is off its middle."""
    slack = np.maximum(room - half, 0.0)
    pitch = 2 * slack * np.maximum(spread, 0.75) / np.maximum(count - 1, 1)
    return np.maximum(pitch, 2.04 * half), np.where(count > 1, 0.0, slack * spread)


# ---- Profiles


def _draw_profiles(primitives: np.ndarray, draws: "_Draws"):
    """Turns kinds and sizes into the numbers of cross-sections and profiles."""
    kind, sides, (x, y, z) = primitives["kind"], primitives["sides"], np.moveaxis(primitives["size"], 2, 0)
    torus, tube, cone, capsule = (kind == k for k in (TORUS, TUBE, CONE, CAPSULE))
    ball = (kind == SPHERE) | (kind == ELLIPSOID)
    primitives["stretch"] = y / x
    # Polygons have their corners on the circle of their size; boxes and pyramids, their sides at it.
    x = x * np.where((sides == 0) | (sides == 4), 1.0, np.cos(np.pi / np.maximum(sides, 3)))
    corner = _between(0.08, 0.45, draws.each(), log=True) * np.minimum(x, z)
    corner *= (draws.each() < 0.4) & ((kind == BOX) | (kind == CYLINDER) | (kind == PRISM))
    wall = _between(0.08, 0.5, draws.each(), log=True) * x
    tip = np.where(draws.each() < 0.5, 0.0, _between(0.15, 0.85, draws.each()))  # of a cone, as a share of its foot
    slope = np.sign(draws.each() - 0.3) * (tip - 1) * x / (2 * z)
    primitives["cut"] = (draws.each() < 0.5) & (corner > 0)
    primitives["center"] = np.where(torus, x - z, np.where(tube, x - wall / 2, 0.0))
    primitives["slope"] = np.where(cone, slope, 0.0)
    width = np.where(ball | capsule, x, np.where(torus, z, corner))
    height = np.where(ball | torus, z, np.where(capsule, x, corner))
    primitives["corner"][..., 0], primitives["corner"][..., 1] = width, height
    half_width = np.where(tube, wall / 2, np.where(cone, (1 + tip) * x / 2, x - width))
    primitives["half_width"] = np.where(torus, 0.0, half_width)
    primitives["half_height"] = z - height


def _measure(recipes: np.ndarray) -> np.ndarray:
    """Sets the box around each shape and its axes by length; returns the shortest by the longest half-size."""
    shape, slot = np.nonzero(recipes["primitives"]["present"] & ~recipes["primitives"]["subtracts"])
    primitives = recipes["primitives"][shape, slot]
    frames, owner = copy_frames(primitives)
    reach = (np.abs(frames[:, :, :3]) * primitives["size"][owner][:, None]).sum(2)
    starts = np.searchsorted(shape[owner], np.arange(len(recipes)))
    low = np.minimum.reduceat(frames[:, :, 3] - reach, starts)
    high = np.maximum.reduceat(frames[:, :, 3] + reach, starts)
    half = (high - low) / 2
    recipes["middle"], recipes["radius"] = (low + high) / 2, half.max(1)
    order = np.argsort(half, axis=1, kind="stable")[:, [1, 0, 2]]  # the shortest becomes y, the longest z
    axes = np.eye(3)[order]
    axes[:, 0] *= np.linalg.det(axes)[:, None]
    recipes["axes"] = axes
    return half.min(1) / half.max(1)


# ---- Deformation and orientation


def _draw_deformation(recipes: np.ndarray, slenderness: np.ndarray, draws: "_Draws"):
    """
    Draws the deformation and its amounts:

    - taper, bulge: what the cross-section grows by at the end, or in the middle, as a share;
    - twist: turns by the unit of length;
    - bend: where it begins, its length, and its curvature in turns by the unit of length;
    - waves: two times direction times frequency (3), phase in turns, and shift (3).
    """
    deformation = recipes["deformation"] = _choose(DEFORMATION_WEIGHTS, draws.one())
    sign, share, turns = np.sign(draws.one() - 0.5), draws.one(), draws.one()
    bulge = np.where(sign > 0, _between(0.3, 1.0, share), _between(-0.6, -0.2, share))
    twist = sign * _between(0.03, 0.15, turns) * np.where(slenderness < 0.3, 4, 1)
    begin, length = _between(-1.0, 0.2, draws.one()), _between(0.3, 2.0, draws.one())
    # No tighter than the shape is thick, or it would run through itself.
    bend = np.minimum(_between(0.08, 0.6, turns) / length, 0.8 / (2 * np.pi * slenderness))
    waves = []
    for _ in range(2):
        direction, shift = _direction(draws.one(), draws.one()), _direction(draws.one(), draws.one())
        frequency = _between(0.25, 1.2, draws.one(), log=True)
        shift *= (_between(0.2, 0.8, draws.one()) / (4 * np.pi * frequency))[:, None]  # two of them do not fold space
        waves += [direction * frequency[:, None], draws.one()[:, None], shift]
    numbers = {
        TAPER: (sign * _between(0.25, 0.75, share))[:, None],
        BULGE: bulge[:, None],
        TWIST: twist[:, None],
        BEND: np.stack([begin, length, bend], axis=1),
        WAVES: np.concatenate(waves, axis=1),
    }
    for which, amounts in numbers.items():
        rows = np.flatnonzero(deformation == which)
        recipes["amounts"][rows, : amounts.shape[1]] = amounts[rows]


def _orientation(how: np.ndarray, *draws: np.ndarray) -> np.ndarray:
    """Rotations `(..., 3, 3)`: none, by right angles, or any; all from numbers drawn evenly from (0, 1)."""
    how = _choose(ORIENTATION_WEIGHTS, how)
    rotations = np.broadcast_to(np.eye(3), (*how.shape, 3, 3)).copy()
    right, anyhow = how == 1, how == 2
    face, quarter = ((count * draw[right]).astype(int) for count, draw in zip((6, 4), draws, strict=False))
    u, v, normal = np.moveaxis(_FACES[face], 2, 0)
    cosine, sine = np.array([1, 0, -1, 0])[quarter, None], np.array([0, 1, 0, -1])[quarter, None]
    rotations[right] = np.stack([cosine * u + sine * v, cosine * v - sine * u, normal], axis=2)
    # A uniform rotation: the columns of a uniform unit quaternion (Shoemake 1992).
    size, first, second = (draw[anyhow] for draw in draws[:3])
    x, y = np.sqrt(1 - size) * np.array([np.sin(2 * np.pi * first), np.cos(2 * np.pi * first)])
    z, w = np.sqrt(size) * np.array([np.sin(2 * np.pi * second), np.cos(2 * np.pi * second)])
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    rotations[anyhow] = np.moveaxis(np.array(rows), 2, 0)
    return rotations


def _direction(height: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Unit vectors `(n, 3)`, evenly over the sphere."""
    z, angle = 2 * height - 1, 2 * np.pi * turn
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)


# ---- Frames and random numbers


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The frame that applies `inner`, then `outer`: `(n, 3, 4)`."""
    composed = outer[:, :, :1] * inner[:, :1]
    for axis in (1, 2):
        composed += outer[:, :, axis : axis + 1] * inner[:, axis : axis + 1]
    composed[:, :, 3] += outer[:, :, 3]
    return composed


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as its count says, and the number of each among its own."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


class _Draws:
    """Random numbers in (0, 1), evenly: the next `one` for each shape, or one for `each` of its primitives."""

    def __init__(self, keys: np.ndarray):
        counters = np.arange(_NUM_DRAWS, dtype=np.int32)[:, None]
        bits = mix_bits(keys[:, 0] + counters * keys[:, 1])
        self.numbers = (((bits >> 8) & 0xFFFFFF) + 0.5) * 2.0**-24
        self.used = 0

    def one(self) -> np.ndarray:
        self.used += 1
        return self.numbers[self.used - 1]

    def each(self) -> np.ndarray:
        self.used += MAX_PRIMITIVES
        return self.numbers[self.used - MAX_PRIMITIVES : self.used]


def _between(low: Any, high: Any, draw: np.ndarray, log: bool = False) -> np.ndarray:
    return low * (high / low) ** draw if log else low + draw * (high - low)


def _cumulate(weights: Any) -> np.ndarray:
    total = np.cumsum(weights, axis=-1, dtype=np.float64)
    return total / total[..., -1:]


def _choose(weights: Sequence[float], draw: np.ndarray) -> np.ndarray:
    """Which of the weights each draw falls on."""
    return np.searchsorted(_cumulate(weights), draw, side="right")


def _choose_from(cumulated: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The same where every draw has cumulated weights of its own: `(..., choices)` and `(...)`."""
    return (draw[..., None] >= cumulated).sum(-1)


def _feature_columns() -> dict[str, np.ndarray]:
    """`FEATURES` by field, indexed by role last but for cumulated weights; the base has the numbers of the first."""
    features = (FEATURES[0], *FEATURES)
    columns = {name: np.array([getattr(f, name) for f in features]) for name in ("square", "lies", "leans")}
    columns["subtracts"] = np.array([f.subtracts for f in features])
    columns["reach"] = np.array([REACHES.index(f.reach) for f in features])
    for name in ("height", "width", "spread"):
        columns[name] = np.array([getattr(f, name) for f in features]).T
    columns["depth"] = np.array([f.depth or (np.nan, np.nan) for f in features]).T
    for name in ("columns", "rows", "ring"):  # whole numbers come of rounding down
        columns[name] = np.array([getattr(f, name) for f in features]).T + [[0], [1]]
    columns["faces"] = _cumulate([f.faces for f in features])
    columns["kinds"] = _cumulate([[f.kinds.get(kind, 0) for kind in KINDS] for f in features])
    return columns


_COLUMNS = _feature_columns()
_SIDES_TABLE = np.array([np.repeat(sides, 180 // len(sides)) for sides in _SIDES], dtype=np.int8)
_NUM_DRAWS = 512
