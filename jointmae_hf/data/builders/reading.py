"""Readers of the files that data sets of shapes come in. None of them unpickles or leaves its folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...point_cloud_processing_joint_mae import MESH_SUFFIXES, _mesh_arrays, _read_cloud, _read_file, _sample_surface
from .core import ShapeItem, item_seed, reason_unreadable


if TYPE_CHECKING:
    import h5py

# Enough for a few compressed chunks of any of the files, so that reading row after row unpacks each chunk once.
_CHUNK_CACHE = 2**27


def read_shape_file(item: ShapeItem, num_points: int, seed: int) -> tuple[np.ndarray, None]:
    """
    The cloud of a file: its points, or `num_points` on the surface of a mesh, evenly by area.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read.
    """
    if not item.path.is_file():
        raise FileNotFoundError(item.path)
    suffix = item.path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        return _read_cloud(item.path, "the file", num_points, seed), None
    vertices, faces = _mesh_arrays(_read_file(item.path, suffix, "the file"), "the file")
    if faces is None:
        return vertices, None
    return _sample_surface(vertices, faces, num_points, item_seed(item, seed), "the file"), None


def read_table(path: Path, num_columns: int) -> np.ndarray:
    """Numbers of a text file without header, float64 `(n, num_columns)`; `ValueError` if they are others."""
    with path.open(encoding="utf-8") as file:
        try:
            values = np.loadtxt(file, ndmin=2)
        except UnicodeDecodeError:
            raise ValueError("the file is no text") from None
    if values.shape[1] != num_columns or not len(values):
        raise ValueError(f"the file holds a table of shape {values.shape}, expected (n, {num_columns})")
    return values


# ---- HDF5


@dataclass(frozen=True)
class H5Summary:
    """Labels `(rows,)` of the clouds in a file, points of each cloud, and which arrays beside them there are."""

    labels: np.ndarray
    num_points: int
    arrays: frozenset[str]


def scan_h5(path: Path, num_classes: int, required: Sequence[str] = ()) -> H5Summary:
    """
    What a file of clouds holds, without reading the clouds: `data` `(rows, points, 3)` and `label`, one for each row.

    Args:
        path: the file.
        num_classes: labels are 0 to one less.
        required: arrays `(rows, points)` that must be there too.

    Raises:
        OSError: if there is no such file, or it is no whole HDF5 file.
        ValueError: if an array is missing, not of numbers, not in the file or of another shape.
    """
    with _open_h5(path) as file:
        data = h5_array(file, "data")
        if data.ndim != 3 or data.shape[2] != 3:
            raise ValueError(f"{path.name} has `data` of shape {data.shape}, expected (rows, points, 3)")
        for name in required:
            if h5_array(file, name).shape != data.shape[:2]:
                raise ValueError(f"{path.name} has `{name}` of shape {file[name].shape}, expected {data.shape[:2]}")
        labels = h5_array(file, "label")[()].reshape(-1)  # (rows,) or (rows, 1)
        if len(labels) != len(data):
            raise ValueError(f"{path.name} has {len(labels)} labels for {len(data)} clouds")
        wrong = ~np.isin(labels, np.arange(num_classes))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{path.name} has label {labels[row]} in row {row}, expected 0 to {num_classes - 1}")
        return H5Summary(labels.astype(np.int64), data.shape[1], frozenset(file))


def scan_h5_lists(
    root: Path, lists: dict[str, str], num_classes: int, required: Sequence[str] = ()
) -> tuple[list[tuple[str, Path, H5Summary]], dict[str, str]]:
    """
    What the files of clouds that lists name hold, and why others cannot be read.

    Args:
        root: the folder of lists and files; lists may name files by where they lay on their maker's disk.
        lists: name of the list of each split.
        num_classes, required: as for [`scan_h5`].

    Returns:
        The split, path and content of each file, in the order of the lists, and reasons by name of the others.

    Raises:
        OSError: if a list is not there, or none of its files can be read.
        ValueError: as [`scan_h5`], or if a list is no list of files or the clouds are of several sizes.
    """
    found, unreadable = [], {}
    for split, name in lists.items():
        listing, reasons, known = root / name, {}, len(found)
        for line in read_lines(listing):
            path = root / plain_name(line.replace("\\", "/").rpartition("/")[2], str(listing))
            try:
                found.append((split, path, scan_h5(path, num_classes, required)))
            except OSError as error:
                reasons[path.name] = reason_unreadable(error, path)
        if len(found) == known:
            raise OSError(f"no file that {listing} names can be read; {'; '.join(map(': '.join, reasons.items()))}")
        unreadable |= reasons
    sizes = {summary.num_points for *_, summary in found}
    if len(sizes) > 1:
        raise ValueError(f"{root} has files with clouds of {sorted(sizes)} points, expected one size.")
    return found, unreadable


def read_h5_row(item: ShapeItem, name: str = "data") -> np.ndarray:
    """One row of an array; the file stays open for the next."""
    return h5_array(_cached_h5(item.path), name)[item.row]


@lru_cache(maxsize=1)
def _cached_h5(path: Path) -> "h5py.File":
    return _open_h5(path)


def _open_h5(path: Path) -> "h5py.File":
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path.name} needs h5py to be read: pip install "jointmae-hf[io]".') from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        return h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE)
    except OSError as error:
        raise OSError(f"{path.name} cannot be read as HDF5: {error}") from None


def h5_array(file: "h5py.File", name: str) -> "h5py.Dataset":
    """
    An array of numbers in an open file. A file may name other files as the place of an array, and may hold objects:
    neither is followed.
    """
    import h5py

    origin = Path(file.filename).name
    if name not in file.keys():
        raise ValueError(f"{origin} has the arrays {sorted(file.keys())}, but no `{name}`")
    array = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual:
        raise ValueError(f"{origin} has no `{name}` of its own: it points elsewhere, which is not followed")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{origin} has `{name}` of type {array.dtype}, expected numbers")
    return array


# ---- Lists of files


def read_lines(path: Path) -> list[str]:
    """Lines that are not empty; `FileNotFoundError` and `ValueError` that name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def plain_name(text: str, origin: str) -> str:
    """`text` if it is the name of a file or folder, and nothing that leads out of the folder it is looked up in."""
    if not re.fullmatch(r"[\w+\-. ]+", text) or text.strip(". ") == "":
        raise ValueError(f"{origin} names {text!r}, expected the bare name of a file")
    return text


def require_folder(root: str | Path) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"`source` is {str(root)!r}, expected a folder.")
    return root
