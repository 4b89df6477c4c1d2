"""A model's folder on the Hub: checked before it is pushed, and loaded back after."""

import fnmatch
import hashlib
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from transformers import AutoModel, AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import jointmae_hf


logger = logging.getLogger(__name__)

# A repository holds these, a card, and pictures for it, nothing else.
MODEL_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "*_joint_mae.py")
PICTURES = "*.png"
_CODE = ("configuration", "geometry", "modeling", "point_cloud_processing")


class PublishingError(RuntimeError):
    """A folder is no complete model, or what was loaded back is not what was pushed; the message says what differs."""


def check_model_folder(folder: str | Path):
    """
    Checks that a folder is exactly a model's repository.

    Raises:
        PublishingError: naming what is missing, or what does not belong there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishingError(f"`folder` is {str(folder)!r}, but there is no such folder.")
    wanted = ["README.md", *MODEL_FILES[:-1], *(f"{name}_joint_mae.py" for name in _CODE)]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise PublishingError(f"{folder} lacks {', '.join(missing)}.")
    allowed = ("README.md", ".gitattributes", *MODEL_FILES, PICTURES)
    extra = [path.name for path in sorted(folder.iterdir()) if not any(fnmatch.fnmatch(path.name, a) for a in allowed)]
    if extra:
        raise PublishingError(
            f"{folder} holds {', '.join(extra)}, which do not belong into a model's repository; build a folder for it "
            "with `python -m jointmae_hf.publishing card`."
        )
    card = ModelCard.load(folder / "README.md")
    if not card.data.to_dict().get("license"):
        raise PublishingError(f"{folder / 'README.md'} names no license in its metadata.")
    load_model(folder)


def load_model(folder: str | Path) -> PreTrainedModel:
    """
    The model of a folder, in evaluation mode, by the class that its configuration names.

    Raises:
        PublishingError: if it is no Joint-MAE model, or lacks weights.
    """
    folder = Path(folder)
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError) as error:
        raise PublishingError(f"{folder / 'config.json'} cannot be used: {error!r}.") from error
    model_class = getattr(jointmae_hf, names[0], None)
    if model_class is None:
        raise PublishingError(f"{folder / 'config.json'} names the architecture {names[0]!r}, which is not ours.")
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise PublishingError(f"{folder / 'model.safetensors'} lacks {', '.join(sorted(report['missing_keys']))}.")
    return model.eval()


def publish_folder(folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """
    Pushes a folder, downloads it again, and compares: every file by its SHA-256, and the features of a fixed cloud,
    computed by the package and by the code in the repository.

    Args:
        folder: exactly a model's repository; see [`check_model_folder`].
        repo_id: `owner/name`; made if it does not exist.
        private: whether it is private if it is made.
        revision: branch to push to; it must exist (default: main).

    Returns:
        The address of the commit.

    Raises:
        PublishingError: if the folder is incomplete, or what came back differs.
    """
    folder = Path(folder)
    check_model_folder(folder)
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=f"Release {folder.resolve().name}",
        delete_patterns="*",  # what an earlier release had and this one has not
    )
    logger.info("Pushed to %s; loading it back.", commit.commit_url)
    verify_published(folder, repo_id, commit.oid)
    logger.info("Every file and the features of a fixed cloud are the same.")
    return str(commit.commit_url)


def verify_published(folder: str | Path, repo_id: str, revision: str):
    """
    Compares a revision on the Hub with a folder, in a cache of its own.

    Raises:
        PublishingError: if a file or a feature differs.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as cache:
        snapshot = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache))
        for file in sorted(folder.iterdir()):
            found = snapshot / file.name
            if not found.is_file():
                raise PublishingError(f"{repo_id} lacks {file.name}.")
            if _sha256(found) != _sha256(file):
                raise PublishingError(f"{file.name} in {repo_id} is not the one in {folder}.")
        where = {"revision": revision, "cache_dir": cache}
        expected = _features(AutoProcessor, AutoModel, folder)
        for how, classes in (
            ("the package", (AutoProcessor, AutoModel)),
            ("its own code", _own_classes(repo_id, **where)),
        ):
            if not np.array_equal(expected, _features(*classes, repo_id, **where)):
                raise PublishingError(f"{repo_id} loaded by {how} gives other features than {folder}.")


def _own_classes(repo_id: str, **where: str) -> tuple[type, type]:
    """Processor and encoder from the code in a repository; where the package is imported, Auto classes prefer that."""
    references = []
    for file, name in (("preprocessor_config.json", "AutoProcessor"), ("config.json", "AutoModel")):
        settings = json.loads(Path(hf_hub_download(repo_id, file, **where)).read_text(encoding="utf-8"))
        if name not in settings.get("auto_map", {}):
            raise PublishingError(
                f"{file} of {repo_id} names no {name} in its `auto_map`; its code would not be found."
            )
        references.append(settings["auto_map"][name])
    processor, model = (get_class_from_dynamic_module(reference, repo_id, **where) for reference in references)
    return processor, model


def _features(processor_class: type, model_class: type, name: str | Path, **where: str) -> np.ndarray:
    """Features of a fixed cloud."""
    processor = processor_class.from_pretrained(name, **where)
    model = model_class.from_pretrained(name, **where).eval()
    cloud = np.random.default_rng(0).normal(size=(processor.num_points, 3)).astype(np.float32)
    with torch.no_grad():
        return model(**processor(cloud)).pooler_output.numpy()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
