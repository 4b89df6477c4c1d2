"""Optimizer, learning rate and the measurement of gradients."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


# Learned inputs that have two axes but are no matrices.
_TOKENS = ("mask_tokens", "modality_embeddings")


def build_optimizer(
    model: PreTrainedModel,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    encoder_lr_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only; of a model with a head, the encoder may learn slower."""
    groups = parameter_groups(model, weight_decay, encoder_lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def parameter_groups(model: PreTrainedModel, weight_decay: float, encoder_lr_scale: float = 1.0) -> list[dict]:
    """
    Trainable parameters in groups: those that are decayed, and biases, norms and learned tokens [relative], each of
    these again in two if the encoder has a learning rate of its own.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim <= 1 or name.rpartition(".")[2] in _TOKENS
            lr_scale = encoder_lr_scale if name.startswith(f"{model.base_model_prefix}.") else 1.0
            decay = 0.0 if is_spared else weight_decay
            group = {"params": [], "weight_decay": decay, "lr_scale": lr_scale}
            groups.setdefault((lr_scale, decay), group)["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Gives each group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """
    Learning rate of an optimizer step: linear warm-up to `peak`, then cosine to 0. A pure function, so there is no
    scheduler to save.

    Args:
        step: 1 to `total_steps`. The last warm-up step has the peak; 0 would be reached one step after the last.
        total_steps, warmup_steps: lengths in optimizer steps.
        peak: highest learning rate.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = max(0, step - 1 - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def loss_gradient_norms(
    losses: Mapping[str, torch.Tensor], parameters: Sequence[nn.Parameter], scale: float = 1.0
) -> dict[str, float]:
    """
    Norm of the gradient of each loss on some parameters. Leaves `.grad` and the graph as they were.

    Args:
        losses: scalar losses, with their weights, of one forward pass.
        parameters: where the gradient is measured.
        scale: losses are multiplied by this for the backward pass only, to keep float16 from underflow.
    """
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) / scale if squares else 0.0
    return norms
