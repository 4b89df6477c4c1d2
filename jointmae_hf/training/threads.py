"""Data parallelism over the threads of one CPU process.

A small model keeps two cores busier with half a batch each than with two threads in every operator. The replicas share
the weights of the model and have gradients of their own, so nothing is copied but gradients, once a step.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..modeling_joint_mae import agreement_loss


class ReplicaThreads:
    """
    Threads that run forward and backward passes over slices of a batch.

    Args:
        model: the model, on the CPU; its weights stay where they are. It may draw nothing at random itself, since
            threads share torch's generator.
        num_threads: how many; a batch is cut into as many slices of equal size.
        context: made anew in each thread for its forward pass, autocast for example.
    """

    def __init__(
        self, model: nn.Module, num_threads: int, context: Callable[[], AbstractContextManager] = nullcontext
    ):
        self.model = model
        self.context = context
        self.replicas = [copy.deepcopy(model) for _ in range(num_threads)]
        for replica in self.replicas:
            for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
                own.data = shared.data
        # Each thread computes alone; operators that split work further would only get in the way of the others.
        self.executor = ThreadPoolExecutor(num_threads, "replica", initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, batch: dict[str, torch.Tensor], terms: list[str], scale: float = 1.0) -> torch.Tensor:
        """
        Adds the gradient of the loss of a batch to that of the model.

        Args:
            batch: inputs of the model; their first axis, of equal length in all, must divide among the threads.
            terms: names of scalar outputs, means over the batch.
            scale: multiplies the loss.

        Returns:
            The values of `terms`.
        """
        count = len(self.replicas)
        work = [
            self.executor.submit(self._backward, replica, part, terms, scale / count)
            for replica, part in zip(self.replicas, self._slices(batch), strict=True)
        ]
        values = torch.stack([done.result() for done in work]).mean(0)
        self._gather_gradients()
        return values

    def _gather_gradients(self):
        """Moves the gradients of the replicas to the model, where they add up."""
        for shared, *own in zip(*(module.parameters() for module in [self.model, *self.replicas]), strict=True):
            for parameter in own:
                if parameter.grad is not None:
                    shared.grad = parameter.grad if shared.grad is None else shared.grad.add_(parameter.grad)
                    parameter.grad = None

    def _slices(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The part of a batch that each replica gets; of a batch smaller than their number, some get none."""
        count = min(len(self.replicas), len(next(iter(batch.values()))))
        chunks = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
        return [{name: parts[i] for name, parts in chunks.items()} for i in range(count)]

    def _forward(self, replica: nn.Module, batch: dict[str, torch.Tensor]) -> ModelOutput:
        with self.context():
            return replica(**batch)

    def _backward(
        self, replica: nn.Module, batch: dict[str, torch.Tensor], terms: list[str], scale: float
    ) -> torch.Tensor:
        outputs = self._forward(replica, batch)
        (outputs.loss * scale).backward()
        return torch.stack([outputs[name].detach().float() for name in terms])


class AgreementThreads(ReplicaThreads):
    """Threads for a model whose loss also compares the views of all shapes of the batch with each other."""

    def backward(self, batch: dict[str, torch.Tensor], terms: list[str], scale: float = 1.0) -> torch.Tensor:
        """As in [`ReplicaThreads`]; the agreement is that of the whole batch."""
        config, count = self.model.config, len(self.replicas)
        parts = list(self.executor.map(self._forward, self.replicas, self._slices(batch)))
        views = torch.cat([part.view_features.detach() for part in parts], dim=1).requires_grad_()
        agreement = agreement_loss(*views, config.agreement_temperature)
        (agreement * config.agreement_loss_weight * scale).backward()
        # Less what each slice had compared within itself.
        losses = [part.loss - config.agreement_loss_weight * part.loss_agreement for part in parts]
        roots = [[loss * scale / count, part.view_features] for loss, part in zip(losses, parts, strict=True)]
        gradients = [[None, gradient] for gradient in views.grad.chunk(count, dim=1)]
        list(self.executor.map(torch.autograd.backward, roots, gradients))
        self._gather_gradients()

        agreement = agreement.detach()
        means = {name: torch.stack([part[name].detach().float() for part in parts]).mean(0) for name in terms}
        means["loss"] = torch.stack(losses).detach().float().mean() + config.agreement_loss_weight * agreement
        means["loss_agreement"] = agreement
        return torch.stack([means[name] for name in terms])


class EncoderThreads(ReplicaThreads):
    """
    Threads that run the encoder over slices of a batch, under a head that gets the batch in one piece.

    Batch normalisation and dropout of a head need all of the batch and one order of random numbers; the encoder, where
    nearly all the time goes, needs neither.
    """

    def backward(
        self, points: torch.Tensor, head_loss: Callable[[ModelOutput], torch.Tensor], scale: float = 1.0
    ) -> torch.Tensor:
        """
        Adds the gradient of a loss of the encoder's output to that of encoder and head.

        Args:
            points: `(batch, num_points, 3)`.
            head_loss: the loss, given the encoder's output for all of them.
            scale: multiplies the loss.

        Returns:
            The loss, detached, not scaled.
        """
        parts = list(self.executor.map(self._forward, self.replicas, self._slices({"point_values": points})))
        whole = {}
        for name, tensor in parts[0].items():
            whole[name] = torch.cat([part[name].detach() for part in parts]).requires_grad_(tensor.requires_grad)
        loss = head_loss(type(parts[0])(**whole))
        (loss * scale).backward()
        used = [name for name, tensor in whole.items() if tensor.grad is not None]
        if used:
            sizes = [len(next(iter(part.values()))) for part in parts]
            gradients = zip(*(whole[name].grad.split(sizes) for name in used), strict=True)
            roots = [[part[name] for name in used] for part in parts]
            list(self.executor.map(torch.autograd.backward, roots, gradients))
            self._gather_gradients()
        return loss.detach()
