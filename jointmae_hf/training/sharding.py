"""Tensors that FSDP2 spreads over processes: in one piece, spread again, or the part of this process."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece; if it is spread, all processes must call this, in the same order."""
    return tensor.detach().full_tensor() if is_spread(tensor) else tensor.detach()


def spread_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A tensor that all processes have in one piece, where and as `reference` lies."""
    tensor = tensor.to(reference.device)
    if is_spread(reference):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, in the same memory."""
    return tensor.to_local() if is_spread(tensor) else tensor
