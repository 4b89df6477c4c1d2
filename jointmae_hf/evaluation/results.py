"""The one file that every task writes, and its one reader.

Tables and model cards are made from these files, so each says everything about its numbers: what was measured on which
data with which weights, by which protocol, at every seed, and how to get it again.
"""

import hashlib
import json
import math
import os
import re
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import replace_text


SCHEMA = "jointmae_hf/result/1"

# Every task, with its headline metric. All metrics are percentages.
TASKS = {
    "linear_svm": "accuracy",
    "few_shot": "accuracy",
    "retrieval": "map",
    "classification": "accuracy",
    "part_segmentation": "instance_miou",
}
# Where the weights came from before the task began.
INITIALIZATIONS = ("pretrained", "untrained", "from_scratch", "random_forest")
# Fields of the configuration that weights do not depend on, and features do.
_READING = ("num_centers", "num_neighbors", "pooling_layers", "pooling_deviation")
# Arguments that say what to do with an earlier run, and nothing about the result.
_RESUMING = ("resume_from_checkpoint", "overwrite_output_dir")


class ResultError(ValueError):
    """A result file is missing, damaged or not what the schema says; the message names the file and the field."""


@dataclass
class TaskResult:
    """
    The result of one task with one model on one data set.

    Args:
        task: one of `TASKS`.
        model: `name`, `initialization` (one of `INITIALIZATIONS`), `parameters` (how many are used) and `weights`
            (digest of the encoder before the task, `None` where each seed has its own); of a network also `reading`,
            see [`reading`]; after fine-tuning also `final_weights`: digests of the last models, one for each seed.
        dataset: `name`, `config_name` and `splits`: the fingerprint of each split that was read.
        split_sizes: shapes used of each part, and `classes`.
        seeds: one for each value of a metric.
        metrics: `{name: {"values", "mean", "deviation"}}` in percent; the sample deviation, `None` for one seed.
        protocol: what was done, in words.
        settings: everything that was set, by name.
        chosen_on_test: whether anything was chosen by its score on the test split.
        command: what makes the result again.
        git_commit: commit of the code, with `-dirty` if it was edited since; `None` outside a clone. Where parts of
            the result were made by different commits, versions or devices, all of them, with `; ` between.
        versions: of Python and packages.
        device: what it ran on, in words.
        seconds: how long it took, without interruptions.
        finished: when, ISO 8601 in UTC.

    Raises:
        ResultError: if a field contradicts the schema.
    """

    task: str
    model: dict[str, Any]
    dataset: dict[str, Any]
    split_sizes: dict[str, int]
    seeds: list[int]
    metrics: dict[str, dict[str, Any]]
    protocol: str
    settings: dict[str, Any]
    chosen_on_test: bool
    command: str
    git_commit: str | None
    versions: dict[str, str]
    device: str
    seconds: float
    finished: str

    def __post_init__(self):
        for name, expected in _TYPES.items():
            value = getattr(self, name)
            _require(
                name, value, isinstance(value, expected) and not _is_wrong_bool(value, expected), _words(expected)
            )
        _require("task", self.task, self.task in TASKS, f"one of {sorted(TASKS)}")
        for name, keys in (
            ("model", ("name", "initialization", "parameters", "weights")),
            ("dataset", ("name", "splits")),
        ):
            for key in keys:
                _require(name, getattr(self, name), key in getattr(self, name), f"an entry {key!r}")
        kind = self.model["initialization"]
        _require("model.initialization", kind, kind in INITIALIZATIONS, f"one of {INITIALIZATIONS}")
        for name in ("train", "test"):
            size = self.split_sizes.get(name)
            _require(f"split_sizes.{name}", size, isinstance(size, int) and size > 0, "a number of shapes")
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        _require("seeds", self.seeds, distinct and all(isinstance(s, int) for s in self.seeds), "distinct integers")
        _require("metrics", sorted(self.metrics), TASKS[self.task] in self.metrics, f"{TASKS[self.task]!r} among them")
        for name, metric in self.metrics.items():
            _check_metric(f"metrics.{name}", metric, len(self.seeds))

    @property
    def headline(self) -> dict[str, Any]:
        """The metric that the task is named for."""
        return self.metrics[TASKS[self.task]]


def summarize(values: list[float]) -> dict[str, Any]:
    """Values of one metric, one for each seed, with their mean and sample deviation (`None` for a single value)."""
    values = [float(value) for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "deviation": deviation}


def summarize_runs(runs: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Metrics of several seeds, `{name: value}` each, as `TaskResult` has them. All must have the same names."""
    return {name: summarize([run[name] for run in runs]) for name in runs[0]}


def origin(device: torch.device) -> dict[str, Any]:
    """Commit, versions and device of what this process computes."""
    from ..training.pretraining import device_name, git_commit, versions

    return {
        "git_commit": git_commit(),
        "versions": versions() | {"scikit-learn": version("scikit-learn")},
        "device": device_name(device),
    }


def provenance(origins: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """
    Command, commit, versions, device and time of a result.

    Args:
        origins: what [`origin`] gave in each process that made a part of it.
        seconds: how long all of it took.
    """
    packages = dict.fromkeys(name for each in origins for name in each["versions"])
    return {
        "command": command_line(),
        "git_commit": _every_value([each["git_commit"] for each in origins]),
        "versions": {name: _every_value([each["versions"].get(name) for each in origins]) for name in packages},
        "device": _every_value([each["device"] for each in origins]),
        "seconds": round(seconds, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _every_value(values: list[str | None]) -> str | None:
    """The value that all have, else each of them."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else "; ".join(value or "unknown" for value in distinct)


def command_line() -> str:
    """
    The shell command that repeats what this process does from the start: without arguments that resume or overwrite,
    and with the launcher where it decides the result, by several processes or a precision.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precise = [] if precision == "no" else ["--mixed_precision", precision]
    if processes == "1":
        words = ["accelerate", "launch", *precise] if precise else ["python"]
    elif torch.cuda.is_available():
        words = ["accelerate", "launch", "--num_processes", processes, *precise]
    else:  # where `accelerate launch` starts one process
        told = [] if precision == "no" else [f"ACCELERATE_MIXED_PRECISION={precision}"]
        words = ["ACCELERATE_USE_CPU=true", *told, "torchrun", "--nproc_per_node", processes]
    skips = False
    for word in sys.argv:
        if word.startswith("--"):
            skips = word.partition("=")[0].replace("-", "_").lstrip("_") in _RESUMING
        if not skips:
            words.append(word)
    return shlex.join(words)


def reading(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the features of a cloud beside the weights: groups, and what is pooled."""
    return {name: config[name] for name in _READING}


def weights_digest(model: nn.Module) -> str:
    """
    SHA-256 over the names and values of a model's weights, whatever file they are in. The 2D embedding is left out: an
    encoder is the same with or without it once it is given clouds alone.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "image_embeddings." in name:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_result(result: TaskResult, path: str | Path):
    """Writes a result file, whole or not at all."""
    replace_text(Path(path), json.dumps({"schema": SCHEMA, **asdict(result)}, indent=2) + "\n")


def read_result(path: str | Path) -> TaskResult:
    """
    Reads and checks a result file.

    Raises:
        ResultError: if it cannot be read, or a field is missing, unknown or wrong.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}.") from error
    schema = record.pop("schema", None) if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ResultError(f"{path} has the schema {schema!r}, expected {SCHEMA!r}. Is it the result of a task?")
    names = {field.name for field in fields(TaskResult)}
    if missing := names - record.keys():
        raise ResultError(f"{path} lacks {', '.join(sorted(missing))}.")
    if unknown := record.keys() - names:
        raise ResultError(f"{path} has unknown fields: {', '.join(sorted(unknown))}.")
    try:
        return TaskResult(**record)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from error


def read_results(paths: list[str | Path]) -> list[TaskResult]:
    """
    Reads result files, and all those in folders, in the order of their paths.

    Raises:
        ResultError: for a file that is no result, or a folder without any.
    """
    results = []
    for path in map(Path, paths):
        if not path.is_dir():
            results.append(read_result(path))
            continue
        found = [file for file in sorted(path.rglob("*.json")) if _is_result(file)]
        if not found:
            raise ResultError(f"{path} holds no results of tasks (*.json with the schema {SCHEMA!r}).")
        results += map(read_result, found)
    return results


def describe(result: TaskResult) -> str:
    """A result in a few lines, for a terminal."""
    data, model = result.dataset["name"], result.model
    lines = [f"{result.task} of {model['name']} ({model['initialization'].replace('_', ' ')}) on {data}"]
    lines.append(", ".join(f"{size:,} {name}" for name, size in result.split_sizes.items()))
    for name, metric in result.metrics.items():
        lines.append(f"  {name}: {format_metric(metric)} %")
    lines.append(f"{len(result.seeds)} seed(s), {result.seconds:.0f} s. Protocol: {result.protocol}.")
    if result.chosen_on_test:
        lines.append("CHOSEN ON TEST DATA: not comparable with results that were not.")
    return "\n".join(lines)


def format_metric(metric: dict[str, Any]) -> str:
    """Mean, and deviation over seeds if there are several."""
    deviation = "" if metric["deviation"] is None else f" ± {metric['deviation']:.1f}"
    return f"{metric['mean']:.1f}{deviation}"


_TYPES: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "model": (dict,),
    "dataset": (dict,),
    "split_sizes": (dict,),
    "seeds": (list,),
    "metrics": (dict,),
    "protocol": (str,),
    "settings": (dict,),
    "chosen_on_test": (bool,),
    "command": (str,),
    "git_commit": (str, type(None)),
    "versions": (dict,),
    "device": (str,),
    "seconds": (int, float),
    "finished": (str,),
}


def _is_result(file: Path) -> bool:
    """Whether a JSON file says that it is a result of a task; folders of runs hold other JSON too."""
    try:
        with file.open(encoding="utf-8") as stream:
            return re.search(r'"schema":\s*"jointmae_hf/result/', stream.read(200)) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _check_metric(name: str, metric: Any, num_seeds: int):
    keys = {"values", "mean", "deviation"}
    _require(name, metric, isinstance(metric, dict) and metric.keys() == keys, f"exactly the entries {sorted(keys)}")
    values = metric["values"]
    _require(
        f"{name}.values", values, isinstance(values, list) and len(values) == num_seeds, f"{num_seeds}, as `seeds`"
    )
    for value in values:
        percent = isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 100
        _require(f"{name}.values", value, percent, "percentages")
    expected = summarize(values)
    for key in ("mean", "deviation"):
        same = metric[key] == expected[key] or (
            None not in (metric[key], expected[key]) and math.isclose(metric[key], expected[key], abs_tol=1e-6)
        )
        _require(f"{name}.{key}", metric[key], same, f"{expected[key]}, which the values give")


def _is_wrong_bool(value: Any, expected: tuple[type, ...]) -> bool:
    return isinstance(value, bool) and bool not in expected


def _words(expected: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in expected)


def _require(name: str, value: Any, condition: bool, expected: str):
    if not condition:
        raise ResultError(f"`{name}` is {value!r}, expected {expected}.")
