"""Reads clouds from data sets of the Hub, local folders and parquet files.

A column of clouds may be `Array2D` of fixed or variable size or nested lists. Clouds of a data set in memory lie end
to end in one array, in the precision they were stored in; nothing is copied row by row.
"""

import glob
import logging
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .augmentation import FIXED_SUBSAMPLE, counter_generator, normalize_clouds, subsample


if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 256


@dataclass
class PointClouds:
    """
    Clouds of any size, end to end.

    Args:
        values: `(total points, 3)`, float16 or float32.
        offsets: int64 `(clouds + 1,)`: cloud `i` is `values[offsets[i] : offsets[i + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def largest_size(self) -> int:
        """Points of the largest cloud."""
        return int(np.diff(self.offsets).max())

    def checksums(self) -> set[int]:
        """A checksum of each cloud, by which it is known in another split."""
        return {zlib.crc32(np.ascontiguousarray(self[index])) for index in range(len(self))}

    def fingerprint(self) -> dict[str, int]:
        """Tells data sets apart by content, wherever they lie."""
        checksum = zlib.crc32(np.ascontiguousarray(self.values), zlib.crc32(self.offsets))
        return {"clouds": len(self), "points": len(self.values), "crc32": checksum}


@dataclass
class PointTable:
    """
    Clouds of one size with their classes, for evaluation.

    Args:
        points: float32 `(clouds, num_points, 3)`, centred on the mean, in the unit sphere, not augmented.
        labels: int64 `(clouds,)`, or `None` when the data set has none.
        class_names: names of the classes, or `None` when the labels are bare integers.
        checksums: those of the clouds as they were read, for [`check_disjoint`].
    """

    points: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    checksums: set[int] = field(default_factory=set)


def load_point_dataset(
    dataset: str, split: str = "train", streaming: bool = False, config_name: str | None = None
) -> "datasets.Dataset | datasets.IterableDataset":
    """
    Opens a data set.

    Args:
        dataset: a name on the Hub, a local folder (of data files, or made by `save_to_disk`), a parquet file, or a
            pattern of parquet files such as `"shapes/*.parquet"`. What is the path of a file is no pattern.
        split: its split, in the syntax of `datasets` (`"train[:10%]"`). Parquet files are of the split in their name
            (`test-00000-of-00002.parquet`, `my_test.parquet`), one data set made by `save_to_disk` of the split it was
            read from; those that name none are `"train"`.
        streaming: whether to read it while it is used rather than before.
        config_name: configuration of a Hub data set that has several.

    Raises:
        FileNotFoundError: if a path that was given does not exist.
        ValueError: if there is no such split, or none of its rows are asked for; the message says which splits there
            are.
    """
    import datasets

    path = Path(dataset).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        rows = _read_saved(path, split)
        return rows.to_iterable_dataset() if streaming else rows
    source, files = (str(path) if path.exists() else dataset, config_name), None
    if path.suffix == ".parquet":
        source, files = ("parquet", None), _parquet_files(path)
    elif not path.exists() and (path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1):
        raise FileNotFoundError(f"`dataset` is {dataset!r}, but there is no such folder.")
    try:
        return datasets.load_dataset(*source, data_files=files, split=split, streaming=streaming)
    except ValueError as error:
        names = datasets.get_dataset_split_names(*source, data_files=files)
        raise ValueError(f"`split` is {split!r}, but {dataset} has the splits {names}: {error}") from error


def _parquet_files(pattern: Path) -> dict[str, list[str]]:
    """The files of a path or pattern by the split that `datasets` would take from their names in a folder."""
    from datasets.data_files import SPLIT_KEYWORDS

    files = defaultdict(list)
    found = Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor)))
    for path in [pattern] if pattern.is_file() else sorted(found):
        shard = re.fullmatch(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}", path.stem)
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        named = (str(split) for split, keywords in SPLIT_KEYWORDS.items() if not words.isdisjoint(keywords))
        files[shard[1] if shard else next(named, "train")].append(glob.escape(str(path)))
    if not files:
        raise FileNotFoundError(f"`dataset` is {str(pattern)!r}, but there is no such file.")
    return dict(files)


def _read_saved(folder: Path, split: str) -> "datasets.Dataset":
    """A split, or slices of splits, of what `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):  # a slice that was saved is all of its split
        saved = {re.split(r"[\[+]", str(saved.split or "train"))[0]: saved}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(saved[name]) for name in saved})
        if all(part.from_ >= part.to for part in parts):
            raise ValueError("these are no rows.")
    except ValueError as error:
        raise ValueError(f"`split` is {split!r}, but {folder} has the splits {list(saved)}: {error}") from None
    return datasets.concatenate_datasets([saved[p.splitname].select(range(p.from_, p.to)) for p in parts])


def load_point_clouds(dataset: "datasets.Dataset", points_column: str = "points") -> PointClouds:
    """
    All clouds of a data set in memory.

    Raises:
        ValueError: if the column is missing, or a cloud is missing, empty, not `(n, 3)`, not finite or has all its
            points in one place; the message says which row.
    """
    check_column(dataset, points_column)
    if len(dataset) == 0:
        raise ValueError("the data set has no rows.")
    parts, row = [], 0
    for table in dataset.select_columns([points_column]).with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        parts.append(clouds_from_arrow(table.column(points_column), points_column, row))
        row += len(parts[-1])
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    return PointClouds(np.concatenate([part.values for part in parts]), _offsets(sizes))


def load_point_table(
    dataset: str,
    split: str = "train",
    points_column: str = "points",
    label_column: str | None = "label",
    num_points: int = 1024,
    seed: int = 0,
    config_name: str | None = None,
) -> PointTable:
    """
    Clouds and labels of a split for evaluation: a subsample that is fixed by the seed, normalised, not augmented.

    Args:
        dataset, split, config_name: as for [`load_point_dataset`].
        points_column: the column of clouds.
        label_column: the column of classes, `ClassLabel` or integers; without such a column there are no labels.
        num_points: points of each cloud, or as many as the largest has; smaller clouds repeat theirs.
        seed: fixes the subsample.

    Raises:
        ValueError: as [`load_point_clouds`], or if the labels are not integers.
    """
    rows = load_point_dataset(dataset, split, config_name=config_name)
    clouds = load_point_clouds(rows, points_column)
    labels = class_names = None
    if label_column in rows.column_names:
        labels, class_names = read_labels(rows, label_column)
    return PointTable(fixed_subsample(clouds, num_points, seed), labels, class_names, clouds.checksums())


def check_disjoint(splits: list[tuple[str, set[int]]]):
    """
    Refuses splits of the same clouds. Official splits of some data sets have a few in common: those may stay, with a
    warning.

    Args:
        splits: the name of each, and the checksums of its clouds.

    Raises:
        ValueError: if two splits share more than half of the clouds of the smaller one.
    """
    for (first, ours), (second, others) in combinations(splits, 2):
        shared = len(ours & others)
        sizes = f"{len(ours):,} and {len(others):,} different clouds"
        found = f"splits {first!r} and {second!r} share {shared:,} of their {sizes}"
        if 2 * shared > min(len(ours), len(others)):
            raise ValueError(f"{found}, expected splits that share a few at most.")
        if shared:
            logger.warning("%s: these are not held out.", found[0].upper() + found[1:])


def fixed_subsample(clouds: PointClouds, num_points: int, seed: int = 0) -> np.ndarray:
    """
    A subsample of each cloud that is fixed by the seed, normalised: float32 `(clouds, num_points, 3)`.

    No more points than the largest cloud has: copies of all of them would tell nothing new.
    """
    num_points = min(num_points, clouds.largest_size)
    points = np.empty((len(clouds), num_points, 3), dtype=np.float32)
    for index in range(len(clouds)):
        generator = counter_generator(seed, FIXED_SUBSAMPLE, 0, index)
        points[index] = clouds[index][subsample(generator, len(clouds[index]), num_points)]
    return normalize_clouds(points)


def read_labels(rows: "datasets.Dataset", label_column: str) -> tuple[np.ndarray, list[str] | None]:
    """
    The classes of a data set, int64 `(rows,)`, and their names if the column is a `ClassLabel`.

    Raises:
        ValueError: if the labels are not integers.
    """
    import datasets

    feature = rows.features[label_column]
    class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    labels = np.asarray(rows.with_format("numpy")[label_column][:])
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(
            f"column {label_column!r} holds {feature}, expected classes; see `Dataset.class_encode_column`."
        )
    return labels.astype(np.int64), class_names


def check_column(dataset: Any, points_column: str):
    """Raises `ValueError`, naming the columns that there are, if a data set lacks the one asked for."""
    names = dataset.column_names
    if names is None:  # a stream whose features are not declared: its first row tells
        names = list(next(iter(dataset.take(1)), {}))
    if points_column not in names:
        raise ValueError(f"`points_column` is {points_column!r}, but the data set has the columns {sorted(names)}.")


def clouds_from_arrow(column: "pa.ChunkedArray", name: str = "points", first_row: int = 0) -> PointClouds:
    """
    Clouds of an Arrow column of lists of (x, y, z), checked.

    float16 and float32 are kept. Others are centred before they become float32, so that large offsets do not eat the
    shape; coordinates that float32 does not hold even then are an error.

    Args:
        column: lists of lists, or the `Array2D` type of `datasets`.
        name: the column's name, for errors.
        first_row: number of the first row, for errors.

    Raises:
        ValueError: if a row is not a finite `(n, 3)` array of distinct points.
    """
    parts = [_chunk_clouds(chunk, name, first_row + start) for chunk, start in _chunks(column)]
    sizes = np.concatenate([size for _, size in parts])
    return PointClouds(np.concatenate([values for values, _ in parts]), _offsets(sizes))


def _chunks(column: "pa.ChunkedArray"):
    """The chunks of a column that hold rows, plain arrays, each with the number of its first row."""
    import pyarrow as pa

    start = 0
    for chunk in column.chunks:
        if len(chunk):
            yield chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk, start
        start += len(chunk)


def _chunk_clouds(chunk: "pa.Array", name: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Points `(total, 3)` and cloud sizes of one array of lists of lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def is_list(kind: pa.DataType) -> bool:
        return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

    def error(row: int, problem: str) -> ValueError:
        return ValueError(f"row {first_row + row} of column {name!r} {problem}.")

    kind = chunk.type
    if not (is_list(kind) and is_list(kind.value_type)) or is_list(kind.value_type.value_type):
        raise error(0, f"is of type {kind}, expected points as lists of (x, y, z), shape (n, 3)")
    if chunk.null_count:
        raise error(int(np.argmax(chunk.is_null())), "is missing (null)")
    sizes = pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64)
    if not sizes.all():
        raise error(int(np.argmin(sizes)), "is an empty cloud")
    points = chunk.flatten()
    owner = np.repeat(np.arange(len(sizes)), sizes)
    widths = pc.fill_null(pc.list_value_length(points), 0).to_numpy(zero_copy_only=False)
    if (widths != 3).any():
        wrong = int(np.argmax(widths != 3))
        raise error(int(owner[wrong]), f"has a point of {widths[wrong]} coordinates, expected shape (n, 3)")
    values = points.flatten()
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise error(0, f"holds {values.type}, expected numbers")
    if values.null_count:
        raise error(int(owner[int(np.argmax(values.is_null())) // 3]), "has a missing (null) coordinate")
    values = values.to_numpy(zero_copy_only=False).reshape(-1, 3)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(owner[np.argmin(finite)])
        count = int((~np.isfinite(values[owner == row])).sum())
        raise error(row, f"has {count} coordinates that are NaN or infinite")
    starts = np.cumsum(sizes) - sizes
    if values.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore", invalid="ignore"):
            means = np.add.reduceat(values.astype(np.float64), starts) / sizes[:, None]
            centered = (values - means[owner]).astype(np.float32)
        finite = np.isfinite(centered).all(axis=1)
        if not finite.all():
            row = int(owner[np.argmin(finite)])
            reach = np.abs(values[owner == row]).max()
            raise error(row, f"reaches to {reach:g}, expected coordinates in the range of float32")
        values = centered
    wide = values.astype(np.float32) if values.dtype == np.float16 else values  # reductions of float16 are slow
    extent = np.maximum.reduceat(wide, starts) != np.minimum.reduceat(wide, starts)
    if not extent.any(axis=1).all():
        row = int(np.argmin(extent.any(axis=1)))
        raise error(row, f"has all its {sizes[row]} points in one place")
    return values, sizes


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])
