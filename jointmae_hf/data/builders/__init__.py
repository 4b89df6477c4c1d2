"""
Builders: data sets of shapes as people have them on disk, made into tables that `load_dataset` reads.

`open_source(name, folder)` describes what is there, `build_dataset` writes the tables, `write_card` the card, and
`push_to_hub` uploads the folder. KiCad's library, from which classes, splits and parts are made, has a builder of its
own: `jointmae_hf.data.kicad`.
"""

from functools import partial
from pathlib import Path

from .card import draw_contact_sheet, write_card
from .core import BuildReport, ShapeItem, ShapeSource, build_dataset
from .folder import open_folder
from .modelnet import open_modelnet
from .scanobjectnn import VARIANTS, open_scanobjectnn
from .shapenet import open_shapenet55, open_shapenetpart


SOURCES = {
    "modelnet40": partial(open_modelnet, num_classes=40),
    "modelnet10": partial(open_modelnet, num_classes=10),
    **{f"scanobjectnn-{variant}": partial(open_scanobjectnn, variant=variant) for variant in VARIANTS},
    "shapenet55": open_shapenet55,
    "shapenetpart": open_shapenetpart,
    "folder": open_folder,
}

__all__ = [
    "SOURCES",
    "BuildReport",
    "ShapeItem",
    "ShapeSource",
    "build_dataset",
    "draw_contact_sheet",
    "open_folder",
    "open_modelnet",
    "open_scanobjectnn",
    "open_shapenet55",
    "open_shapenetpart",
    "open_source",
    "push_to_hub",
    "write_card",
]


def open_source(name: str, root: str | Path) -> ShapeSource:
    """The data set `name`, a key of `SOURCES`, as it lies in the folder `root`; errors as those of its builder."""
    if name not in SOURCES:
        raise ValueError(f"`name` is {name!r}, expected one of {', '.join(SOURCES)}.")
    return SOURCES[name](root)


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """
    Uploads a built folder as the data set `repo_id`, which is made if there is none. Tables of an earlier build, the
    `data/*.parquet` that are not in the folder, are deleted there in the same commit.

    Args:
        folder: tables, card and contact sheet.
        repo_id: `owner/name`.
        private: whether a new repository is private. Most standard sets may not be passed on; see the card's licence.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type="dataset",
        ignore_patterns=["**/.*", ".*"],
        delete_patterns=["data/*.parquet"],
    )
    return commit.commit_url
