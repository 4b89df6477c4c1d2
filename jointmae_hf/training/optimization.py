"""Optimizer, learning rate and the measurement of gradients."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


# Learned inputs that have two axes but are no matrices.
_TOKENS = ("mask_tokens", "modality_embeddings")


def build_optimizer(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas)


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict]:
    """
    Groups of trainable parameters by two marks: whether they are decayed (not biases, norms and learned tokens)
    [relative], and whether they are of the encoder, which starts to learn later.
    """
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim <= 1 or name.rpartition(".")[2] in _TOKENS
            groups.setdefault((id(parameter) in encoder, is_spared), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_spared else weight_decay, "is_encoder": is_encoder}
        for (is_encoder, is_spared), parameters in groups.items()
    ]


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, start: int = 0) -> float:
    """
    Learning rate of an optimizer step: linear warm-up to `peak`, then cosine to 0. A pure function, so there is no
    scheduler to save.

    Args:
        step: 1 to `total_steps`. The last warm-up step has the peak; 0 would be reached one step after the last.
        total_steps, warmup_steps: lengths in optimizer steps.
        peak: highest learning rate.
        start: up to this step it is 0, and the warm-up comes after it; the cosine is the same.
    """
    rise = min(1.0, max(0, step - start) / warmup_steps) if warmup_steps else float(step > start)
    progress = max(0, step - 1 - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * progress))


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
