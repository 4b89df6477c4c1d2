"""Clouds with their classes and, where there are any, the parts of their points."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .augmentation import counter_generator
from .loading import PointClouds, check_disjoint, load_point_clouds, load_point_dataset, read_labels


# Purpose of random numbers: which shapes of a class a part of a split takes.
_SPLIT = 66
# Bare integers may count to this many classes in any data set, and to this many times its rows in a larger one.
_MAX_NUMBERS, _MAX_NUMBERS_PER_ROW = 10_000, 10


@dataclass
class LabelledClouds:
    """
    A split of a labelled data set, in memory.

    Args:
        clouds: the clouds, of any size.
        labels: int64 `(clouds,)`, 0 to `len(class_names) - 1`.
        class_names: name of each class.
        part_labels: int64 `(total points,)`, end to end as `clouds.values`; -100 where a point has none. `None` if
            parts were not asked for.
        part_names: name of each part.
    """

    clouds: PointClouds
    labels: np.ndarray
    class_names: list[str]
    part_labels: np.ndarray | None = None
    part_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.clouds)

    def parts(self, index: int) -> np.ndarray:
        """Parts of the points of one cloud."""
        return self.part_labels[self.clouds.offsets[index] : self.clouds.offsets[index + 1]]

    def select(self, rows: np.ndarray) -> "LabelledClouds":
        """These rows, in this order."""
        offsets = self.clouds.offsets
        points = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        sizes = np.diff(offsets)[rows]
        clouds = PointClouds(self.clouds.values[points], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        part_labels = None if self.part_labels is None else self.part_labels[points]
        return LabelledClouds(clouds, self.labels[rows], self.class_names, part_labels, self.part_names)

    def fingerprint(self) -> dict[str, int]:
        """Tells data sets apart by content, labels too."""
        checksum = zlib.crc32(np.ascontiguousarray(self.labels))
        if self.part_labels is not None:
            checksum = zlib.crc32(np.ascontiguousarray(self.part_labels), checksum)
        return {**self.clouds.fingerprint(), "labels_crc32": checksum}


def load_labelled_splits(
    dataset: str,
    splits: tuple[str, ...],
    points_column: str = "points",
    label_column: str = "label",
    part_column: str | None = None,
    config_name: str | None = None,
) -> tuple[LabelledClouds, ...]:
    """
    Splits of one labelled data set, with the same classes in all.

    Args:
        dataset, config_name: as for [`~jointmae_hf.data.loading.load_point_dataset`].
        splits: in the syntax of `datasets`; the first names the classes if the labels are bare integers.
        points_column: the column of clouds.
        label_column: the column of classes, `ClassLabel` or integers.
        part_column: the column of a class for each point, `List(ClassLabel)` or lists of integers; `None`: not read,
            the classes of the clouds are what is to be told apart.

    Raises:
        ValueError: if a column is missing or of the wrong kind, a label out of range, a cloud has not one part label
            for each point, the splits have different classes, two splits share more than half of the smaller one,
            bare integers count to far more classes than there are rows, or all clouds are of one class and no
            `part_column` is given.
    """
    loaded = [
        _load_split(
            load_point_dataset(dataset, split, config_name=config_name),
            split,
            points_column,
            label_column,
            part_column,
        )
        for split in splits
    ]
    check_disjoint([(split, part.clouds.checksums()) for split, part in zip(splits, loaded, strict=True)])
    for key in ("class_names", "part_names"):
        named = [getattr(part, key) for part in loaded]
        if any(names is not None for names in named) and any(names != named[0] for names in named):
            differing = next(split for split, names in zip(splits, named, strict=True) if names != named[0])
            raise ValueError(f"split {differing!r} has other {key.replace('_', ' ')} than split {splits[0]!r}.")
    if part_column is None:
        used = np.unique(np.concatenate([part.labels for part in loaded]))
        if len(used) < 2:
            raise ValueError(
                f"column {label_column!r} has the label {used[0]} in every row of {', '.join(map(repr, splits))}, "
                "expected two classes or more."
            )
    num_rows = sum(map(len, loaded))
    # Bare integers: as many classes as any split uses.
    if loaded[0].class_names is None:
        names = _numbers([part.labels for part in loaded], num_rows, label_column)
        for part in loaded:
            part.class_names = names
    if part_column is not None and loaded[0].part_names is None:
        names = _numbers([part.part_labels for part in loaded], num_rows, part_column)
        for part in loaded:
            part.part_names = names
    return tuple(loaded)


def stratified_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """
    Rows of a share of every class, at least one of each, in the order of the data set. Of one seed, a smaller share is
    a part of a larger one.

    Args:
        labels: integers `(rows,)`.
        fraction: in (0, 1].
        seed: decides which.
    """
    if fraction == 1:
        return np.arange(len(labels))
    rows = []
    for label in np.unique(labels):
        members = counter_generator(seed, _SPLIT, 0, int(label)).permutation(np.flatnonzero(labels == label))
        rows.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(rows))


def validation_rows(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows to train on and rows to validate on: a share of every class, rounded, that leaves the class one at least.

    Args:
        labels: integers `(rows,)`.
        fraction: in [0, 1).
        seed: decides which.
    """
    held_out = []
    for label in np.unique(labels):
        members = counter_generator(seed, _SPLIT, 1, int(label)).permutation(np.flatnonzero(labels == label))
        held_out.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _load_split(
    rows: Any, split: str, points_column: str, label_column: str, part_column: str | None
) -> LabelledClouds:
    for name, column in (("label_column", label_column), ("part_column", part_column)):
        if column is not None and column not in rows.column_names:
            raise ValueError(
                f"`{name}` is {column!r}, but split {split!r} has the columns {sorted(rows.column_names)}."
            )
    clouds = load_point_clouds(rows, points_column)
    labels, class_names = read_labels(rows, label_column)
    limit = len(class_names) if class_names is not None else np.iinfo(np.int64).max
    if (wrong := (labels < 0) | (labels >= limit)).any():
        row = int(np.argmax(wrong))
        raise ValueError(f"row {row} of split {split!r} has the label {labels[row]}, expected 0 to {limit - 1}.")
    part_labels = part_names = None
    if part_column is not None:
        part_labels, part_names = _read_parts(rows, split, part_column, np.diff(clouds.offsets))
    return LabelledClouds(clouds, labels, class_names, part_labels, part_names)


def _read_parts(rows: Any, split: str, column: str, sizes: np.ndarray) -> tuple[np.ndarray, list[str] | None]:
    """Part labels end to end, and the names of the parts if the column has them."""
    import datasets
    import pyarrow.compute as pc

    feature = rows.features[column]
    inner = getattr(feature, "feature", None)
    if inner is None or not (isinstance(inner, datasets.ClassLabel) or "int" in getattr(inner, "dtype", "")):
        raise ValueError(f"column {column!r} holds {feature}, expected a list of classes, one for each point.")
    names = list(inner.names) if isinstance(inner, datasets.ClassLabel) else None
    table = rows.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()
    found = pc.fill_null(pc.list_value_length(table), 0).to_numpy(zero_copy_only=False)
    if (wrong := found != sizes).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"row {row} of split {split!r} has {found[row]} part labels in {column!r} for {sizes[row]} points."
        )
    labels = pc.fill_null(table.flatten(), -100).to_numpy(zero_copy_only=False).astype(np.int64)
    limit = len(names) if names is not None else np.iinfo(np.int64).max
    if (wrong := ((labels < 0) & (labels != -100)) | (labels >= limit)).any():
        at = int(np.argmax(wrong))
        row = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
        raise ValueError(
            f"row {row} of split {split!r} has the part label {labels[at]}, expected 0 to {limit - 1}, or -100."
        )
    return labels, names


def _numbers(labels: list[np.ndarray], num_rows: int, column: str) -> list[str]:
    """Names of classes that are bare integers."""
    highest = max(int(part.max()) for part in labels)
    if highest >= max(_MAX_NUMBERS, _MAX_NUMBERS_PER_ROW * num_rows):
        raise ValueError(
            f"column {column!r} has the label {highest}, which makes {highest + 1:,} classes for {num_rows:,} rows; "
            "expected 0 to n - 1 for n classes: map the labels to these, or use a `ClassLabel`, see "
            "`Dataset.class_encode_column`."
        )
    return [str(number) for number in range(1 + highest)]
