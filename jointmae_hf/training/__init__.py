"""Training loops on Accelerate."""

from .arguments import PreTrainingArguments
from .checkpoints import CheckpointError
from .pretraining import NonFiniteLossError, pretrain


__all__ = ["CheckpointError", "NonFiniteLossError", "PreTrainingArguments", "pretrain"]
