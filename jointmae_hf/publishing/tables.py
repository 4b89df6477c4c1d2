"""Markdown tables made from results. Nothing in them is typed by hand."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.results import TASKS, ResultError, TaskResult, format_metric


TASK_NAMES = {
    "linear_svm": "linear SVM",
    "few_shot": "few-shot",
    "retrieval": "retrieval",
    "classification": "fine-tuned classification",
    "part_segmentation": "part segmentation",
}
METRIC_NAMES = {
    "accuracy": "accuracy",
    "mean_class_accuracy": "mean of classes",
    "accuracy_voted": "accuracy, voted",
    "accuracy_best_on_validation": "accuracy, best on validation",
    "accuracy_chosen_on_test": "accuracy, chosen on test",
    "map": "mAP",
    "instance_miou": "instance mIoU",
    "class_miou": "class mIoU",
    "point_accuracy": "point accuracy",
    "instance_miou_best_on_validation": "instance mIoU, best on validation",
    "instance_miou_chosen_on_test": "instance mIoU, chosen on test",
}
WEIGHTS_NAMES = {
    "pretrained": "pre-trained",
    "untrained": "untrained",
    "from_scratch": "from scratch",
    "random_forest": "random forest",
}
# Held-out losses of a pre-training run, their names, and what stands beside them.
_LOSSES = (
    ("loss_3d", "3D loss (Chamfer)", "the same decoder given the encoder's mean output: what positions alone tell"),
    ("loss_2d", "2D loss (depth MSE)", "likewise"),
    ("loss_cross", "cross loss", "likewise"),
)
_PROTOCOL_QUERIES = 20  # test shapes of each class of a few-shot fold, in the literature
# How a network is tuned. `encoder_lr_scale` may differ: a pre-trained encoder learns slower than one from scratch.
_TUNING = (
    *("learning_rate", "warmup_ratio", "weight_decay", "adam_betas", "max_grad_norm", "mixed_precision"),
    *("scale_min", "scale_max", "rotation_axis"),
)


def results_table(results: list[TaskResult], headlines_only: bool = False) -> str:
    """
    All results in one table: a row for each task, data set, variant and metric, a column for each kind of weights.

    Args:
        results: at most one for each cell.
        headlines_only: whether to leave out all metrics but the one that a task is named for.

    Raises:
        ResultError: if there is none, two results claim one cell, or those of a row are not comparable.
    """
    if not results:
        raise ResultError("`results` is empty; there is nothing to put into a table.")
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    compared: dict[tuple[str, str], list[TaskResult]] = {}
    for result in results:
        compared.setdefault((task_name(result), dataset_name(result)), []).append(result)
    for side_by_side in compared.values():
        check_comparable(side_by_side)
    order = {task: number for number, task in enumerate(TASKS)}
    for result in sorted(results, key=lambda found: order[found.task]):
        for metric, values in result.metrics.items():
            if headlines_only and metric != TASKS[result.task]:
                continue
            row = (task_name(result), dataset_name(result), METRIC_NAMES.get(metric, metric.replace("_", "-")))
            kind = result.model["initialization"]
            if kind in cells.setdefault(row, {}):
                cell = ", ".join((*row, WEIGHTS_NAMES[kind]))
                raise ResultError(f"two results are for {cell}; the second was made by: {result.command}")
            seeds = f" ({len(result.seeds)})" if len(result.seeds) > 1 else ""
            mark = " (chosen on test)" if result.chosen_on_test else ""
            cells[row][kind] = format_metric(values) + seeds + mark
    used = [kind for kind in WEIGHTS_NAMES if any(kind in row for row in cells.values())]
    head = ["task", "data set", "metric, %", *(WEIGHTS_NAMES[kind] for kind in used)]
    rows = [[*row, *(found.get(kind, "") for kind in used)] for row, found in cells.items()]
    return _markdown(head, rows, numbers=range(3, len(head)))


def check_comparable(results: list[TaskResult], any_share: bool = False):
    """
    Refuses results of one task on one data set that were not measured under the same conditions.

    Args:
        results: to be set side by side; what only some have, as steps of training, is compared among these.
        any_share: whether the share of the labels may differ, and what follows from it.

    Raises:
        ResultError: naming the first condition that differs, its two values and the two commands.
    """
    found: dict[str, tuple[Any, str]] = {}
    for result in results:
        for name, value in _conditions(result, any_share).items():
            expected, command = found.setdefault(name, (value, result.command))
            if value != expected:
                raise ResultError(
                    f"results for {task_name(result)}, {dataset_name(result)} are not comparable: `{name}` is "
                    f"{value!r} in that of `{result.command}`, but {expected!r} in that of `{command}`."
                )


def check_one_model(results: list[TaskResult]):
    """
    Refuses pre-trained networks of different weights, or that read clouds differently: they would stand in one column.

    Raises:
        ResultError: naming the commands of two of them.
    """
    first: dict[str, TaskResult] = {}
    for result in (result for result in results if result.model["initialization"] == "pretrained"):
        for key, what in (("weights", "other weights"), ("reading", "other groups or pooled layers")):
            if key in result.model and result.model[key] != first.setdefault(key, result).model[key]:
                other = first[key]
                raise ResultError(
                    f"`results` are of several pre-trained models: {result.model['name']} in that of "
                    f"`{result.command}`, but {other.model['name']} in that of `{other.command}`, with {what}."
                )


def _conditions(result: TaskResult, any_share: bool) -> dict[str, Any]:
    """What results must have in common beside the name of their task, by the names of fields and settings."""
    settings, sizes = result.settings, result.split_sizes
    found = {f"dataset.splits.{split}": fingerprint for split, fingerprint in result.dataset["splits"].items()}
    names = ["train_split", "test_split", "num_points", "num_points_used", "point_seed"]
    is_network = result.model["initialization"] != "random_forest"
    if is_network:
        names += ("C", *_TUNING)
        found |= {f"model.{key}": result.model[key] for key in ("parameters", "reading") if key in result.model}
    if result.task == "few_shot":
        found["seeds"] = result.seeds  # each is another draw of classes and shapes
    if not any_share:
        names += ["steps", "batch_size_used"] + (["config_overrides"] if is_network else [])
    else:
        sizes = {"test": sizes["test"]}
        names.append("validation_fraction")
        if "steps" in settings:  # else a batch is what the frozen network is given at a time
            names += ["batch_size", "max_steps"] + ([] if settings["max_steps"] else ["epochs"])
        if result.model["initialization"] == "pretrained":
            found["model.weights"] = result.model["weights"]
    found |= {f"split_sizes.{part}": size for part, size in sizes.items()}
    return found | {f"settings.{name}": settings[name] for name in names if name in settings}


def commands_table(results: list[TaskResult], before: Sequence[list[str]] = ()) -> str:
    """How each result is made again: command, commit, device and time. `before` are rows of what comes first."""
    head = ["task", "data set", "weights", "command", "commit", "device", "time"]
    rows = [*before]
    for result in results:
        weights = WEIGHTS_NAMES[result.model["initialization"]]
        how = reproduction(result.command, result.git_commit, result.device, result.seconds)
        rows.append([task_name(result), dataset_name(result), weights, *how])
    return _markdown(head, rows, numbers=range(0))


def reproduction(command: str, git_commit: str | None, device: str, seconds: float) -> list[str]:
    """Command, commit, device and time as a table shows them: of each commit 7 digits, and whether it is `-dirty`."""
    command = "`" + command.replace("|", "\\|") + "`"
    commit = re.sub(r"\b([0-9a-f]{7})[0-9a-f]+", r"\1", git_commit or "")
    return [command, commit, device, _time(seconds)]


def report_table(file: str | Path) -> str:
    """
    The report of a pre-training run: held-out losses, and a linear SVM on its features, each beside its counterpart.

    Args:
        file: `result.json` of the run.

    Raises:
        ResultError: if it is no result of pre-training, or of one without a report.
    """
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))["report"]
        losses, averaged = (report["reconstruction"][name] for name in ("held_out", "encoder_output_averaged"))
        rows = [
            [f"{name}, 1e-3", f"{1e3 * losses[key]:.2f}", f"{1e3 * averaged[key]:.2f}", counterpart]
            for key, name, counterpart in _LOSSES
            if key in losses
        ]
        if svm := report.get("linear_svm"):
            accuracies = [f"{svm[kind]['accuracy']:.1f}" for kind in ("pretrained", "untrained")]
            rows.append([f"linear SVM, {svm['classes']} classes, %", *accuracies, "the same network untrained"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{file} is not the result of a pre-training run with a report: {error!r}.") from error
    return _markdown(["", "trained", "compared with", ""], rows, numbers=range(1, 3))


def task_name(result: TaskResult, with_share: bool = True) -> str:
    """The task with what makes a variant of it, from the settings; the share of the labels can be left out."""
    settings, parts = result.settings, [TASK_NAMES[result.task]]
    if result.task == "few_shot":
        parts.append(f"{settings['ways']}-way {settings['shots']}-shot")
        if settings.get("queries", _PROTOCOL_QUERIES) != _PROTOCOL_QUERIES:
            parts.append(f"{settings['queries']} queries")
        if "head" in settings:
            parts.append("fine-tuned")
    if result.task == "retrieval" and settings["gallery"] == "train":
        parts.append("in the training split")
    if settings.get("head", "full") != "full":
        parts.append(f"{settings['head']} head")
    if not settings.get("use_object_class", True):
        parts.append("class unknown")
    if "augmentation" in settings:
        parts.append(settings["augmentation"])
    if with_share and settings.get("train_fraction", 1.0) < 1:
        parts.append(f"{100 * settings['train_fraction']:g} % of the labels")
    return ", ".join(parts)


def dataset_name(result: TaskResult) -> str:
    """The last telling part of the data set's name or path, and its configuration, for a cell of a table."""
    path = Path(result.dataset["name"])
    # Files of splits and patterns of files say less than the folder they are in.
    untelling = re.compile(r"data|(.*[*?[].*|(train|validation|test)\b.*)\.parquet")
    telling = [part for part in path.relative_to(path.anchor).parts if not untelling.fullmatch(part)]
    name = telling[-1].removesuffix(".parquet") if telling else str(path)
    config = result.dataset.get("config_name")
    return (f"{name} ({config})" if config else name).replace("|", "\\|")


def rewrite_block(text: str, name: str, content: str) -> str:
    """
    Replaces what stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`.

    Raises:
        ValueError: if the text does not hold this pair of marks exactly once.
    """
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the text must hold {start} and, after it, {end}, once each.")
    pattern = re.compile(f"({re.escape(start)}).*({re.escape(end)})", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n\n{content.strip()}\n\n{found[2]}", text)


def _markdown(head: list[str], rows: list[list[str]], numbers: range) -> str:
    """A table whose columns of numbers are aligned to the right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
