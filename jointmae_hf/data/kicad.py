"""Labelled point clouds of electronic parts from KiCad's 3D library.

A KiCad installation holds thousands of models as `<library>.3dshapes/<part>.wrl`. This module reads them, samples
each surface and labels every point with the part of the housing it lies on, so one table serves pre-training,
classification and part segmentation. Notable choices:

- The VRML reader is pure text parsing of the flat subset KiCad exports; what it does not follow it refuses by name.
- Part labels come from material names, classes from library folders (and names where a folder mixes shapes).
- Files under the GPL are left out: the rest is CC-BY-SA 4.0, and a derived set can carry only one of the two.
- Near-duplicates are dropped before the split, and whole name families go to one side of it: a header with 5 pins in
  `train` and the same header with 6 in `test` would measure memory, not learning.
- Every file has its own random seed, made from its name: the order of the files and other files change nothing.
"""

import functools
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import numpy as np

from .builders.core import ShapeItem, normalize_unit_sphere, read_rows, write_parquet, write_shards
from .loading import clouds_from_arrow


PART_NAMES = ("body", "metal", "label", "glass", "board")

# By the start of a material's name; what matches none is body.
_PART_PREFIXES = {
    "PIN": "metal",
    "MET": "metal",
    "IC-LABEL": "label",
    "LED": "glass",
    "GLASS": "glass",
    "BOARD": "board",
}

# Folders that hold the same kind of part at another pitch or from another vendor, by the start of their names.
_MERGED_LIBRARIES = {
    "Connector_PinHeader": "pin_header",
    "Connector_PinSocket": "pin_socket",
    "Connector_Phoenix": "connector_phoenix",
    "TerminalBlock": "terminal_block",
    "Capacitor_Tantalum_SMD": "capacitor_smd",
    "Package_DFN_QFN": "package_leadless",
    "Package_SON": "package_leadless",
    "Package_LGA": "package_leadless",
    "Package_DirectFET": "package_leadless",
}

# `Capacitor_THT` mixes four shapes that have nothing in common; the name tells them apart.
_CAPACITOR_THT = {
    "CP_Radial": "capacitor_electrolytic_radial",
    "C_Radial": "capacitor_electrolytic_radial",
    "CP_Axial": "capacitor_axial",
    "C_Axial": "capacitor_axial",
    "C_Disc": "capacitor_disc",
    "C_Rect": "capacitor_film_box",
}

# These begin with a literal word on purpose: the search then runs at memory speed over files of megabytes.
_COMMENT = re.compile(r"#[^\n]*")
_SHAPE = re.compile(r"Shape\s*\{")
_MATERIAL = re.compile(r"material\s+(?:DEF|USE)\s+([^\s{}\[\],]+)")
_COORD_INDEX = re.compile(r"coordIndex\s*\[([^\]]*)\]")
_POINT = re.compile(r"coord\s+(?:DEF\s+\S+\s+)?Coordinate\s*\{\s*point\s*\[([^\]]*)\]")
_OTHER_GEOMETRY = re.compile(r"geometry\s+(?:DEF\s+\S+\s+)?(?!Indexed|PointSet|DEF)\S+")
# Nodes that move, hide or make shapes: reading the faces as they stand would give a wrong part.
_UNSUPPORTED_NODES = ("Transform", "Switch", "Inline", "PROTO")


def read_vrml(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the triangles of a VRML 2.0 file and the name of each triangle's material.

    Each `Shape` holds one `IndexedFaceSet` and names one material (`DEF` or `USE`), in either order. Polygons with
    more than three corners become fans around their first corner; lines and points are left out.

    Returns `triangles`, float64 `(num_triangles, 3 corners, 3)` in the file's units (KiCad: 0.1 inch), and
    `materials`, object `(num_triangles,)`: the material's name, empty for a material without one.

    Raises `ValueError` that begins with the path: an empty or truncated file, a file without faces, numbers that
    cannot be read, a corner outside the point list, or a node this reader does not follow (transforms, shared
    geometry).
    """
    return parse_vrml(Path(path).read_text(encoding="latin-1"), str(path))


def parse_vrml(text: str, name: str = "VRML text") -> tuple[np.ndarray, np.ndarray]:
    """`read_vrml` for text already in memory; errors begin with `name`."""
    text = _COMMENT.sub("", text)
    if not text.strip():
        raise ValueError(f"{name}: empty file")
    if text.count("{") != text.count("}") or text.count("[") != text.count("]"):
        counts = ", ".join(f"{text.count(bracket)} `{bracket}`" for bracket in "{}[]")
        raise ValueError(f"{name}: truncated or unbalanced file, it has {counts}")
    unsupported = [node for node in _UNSUPPORTED_NODES if node in text] + _OTHER_GEOMETRY.findall(text)
    if unsupported:
        raise ValueError(f"{name}: `{unsupported[0]}` is not supported, only flat lists of face sets are")

    materials, corner_texts, point_texts = [], [], []
    for shape in _SHAPE.split(text)[1:]:
        if "IndexedFaceSet" not in shape:  # KiCad defines materials in shapes without geometry
            continue
        corners, points, material = _COORD_INDEX.search(shape), _POINT.search(shape), _MATERIAL.search(shape)
        if corners is None or points is None:
            raise ValueError(f"{name}: face set {len(materials)} has no {'point' if corners else 'coordIndex'} list")
        materials.append(material[1] if material else "")
        corner_texts.append(corners[1] + " -1")  # the terminator of the last polygon is optional
        point_texts.append(points[1])
    if not materials:
        raise ValueError(f"{name}: no faces")

    corners, num_corners = _parse_numbers(corner_texts, np.int64, name)
    coordinates, num_coordinates = _parse_numbers(point_texts, np.float64, name)
    if (num_coordinates % 3).any() or not np.isfinite(coordinates).all():
        raise ValueError(f"{name}: points are not triples of finite numbers")
    num_points = num_coordinates // 3
    face_set = np.repeat(np.arange(len(materials)), num_corners)
    if (outside := corners >= num_points[face_set]).any():
        i = int(np.flatnonzero(outside)[0])
        limit = num_points[face_set[i]]
        raise ValueError(f"{name}: face set {face_set[i]} has corner {corners[i]}, expected less than {limit}")

    first_point = np.cumsum(num_points) - num_points
    triangles, last_token = _fan_triangulate(np.where(corners < 0, -1, corners + first_point[face_set]))
    if not len(triangles):
        raise ValueError(f"{name}: no faces")
    materials = np.array(materials, dtype=object)[face_set[last_token]]
    return coordinates.reshape(-1, 3)[triangles], materials


def _parse_numbers(texts: list[str], dtype: type, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of `texts` in a row, and how many each text holds."""
    tokens = [text.replace(",", " ").split() for text in texts]
    try:
        values = np.array(list(chain.from_iterable(tokens)), dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return values, np.array([len(t) for t in tokens])


def _fan_triangulate(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Triangles `(n, 3)` of polygons separated by -1, and the position of each triangle's last corner in `corners`."""
    position = np.arange(len(corners))
    ends = np.where(corners < 0, position, -1)
    first = np.concatenate([[0], np.maximum.accumulate(ends)[:-1] + 1])  # (corners,) where the polygon of each begins
    last = position[(position - first >= 2) & (corners >= 0)]
    return np.stack([corners[first[last]], corners[last - 1], corners[last]], axis=1), last


def part_label(material: str) -> int:
    """Index into `PART_NAMES` of a material: pins and bare metal, printed label, LED or glass, board; else body."""
    for prefix, part in _PART_PREFIXES.items():
        if material.upper().startswith(prefix):
            return PART_NAMES.index(part)
    return PART_NAMES.index("body")


def shape_class(library: str, name: str) -> str:
    """Class of the part `name` in `library` (the folder without `.3dshapes`).

    It is the library in lower case, with libraries merged that differ in pitch or vendor alone; through-hole
    capacitors are divided by their names into radial electrolytic, axial, disc and film box.
    """
    if library == "Capacitor_THT":
        return next((c for prefix, c in _CAPACITOR_THT.items() if name.startswith(prefix)), "capacitor_tht")
    return next((c for prefix, c in _MERGED_LIBRARIES.items() if library.startswith(prefix)), library.lower())


def name_family(name: str) -> str:
    """The part's name without its numbers, except how many rows of pins it has: `Header_1x05_P2.54mm` and
    `Header_1x06_P2.00mm` are one family, `Header_2x05_P2.54mm` another."""
    return re.sub(
        r"(?P<rows>(?<=_)\dx)\d\d(?=[_-])|\d+(?:[.,]\d+)*", lambda m: (m["rows"] or "") + "#", name
    ).casefold()


def shape_signature(triangles: np.ndarray) -> np.ndarray:
    """Twelve numbers `(12,)` of a mesh `(n, 3, 3)` that do not change with its position or size.

    Box sides (2), area over squared diagonal (1), and the mean (3, from the box's corner) and second moments (6) of
    the surface, all in units of the box's diagonal. Raises `ValueError` when the surface has no area.
    """
    area, corner = triangle_areas(triangles), triangles.min(axis=(0, 1))
    box = triangles.max(axis=(0, 1)) - corner
    diagonal = np.linalg.norm(box)
    if not area.sum() > 0:
        raise ValueError("the surface has no area")
    weight = area / area.sum()
    corners = (triangles - corner) / diagonal  # (n, 3, 3)
    centroid = corners.mean(axis=1)
    mean = weight @ centroid
    # Integral of x x^T over a triangle: (9 c c^T + sum of corner outer products) / 12 times its area.
    second = 9 * np.einsum("n,ni,nj->ij", weight, centroid, centroid)
    second = (second + np.einsum("n,nki,nkj->ij", weight, corners, corners)) / 12 - np.outer(mean, mean)
    return np.concatenate([box[:2] / diagonal, [area.sum() / diagonal**2], mean, second[np.triu_indices(3)]])


def triangle_areas(triangles: np.ndarray) -> np.ndarray:
    """Areas `(n,)` of triangles `(n, 3, 3)`."""
    edges = triangles[:, 1:] - triangles[:, :1]
    return np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2


def sample_surface(
    triangles: np.ndarray, num_points: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points `(num_points, 3)` spread evenly over the area of `triangles` `(n, 3, 3)`, and each one's triangle
    `(num_points,)`. Raises `ValueError` when the surface has no area."""
    cumulative = np.cumsum(triangle_areas(triangles))
    if not cumulative[-1] > 0:
        raise ValueError("the surface has no area")
    # `side="right"` can never choose a triangle without area, nor run past the last one with area.
    index = np.searchsorted(cumulative / cumulative[-1], generator.random(num_points), side="right")
    u, v = generator.random((2, num_points, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # fold the square onto the triangle
    a, b, c = triangles[index].swapaxes(0, 1)
    return a + u * (b - a) + v * (c - a), index


def morton_order(points: np.ndarray, part_labels: np.ndarray, bits: int = 10) -> np.ndarray:
    """Order `(n,)` of points in [-1, 1] along a Morton curve inside each part.

    Neighbours in the table are then neighbours in space: the files come out a tenth smaller than with points in random
    order [our measurement], and part labels, now runs, cost next to nothing.
    """
    cell = np.clip(((points + 1) * 2 ** (bits - 1)).astype(np.int64), 0, 2**bits - 1)
    code = sum(((cell[:, axis] >> bit) & 1) << (3 * bit + axis) for bit in range(bits) for axis in range(3))
    return np.lexsort([code, part_labels])


@dataclass
class KicadShape:
    """One part: its sampled cloud `points` `(num_points, 3)` in the unit sphere, the index into `PART_NAMES` of each
    point, and the signature of the mesh it was sampled from."""

    library: str
    name: str
    points: np.ndarray
    part_labels: np.ndarray
    signature: np.ndarray

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"

    @property
    def shape_class(self) -> str:
        return shape_class(self.library, self.name)


def load_shape(path: str | Path, num_points: int = 2048, seed: int = 0, coordinate_bits: int = 10) -> KicadShape:
    """Reads, samples and normalises one part. Its randomness comes from `seed` and its own name alone.

    Coordinates are multiples of 2^-`coordinate_bits`, float16. Raises `ValueError` as `read_vrml` does.
    """
    path = Path(path)
    library, name = path.parent.name.removesuffix(".3dshapes"), path.stem
    triangles, materials = read_vrml(path)
    try:
        signature = shape_signature(triangles)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    generator = np.random.default_rng([seed, zlib.crc32(f"{library}/{name}".encode())])
    points, index = sample_surface(triangles, num_points, generator)
    points = normalize_unit_sphere(points)
    names, material = np.unique(materials[index].astype(str), return_inverse=True)
    part_labels = np.array([part_label(n) for n in names], dtype=np.uint8)[material]
    order = morton_order(points, part_labels)
    points = np.round(points[order] * 2**coordinate_bits) / 2**coordinate_bits
    return KicadShape(library, name, points.astype(np.float16), part_labels[order], signature)


def drop_near_duplicates(shapes: Sequence[KicadShape], tolerance: float = 0.004) -> list[KicadShape]:
    """Shapes in the order of their names without those whose signature differs from a kept one of the same class by
    less than `tolerance` in every number."""
    kept, signatures = [], defaultdict(list)
    for shape in sorted(shapes, key=lambda s: s.key):
        seen = signatures[shape.shape_class]
        if seen and (np.abs(np.stack(seen) - shape.signature).max(axis=1) < tolerance).any():
            continue
        seen.append(shape.signature)
        kept.append(shape)
    return kept


def assign_families(shapes: Sequence[KicadShape]) -> list[str]:
    """Family of each shape: `class/name without numbers`.

    A family that is more than half of its class could not be split without emptying one side; it is divided by the
    first measurement in the name (`D12mm`), which still keeps different pin counts together.
    """
    families = [f"{s.shape_class}/{name_family(s.name)}" for s in shapes]
    class_size, family_size = Counter(s.shape_class for s in shapes), Counter(families)
    for i, shape in enumerate(shapes):
        measurement = re.search(r"(?:^|_)([^_]*\dmm)", shape.name)
        if measurement and 2 * family_size[families[i]] > class_size[shape.shape_class]:
            families[i] += f"/{measurement[1].casefold()}"
    return families


def split_by_family(
    classes: Sequence[str], families: Sequence[str], test_fraction: float = 0.225, seed: int = 0
) -> np.ndarray:
    """Whether each shape is in the test split, bool `(num_shapes,)`; a family is never on both sides.

    In each class, families in an order drawn from `seed` and their names join the test split while that brings it
    nearer to `test_fraction`. A class with two families or more has at least one on each side.
    """
    sizes = defaultdict(Counter)
    for shape_class, family in zip(classes, families, strict=True):
        sizes[shape_class][family] += 1
    test_families = set()
    for family_sizes in sizes.values():
        target, total, chosen = test_fraction * family_sizes.total(), 0, set()
        order = sorted(family_sizes, key=lambda f: (zlib.crc32(f"{seed}/{f}".encode()), f))
        for family in order:
            if abs(total + family_sizes[family] - target) < abs(total - target):
                chosen.add(family)
                total += family_sizes[family]
        if not chosen and len(order) > 1:
            chosen.add(min(order, key=lambda f: family_sizes[f]))
        test_families |= chosen
    return np.array([f in test_families for f in families], dtype=bool)


def choose_subset(
    classes: Sequence[str], is_test: np.ndarray, keys: Sequence[str], max_per_class: int, seed: int = 0
) -> np.ndarray:
    """Which shapes stay, bool `(num_shapes,)`, when no class may hold more than `max_per_class` of them.

    Each class keeps its share of test shapes; which ones stay is drawn from `seed` and their names.
    """
    groups = defaultdict(list)
    for i, group in enumerate(zip(classes, is_test.tolist(), strict=True)):
        groups[group].append(i)
    class_size = Counter(classes)
    keep = np.zeros(len(classes), dtype=bool)
    for (shape_class, _), members in groups.items():
        share = min(1.0, max_per_class / class_size[shape_class])
        members.sort(key=lambda i: (zlib.crc32(f"{seed}/{keys[i]}".encode()), keys[i]))
        keep[members[: max(1, round(share * len(members)))]] = True
    return keep


def read_debian_copyright(path: str | Path) -> "DebianCopyright":
    """Reads the `Files`, `Copyright` and `License` fields of a machine-readable `debian/copyright` (DEP-5)."""
    stanzas = []
    for stanza in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8")):
        fields = {m[1]: m[2] for m in re.finditer(r"^(\S+):((?:.*)(?:\n[ \t].*)*)", stanza, re.MULTILINE)}
        if "Files" in fields and "License" in fields:
            licence = fields["License"].strip().splitlines()[0]
            stanzas.append((fields["Files"].split(), " ".join(fields.get("Copyright", "").split()), licence))
    return DebianCopyright(stanzas)


@dataclass
class DebianCopyright:
    """Who holds the copyright of a file and under which licence; `stanzas` are (patterns, copyright, licence)."""

    stanzas: list[tuple[list[str], str, str]]

    def __call__(self, file: str) -> tuple[str, str]:
        """Copyright and licence of `file`, a path from the library's root; the last matching stanza holds, as DEP-5
        has it. Raises `KeyError` for a file that no stanza covers."""
        exact, wildcards = self._patterns
        matches = [i for pattern, i in wildcards if pattern.fullmatch(file)]
        last = max([*matches, exact.get(file, -1)])
        if last < 0:
            raise KeyError(f"{file}: not covered by the copyright file")
        return self.stanzas[last][1:]

    @functools.cached_property
    def _patterns(self) -> tuple[dict[str, int], list[tuple[re.Pattern, int]]]:
        exact, wildcards = {}, []
        for i, (patterns, _, _) in enumerate(self.stanzas):
            for pattern in patterns:
                if "*" in pattern or "?" in pattern:
                    regex = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
                    wildcards.append((re.compile(regex), i))
                else:
                    exact[pattern] = i
        return exact, wildcards


def is_gpl(path: str | Path, debian_copyright: DebianCopyright | None = None) -> bool:
    """Whether a model is under the GPL, by its own header or, when there is one, by the package's copyright file."""
    path = Path(path)
    if debian_copyright and debian_copyright(f"{path.parent.name}/{path.name}")[1].startswith("GPL"):
        return True
    with path.open("rb") as file:
        return b"GNU General Public License" in file.read(4096)


@dataclass
class KicadReport:
    """What became of every file (the counts add up to `num_files`) and the settings a card states."""

    min_per_class: int
    coordinate_bits: int
    num_files: int
    num_gpl: int
    unreadable: list[str]
    num_duplicates: int
    small_classes: dict[str, int]
    num_beyond_limit: int
    num_shapes: int
    multi_part_share: float
    copyright_holders: dict[str, int]

    def __str__(self) -> str:
        lines = [
            f"{self.num_files} files: {self.num_gpl} under the GPL left out, {len(self.unreadable)} unreadable, "
            f"{self.num_duplicates} near-duplicates dropped, {sum(self.small_classes.values())} in "
            f"{len(self.small_classes)} classes too small, {self.num_beyond_limit} beyond the limit",
            f"{self.num_shapes} shapes, {100 * self.multi_part_share:.1f} % with more than one part",
            *(f"unreadable: {reason}" for reason in self.unreadable),
        ]
        return "\n".join(lines)


def build_kicad_dataset(
    library_root: str | Path,
    num_points: int = 2048,
    seed: int = 0,
    max_shapes: int | None = None,
    max_per_class: int | None = None,
    min_per_class: int = 20,
    test_fraction: float = 0.225,
    coordinate_bits: int = 10,
    copyright_file: str | Path | None = None,
    num_workers: int = 1,
    parts_folder: str | Path | None = None,
) -> tuple[datasets.DatasetDict, KicadReport]:
    """Builds the `train` and `test` splits from `library_root`, KiCad's `3dmodels` folder.

    Columns: `points` float16 `(num_points, 3)` in the unit sphere, ordered along a curve inside each part (shuffle or
    sample them before use), `part_labels` `(num_points,)` of `PART_NAMES`, `label`, `name`, `library`, `family`.

    `max_per_class` and `max_shapes` (which lowers the former until it fits) thin out the finished split, so a shape of
    the test split is one in every size of the set. Classes of fewer than `min_per_class` shapes are left out. Files
    that cannot be read are skipped and listed in the report. With `parts_folder`, what was read is kept there, and a
    build that was killed goes on from it. Raises `FileNotFoundError` when there is no model in the folder and
    `ValueError` when no class is large enough or the parts were made with other settings.
    """
    paths = sorted(Path(library_root).glob("*.3dshapes/*.wrl"))
    if not paths:
        raise FileNotFoundError(f"library_root={str(library_root)!r} holds no `<library>.3dshapes/<part>.wrl`")
    debian_copyright = read_debian_copyright(copyright_file) if copyright_file else None
    free_paths = [p for p in paths if not is_gpl(p, debian_copyright)]
    items = [ShapeItem(f"{p.parent.name.removesuffix('.3dshapes')}/{p.stem}", "all", 0, p) for p in free_paths]
    settings = {"num_points": num_points, "seed": seed, "coordinate_bits": coordinate_bits}
    if parts_folder is None:
        outcomes = list(read_rows(items, functools.partial(_load_item, **settings), num_workers))
        read = [shape for shape in outcomes if not isinstance(shape, str)]
        unreadable = [outcome for outcome in outcomes if isinstance(outcome, str)]
    else:
        read, unreadable = _load_resumable(items, Path(parts_folder), settings, num_workers)
    shapes = drop_near_duplicates(read)
    num_duplicates = len(read) - len(shapes)

    class_size = Counter(s.shape_class for s in shapes)
    small_classes = {c: n for c, n in sorted(class_size.items()) if n < min_per_class}
    shapes = [s for s in shapes if s.shape_class not in small_classes]
    if not shapes:
        raise ValueError(f"min_per_class={min_per_class}: the largest class has {max(class_size.values(), default=0)}")
    classes, families = [s.shape_class for s in shapes], assign_families(shapes)
    is_test = split_by_family(classes, families, test_fraction, seed)
    limit = _class_limit(classes, max_shapes, max_per_class)
    keep = choose_subset(classes, is_test, [s.key for s in shapes], limit, seed)

    class_names = sorted(set(classes))
    features = datasets.Features(
        {
            "points": datasets.Array2D((num_points, 3), "float16"),
            "part_labels": datasets.List(datasets.ClassLabel(names=list(PART_NAMES)), length=num_points),
            "label": datasets.ClassLabel(names=class_names),
            "name": datasets.Value("string"),
            "library": datasets.Value("string"),
            "family": datasets.Value("string"),
        }
    )
    splits = {}
    for split, members in {"train": keep & ~is_test, "test": keep & is_test}.items():
        indices = np.flatnonzero(members)
        splits[split] = datasets.Dataset.from_dict(
            {
                "points": [shapes[i].points for i in indices],
                "part_labels": [shapes[i].part_labels for i in indices],
                "label": [class_names.index(classes[i]) for i in indices],
                "name": [shapes[i].name for i in indices],
                "library": [shapes[i].library for i in indices],
                "family": [families[i] for i in indices],
            },
            features=features,
            split=split,
        )
    kept = [shapes[i] for i in np.flatnonzero(keep)]
    holders = Counter(debian_copyright(f"{s.library}.3dshapes/{s.name}.wrl")[0] for s in kept if debian_copyright)
    report = KicadReport(
        min_per_class=min_per_class,
        coordinate_bits=coordinate_bits,
        num_files=len(paths),
        num_gpl=len(paths) - len(free_paths),
        unreadable=unreadable,
        num_duplicates=num_duplicates,
        small_classes=small_classes,
        num_beyond_limit=len(shapes) - len(kept),
        num_shapes=len(kept),
        multi_part_share=float(np.mean([len(np.unique(s.part_labels)) > 1 for s in kept])),
        copyright_holders=dict(holders.most_common()),
    )
    return datasets.DatasetDict(splits), report


def _load_item(item: ShapeItem, **settings) -> KicadShape:
    return load_shape(item.path, **settings)


def _load_row(item: ShapeItem, **settings) -> dict:
    return vars(load_shape(item.path, **settings))


def _load_resumable(
    items: Sequence[ShapeItem], folder: Path, settings: dict[str, int], num_workers: int
) -> tuple[list[KicadShape], list[str]]:
    """Shapes of the readable files, and a reason for each of the others, by way of shards in `folder`."""
    import pyarrow.parquet as pq

    num_points = settings["num_points"]
    features = datasets.Features(
        {
            "library": datasets.Value("string"),
            "name": datasets.Value("string"),
            "points": datasets.Array2D((num_points, 3), "float16"),
            "part_labels": datasets.List(datasets.Value("uint8"), length=num_points),
            "signature": datasets.List(datasets.Value("float64")),
        }
    )
    read = functools.partial(_load_row, **settings)
    report = write_shards(items, read, features, folder, {"source": "kicad", **settings}, num_workers)
    shapes = []
    for path in sorted((folder / "data").glob("*.parquet")):
        table = pq.read_table(path)
        clouds = clouds_from_arrow(table["points"]) if len(table) else []
        for points, row in zip(clouds, table.drop(["points"]).to_pylist(), strict=True):
            part_labels, signature = np.array(row["part_labels"], np.uint8), np.array(row["signature"])
            shapes.append(KicadShape(row["library"], row["name"], points, part_labels, signature))
    return shapes, list(report.unreadable.values())


def _class_limit(classes: Sequence[str], max_shapes: int | None, max_per_class: int | None) -> int:
    """The largest number of shapes a class may hold under both limits."""
    sizes = Counter(classes).values()
    limit = min(max(sizes), max_per_class or max(sizes))
    while max_shapes and limit > 1 and sum(min(limit, size) for size in sizes) > max_shapes:
        limit -= 1
    return limit


def write_splits(dataset: datasets.DatasetDict, folder: str | Path) -> list[Path]:
    """Writes `folder/data/<split>-00000-of-00001.parquet`, one file a split, as small as parquet makes it."""
    paths = []
    for split, rows in dataset.items():
        path = Path(folder) / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(rows, path, compression_level=22, row_group_size=len(rows))
        paths.append(path)
    return paths
