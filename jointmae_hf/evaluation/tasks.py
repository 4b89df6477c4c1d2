"""The tasks on frozen features: linear SVM, few-shot classification and retrieval, each from arguments to a result.

Features are extracted once for each subsample and never again, by all processes that were launched, each its share of
the batches; the main process measures them. The random forest on shape histograms goes through the same code, on
descriptors in place of features, so that it sees the same shapes.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel

from .. import JointMAEConfig, JointMAEModel
from ..data.labelled import LabelledClouds, load_labelled_splits, stratified_rows, validation_rows
from ..data.loading import fixed_subsample
from ..files import replace_text
from ..training.arguments import _argument
from ..training.pretraining import build_untrained_model, check_processes, config_fields, git_commit, share_cores
from .features import extract_features
from .few_shot import draw_fold
from .histograms import random_forest, shape_histograms
from .linear_svm import accuracies, linear_svm, standardize
from .results import (
    TaskResult,
    origin,
    provenance,
    read_result,
    reading,
    summarize_runs,
    weights_digest,
    write_result,
)
from .retrieval import retrieval_metrics


logger = logging.getLogger(__name__)

_VALIDATION_FRACTION = 0.2
# Arguments that do not decide what is measured at a seed; the last three do by what they name.
_NEUTRAL = ("seeds", "output", "dataset", "model_name_or_path", "device")


@dataclass
class FrozenTaskArguments:
    """
    What all tasks on frozen features share; the help of each field is its documentation.

    Raises:
        ValueError: if a value is out of range or two arguments contradict each other; the message names them.
    """

    dataset: str | None = _argument(
        None, "Name on the Hub, local folder or parquet files (default: the embedded data)."
    )
    dataset_config_name: str | None = _argument(None, "Configuration of a Hub data set that has several.")
    train_split: str = _argument("train", "Split to learn from, in the syntax of `datasets`.")
    test_split: str = _argument("test", "Split to measure on.")
    points_column: str = _argument("points", "Column of clouds: (n, 3) each, n any number.")
    label_column: str = _argument("label", "Column of classes: ClassLabel or integers.")
    num_points: int = _argument(1024, "Points of a cloud that are used, drawn by the seed.")
    model_name_or_path: str | None = _argument(None, "Pre-trained model: folder or name on the Hub.")
    untrained: bool = _argument(False, "The same network with random weights, or --preset if no model is named.")
    preset: str = _argument("tiny", "Size of an untrained network: tiny, small or base.")
    seeds: list[int] = _argument(
        [0], "Seeds of the subsamples and of untrained weights; one value of the metric each."
    )
    batch_size: int = _argument(64, "Clouds at a time in the network.")
    device: str | None = _argument(
        None, "Where the network runs, such as cpu or cuda (default: a GPU if there is one, one for each process)."
    )
    output: str | None = _argument(
        None,
        "File of the result (default: outputs/TASK-KIND/result.json, KIND as in the result: pretrained, ..., and what "
        "makes a variant of the task; it replaces a result of the same measurement alone). A run that was stopped "
        "goes on after the seeds that it had measured.",
    )

    def __post_init__(self):
        for name in ("num_points", "batch_size"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        valid = len(set(self.seeds)) == len(self.seeds) > 0 and min(self.seeds) >= 0
        self._require("seeds", valid, "distinct numbers, 0 or more")
        self._require("dataset", self.dataset is not None, "a name on the Hub, a folder or a parquet file")
        is_file = self.output is None or not Path(self.output).is_dir()
        self._require("output", is_file, "a file, but there is a folder of that name")
        named = self.model_name_or_path is not None or self.untrained or getattr(self, "baseline", "none") != "none"
        self._require("model_name_or_path", named, "a model, or --untrained")

    def _require(self, name: str, condition: Any, expected: str):
        if not condition:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected {expected}.")


@dataclass
class LinearSvmArguments(FrozenTaskArguments):
    """Arguments of [`evaluate_linear_svm`]."""

    baseline: Literal["none", "random_forest"] = _argument("none", "A random forest on shape histograms, no network.")
    train_fraction: float = _argument(1.0, "Share of the training shapes of each class, at least one, by the seed.")
    C: list[float] = _argument([0.01], "C of the SVM. Several: the best on a fifth of the training split is taken.")
    choose_on_test: bool = _argument(False, "Take the best of several C on the test split, and label the result so.")

    def __post_init__(self):
        super().__post_init__()
        self._require("C", self.C and min(self.C) > 0, "positive numbers")
        self._require("choose_on_test", len(self.C) > 1 or not self.choose_on_test, "false with a single `C`")
        chooses = self.choose_on_test and self.baseline != "none"
        self._require("choose_on_test", not chooses, "false with a `baseline`, where there is nothing to choose")
        self._require("train_fraction", 0 < self.train_fraction <= 1, "in (0, 1]")


@dataclass
class FewShotArguments(FrozenTaskArguments):
    """Arguments of [`evaluate_few_shot`]."""

    seeds: list[int] = _argument(list(range(10)), "Seeds of the folds; one fold each.")
    ways: int = _argument(5, "Classes of a fold.")
    shots: int = _argument(10, "Labelled shapes of each class, from the training split.")
    queries: int = _argument(20, "Shapes of each class to be recognised, from the test split.")
    point_seed: int = _argument(0, "Seed of the subsample of points, and of untrained weights.")
    baseline: Literal["none", "random_forest"] = _argument("none", "A random forest on shape histograms, no network.")

    def __post_init__(self):
        super().__post_init__()
        self._require("ways", self.ways > 1, "2 or more")
        for name in ("shots", "queries"):
            self._require(name, getattr(self, name) > 0, "more than 0")


@dataclass
class RetrievalArguments(FrozenTaskArguments):
    """Arguments of [`evaluate_retrieval`]."""

    gallery: Literal["test", "train"] = _argument(
        "test", "What is searched for each shape of the test split: the rest of that split, or the training split."
    )


def evaluate_linear_svm(arguments: LinearSvmArguments) -> TaskResult | None:
    """
    Linear SVM on frozen features, or the random forest on shape histograms.

    Returns:
        What the file of the result holds; `None` in all but the main process.

    Raises:
        ValueError: for arguments or data that cannot be used.
    """

    def measure(
        task: "_FrozenTask", seed: int, train_features: np.ndarray, test_features: np.ndarray
    ) -> dict[str, float]:
        train, test = task.train, task.test
        rows = stratified_rows(train.labels, arguments.train_fraction, seed)
        train_features, labels = train_features[rows], train.labels[rows]
        task.split_sizes["train"] = len(rows)
        if arguments.baseline == "random_forest":
            return accuracies(random_forest(train_features, labels, test_features, seed), test.labels)
        if arguments.choose_on_test:
            runs = [linear_svm(train_features, labels, test_features, test.labels, C) for C in arguments.C]
            best = max(range(len(runs)), key=lambda index: runs[index]["accuracy"])
            task.C = arguments.C[best]
            return runs[best]
        task.C = arguments.C[0] if len(arguments.C) == 1 else _choose_C(train_features, labels, arguments.C, seed)
        return linear_svm(train_features, labels, test_features, test.labels, task.C)

    if arguments.baseline == "random_forest":
        protocol = "random forest of 500 trees on shape histograms, fixed beforehand"
    else:
        protocol = "frozen encoder, 3D alone, no augmentation, standardised features, linear SVM, last checkpoint, "
        protocol += "C fixed beforehand"
        if len(arguments.C) > 1:
            protocol = protocol.replace("fixed beforehand", "chosen on a fifth of the training split")
    if arguments.choose_on_test:
        protocol = protocol.replace("a fifth of the training split", "THE TEST SPLIT")
    if arguments.train_fraction < 1:
        protocol += f"; {100 * arguments.train_fraction:g} % of the training labels, at least one of each class"
    return _FrozenTask("linear_svm", arguments).run(measure, protocol)


def evaluate_few_shot(arguments: FewShotArguments) -> TaskResult | None:
    """
    K-way N-shot classification by a linear SVM on frozen features, one fold for each seed.

    Returns:
        What the file of the result holds; `None` in all but the main process.

    Raises:
        ValueError: for arguments or data that cannot be used, also if too few classes are large enough.
    """

    def measure(
        task: "_FrozenTask", seed: int, train_features: np.ndarray, test_features: np.ndarray
    ) -> dict[str, float]:
        train, test = task.train.labels, task.test.labels
        fold = draw_fold(train, test, arguments.ways, arguments.shots, arguments.queries, seed)
        support, queries = (train_features[fold.support], train[fold.support]), test_features[fold.queries]
        task.split_sizes = {"train": len(fold.support), "test": len(fold.queries), "classes": arguments.ways}
        if arguments.baseline == "random_forest":
            metrics = accuracies(random_forest(*support, queries, seed), test[fold.queries])
        else:
            metrics = linear_svm(*support, queries, test[fold.queries])
        return {"accuracy": metrics["accuracy"]}  # all classes have the same number of queries

    forest = "random forest of 500 trees on shape histograms"
    learner = (
        forest if arguments.baseline == "random_forest" else "frozen encoder, standardised features, SVM, C = 0.01"
    )
    protocol = (
        f"{arguments.ways}-way {arguments.shots}-shot, {arguments.queries} test shapes a class, one fold a seed: "
        f"{learner}; fixed beforehand"
    )
    return _FrozenTask("few_shot", arguments).run(measure, protocol, arguments.point_seed)


def evaluate_retrieval(arguments: RetrievalArguments) -> TaskResult | None:
    """
    Shape retrieval by cosine similarity of frozen features.

    Returns:
        What the file of the result holds; `None` in all but the main process.

    Raises:
        ValueError: for arguments or data that cannot be used.
    """

    def measure(
        task: "_FrozenTask", seed: int, train_features: np.ndarray, test_features: np.ndarray
    ) -> dict[str, float]:
        train_features, test_features = standardize(train_features, test_features)
        gallery = (train_features, task.train.labels) if arguments.gallery == "train" else ()
        metrics = retrieval_metrics(test_features, task.test.labels, *gallery)
        task.split_sizes["queries"] = metrics.pop("queries")
        return metrics

    searched = "the rest of the test split" if arguments.gallery == "test" else "the training split"
    protocol = (
        "frozen encoder, 3D alone, features standardised with the training split (labels unused), cosine similarity; "
        f"each test shape searches {searched}"
    )
    return _FrozenTask("retrieval", arguments).run(measure, protocol)


class _FrozenTask:
    """Data, network and features of a task, and the loop over its seeds."""

    def __init__(self, name: str, arguments: FrozenTaskArguments):
        self.name = name
        self.arguments = arguments
        self.started = time.perf_counter()
        git_commit()  # the clone may move on while this runs
        # Accelerate is told, as it joins processes without a GPU only then.
        self.state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
        check_processes(self.state.num_processes)
        self.is_forest = getattr(arguments, "baseline", "none") == "random_forest"
        self.device = self._choose_device()
        if self.state.num_processes > 1 and self.device.type == "cpu":
            share_cores(self.state.num_processes)
        with self.state.main_process_first():  # one process fills the cache of `datasets`
            self.train, self.test = load_labelled_splits(
                arguments.dataset,
                (arguments.train_split, arguments.test_split),
                arguments.points_column,
                arguments.label_column,
                config_name=arguments.dataset_config_name,
            )
        self.split_sizes = {"train": len(self.train), "test": len(self.test), "classes": len(self.train.class_names)}
        self.C: float | None = None  # of the seed measured last
        self._features: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    def _choose_device(self) -> torch.device:
        if self.is_forest:
            return torch.device("cpu")
        if self.state.num_processes > 1:
            return self.state.device
        return torch.device(self.arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def run(
        self, measure: Callable[..., dict[str, float]], protocol: str, feature_seed: int | None = None
    ) -> TaskResult | None:
        """
        Measures each seed and writes the result.

        Args:
            measure: metrics from this task, a seed, and the features of both splits.
            protocol: what is done, in words.
            feature_seed: of the subsample, if it is the same for all seeds.
        """
        arguments = self.arguments
        seeds = self._distinct_seeds()
        first = seeds[0] if feature_seed is None else feature_seed
        model, made_by = self._describe_model(first), origin(self.device)
        output = Path(arguments.output) if arguments.output else self._default_output(model)
        finished = _FinishedSeeds(output, self._identity(first, made_by), self.state)
        for seed in seeds:
            if seed in finished.runs:
                logger.info("Seed %d was measured before this run was stopped.", seed)
                continue
            features = self.features(seed if feature_seed is None else feature_seed)
            if self.state.is_main_process:
                run = {"metrics": measure(self, seed, *features), "split_sizes": self.split_sizes, "C": self.C}
                finished.add(seed, run, time.perf_counter() - self.started)
        if not self.state.is_main_process:
            return None
        runs = [finished.runs[seed] for seed in seeds]
        settings = asdict(arguments) | {"seeds": seeds, "num_processes": self.state.num_processes}
        if runs[0]["C"] is not None:
            settings["C_used"] = [run["C"] for run in runs]
        result = TaskResult(
            task=self.name,
            model=model,
            dataset={
                "name": arguments.dataset,
                "config_name": arguments.dataset_config_name,
                "splits": self._fingerprints(),
            },
            split_sizes=runs[-1]["split_sizes"],
            seeds=seeds,
            metrics=summarize_runs([run["metrics"] for run in runs]),
            protocol=protocol,
            settings=settings,
            chosen_on_test=getattr(arguments, "choose_on_test", False),
            **provenance([made_by], finished.earlier_seconds + time.perf_counter() - self.started),
        )
        write_result(result, output)
        finished.remove()
        logger.info("The result is in %s.", output)
        return result

    def _default_output(self, model: dict[str, Any]) -> Path:
        """
        Where the result goes if nothing else is said.

        Raises:
            ValueError: if another model's result is there, or one of other data or settings.
        """
        arguments, parts = self.arguments, [self.name, model["initialization"]]
        if self.name == "few_shot":
            parts += [f"{arguments.ways}-way", f"{arguments.shots}-shot"]
        if getattr(arguments, "train_fraction", 1.0) < 1:
            parts.append(f"{100 * arguments.train_fraction:g}-percent")
        output = Path("outputs") / "-".join(parts) / "result.json"
        if output.exists():
            found = read_result(output)
            values = {key: (found.model[key], value) for key, value in model.items() if key in found.model}
            del values["name"]
            values["dataset.splits"] = (found.dataset["splits"], json.loads(json.dumps(self._fingerprints())))
            for key, value in asdict(arguments).items():
                if key in found.settings and key not in _NEUTRAL:
                    values[key] = (found.settings[key], value)
            for key, (there, here) in values.items():
                if there != here:
                    raise ValueError(
                        f"`output` is not given, and {output} holds the result of another measurement (`{key}` is "
                        f"{there!r} there and {here!r} here): name another file."
                    )
        return output

    def features(self, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
        """
        Features of both splits: of the network, or the histograms. Those of the last seed are kept. All processes must
        call this; histograms are made by the main process alone, and the others get `None`.
        """
        if self._features is None or self._features[0] != seed:
            if self.is_forest and not self.state.is_main_process:
                return None
            train = self._extract(self.train, seed, self.arguments.train_split)
            test = self._extract(self.test, seed, self.arguments.test_split)
            self._features = (seed, (train, test))
        return self._features[1]

    def _extract(self, split: LabelledClouds, seed: int, name: str) -> np.ndarray:
        points = fixed_subsample(split.clouds, self.arguments.num_points, seed)
        if self.is_forest:
            return shape_histograms(points, seed)
        # Whole batches, so that the features do not depend on how many processes share them.
        size, rank, processes = self.arguments.batch_size, self.state.process_index, self.state.num_processes
        batches = -(-len(points) // size)
        start, stop = (size * (batches * part // processes) for part in (rank, rank + 1))
        progress = f"{self.name}, seed {seed}, {name}" if self.state.is_main_process else None
        share = points[start:stop]
        features = (
            [extract_features(self._encoder(seed), share, batch_size=size, progress=progress)] if len(share) else []
        )
        return np.concatenate(gather_object(features))

    def _encoder(self, seed: int) -> PreTrainedModel:
        """The network; an untrained one anew for each seed."""
        if not hasattr(self, "encoder") or (self.arguments.untrained and self.encoder_seed != seed):
            self.encoder = load_encoder(
                self.arguments.model_name_or_path, self.arguments.untrained, seed, self.arguments.preset
            ).to(self.device)
            self.encoder_seed = seed
        return self.encoder

    def _describe_model(self, first_seed: int) -> dict[str, Any]:
        arguments = self.arguments
        if self.is_forest:
            name = "random forest on shape histograms"
            return {"name": name, "initialization": "random_forest", "parameters": 0, "weights": None}
        encoder = self._encoder(first_seed)
        return {
            "name": arguments.model_name_or_path or arguments.preset,
            "initialization": "untrained" if arguments.untrained else "pretrained",
            "parameters": encoder_parameters(encoder),
            "weights": None if arguments.untrained else weights_digest(encoder),
            "reading": reading(config_fields(encoder.config)),
        }

    def _fingerprints(self) -> dict[str, dict[str, int]]:
        arguments = self.arguments
        return {arguments.train_split: self.train.fingerprint(), arguments.test_split: self.test.fingerprint()}

    def _identity(self, first_seed: int, made_by: dict[str, Any]) -> dict[str, Any]:
        """What decides the metrics of a seed, for JSON."""
        return {
            "task": self.name,
            "settings": {name: value for name, value in asdict(self.arguments).items() if name not in _NEUTRAL},
            "splits": self._fingerprints(),
            "weights": None if self.is_forest else weights_digest(self._encoder(first_seed)),
            "config": None if self.is_forest else config_fields(self._encoder(first_seed).config),
            "origin": made_by,
        }

    def _distinct_seeds(self) -> list[int]:
        """The seeds that can make a difference: repeating the same number would pass for a deviation of 0."""
        arguments = self.arguments
        sizes = np.concatenate([np.diff(split.clouds.offsets) for split in (self.train, self.test)])
        fixed = not (arguments.untrained or self.is_forest or self.name == "few_shot") and (
            getattr(arguments, "train_fraction", 1.0) == 1.0 and len(getattr(arguments, "C", [0])) == 1
        )
        if fixed and len(arguments.seeds) > 1 and (sizes == arguments.num_points).all():
            logger.warning(
                "All clouds have exactly %d points, so every seed would give the same result: only seed %d is run.",
                arguments.num_points,
                arguments.seeds[0],
            )
            return arguments.seeds[:1]
        return arguments.seeds


class _FinishedSeeds:
    """
    What has been measured of a task, in a file beside its result until that is written.

    Args:
        output: file of the result.
        identity: what decides the metrics; a file with another one is not used.
        state: of the processes. All must make this at the same time; only the main process reads and writes.
    """

    def __init__(self, output: Path, identity: dict[str, Any], state: PartialState):
        self.path = output.with_name(output.name + ".seeds")
        self.identity = json.loads(json.dumps(identity))
        found = [self._read() if state.is_main_process else None]
        broadcast_object_list(found)
        record = found[0] or {"runs": {}, "seconds": 0.0}
        self.runs = {int(seed): run for seed, run in record["runs"].items()}
        self.earlier_seconds = record["seconds"]

    def _read(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("identity") == self.identity else None

    def add(self, seed: int, run: dict[str, Any], seconds: float):
        """Keeps the run of a seed; `seconds` are those since this process began."""
        self.runs[seed] = run
        record = {"identity": self.identity, "runs": self.runs, "seconds": self.earlier_seconds + seconds}
        replace_text(self.path, json.dumps(record))

    def remove(self):
        self.path.unlink(missing_ok=True)


def load_encoder(
    model_name_or_path: str | None, untrained: bool = False, seed: int = 0, preset: str = "tiny"
) -> PreTrainedModel:
    """
    A frozen encoder.

    Args:
        model_name_or_path: any Joint-MAE model, by folder or name on the Hub.
        untrained: whether to leave its weights and take those that pre-training would start from.
        seed: decides untrained weights.
        preset: size of an untrained network if no model is named.
    """
    if not untrained:
        # In float32, whatever it was saved in, as fine-tuning does: one model, one digest.
        return JointMAEModel.from_pretrained(model_name_or_path, dtype=torch.float32).eval()
    named = model_name_or_path is not None
    config = JointMAEConfig.from_pretrained(model_name_or_path) if named else JointMAEConfig.from_preset(preset)
    return build_untrained_model(config, seed).joint_mae.eval()


def encoder_parameters(encoder: PreTrainedModel) -> int:
    """Parameters of the 3D encoder; those of the 2D embedding are of no use after pre-training."""
    return sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("image_embeddings."))


def _choose_C(features: np.ndarray, labels: np.ndarray, candidates: list[float], seed: int) -> float:
    """The C that is best on a fifth of the training shapes; the first of equals."""
    kept, held_out = validation_rows(labels, _VALIDATION_FRACTION, seed)
    if len(held_out) == 0:
        raise ValueError("`C` has several values, but no class has enough training shapes to choose on.")
    scores = [
        linear_svm(features[kept], labels[kept], features[held_out], labels[held_out], C)["accuracy"]
        for C in candidates
    ]
    return candidates[int(np.argmax(scores))]
