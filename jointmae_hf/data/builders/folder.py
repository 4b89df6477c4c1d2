"""Any folder `split/class/file` of meshes or clouds."""

import re
from collections import Counter
from pathlib import Path

from ...point_cloud_processing_joint_mae import ARRAY_SUFFIXES, MESH_SUFFIXES, TEXT_SUFFIXES
from .core import ShapeItem, ShapeSource
from .reading import read_shape_file, require_folder


def open_folder(root: str | Path, license: str = "unknown") -> ShapeSource:
    """
    Shapes in `<split>/<class>/<file>`, of every format that the processor reads. Classes are in alphabetical order
    over all splits; other files are passed over and counted.

    Args:
        root: the folder.
        license: identifier of the licence, for the card.

    Raises:
        FileNotFoundError: if it holds no shape.
        ValueError: if the name of a split is one that `datasets` does not take, or two files differ in suffix alone.
    """
    root = require_folder(root)
    known = (*ARRAY_SUFFIXES, *TEXT_SUFFIXES, *MESH_SUFFIXES)
    paths = sorted(
        p for p in root.glob("*/*/*") if p.is_file() and not any(n[0] == "." for n in p.relative_to(root).parts)
    )
    shapes = [path for path in paths if path.suffix.lower() in known]
    if not shapes:
        raise FileNotFoundError(
            f"{root} holds no `<split>/<class>/<file>` with one of the suffixes {', '.join(known)}."
        )
    splits = {path.parts[-3] for path in shapes}
    for split in sorted(splits):
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise ValueError(f"{root} has the split {split!r}, expected letters, digits and underscores.")
    classes = sorted({path.parts[-2] for path in shapes})
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
        ignored=dict(Counter(path.suffix.lower() for path in paths if path.suffix.lower() not in known)),
    )
