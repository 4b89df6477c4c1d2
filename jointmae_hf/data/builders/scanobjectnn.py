"""ScanObjectNN: objects cut out of scanned rooms, in the three splits that results are reported on."""

from pathlib import Path

import numpy as np

from .core import ShapeItem, ShapeSource
from .reading import read_h5_row, require_folder, scan_h5


SCANOBJECTNN_CLASSES = ("bag bin box cabinet chair desk display door shelf table bed pillow sink sofa toilet").split()
# Folder, end of the file names, and what it is.
VARIANTS = {
    "obj-bg": ("main_split", "", "with the background around them"),
    "obj-only": ("main_split_nobg", "", "without background"),
    "pb-t50-rs": (
        "main_split",
        "_augmentedrot_scale75",
        "with background, shifted by up to half their size, rotated and scaled, about five times each",
    ),
}
_SIZES = {
    "obj-bg": {"train": 2309, "test": 581},
    "obj-only": {"train": 2309, "test": 581},
    "pb-t50-rs": {"train": 11416, "test": 2882},
}
_PARTS = ("background", "object")


def open_scanobjectnn(root: str | Path, variant: str) -> ShapeSource:
    """
    One of the splits of ScanObjectNN.

    Args:
        root: the folder that holds `main_split` and `main_split_nobg` (`h5_files` of the published archive, or one
            above it).
        variant: `"obj-bg"`, `"obj-only"` or `"pb-t50-rs"`.

    Raises:
        OSError: if a file is not there, or is torn.
        ValueError: if an array of it is not as it should be.
    """
    root = require_folder(root)
    folder, ending, kind = VARIANTS[variant]
    root = root / "h5_files" if (root / "h5_files").is_dir() else root
    summaries = {}
    for split, prefix in {"train": "training", "test": "test"}.items():
        path = root / folder / f"{prefix}_objectdataset{ending}.h5"
        summaries[split] = path, scan_h5(path, len(SCANOBJECTNN_CLASSES))
    sizes = {summary.num_points for _, summary in summaries.values()}
    if len(sizes) > 1:
        raise ValueError(f"{root / folder} has files with clouds of {sorted(sizes)} points, expected one size.")
    has_mask = all("mask" in summary.arrays for _, summary in summaries.values())
    if has_mask:
        for path, _ in summaries.values():
            scan_h5(path, len(SCANOBJECTNN_CLASSES), required=("mask",))
    items = [
        ShapeItem(f"{path.stem}/{row}", split, int(label), path, row)
        for split, (path, summary) in summaries.items()
        for row, label in enumerate(summary.labels)
    ]
    return ShapeSource(
        name=f"scanobjectnn-{variant}",
        pretty_name=f"ScanObjectNN {variant.upper().replace('-', '_')}",
        description=f"Scanned indoor objects of 15 classes in the official split, {kind}.",
        items=items,
        class_names=SCANOBJECTNN_CLASSES,
        read=_read_masked if has_mask else _read,
        part_names=_PARTS if has_mask else None,
        num_points=sizes.pop(),
        official_sizes=_SIZES[variant],
        license="other",
        license_note="Made from ScanNet and SceneNN, whose terms of use apply. See the homepage.",
        homepage="https://hkust-vgd.github.io/scanobjectnn",
    )


def _read(item: ShapeItem, num_points: int, seed: int) -> tuple[np.ndarray, None]:
    return read_h5_row(item), None


def _read_masked(item: ShapeItem, num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return read_h5_row(item), (read_h5_row(item, "mask") != -1).astype(np.uint8)  # -1 is background
