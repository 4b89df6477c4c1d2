"""Any folder `split/class/file` of meshes or clouds."""

import logging
import re
from collections import Counter
from pathlib import Path

from ...point_cloud_processing_joint_mae import FILE_SUFFIXES
from .core import ShapeItem, ShapeSource
from .reading import read_shape_file, require_folder


logger = logging.getLogger(__name__)


def open_folder(root: str | Path, license: str = "unknown") -> ShapeSource:
    """
    Shapes in `<split>/<class>/<file>`, of every format that the processor reads. Classes are in alphabetical order
    over all splits; other files, and those that lie higher or deeper, are passed over and counted.

    Args:
        root: the folder.
        license: identifier of the licence, for the card.

    Raises:
        FileNotFoundError: if it holds no shape.
        ValueError: if the name of a split is one that `datasets` does not take, or two files differ in suffix alone.
    """
    root = require_folder(root)
    # Only the first pattern enters linked folders. A link to nowhere is no folder: it is reported as unreadable.
    found = {*root.glob("*/*/*"), *root.rglob("*")}
    paths = sorted(p for p in found if not p.is_dir() and not any(n[0] == "." for n in p.relative_to(root).parts))
    shapes, ignored = [], Counter()
    for path in paths:
        suffix, in_place = path.suffix.lower(), len(path.relative_to(root).parts) == 3
        if suffix in FILE_SUFFIXES and in_place:
            shapes.append(path)
        else:
            ignored[f"{suffix} outside `<split>/<class>/`" if suffix in FILE_SUFFIXES else suffix] += 1
    if not shapes:
        raise FileNotFoundError(
            f"{root} holds no `<split>/<class>/<file>` with one of the suffixes {', '.join(FILE_SUFFIXES)}."
        )
    splits = {path.parts[-3] for path in shapes}
    for split in sorted(splits):
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise ValueError(f"{root} has the split {split!r}, expected letters, digits and underscores.")
    classes = sorted({path.parts[-2] for path in shapes})
    for folded, count in Counter(map(str.casefold, classes)).items():
        if count > 1:
            same = [name for name in classes if name.casefold() == folded]
            logger.warning("%s has the classes %s, which differ in case alone; they stay apart.", root, same)
    order = sorted(splits, key=lambda split: (split != "train", split))  # the card shows the first one
    items = [
        ShapeItem(path.relative_to(root).with_suffix("").as_posix(), split, classes.index(path.parts[-2]), path)
        for split in order
        for path in shapes
        if path.parts[-3] == split
    ]
    return ShapeSource(
        name="folder",
        pretty_name=root.resolve().name,
        description="Shapes from a folder `split/class/file`.",
        items=items,
        class_names=classes,
        read=read_shape_file,
        license=license,
        license_note="As stated above by whoever built this set.",
        ignored=dict(ignored),
    )
