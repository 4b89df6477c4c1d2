"""Curves for cards and READMEs, made from logs and result files."""

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.results import TASKS, ResultError, TaskResult
from .tables import METRIC_NAMES, WEIGHTS_NAMES, check_comparable, dataset_name, task_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_losses(log: str | Path, path: str | Path):
    """Draws every loss in the log of a run against the steps, on a logarithmic axis."""
    records = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "loss" in record]
    figure, axis = _figure()
    for name in [key for key in (records[0] if records else {}) if key.startswith("loss")]:
        axis.plot([record["step"] for record in records], [record[name] for record in records], label=name)
    axis.set(xlabel="step", yscale="log")
    _save(figure, axis, path)


def draw_label_curve(results: list[TaskResult], path: str | Path):
    """
    Draws the headline metric against the number of labelled training shapes, a line for each kind of weights.

    Args:
        results: of one task on one data set, with any `train_fraction`; bars are the deviation over seeds.
        path: the picture.

    Raises:
        ResultError: if there is none, they are of several tasks, data sets or pre-trained models, their settings
            differ in more than the share of the labels, or one was chosen on test data.
    """
    kinds = sorted({(task_name(result, with_share=False), dataset_name(result)) for result in results})
    if len(kinds) != 1:
        raise ResultError(f"`results` are of {kinds}, expected one task on one data set.")
    check_comparable(results, any_share=True)
    of_share = defaultdict(list)
    for result in results:
        of_share[result.split_sizes["train"]].append(result)
    for side_by_side in of_share.values():
        check_comparable(side_by_side)
    lines = defaultdict(list)
    for result in results:
        if result.chosen_on_test:
            raise ResultError(f"the result of `{result.command}` was chosen on test data, which no curve may show.")
        metric = result.headline
        point = (result.split_sizes["train"], metric["mean"], metric["deviation"] or 0.0)
        lines[result.model["initialization"]].append(point)
    figure, axis = _figure()
    for kind, name in WEIGHTS_NAMES.items():
        if kind in lines:
            sizes, means, deviations = zip(*sorted(lines[kind]), strict=True)
            axis.errorbar(sizes, means, deviations, marker="o", markersize=4, capsize=2, label=name)
    axis.set(xlabel="labelled training shapes", xscale="log", ylabel=f"{METRIC_NAMES[TASKS[results[0].task]]}, %")
    _save(figure, axis, path)


def _figure() -> "tuple[Figure, Axes]":
    """A figure that needs no display and leaves the state of pyplot alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="tight")
    return figure, FigureCanvasAgg(figure).figure.subplots()


def _save(figure: "Figure", axis: "Axes", path: str | Path):
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
