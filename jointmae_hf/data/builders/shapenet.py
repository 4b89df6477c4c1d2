"""ShapeNet-55 as Point-BERT distributes it, and ShapeNetPart in its two forms."""

import json
from pathlib import Path

import numpy as np

from .core import ShapeItem, ShapeSource
from .reading import plain_name, read_h5_row, read_lines, read_shape_file, read_table, require_folder, scan_h5_lists


# Classes of ShapeNetCore by WordNet's number, in whose order labels are given.
SHAPENET55_CLASSES = {
    "02691156": "airplane",
    "02747177": "trash bin",
    "02773838": "bag",
    "02801938": "basket",
    "02808440": "bathtub",
    "02818832": "bed",
    "02828884": "bench",
    "02843684": "birdhouse",
    "02871439": "bookshelf",
    "02876657": "bottle",
    "02880940": "bowl",
    "02924116": "bus",
    "02933112": "cabinet",
    "02942699": "camera",
    "02946921": "can",
    "02954340": "cap",
    "02958343": "car",
    "02992529": "cellphone",
    "03001627": "chair",
    "03046257": "clock",
    "03085013": "keyboard",
    "03207941": "dishwasher",
    "03211117": "display",
    "03261776": "earphone",
    "03325088": "faucet",
    "03337140": "file cabinet",
    "03467517": "guitar",
    "03513137": "helmet",
    "03593526": "jar",
    "03624134": "knife",
    "03636649": "lamp",
    "03642806": "laptop",
    "03691459": "loudspeaker",
    "03710193": "mailbox",
    "03759954": "microphone",
    "03761084": "microwave",
    "03790512": "motorbike",
    "03797390": "mug",
    "03928116": "piano",
    "03938244": "pillow",
    "03948459": "pistol",
    "03991062": "flowerpot",
    "04004475": "printer",
    "04074963": "remote control",
    "04090263": "rifle",
    "04099429": "rocket",
    "04225987": "skateboard",
    "04256520": "sofa",
    "04330267": "stove",
    "04379243": "table",
    "04401088": "telephone",
    "04460130": "tower",
    "04468005": "train",
    "04530566": "watercraft",
    "04554684": "washer",
}
# Classes of ShapeNetPart in their order, with their parts, which are numbered through.
SHAPENETPART_CLASSES = {
    "Airplane": ("02691156", 4),
    "Bag": ("02773838", 2),
    "Cap": ("02954340", 2),
    "Car": ("02958343", 4),
    "Chair": ("03001627", 4),
    "Earphone": ("03261776", 3),
    "Guitar": ("03467517", 3),
    "Knife": ("03624134", 2),
    "Lamp": ("03636649", 4),
    "Laptop": ("03642806", 2),
    "Motorbike": ("03790512", 6),
    "Mug": ("03797390", 2),
    "Pistol": ("03948459", 3),
    "Rocket": ("04099429", 3),
    "Skateboard": ("04225987", 3),
    "Table": ("04379243", 3),
}
# The parts of the class with index c are numbered from the c-th of these to before the next: 0 to 49 in all.
PART_BOUNDS = np.cumsum([0, *(count for _, count in SHAPENETPART_CLASSES.values())])
SHAPENETPART_PARTS = [f"{name} {k}" for name, (_, count) in SHAPENETPART_CLASSES.items() for k in range(count)]

_TERMS = "ShapeNet's terms: for research and education, not commercial, not to be passed on. See the homepage."


def open_shapenet55(root: str | Path) -> ShapeSource:
    """
    ShapeNet-55: `shapenet_pc/<class>-<model>.npy`, clouds of 8192 points, and the lists `ShapeNet-55/train.txt` and
    `test.txt`.

    Raises:
        FileNotFoundError: if a list is not there.
        ValueError: if a list names a file of an unknown class, or one outside the folder.
    """
    root = require_folder(root)
    synsets = list(SHAPENET55_CLASSES)
    items = []
    for split in ("train", "test"):
        listing = root / "ShapeNet-55" / f"{split}.txt"
        for line in read_lines(listing):
            name = plain_name(line, str(listing))
            synset = name.partition("-")[0]
            if synset not in SHAPENET55_CLASSES or not name.endswith(".npy"):
                raise ValueError(f"{listing} names {name!r}, expected `<class>-<model>.npy` with one of 55 classes.")
            path = root / "shapenet_pc" / name
            items.append(ShapeItem(name.removesuffix(".npy"), split, synsets.index(synset), path))
    return ShapeSource(
        name="shapenet55",
        pretty_name="ShapeNet-55",
        description="CAD models of the 55 classes of ShapeNetCore, sampled and split by Point-BERT's authors.",
        items=items,
        class_names=list(SHAPENET55_CLASSES.values()),
        read=read_shape_file,
        official_sizes={"train": 41952, "test": 10518},
        license="other",
        license_note=_TERMS,
        homepage="https://shapenet.org",
    )


def open_shapenetpart(root: str | Path) -> ShapeSource:
    """
    ShapeNetPart: 16 classes, every point labelled with one of 50 parts.

    - `shapenetcore_partanno_segmentation_benchmark_v0_normal`: `synsetoffset2category.txt`,
      `train_test_split/shuffled_{train,val,test}_file_list.json` and `<class>/<model>.txt` with lines of x, y, z, a
      normal (left out) and the part;
    - the HDF5 form: `{train,val,test}_hdf5_file_list.txt` and files of clouds of 2048 points with `data`, `label` and
      `pid`; one that is missing or torn is left out and reported.

    Raises:
        FileNotFoundError: if it is neither.
        OSError: if no HDF5 file of a split can be read.
        ValueError: if a list or array of it is not as it should be.
    """
    root = require_folder(root)
    root = next((root / name for name in ("hdf5_data",) if (root / name).is_dir()), root)
    num_points, unreadable = None, {}
    if (root / "synsetoffset2category.txt").is_file():
        items, read = _scan_part_text(root), _read_part_text
    elif (root / "train_hdf5_file_list.txt").is_file():
        items, num_points, unreadable = _scan_part_hdf5(root)
        read = _read_part_hdf5
    else:
        raise FileNotFoundError(
            f"{root} holds no ShapeNetPart: neither `synsetoffset2category.txt` nor `train_hdf5_file_list.txt`."
        )
    return ShapeSource(
        name="shapenetpart",
        pretty_name="ShapeNetPart",
        description="CAD models of 16 classes of ShapeNet in the official split, each point labelled with its part.",
        items=items,
        class_names=list(SHAPENETPART_CLASSES),
        read=read,
        part_names=SHAPENETPART_PARTS,
        num_points=num_points,
        official_sizes={"train": 12137, "validation": 1870, "test": 2874},
        license="other",
        license_note=_TERMS,
        homepage="https://shapenet.org",
        unreadable=unreadable,
    )


def _check_categories(path: Path):
    """Refuses a list of classes that is not the official one: labels follow its order."""
    found = [tuple(line.split()[:2]) for line in read_lines(path)]
    expected = [(name, synset) for name, (synset, _) in SHAPENETPART_CLASSES.items()]
    if found != expected:
        wrong = [pair for pair in found if pair not in expected]
        raise ValueError(f"{path} lists {wrong or 'other classes or another order'}, expected {expected}.")


def _scan_part_text(root: Path) -> list[ShapeItem]:
    _check_categories(root / "synsetoffset2category.txt")
    labels = {synset: label for label, (synset, _) in enumerate(SHAPENETPART_CLASSES.values())}
    items = []
    for split, short in {"train": "train", "validation": "val", "test": "test"}.items():
        listing = root / "train_test_split" / f"shuffled_{short}_file_list.json"
        if not listing.is_file():
            raise FileNotFoundError(f"there is no {listing.name} in {listing.parent}")
        try:
            entries = json.loads(listing.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{listing} cannot be read as JSON: {error}") from None
        if not (isinstance(entries, list) and entries and all(isinstance(entry, str) for entry in entries)):
            raise ValueError(f"{listing} is no list of names, or an empty one.")
        for entry in entries:  # shape_data/02691156/1a04e3eab45ca15dd86060f189eb133
            parts = entry.split("/")
            if len(parts) != 3 or parts[1] not in labels:
                raise ValueError(f"{listing} names {entry!r}, expected `shape_data/<class>/<model>`.")
            model = plain_name(parts[2], str(listing))
            path = root / parts[1] / f"{model}.txt"
            items.append(ShapeItem(f"{parts[1]}/{model}", split, labels[parts[1]], path))
    return items


def _scan_part_hdf5(root: Path) -> tuple[list[ShapeItem], int, dict[str, str]]:
    if (root / "all_object_categories.txt").is_file():
        _check_categories(root / "all_object_categories.txt")
    shorts = {"train": "train", "validation": "val", "test": "test"}
    lists = {split: f"{short}_hdf5_file_list.txt" for split, short in shorts.items()}
    files, unreadable = scan_h5_lists(root, lists, len(SHAPENETPART_CLASSES), required=("pid",))
    items = [
        ShapeItem(f"{path.stem}/{row}", split, int(label), path, row)
        for split, path, summary in files
        for row, label in enumerate(summary.labels)
    ]
    return items, files[0][2].num_points, unreadable


def _read_part_text(item: ShapeItem, num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    table = read_table(item.path, 7)
    return table[:, :3], _check_parts(table[:, 6], item.label)


def _read_part_hdf5(item: ShapeItem, num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return read_h5_row(item), _check_parts(read_h5_row(item, "pid"), item.label)


def _check_parts(parts: np.ndarray, label: int) -> np.ndarray:
    """Parts `(n,)` as integers; `ValueError` if one is none of the shape's class."""
    low, high = PART_BOUNDS[label], PART_BOUNDS[label + 1]
    wrong = ~np.isin(parts, np.arange(low, high))
    if wrong.any():
        name = list(SHAPENETPART_CLASSES)[label]
        raise ValueError(f"has part {parts[np.argmax(wrong)]:g}, but those of {name} are {low} to {high - 1}")
    return parts.astype(np.uint8)
