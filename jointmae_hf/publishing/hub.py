"""A model's folder on the Hub: checked before it is pushed, and loaded back after."""

import fnmatch
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import jointmae_hf


logger = logging.getLogger(__name__)

# A repository holds these, a card, pictures for it, and licences, nothing else.
MODEL_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "*_joint_mae.py")
PICTURES = "*.png"
LICENCES = ("LICENSE*", "NOTICE*", "ATTRIBUTION*")
# The Auto classes that load a model, by its architecture; its card shows the first.
AUTO_CLASSES = {
    "JointMAEForPreTraining": ("AutoModel", "AutoModelForPreTraining"),
    "JointMAEModel": ("AutoModel",),
    "JointMAEForPointCloudClassification": ("AutoModelForImageClassification",),
    "JointMAEForPartSegmentation": ("AutoModelForSemanticSegmentation",),
}
_CODE = ("configuration", "geometry", "modeling", "point_cloud_processing")
_HINTS = {
    401: "; log in with `hf auth login`",
    403: "; the token may not write there",
    404: "; there is no such repository or branch, or the token may not see it",
}


class PublishingError(RuntimeError):
    """A folder is no complete model, the Hub refused it, or what was loaded back differs; the message says in what."""


def check_model_folder(folder: str | Path, repo_id: str | None = None):
    """
    Checks that a folder is exactly a model's repository, and that the package and the code in the folder, which is
    run, compute the same.

    Args:
        folder: the folder.
        repo_id: `owner/name`, where it is to be pushed; its card must load the model from there.

    Raises:
        PublishingError: naming what is missing, what does not belong there, or what is wrong with a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishingError(f"`folder` is {str(folder)!r}, but there is no such folder.")
    wanted = ["README.md", *MODEL_FILES[:-1], *(f"{name}_joint_mae.py" for name in _CODE)]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise PublishingError(f"{folder} lacks {', '.join(missing)}.")
    allowed = ("README.md", ".gitattributes", *MODEL_FILES, PICTURES, *LICENCES)
    extra = [path.name for path in sorted(folder.iterdir()) if not any(fnmatch.fnmatch(path.name, a) for a in allowed)]
    if extra:
        raise PublishingError(
            f"{folder} holds {', '.join(extra)}, which do not belong into a model's repository; build a folder for it "
            "with `python -m jointmae_hf.publishing card`."
        )
    card = _read_card(folder)
    if not card.data.to_dict().get("license"):
        raise PublishingError(f"{folder / 'README.md'} names no license in its metadata.")
    links = re.findall(r"\]\(([^)#\s]+)", card.text)
    broken = [link for link in links if not re.match(r"[a-z]+:", link) and not (folder / link).is_file()]
    if broken:
        raise PublishingError(f"{folder / 'README.md'} shows or links to {broken[0]}, which is not in the folder.")
    named = set(re.findall(r'^name = "(.+)"$', card.text, re.MULTILINE))
    if repo_id is not None and named != {repo_id}:
        raise PublishingError(
            f"{folder / 'README.md'} loads a model from {', '.join(sorted(named)) or 'nowhere'}, expected {repo_id}: "
            f"build the card with `python -m jointmae_hf.publishing card ... --repo_id {repo_id}`."
        )
    _check_outputs(folder, folder)


def load_model(folder: str | Path) -> PreTrainedModel:
    """
    The model of a folder, in evaluation mode and float32, by the class that its configuration names.

    Raises:
        PublishingError: if it is no Joint-MAE model, or its weights are damaged or not those of the configuration.
    """
    folder = Path(folder)
    model_class = getattr(jointmae_hf, _architecture(folder))
    with _explained(f"{folder} cannot be loaded"):
        return _load(model_class, folder, dtype=torch.float32)


def publish_folder(folder: str | Path, repo_id: str, private: bool = True, revision: str | None = None) -> str:
    """
    Checks and pushes a folder, downloads it again, and compares: every file by its SHA-256, and what is computed of a
    fixed cloud (logits of a head, features of an encoder) by the package and by the code in the repository.

    The repository becomes what the folder is. Files of an earlier release that this one has not are deleted there, in
    the same commit; a repository of something else is refused.

    Args:
        folder: exactly a model's repository; see [`check_model_folder`].
        repo_id: `owner/name`; made if it does not exist.
        private: whether it is private if it is made.
        revision: branch to push to; it must exist (default: main).

    Returns:
        The address of the commit.

    Raises:
        PublishingError: if the folder is no complete model for this name or the repository holds something else, both
            of which leave the repository as it was; if the Hub refuses; or if what came back differs.
    """
    folder = Path(folder)
    check_model_folder(folder, repo_id)
    api = HfApi()
    with _hub_answers(repo_id):
        _check_base_model(api, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        _check_earlier_release(api, repo_id, revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"Release {folder.resolve().name}",
            delete_patterns="*",  # what an earlier release had and this one has not
        )
    logger.info("Pushed to %s; loading it back.", commit.commit_url)
    verify_published(folder, repo_id, commit.oid)
    logger.info("Every file and what is computed of a fixed cloud are the same.")
    return str(commit.commit_url)


def verify_published(folder: str | Path, repo_id: str, revision: str):
    """
    Compares a revision on the Hub with a folder, in a cache of its own.

    Raises:
        PublishingError: if a file or an output differs, or the revision cannot be had.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as cache:
        with _hub_answers(repo_id):
            snapshot = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache))
        for file in sorted(folder.iterdir()):
            found = snapshot / file.name
            if not found.is_file():
                raise PublishingError(f"{repo_id} lacks {file.name}.")
            if _sha256(found) != _sha256(file):
                raise PublishingError(f"{file.name} in {repo_id} is not the one in {folder}.")
        _check_outputs(folder, repo_id, revision=revision, cache_dir=cache)


def _check_outputs(folder: Path, name: str | Path, **where: str):
    """Compares what is computed at `name`, the folder or a repository, with what the package makes of the folder."""
    with _explained(f"{folder} cannot be used by the package"):
        expected = _compute(folder, folder, own_code=False)
    ways = [("its own code", True)] if name == folder else [("the package", False), ("its own code", True)]
    for how, own_code in ways:
        with _explained(f"{name} cannot be used by {how}"):
            found = _compute(folder, name, own_code, **where)
        if not np.array_equal(expected, found):
            raise PublishingError(f"{name} loaded by {how} computes other values than {folder} by the package.")


def _compute(folder: Path, name: str | Path, own_code: bool, **where: str) -> np.ndarray:
    """Logits of a head, or features of an encoder, for a fixed cloud, by each Auto class of the folder's model."""
    architecture = _architecture(folder)
    names = ("AutoProcessor", "AutoConfig", *AUTO_CLASSES[architecture])
    # Where the package is imported, Auto classes prefer it to the code beside the weights.
    classes = [_own_class(folder, key, name, **where) if own_code else getattr(transformers, key) for key in names]
    processor, config = (loaded.from_pretrained(name, **where) for loaded in classes[:2])
    for key in ("num_centers", "num_neighbors"):  # not `num_points`: a head may be tuned for more or fewer
        given, expected = getattr(processor, key), getattr(config, key)
        if given != expected:
            raise PublishingError(
                f"`{key}` is {given} in preprocessor_config.json of {name}, expected {expected} as in its config.json."
            )
    inputs = processor(np.random.default_rng(0).normal(size=(processor.num_points, 3)).astype(np.float32))
    if architecture == "JointMAEForPartSegmentation" and config.num_object_classes > 0:
        inputs["object_class"] = torch.zeros(1, dtype=torch.int64)
    outputs = []
    for model_class in classes[2:]:
        model = _load(model_class, name, config=config, **where)
        with torch.no_grad():
            if "AutoModel" in names:  # pre-training itself draws masks
                outputs.append(model.base_model(**inputs).pooler_output)
            else:
                outputs.append(model(**inputs).logits)
    values = torch.stack(outputs).float().numpy()
    if not np.isfinite(values).all():
        raise PublishingError(f"{name} computes values that are not finite.")
    return values


def _load(model_class: type, name: str | Path, **options: Any) -> PreTrainedModel:
    """A model in evaluation mode, all of its weights from `name`."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the report names them, the error not
    model, report = model_class.from_pretrained(name, **options)
    if missing := report["missing_keys"]:
        raise PublishingError(f"model.safetensors of {name} lacks {', '.join(sorted(missing))}.")
    if report["mismatched_keys"]:
        key, found, expected = sorted(report["mismatched_keys"])[0]
        raise PublishingError(
            f"`{key}` has shape {tuple(found)} in model.safetensors of {name}, but its config.json makes it "
            f"{tuple(expected)}."
        )
    return model.eval()


def _own_class(folder: Path, key: str, name: str | Path, **where: str) -> type:
    """The class that the folder's `auto_map` gives for an Auto class, from the code at `name`."""
    file = folder / ("preprocessor_config.json" if key == "AutoProcessor" else "config.json")
    reference = _read_json(file).get("auto_map", {}).get(key)
    if reference is None:
        raise PublishingError(f"{file} names no {key} in its `auto_map`; its code would not be found.")
    module = str(reference).partition(".")[0]
    if not (folder / f"{module}.py").is_file():  # transformers would follow a reference into a stranger's repository
        raise PublishingError(f"{file} gives {reference!r} for {key} in its `auto_map`, which is no code of its own.")
    return get_class_from_dynamic_module(reference, str(name), **where)


def _architecture(folder: Path) -> str:
    """The class that a folder's configuration names."""
    named = _read_json(folder / "config.json").get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in AUTO_CLASSES:
        raise PublishingError(
            f"`architectures` is {named!r} in {folder / 'config.json'}, expected one of {', '.join(AUTO_CLASSES)}."
        )
    return named[0]


def _read_json(file: Path) -> dict[str, Any]:
    with _explained(f"{file} cannot be read"):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise PublishingError(f"{file} holds no settings, but {type(content).__name__}.")
    return content


def _read_card(folder: Path) -> ModelCard:
    with _explained(f"{folder / 'README.md'} cannot be read"):
        return ModelCard.load(folder / "README.md")


def _check_base_model(api: HfApi, folder: Path):
    """Raises `PublishingError` if the card says that the model came from one that is not on the Hub."""
    named = _read_card(folder).data.base_model or []
    for base_model in [named] if isinstance(named, str) else named:
        if not api.repo_exists(base_model):
            raise PublishingError(
                f"`base_model` is {base_model!r} in {folder / 'README.md'}, but the Hub has no such model; publish it "
                "first, or build the card with another --base_model."
            )


def _check_earlier_release(api: HfApi, repo_id: str, revision: str | None):
    """Raises `PublishingError` if a repository holds files, but no Joint-MAE model that they would belong to."""
    files = [name for name in api.list_repo_files(repo_id, revision=revision) if name != ".gitattributes"]
    if not files:
        return
    found = None
    if "config.json" in files:
        with tempfile.TemporaryDirectory() as cache:
            config = api.hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=cache)
            found = _read_json(Path(config)).get("model_type")
    if found != jointmae_hf.JointMAEConfig.model_type:
        what = "no config.json" if "config.json" not in files else f"a model of type {found!r}"
        raise PublishingError(
            f"{repo_id} on the Hub holds {len(files)} files, such as {files[0]}, and {what}: they are no earlier "
            "release and would be deleted. Choose another name, or empty that repository."
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever files of a folder cause, its code included, becomes a `PublishingError`."""
    try:
        yield
    except PublishingError:
        raise
    except Exception as error:
        raise PublishingError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def _hub_answers(repo_id: str) -> Iterator[None]:
    """A refusal of the Hub, or none to be reached, becomes a `PublishingError`."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0]
        raise PublishingError(f"{repo_id} on the Hub: {said}{_HINTS.get(status, '')}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
