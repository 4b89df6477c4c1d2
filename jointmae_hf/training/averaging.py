"""An exponential moving average of the weights, EMA: often a better model than the last step's."""

import torch
from torch import nn

from .sharding import local_part, spread_like


class WeightAverage:
    """
    The average of a model's weights over the steps so far.

    The first steps count less than `decay` alone would have it: after step `n` it is at most `(1 + n) / (10 + n)`, so
    that a short run does not keep its untrained weights. As a function of the step, it need not be saved.

    Args:
        model: the model; its parameters are what is averaged, in float32.
        decay: share of the average that a step keeps, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        parameters = [parameter.detach() for parameter in model.parameters()]
        self.averages = [parameter.float().clone() for parameter in parameters]
        # The parts of this process, in the same memory: a step needs no others.
        self.local_parameters = [local_part(parameter) for parameter in parameters]
        self.local_averages = [local_part(average) for average in self.averages]

    @torch.no_grad()
    def update(self, step: int):
        """Takes account of the weights after optimizer step `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.local_averages, [parameter.float() for parameter in self.local_parameters], share)

    @torch.no_grad()
    def copy_to_model(self):
        """Puts the average in place of the weights."""
        torch._foreach_copy_(self.local_parameters, self.local_averages)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average by the names of the parameters."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]):
        """
        Goes on from a saved average.

        Raises:
            KeyError: if it lacks a parameter.
            RuntimeError: if one has another shape.
        """
        for name, average in self.tensors().items():
            average.copy_(spread_like(tensors[name], average))
