"""The arguments of pre-training: one dataclass, from which scripts make their command line."""

import ast
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..configuration_joint_mae import JointMAEConfig


def _argument(default: Any, description: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": description})
    return field(default=default, metadata={"help": description})


@dataclass
class PreTrainingArguments:
    """
    Arguments of [`pretrain`]; the help of each field is its documentation.

    Raises:
        ValueError: if a value is out of range or two arguments contradict each other; the message names them.
    """

    # Data
    dataset: str | None = _argument(
        None, "Name on the Hub, local folder, parquet file or pattern of parquet files (default: the embedded data)."
    )
    train_data: str | None = _argument(
        None,
        "Sources to train on instead of --dataset, `NAME:WEIGHT,...`: `procedural` shapes, and data sets as --dataset "
        "takes them. --dataset is then for the report alone. Needs --max_steps.",
    )
    dataset_config_name: str | None = _argument(
        None, "Configuration of a Hub data set that has several; with --train_data, of each of its data sets."
    )
    split: str = _argument("train", "Split to train on, in the syntax of `datasets`.")
    points_column: str = _argument("points", "Column of clouds: (n, 3) each, n any number.")
    streaming: bool = _argument(False, "Read the data set during training instead of before; needs --max_steps.")
    shuffle_buffer_size: int = _argument(
        1000, "Rows of a stream that are read and shuffled at a time; 0 keeps the order of the stream."
    )
    num_workers: int | None = _argument(
        None, "Processes that prepare batches ahead; a stream uses one at most (default: 2 with a GPU, else 0)."
    )
    num_threads: int | None = _argument(
        None, "Threads of each process on a CPU (default: all cores shared out; `accelerate launch` would give one)."
    )

    # Model
    preset: str = _argument("tiny", "Size of a new model: tiny, small or base.")
    config_name: str | None = _argument(None, "Configuration (folder, file or Hub name) of a new model, not a preset.")
    model_name_or_path: str | None = _argument(None, "Model to continue from: its configuration and its weights.")
    config_overrides: str | None = _argument(
        None, "Fields of the configuration to replace: `key=value,...`, lists as `num_centers=[64,16]`."
    )

    # Augmentation
    scale_min: float = _argument(2 / 3, "Smallest random scale of an axis.")
    scale_max: float = _argument(3 / 2, "Largest random scale of an axis.")
    max_shift: float = _argument(0.2, "Largest random shift along an axis, either way, in unit-sphere coordinates.")
    rotation: Literal["none", "x", "y", "z", "so3"] = _argument("none", "Random rotation: about one axis, or any.")
    max_tilt: float = _argument(0.0, "Besides, a random turn about any axis by up to this many degrees.")
    max_jitter: float = _argument(0.0, "Gaussian noise on each point; largest deviation, in unit-sphere coordinates.")

    # Length and optimisation
    epochs: float = _argument(20.0, "Passes over the data set.")
    max_steps: int | None = _argument(None, "Optimizer steps, instead of --epochs.")
    batch_size: int = _argument(16, "Samples of an optimizer step, over all processes and accumulation steps.")
    gradient_accumulation_steps: int = _argument(1, "Forward passes of a process to an optimizer step.")
    learning_rate: float = _argument(1e-3, "Highest learning rate: warm-up to it, then cosine to 0.")
    warmup_ratio: float = _argument(0.05, "Share of the steps over which the learning rate rises from 0.")
    weight_decay: float = _argument(0.05, "Weight decay of matrices; biases, norms and tokens have none.")
    adam_beta1: float = _argument(0.9, "First beta of AdamW.")
    adam_beta2: float = _argument(0.95, "Second beta of AdamW.")
    max_grad_norm: float = _argument(10.0, "Gradients are clipped to this norm; 0 leaves them.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _argument(
        None, "Precision of the forward pass (default: what `accelerate launch` says, else no)."
    )
    compile: bool = _argument(False, "Compile the blocks of the model with torch.compile.")
    cuda_graph: bool = _argument(
        False,
        "Replay forward and backward pass from a CUDA graph, on one GPU. It keeps its memory; `grad_norm_steps` takes "
        "as much again.",
    )
    ema_decay: float | None = _argument(
        None, "Keep an exponential moving average of the weights, and end with it (0.999, say; default: none)."
    )
    seed: int = _argument(0, "Decides everything random: weights, order, augmentation, views, masks.")

    # Output
    output_dir: str = _argument("outputs/pretrain", "Folder for the model, checkpoints, log.jsonl and result.json.")
    overwrite_output_dir: bool = _argument(False, "Delete what an earlier run left in the output folder.")
    logging_steps: int = _argument(10, "Optimizer steps to a line of log.jsonl.")
    grad_norm_steps: int = _argument(
        100, "Steps between measurements of each loss's gradient on the shared encoder, the first step too; 0: never."
    )
    save_steps: int = _argument(200, "Optimizer steps between checkpoints; 0: one at the end only.")
    save_total_limit: int | None = _argument(2, "Checkpoints to keep, the newest ones.")
    resume_from_checkpoint: str | None = _argument(
        None, "Checkpoint to continue, or `latest`: the newest good one of the output folder, the start if none."
    )
    report_to: str = _argument("none", "Trackers of Accelerate, comma-separated (tensorboard, wandb, ...), or none.")
    push_to_hub: bool = _argument(False, "Upload the final model to --hub_model_id.")
    hub_model_id: str | None = _argument(None, "Repository on the Hub, `owner/name`.")
    hub_private_repo: bool = _argument(True, "Whether that repository is private if it is made.")

    # Evaluation
    evaluate: bool = _argument(True, "Report on features and reconstructions at the end.")
    eval_split: str = _argument("test", "Split that the report is measured on.")
    label_column: str = _argument("label", "Column of classes, for the report; may be missing.")

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "epochs", "learning_rate"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        for name in (
            "shuffle_buffer_size",
            "weight_decay",
            "max_grad_norm",
            "grad_norm_steps",
            "save_steps",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("max_steps", "save_total_limit", "num_threads"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0")
        self._require("output_dir", not Path(self.output_dir).is_file(), "no file of that name")
        self._require("seed", 0 <= self.seed < 2**63, "0 to 2 ** 63 - 1")
        for name in ("streaming", "train_data"):
            endless = self.max_steps is None and getattr(self, name)
            self._require("max_steps", not endless, f"a number with `{name}`")
        self._require("streaming", not (self.streaming and self.train_data), "False with `train_data`")
        both = self.overwrite_output_dir and self.resume_from_checkpoint == "latest"
        self._require("overwrite_output_dir", not both, "False with `resume_from_checkpoint` latest")
        same = self.evaluate and self.eval_split == self.split
        self._require("eval_split", not same, "another split than `split`, or `evaluate` False")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1")
        self._require("hub_model_id", not self.push_to_hub or self.hub_model_id, "a name with `push_to_hub`")
        both = self.config_name is not None and self.model_name_or_path is not None
        self._require("config_name", not both, "nothing with `model_name_or_path`, which has its configuration")

    def _require(self, name: str, condition: Any, expected: str):
        if not condition:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected {expected}.")


def build_config(arguments: PreTrainingArguments) -> JointMAEConfig:
    """The configuration that the arguments ask for, overrides applied and validated."""
    source = arguments.model_name_or_path or arguments.config_name
    config = JointMAEConfig.from_pretrained(source) if source else JointMAEConfig.from_preset(arguments.preset)
    overrides = parse_config_overrides(arguments.config_overrides or "")
    return JointMAEConfig(**{**config.to_dict(), **overrides}) if overrides else config


def parse_config_overrides(text: str) -> dict[str, Any]:
    """
    Fields and values of `key=value,...`; values are JSON or Python literals, else strings.

    Raises:
        ValueError: if an item is not `key=value`, or the configuration has no such field.
    """
    known = {f.name for f in fields(JointMAEConfig)}
    overrides = {}
    for item in _split_outside_brackets(text):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ValueError(f"`config_overrides` holds {item!r}, expected key=value.")
        if key not in known:
            raise ValueError(f"`config_overrides` names {key!r}, which JointMAEConfig does not have.")
        overrides[key] = _literal(value)
    return overrides


def _split_outside_brackets(text: str) -> list[str]:
    items, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item for item in items if item.strip()]


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text
