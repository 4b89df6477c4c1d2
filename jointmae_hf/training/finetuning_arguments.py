"""The arguments of fine-tuning: dataclasses, from which scripts make their command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.augmentation import Augmentation
from .arguments import _argument, parse_config_overrides


@dataclass
class FineTuningArguments:
    """
    What fine-tuning for any task shares; the help of each field is its documentation.

    Raises:
        ValueError: if a value is out of range or two arguments contradict each other; the message names them.
    """

    # Data
    dataset: str | None = _argument(
        None, "Name on the Hub, local folder or parquet files (default: the embedded data)."
    )
    dataset_config_name: str | None = _argument(None, "Configuration of a Hub data set that has several.")
    train_split: str = _argument("train", "Split to train on, in the syntax of `datasets`.")
    test_split: str = _argument("test", "Split that the result is measured on, once, after the last step.")
    points_column: str = _argument("points", "Column of clouds: (n, 3) each, n any number.")
    label_column: str = _argument("label", "Column of classes of objects: ClassLabel or integers.")
    num_points: int = _argument(
        1024, "Points that the network is given, drawn anew each time; at most those of the largest training cloud."
    )
    train_fraction: float = _argument(1.0, "Share of the training shapes of each class, at least one, by the seed.")
    validation_fraction: float = _argument(
        0.1, "Share of these that is not trained on but finds the best checkpoint; 0: train on all, keep the last."
    )
    num_workers: int = _argument(0, "Processes that prepare batches ahead.")
    num_threads: int | None = _argument(None, "Threads of each process on a CPU (default: all cores shared out).")

    # Model
    model_name_or_path: str | None = _argument(None, "Pre-trained model: folder or name on the Hub.")
    from_scratch: bool = _argument(
        False,
        "The same network from random weights, or --preset if no model is named; frozen under --head mlp: untrained.",
    )
    baseline: Literal["none", "random_forest"] = _argument(
        "none", "A random forest on hand-made descriptors of the same shapes, or of their points, no network."
    )
    preset: str = _argument("tiny", "Size of a network from scratch: tiny, small or base.")
    config_overrides: str | None = _argument(None, "Fields of the configuration to replace: `key=value,...`.")

    # Augmentation
    augmentation: Literal["scale_translate", "rotate", "none"] = _argument(
        "scale_translate", "Recipe: random scale and shift of each axis, or random rotation about one axis."
    )
    scale_min: float = _argument(2 / 3, "Smallest random scale of an axis, in the recipe `scale_translate`.")
    scale_max: float = _argument(3 / 2, "Largest random scale of an axis, likewise.")
    rotation_axis: Literal["x", "y", "z"] = _argument("y", "Axis of the recipe `rotate`: the one that points up.")

    # Length and optimisation
    epochs: float = _argument(300.0, "Passes over the training shapes.")
    max_steps: int | None = _argument(None, "Optimizer steps, instead of --epochs.")
    batch_size: int = _argument(
        32, "Samples of an optimizer step over all processes; fewer if there are fewer shapes."
    )
    gradient_accumulation_steps: int = _argument(1, "Forward passes of a process to an optimizer step.")
    learning_rate: float = _argument(5e-4, "Highest learning rate: warm-up to it, then cosine to 0.")
    encoder_lr_scale: float = _argument(
        1.0, "Learning rate of the encoder as a share of the head's: less keeps more of what it learned before."
    )
    warmup_ratio: float = _argument(1 / 30, "Share of the steps over which the learning rate rises from 0.")
    weight_decay: float = _argument(0.05, "Weight decay of matrices; biases, norms and tokens have none.")
    max_grad_norm: float = _argument(10.0, "Gradients are clipped to this norm; 0 leaves them.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _argument(
        None, "Precision of the forward pass (default: what `accelerate launch` says, else no)."
    )
    seeds: list[int] = _argument([0], "Seeds, one run each: head, order, augmentation, label fraction.")

    # Evaluation
    eval_epochs: float = _argument(
        10.0, "Epochs between evaluations on the validation part; also after the last step."
    )
    choose_on_test: bool = _argument(
        False,
        "Find the best checkpoint on the test split instead, and label the result so. The last is still reported.",
    )

    # Output
    output_dir: str = _argument(
        "outputs/finetune", "Folder for result.json, and seed-N with model, best and log.jsonl."
    )
    overwrite_output_dir: bool = _argument(False, "Delete what an earlier run left in the output folder.")
    logging_steps: int = _argument(10, "Optimizer steps to a line of log.jsonl.")
    save_steps: int = _argument(200, "Optimizer steps between checkpoints; 0: one at the end only.")
    save_total_limit: int | None = _argument(2, "Checkpoints to keep of each seed, the newest ones.")
    resume_from_checkpoint: str | None = _argument(
        None,
        "`latest`: go on with the newest good checkpoint of the output folder; seeds that are done are not repeated.",
    )

    def __post_init__(self):
        for name in (
            "num_points",
            "batch_size",
            "gradient_accumulation_steps",
            "epochs",
            "learning_rate",
            "encoder_lr_scale",
        ):
            self._require(name, getattr(self, name) > 0, "more than 0")
        for name in ("eval_epochs", "logging_steps"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        for name in ("weight_decay", "max_grad_norm", "save_steps", "num_workers"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("max_steps", "save_total_limit", "num_threads"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0")
        self._require("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)")
        self._require(
            "scale_min", 0 < self.scale_min <= self.scale_max, f"above 0, `scale_max` ({self.scale_max:g}) at most"
        )
        self._require("train_fraction", 0 < self.train_fraction <= 1, "in (0, 1]")
        self._require("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)")
        valid = len(set(self.seeds)) == len(self.seeds) > 0 and min(self.seeds) >= 0 and max(self.seeds) < 2**63
        self._require("seeds", valid, "distinct numbers from 0 to 2 ** 63 - 1")
        self._require("dataset", self.dataset is not None, "a name on the Hub, a folder or a parquet file")
        self._require("output_dir", not Path(self.output_dir).is_file(), "no file of that name")
        is_forest = self.baseline == "random_forest"
        named = self.model_name_or_path is not None or self.from_scratch or is_forest
        self._require("model_name_or_path", named, "a model, or --from_scratch")
        chooses = self.choose_on_test and is_forest
        self._require("choose_on_test", not chooses, "false with a `baseline`, where there is nothing to choose")
        self._require("resume_from_checkpoint", self.resume_from_checkpoint in (None, "latest"), "'latest'")
        both = self.overwrite_output_dir and self.resume_from_checkpoint is not None
        self._require("overwrite_output_dir", not both, "False with `resume_from_checkpoint`")

    def _require(self, name: str, condition: Any, expected: str):
        if not condition:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected {expected}.")

    def recipe(self) -> Augmentation:
        """The random maps of the augmentation that is named."""
        if self.augmentation == "scale_translate":
            return Augmentation((self.scale_min, self.scale_max))
        return Augmentation((1, 1), 0.0, self.rotation_axis if self.augmentation == "rotate" else "none")


@dataclass
class ClassificationArguments(FineTuningArguments):
    """Arguments of [`finetune_classification`]."""

    head: Literal["full", "linear", "mlp"] = _argument(
        "full", "What learns: the whole network under an MLP head, or a linear or MLP head on the frozen encoder."
    )
    ways: int = _argument(
        0, "Few-shot: classes of a fold, one fold a seed; needs --validation_fraction 0. 0: all shapes."
    )
    shots: int = _argument(10, "Few-shot: labelled shapes of each class, from the training split.")
    queries: int = _argument(20, "Few-shot: shapes of each class to be recognised, from the test split.")
    voting: int = _argument(0, "Augmented looks at each test shape, reported apart as `accuracy_voted`; 0: none.")
    output_dir: str = _argument(
        "outputs/finetune_classification", "Folder for result.json, and seed-N with model, best and log.jsonl."
    )

    def __post_init__(self):
        super().__post_init__()
        self._require("voting", self.voting >= 0, "0 or more")
        self._require("ways", self.ways == 0 or self.ways > 1, "2 or more, or 0 for all shapes")
        deeper = "classifier_num_layers" in parse_config_overrides(self.config_overrides or "")
        self._require("config_overrides", self.head == "full" or not deeper, "no `classifier_num_layers` with `head`")
        for name in ("shots", "queries"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        all_shots = self.ways == 0 or (self.validation_fraction == 0 and self.train_fraction == 1)
        self._require(
            "validation_fraction", all_shots, "0 with `ways`, and all of `train_fraction`: no shot is spared"
        )


@dataclass
class SegmentationArguments(FineTuningArguments):
    """Arguments of [`finetune_segmentation`]."""

    num_points: int = _argument(2048, "Points that the network is given, at most those of the largest training cloud.")
    head: Literal["full", "mlp"] = _argument(
        "full", "What learns: the whole network under an MLP head, or the head on the frozen encoder."
    )
    part_column: str = _argument("part_labels", "Column of a class for each point.")
    use_object_class: bool = _argument(True, "Whether the network is told the class of the object.")
    output_dir: str = _argument(
        "outputs/finetune_segmentation", "Folder for result.json, and seed-N with model, best and log.jsonl."
    )
