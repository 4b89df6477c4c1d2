"""Checkpoints that are whole or absent, hold no pickle, and say when they are damaged.

A checkpoint is a folder `checkpoint-STEP`:

    config.json, model.safetensors    what `save_pretrained` writes: a model to load like any other
    preprocessor_config.json          its processor
    optimizer.safetensors             `PARAMETER.exp_avg` and so on, by the name of the parameter
    average.safetensors               the average of the weights, if the run keeps one
    trainer_state.json                step, arguments, losses so far, position in the stream
    log.jsonl                         the log up to this step
    manifest.json                     size and SHA-256 of each of them

It is written under another name, flushed to the disk, and renamed. There is no pointer to the latest one that could
be wrong: it is found by looking.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import FeatureExtractionMixin, PreTrainedModel
from transformers.utils import logging as hf_logging

from ..files import flush
from .averaging import WeightAverage
from .sharding import spread_like, whole


logger = logging.getLogger(__name__)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"
STATE = "trainer_state.json"
LOG = "log.jsonl"
MANIFEST = "manifest.json"
LOCK = ".lock"

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"checkpoint-\d+\.(partial|replaced)")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


@contextlib.contextmanager
def folder_of_one_run(folder: Path) -> Iterator[None]:
    """
    Inside, no other process may run in a folder; the system takes the lock from a process that was killed.

    Raises:
        FileExistsError: if one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(
            f"`output_dir` {folder} is in use by another run, which may have outlived its launcher; wait for its "
            "end or stop it."
        ) from error
    try:
        yield
    finally:
        lock.release()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. They may be damaged, never half-written."""
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step after which a checkpoint was written, by its name."""
    return int(_NAME.fullmatch(path.name).group(1))


def latest_checkpoint(output_dir: Path) -> Path | None:
    """
    The newest undamaged checkpoint of a run, or `None` if there is none at all. Warns of damaged ones that it passes.

    Raises:
        CheckpointError: if there are checkpoints, but all are damaged.
    """
    problems = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            logger.warning("%s The checkpoint before it is tried.", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError("No checkpoint can be used: " + " ".join(problems))
    return None


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: PreTrainedModel,
    processor: FeatureExtractionMixin,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    log: Path | None = None,
    average: WeightAverage | None = None,
    writes: bool = True,
) -> Path:
    """
    Writes `output_dir/checkpoint-STEP`, whole or not at all. All processes call it, since each may have a part.

    Args:
        output_dir: folder of the run.
        step: optimizer steps done.
        model: model, not wrapped.
        processor: what makes its inputs.
        optimizer: its optimizer; only its tensors are saved, its settings are arguments.
        state: everything else that continuing needs, for JSON.
        log: log of the run so far, copied along.
        average: average of the weights.
        writes: whether this is the process that writes.
    """
    path = output_dir / f"checkpoint-{step}"
    weights, moments = whole_weights(model), optimizer_tensors(model, optimizer)
    averages = None if average is None else {name: whole(tensor) for name, tensor in average.tensors().items()}
    if not writes:
        return path
    partial = path.with_name(path.name + ".partial")
    remove_unfinished(output_dir)
    partial.mkdir(parents=True)
    save_model(model, partial, weights)
    processor.save_pretrained(partial)
    save_file(moments, partial / OPTIMIZER)
    if averages is not None:
        save_file(averages, partial / AVERAGE)
    (partial / STATE).write_text(json.dumps(state, indent=2) + "\n")
    if log is not None and log.exists():
        shutil.copyfile(log, partial / LOG)
    _share_weights(partial, STATE)
    files = sorted(partial.iterdir())
    manifest = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for file in [*files, partial / MANIFEST, partial]:
        flush(file)
    if path.exists():  # damaged, or later than the one that was resumed from
        replaced = path.with_name(path.name + ".replaced")
        path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced)
    else:
        partial.rename(path)
    flush(output_dir)
    return path


def save_model(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None):
    """
    `save_pretrained` without its progress bar, which would cut through that of training.

    Args:
        model: the model.
        folder: where to.
        weights: its weights in one piece, if it holds a part of them only.
    """
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def _share_weights(folder: Path, beside: str):
    """Weights may be read by whoever may read a file beside them; safetensors 0.8 lets only their owner."""
    mode = (folder / beside).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def save_model_folder(model: PreTrainedModel, processor: FeatureExtractionMixin, folder: Path):
    """Model and processor in a folder that `from_pretrained` loads; each file is whole or absent, others stay."""
    staging = folder / "model.partial"
    shutil.rmtree(staging, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, staging)
    processor.save_pretrained(staging)
    _share_weights(staging, "config.json")
    for file in sorted(staging.iterdir()):
        file.replace(folder / file.name)
    staging.rmdir()


def remove_old_checkpoints(output_dir: Path, keep: int | None):
    """Removes all but the `keep` newest checkpoints; `None` keeps all."""
    if keep is not None:
        for path in list_checkpoints(output_dir)[:-keep]:
            # Under another name first: a folder that is half removed must not look like a checkpoint.
            replaced = path.with_name(path.name + ".replaced")
            path.rename(replaced)
            shutil.rmtree(replaced)


def abandon_checkpoints_after(checkpoint: Path, step: int):
    """
    Renames checkpoints of later steps than `step`, that of the one that a run goes on from.

    They are of another continuation, but would be the newest: to resume from and to keep.
    """
    for path in list_checkpoints(checkpoint.parent):
        if checkpoint_step(path) > step:
            abandoned = path.with_name(f"abandoned-{path.name}")
            if abandoned.exists():
                shutil.rmtree(abandoned)
            path.rename(abandoned)
            logger.warning("%s is later than %s and now called %s.", path, checkpoint.name, abandoned.name)


def remove_unfinished(output_dir: Path):
    """Removes what a killed run left of a checkpoint that it was writing or removing."""
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            if path.is_dir() and _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)


def verify_checkpoint(path: Path):
    """
    Compares every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
    """
    manifest = read_json(path / MANIFEST)
    for name in (MODEL, OPTIMIZER, STATE):
        if name not in manifest:
            raise CheckpointError(f"{path / MANIFEST} does not list {name}.")
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, expected {expected['size']}.")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one of the manifest.")


def read_json(file: Path) -> Any:
    """Reads a JSON file of a checkpoint; raises `CheckpointError` if it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error


def load_weights(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer):
    """
    Puts the weights and the optimizer's tensors of a checkpoint into a model and its optimizer, in place.

    Raises:
        CheckpointError: if a file cannot be read or does not fit the model.
    """
    try:
        own = model.state_dict()
        weights = load_file(path / MODEL).items()
        model.load_state_dict({name: spread_like(tensor, own.get(name, tensor)) for name, tensor in weights})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path / MODEL} cannot be loaded: {error}") from error
    try:
        tensors = load_file(path / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / OPTIMIZER} cannot be loaded: {error}") from error
    optimizer.state.clear()
    keys = ("step", "exp_avg", "exp_avg_sq")
    for name, parameter in model.named_parameters():
        missing = [f"{name}.{key}" for key in keys if f"{name}.{key}" not in tensors]
        # A parameter that has had no gradient yet has none of them.
        if not parameter.requires_grad or len(missing) == len(keys):
            continue
        if missing:
            raise CheckpointError(f"{path / OPTIMIZER} lacks {missing[0]}.")
        for key in keys:
            tensor = tensors[f"{name}.{key}"]
            # AdamW counts its steps on the CPU.
            optimizer.state[parameter][key] = tensor if key == "step" else spread_like(tensor, parameter)


def load_average(path: Path, average: WeightAverage):
    """
    Puts the average of a checkpoint into that of a run.

    Raises:
        CheckpointError: if it cannot be read or does not fit the model.
    """
    try:
        average.load(load_file(path / AVERAGE))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path / AVERAGE} cannot be loaded: {error}") from error


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model, each in one piece."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state, each in one piece, `PARAMETER.KEY`."""
    return {
        f"{name}.{key}": whole(tensor).contiguous()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
