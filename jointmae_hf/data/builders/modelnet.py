"""ModelNet40 and ModelNet10: `.off` folders, `modelnet40_ply_hdf5_2048` and `modelnet40_normal_resampled`."""

from pathlib import Path

import numpy as np

from .core import MESH_POINTS, ShapeItem, ShapeSource
from .reading import (
    plain_name,
    read_h5_row,
    read_lines,
    read_shape_file,
    require_folder,
    scan_h5_lists,
)


MODELNET40_CLASSES = (
    "airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain desk door dresser flower_pot "
    "glass_box guitar keyboard lamp laptop mantel monitor night_stand person piano plant radio range_hood sink sofa "
    "stairs stool table tent toilet tv_stand vase wardrobe xbox"
).split()
MODELNET10_CLASSES = "bathtub bed chair desk dresser monitor night_stand sofa table toilet".split()

_SIZES = {40: {"train": 9843, "test": 2468}, 10: {"train": 3991, "test": 908}}
_H5_SIZES = {"train": 9840, "test": 2468}


def open_modelnet(root: str | Path, num_classes: int = 40) -> ShapeSource:
    """
    ModelNet as it lies in `root`, in any of its three forms.

    - `<class>/train/<name>.off`, as published: meshes;
    - `train_files.txt`, `test_files.txt` and `ply_data_*.h5`: clouds of 2048 points;
    - `modelnet40_train.txt`, `modelnet40_test.txt` and `<class>/<name>.txt`: clouds of 10,000 points, whose normals
      are left out.

    The ten classes of ModelNet10 can be taken out of each form of ModelNet40.

    An `.h5` file that is missing or torn is left out and reported.

    Raises:
        FileNotFoundError: if it is none of these.
        OSError: if no `.h5` file of a split can be read.
        ValueError: if a list or array of it is not as it should be, or a split has no shape of the classes.
    """
    root = require_folder(root)
    classes = {40: MODELNET40_CLASSES, 10: MODELNET10_CLASSES}[num_classes]
    sizes = _SIZES[num_classes]
    num_points, unreadable = None, {}
    if (root / "train_files.txt").is_file():
        items, num_points, unreadable = _scan_hdf5(root, classes)
        read, form = _read_hdf5, "the clouds of `modelnet40_ply_hdf5_2048`"
        sizes = _H5_SIZES if num_classes == 40 else {}
    elif (root / f"modelnet{num_classes}_train.txt").is_file():
        items = _scan_resampled(root, num_classes, classes)
        read, form = read_shape_file, "the clouds of `modelnet40_normal_resampled`"
    elif any(root.glob("*/train/*.off")):
        items = _scan_off(root, classes)
        read, form = read_shape_file, "points sampled on the meshes, evenly by area"
        num_points = MESH_POINTS
    else:
        raise FileNotFoundError(
            f"{root} holds no ModelNet: neither `<class>/train/*.off`, nor `train_files.txt` with `ply_data_*.h5`, "
            f"nor `modelnet{num_classes}_train.txt` with `<class>/<name>.txt`."
        )
    for split in ("train", "test"):
        if not any(item.split == split for item in items):
            raise ValueError(
                f"{root} has no shape of the {num_classes} classes of ModelNet{num_classes} for {split!r}."
            )
    return ShapeSource(
        name=f"modelnet{num_classes}",
        pretty_name=f"ModelNet{num_classes}",
        description=f"CAD models of {num_classes} classes in the official split; {form}.",
        items=items,
        class_names=classes,
        read=read,
        num_points=num_points,
        official_sizes=sizes,
        license="other",
        license_note="For academic research; the copyright of each model stays with its author. See the homepage.",
        homepage="https://modelnet.cs.princeton.edu",
        unreadable=unreadable,
    )


def _scan_off(root: Path, classes: list[str]) -> list[ShapeItem]:
    missing = [name for name in classes if not (root / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{root} has no folder for the classes {missing}.")
    return [
        ShapeItem(f"{name}/{path.stem}", split, label, path)
        for split in ("train", "test")
        for label, name in enumerate(classes)
        for path in sorted((root / name / split).glob("*.off"))
    ]


def _scan_resampled(root: Path, num_classes: int, classes: list[str]) -> list[ShapeItem]:
    names = root / f"modelnet{num_classes}_shape_names.txt"
    if names.is_file():
        check_classes(names, classes)
    items = []
    for split in ("train", "test"):
        listing = root / f"modelnet{num_classes}_{split}.txt"
        for line in read_lines(listing):
            name = plain_name(line, str(listing))
            label = name.rpartition("_")[0]  # `night_stand_0001` is of `night_stand`
            if label not in classes:
                raise ValueError(f"{listing} names {name!r}, which is of none of the {len(classes)} classes.")
            items.append(ShapeItem(f"{label}/{name}", split, classes.index(label), root / label / f"{name}.txt"))
    return items


def _scan_hdf5(root: Path, classes: list[str]) -> tuple[list[ShapeItem], int, dict[str, str]]:
    if (root / "shape_names.txt").is_file():
        check_classes(root / "shape_names.txt", MODELNET40_CLASSES)
    wanted = {MODELNET40_CLASSES.index(name): label for label, name in enumerate(classes)}
    lists = {split: f"{split}_files.txt" for split in ("train", "test")}
    files, unreadable = scan_h5_lists(root, lists, len(MODELNET40_CLASSES))
    items = [
        ShapeItem(f"{path.stem}/{row}", split, wanted[int(label)], path, row)
        for split, path, summary in files
        for row, label in enumerate(summary.labels)
        if int(label) in wanted
    ]
    return items, files[0][2].num_points, unreadable


def _read_hdf5(item: ShapeItem, num_points: int, seed: int) -> tuple[np.ndarray, None]:
    return read_h5_row(item), None


def check_classes(path: Path, classes: list[str]):
    """Refuses a list of classes that is not the official one, in its order."""
    found = [line.split()[0] for line in read_lines(path)]
    if found != list(classes):
        i = next(
            (i for i, (a, b) in enumerate(zip(found, classes, strict=False)) if a != b), min(len(found), len(classes))
        )
        expected = repr(classes[i]) if i < len(classes) else "no more"
        got = repr(found[i]) if i < len(found) else "nothing"
        raise ValueError(f"{path} has {got} in line {i + 1}, expected {expected}: labels would mean other classes.")
