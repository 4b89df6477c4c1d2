"""What all builders share: reading shapes with several processes, resumable shards of parquet, and the report.

A builder describes a data set on disk as a [`ShapeSource`]: which shapes there are, in the official order, and how one
is read. Notable choices:

- Which shapes make a shard is settled before the first is read, and a shape depends on the seed and its own name
  alone. A build that was killed goes on after its last whole shard and ends in the same bytes as one that was not.
- A shard is written beside its place and moved there; `build.json` says which ones are done. Nothing is half there.
- A shape that cannot be read is left out and reported with its reason. Building again tries only the shards that have
  such shapes, so a repaired file finds its place.
- A layout that is not the one a builder knows is an error before anything is written.
"""

import hashlib
import json
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import replace_file, replace_text
from ..augmentation import subsample


if TYPE_CHECKING:
    import datasets

BUILD_FILE = "build.json"
# Points sampled on a mesh when no number is asked for: what the models take.
MESH_POINTS = 2048
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShapeItem:
    """
    One shape of a data set, not read yet.

    Args:
        name: tells it apart from all others of the data set, and seeds its sampling; never a path from outside.
        split: the split it belongs to.
        label: index of its class.
        path: the file that holds it.
        row: its row in that file, if the file holds many.
    """

    name: str
    split: str
    label: int
    path: Path
    row: int | None = None


@dataclass(frozen=True)
class ShapeSource:
    """
    A data set on disk, described.

    Args:
        name: name of the builder, as on the command line.
        pretty_name: title of the card.
        description: where the shapes come from; opens the card.
        items: all shapes, split after split, each split in its official order.
        class_names: classes in their official order.
        read: a function of the module (processes import it by name) from an item, a number of points and a seed to the
            cloud, `(n, 3)`, and the part of each point, `(n,)` or `None`. Meshes are sampled; clouds are
            returned whole. Raises `OSError` or `ValueError` for what it cannot read.
        part_names: names of the parts, if `read` returns them.
        num_points: size of all clouds, if it is known beforehand.
        official_sizes: shapes of each official split, to tell a copy that lacks some.
        license: what the card states in its metadata, an identifier of the Hub.
        license_note: what a user has to know of the terms.
        homepage: where the data set is published.
        ignored: files beside the shapes that were passed over, by suffix.
        unreadable: reasons by name of whole files of shapes that are left out, as nobody knows which shapes they hold.

    Raises:
        ValueError: if two items have one name.
    """

    name: str
    pretty_name: str
    description: str
    items: Sequence[ShapeItem]
    class_names: Sequence[str]
    read: Callable[[ShapeItem, int, int], tuple[np.ndarray, np.ndarray | None]]
    part_names: Sequence[str] | None = None
    num_points: int | None = None
    official_sizes: dict[str, int] = field(default_factory=dict)
    license: str = "unknown"
    license_note: str = "Not stated by the source."
    homepage: str | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        counts = Counter(item.name for item in self.items)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:  # one of them could be in each split
            files = ", ".join(item.path.name for item in self.items if item.name == twice[0])
            raise ValueError(
                f"{self.name} lists {len(twice)} shapes more than once, the first one {twice[0]!r} as {files}; "
                "suffixes do not tell shapes apart."
            )


@dataclass
class BuildReport:
    """
    What became of every shape.

    Args:
        num_rows: shapes written, by split.
        unreadable: reasons by name of the shapes, and of whole files of shapes, that were left out.
        official_sizes: as of the source.
        ignored: as of the source.
    """

    num_rows: dict[str, int]
    unreadable: dict[str, str]
    official_sizes: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{split}: {self._size(split)}" for split in self.num_rows]
        if self.ignored:
            kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.ignored.items())
            lines.append(f"passed over: {kinds}")
        lines.append(f"unreadable: {len(self.unreadable)}")
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.unreadable.items())])

    def _size(self, split: str) -> str:
        rows, official = self.num_rows[split], self.official_sizes.get(split)
        note = f" of the official {official:,}" if official not in (None, rows) else ""
        return f"{rows:,} shapes{note}"


def build_dataset(
    source: ShapeSource,
    output: str | Path,
    num_points: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    num_workers: int = 1,
    rows_per_shard: int = 1024,
) -> BuildReport:
    """
    Writes the tables of a data set to `output/data/<split>-00000-of-00010.parquet`, or goes on doing so.

    Columns: `points` `(n, 3)`, centred on their mean, the farthest at distance 1; `label`; `part_labels` `(n,)` if the
    source has parts; `name`.

    Args:
        source: the data set on disk.
        output: the folder to write, a repository of the Hub in the making. It is new, or of an earlier run.
        num_points: points of each cloud: a seeded random subset of larger clouds, repeated points of smaller ones, or
            so many samples of a mesh. By default clouds stay as they are and meshes get 2048 points.
        dtype: `"float32"` or `"float16"` (an error of up to 0.00024, half the size).
        seed: seed of the sampling.
        num_workers: processes that read.
        rows_per_shard: shapes of a file; an interrupted build repeats no more than these.

    Raises:
        ValueError: if an argument is out of range, the output holds another build, or no shape of a split can be read.
    """
    _require("num_points", num_points, num_points is None or num_points > 0, "a positive number or None")
    _require("dtype", dtype, dtype in ("float32", "float16"), "'float32' or 'float16'")
    size = num_points or source.num_points
    read = partial(_read_row, source.read, size, dtype, seed)
    settings = {
        "source": source.name,
        "num_points": num_points,
        "dtype": dtype,
        "seed": seed,
        "rows_per_shard": rows_per_shard,
    }
    features = _features(source, size, dtype)
    report = write_shards(source.items, read, features, Path(output), settings, num_workers, rows_per_shard)
    report.official_sizes, report.ignored = source.official_sizes, source.ignored
    report.unreadable = source.unreadable | report.unreadable
    for split, rows in report.num_rows.items():
        if not rows:
            first = next(item.name for item in source.items if item.split == split)
            raise ValueError(f"no shape of split {split!r} can be read; {first}: {report.unreadable[first]}.")
    return report


def item_seed(item: ShapeItem, seed: int) -> list[int]:
    """Seed of one shape, from its name, so that other shapes and their order change nothing."""
    return [seed, zlib.crc32(item.name.encode())]


def normalize_unit_sphere(points: np.ndarray) -> np.ndarray:
    """Points `(n, 3)` centred on their mean, the farthest one at distance 1."""
    centered = points - points.mean(axis=0)
    return centered / np.linalg.norm(centered, axis=1).max()


def _read_row(read: Callable, size: int | None, dtype: str, seed: int, item: ShapeItem) -> dict[str, Any]:
    """One row of the table; `ValueError` if the cloud is none that a model could take."""
    points, part_labels = read(item, size or MESH_POINTS, seed)
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"has shape {points.shape}, expected (n, 3)")
    if not np.isfinite(points).all():
        raise ValueError(f"holds {(~np.isfinite(points)).sum()} coordinates that are NaN or infinite")
    if size is not None and len(points) != size:
        chosen = subsample(np.random.default_rng(item_seed(item, seed)), len(points), size)
        points = points[chosen]
        part_labels = part_labels if part_labels is None else part_labels[chosen]
    if not (np.ptp(points, axis=0) > 0).any():
        raise ValueError(f"has all its {len(points)} points in one place")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        normalized = normalize_unit_sphere(points).astype(dtype)
    if not (np.isfinite(normalized).all() and normalized.any()):
        raise ValueError(f"reaches to {np.abs(points).max():g}, which is too far or too near to be normalised")
    row = {"points": normalized, "label": item.label, "name": item.name}
    return row if part_labels is None else row | {"part_labels": part_labels}


def _features(source: ShapeSource, size: int | None, dtype: str) -> "datasets.Features":
    import datasets

    features = {"points": datasets.Array2D((size, 3), dtype)}
    if source.part_names is not None:
        parts = datasets.ClassLabel(names=list(source.part_names))
        features["part_labels"] = datasets.List(parts, length=size or -1)
    features |= {"label": datasets.ClassLabel(names=list(source.class_names)), "name": datasets.Value("string")}
    return datasets.Features(features)


# ---- Shards


def write_shards(
    items: Sequence[ShapeItem],
    read: Callable[[ShapeItem], dict[str, Any]],
    features: "datasets.Features",
    folder: Path,
    settings: dict[str, Any],
    num_workers: int = 1,
    rows_per_shard: int = 1024,
) -> BuildReport:
    """
    Writes the rows of all items to `folder/data/<split>-<shard>-of-<shards>.parquet`, or those still missing.

    Args:
        items: split after split.
        read: from an item to its row, the columns of `features`; picklable. `OSError` and `ValueError` leave it out.
        features: the columns.
        folder: new, or of an earlier call with the same items and settings.
        settings: all else that decides the bytes, for `build.json`.
        num_workers: processes that read.
        rows_per_shard: items of a shard.

    Raises:
        ValueError: if `folder` holds a build of other items or with other settings, or an argument is out of range.
    """
    _require("num_workers", num_workers, num_workers > 0, "a positive number")
    _require("rows_per_shard", rows_per_shard, rows_per_shard > 0, "a positive number")
    settings = {"format": _FORMAT_VERSION, **settings, "items": _digest(items)}
    shards = _plan_shards(items, rows_per_shard)
    done = _load_state(folder, settings)
    for name, state in list(done.items()):
        if state["unreadable"] or not (folder / "data" / name).is_file():
            del done[name]
    missing = {name: members for name, members in shards.items() if name not in done}
    for left in (folder / "data").glob(".*.partial"):  # a build with other settings may name its shards otherwise
        left.unlink()
    if missing and not done:  # says whose the first shard is, should the build end before it is listed
        _save_state(folder, settings, {})
    # A generator over all missing items, cut into shards: the processes read ahead into the next one.
    rows = read_rows([i for members in missing.values() for i in members], read, num_workers, done=len(items))
    with closing(rows):
        for name, members in missing.items():
            outcomes = list(islice(rows, len(members)))
            good = [outcome for outcome in outcomes if not isinstance(outcome, str)]
            bad = {i.name: o for i, o in zip(members, outcomes, strict=True) if isinstance(o, str)}
            write_parquet(_table(good, features), folder / "data" / name)
            done[name] = {"rows": len(good), "unreadable": bad}
            _save_state(folder, settings, {n: done[n] for n in shards if n in done})
    num_rows: dict[str, int] = {}
    for name, members in shards.items():
        num_rows[members[0].split] = num_rows.get(members[0].split, 0) + done[name]["rows"]
    return BuildReport(num_rows, {k: v for name in shards for k, v in done[name]["unreadable"].items()})


def read_rows(
    items: Sequence[ShapeItem], read: Callable[[ShapeItem], Any], num_workers: int = 1, done: int | None = None
) -> Iterator[Any]:
    """
    What `read` makes of each item, in order, or the reason, a string, why it cannot be read. Shows progress.

    Args:
        items: what to read.
        read: a picklable function.
        num_workers: processes; one reads in this process.
        done: number of all items, if some need no reading any more.
    """
    from tqdm.auto import tqdm

    total = done or len(items)
    progress = tqdm(total=total, initial=total - len(items), desc="Reading", unit="shape")
    with progress, ProcessPoolExecutor(num_workers, initializer=_end_with_parent) as pool:
        # Starts no process before its first task.
        attempt = partial(_row_or_reason, read)
        outcomes = map(attempt, items) if num_workers == 1 else _bounded_map(pool, attempt, items, num_workers)
        for outcome in outcomes:
            progress.update()
            yield outcome


def _bounded_map(pool: ProcessPoolExecutor, function: Callable, items: Sequence, num_workers: int) -> Iterator[Any]:
    """`pool.map` that reads no further ahead than a few blocks: large clouds would pile up in memory."""
    block, pending = 8, []
    for start in range(0, len(items), block):
        pending.append(pool.submit(_map_block, function, items[start : start + block]))
        if len(pending) > 4 * num_workers:
            yield from pending.pop(0).result()
    for future in pending:
        yield from future.result()


def _map_block(function: Callable, items: Sequence) -> list[Any]:
    return [function(item) for item in items]


def _row_or_reason(read: Callable[[ShapeItem], Any], item: ShapeItem) -> Any:
    try:
        return read(item)
    except (OSError, ValueError) as error:
        return reason_unreadable(error, item.path)


def reason_unreadable(error: OSError | ValueError, path: Path) -> str:
    """What a report says of a file, without the folders of this machine."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = f"{type(error).__name__}: {error.strerror}" if getattr(error, "strerror", None) else str(error)
    return text.replace(str(path), path.name)


def _end_with_parent():
    """Ends a worker when its parent is killed; it would wait for tasks for ever."""

    def watch():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _plan_shards(items: Sequence[ShapeItem], rows_per_shard: int) -> dict[str, list[ShapeItem]]:
    """Items of each file, by its name."""
    splits: dict[str, list[ShapeItem]] = {}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    shards = {}
    for split, members in splits.items():
        count = -(-len(members) // rows_per_shard)
        for i in range(count):
            name = f"{split}-{i:05d}-of-{count:05d}.parquet"
            shards[name] = members[i * rows_per_shard : (i + 1) * rows_per_shard]
    return shards


def _digest(items: Sequence[ShapeItem]) -> str:
    """Tells lists of items apart, wherever the files lie."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.split}\0{item.label}\0{item.name}\n".encode())
    return digest.hexdigest()[:16]


def _load_state(folder: Path, settings: dict[str, Any]) -> dict[str, dict]:
    """The shards that an earlier run finished; one that finished none may have had other settings."""
    path = folder / BUILD_FILE
    if not path.is_file() and (folder / "README.md").exists():
        raise ValueError(f"`output` is {str(folder)!r}, which holds a README.md of another origin; name a new folder.")
    if all(file.name.endswith(".partial") for file in (folder / "data").glob("*")):
        return {}
    if not path.is_file():
        raise ValueError(f"`output` is {str(folder)!r}, which holds data of another origin; name a new folder.")
    state = json.loads(path.read_text(encoding="utf-8"))
    found = state["settings"]
    different = [
        f"{key} {found.get(key)!r}, not {value!r}" for key, value in settings.items() if found.get(key) != value
    ]
    if different:
        what = ", ".join(different)
        raise ValueError(f"`output` is {str(folder)!r}, which holds a build with {what}; name a new folder.")
    return state["shards"]


def _save_state(folder: Path, settings: dict[str, Any], shards: dict[str, dict]):
    text = json.dumps({"settings": settings, "shards": shards}, indent=1, ensure_ascii=False)
    replace_text(folder / BUILD_FILE, text + "\n")


def _table(rows: list[dict[str, Any]], features: "datasets.Features") -> "datasets.Dataset":
    import datasets

    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def write_parquet(rows: "datasets.Dataset", path: str | Path, compression_level: int = 3, row_group_size: int = 256):
    """
    Writes a table of clouds as small as parquet makes it; `load_dataset` finds the features in its schema.

    `Dataset.to_parquet` chooses its own compression, hence this. Bytes of coordinates are stored plane by plane,
    columns of few values with a dictionary.
    """
    import pyarrow.parquet as pq

    others = [name for name in rows.column_names if name != "points"]
    dictionary = [f"{name}.list.element" if name == "part_labels" else name for name in others]
    replace_file(
        Path(path),
        lambda partial_path: pq.write_table(
            rows.with_format("arrow")[:],
            partial_path,
            row_group_size=max(1, min(row_group_size, len(rows))),
            data_page_size=2**26,  # one page a column, so that the compressor sees all of it
            compression="zstd",
            compression_level=compression_level,
            use_dictionary=dictionary,
            column_encoding={"points.list.element.list.element": "BYTE_STREAM_SPLIT"},
        ),
    )


def _require(name: str, value: Any, valid: bool, expected: str):
    if not valid:
        raise ValueError(f"`{name}` is {value!r}, expected {expected}.")
