"""Forward and backward pass replayed from a CUDA graph.

A step of a small model is thousands of short kernels, which a GPU finishes sooner than Python launches them. A graph
of them is launched in one piece, and what else the process does meanwhile - making batches - no longer holds it up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


_EAGER_CALLS = 3  # before the capture: kernels are compiled, libraries and the optimizer get ready


class GraphedBackward:
    """
    Forward and backward passes on a GPU, from the fourth on replayed.

    What is replayed has fixed shapes. A batch with others is computed kernel by kernel.

    Args:
        model: whose gradients are wanted; they must be `None` at every call, as `zero_grad()` leaves them.
        forward: computes its outputs from the inputs, under autocast for example; it may not wait for the GPU.
        terms: names of scalar outputs.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], terms: list[str]):
        self.model = model
        self.forward = forward
        self.terms = terms
        self.graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Sets the gradients of the model to those of the loss of a batch.

        Args:
            batch: inputs of the model, on the GPU.

        Returns:
            The values of `terms`.
        """
        if self.graph is None and self._calls == _EAGER_CALLS:
            self._capture(batch)
        if self.graph is None or _shapes(batch) != _shapes(self._inputs):
            self._calls += 1
            return self._run(batch)
        for name, tensor in batch.items():
            self._inputs[name].copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._values.clone()

    def _run(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = self.forward(**batch)
        outputs.loss.backward()
        return torch.stack([outputs[name].detach().float() for name in self.terms])

    def _capture(self, batch: dict[str, torch.Tensor]):
        self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        self.graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating memory and moving batches.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._values = self._run(self._inputs)
        # Each replay writes these anew.
        self._gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]


def _shapes(batch: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}
