"""torch.compile, block by block."""

import torch
from torch import nn

from ..modeling_joint_mae import (
    JointMAEImageEmbeddings,
    JointMAELayer,
    JointMAEPointEmbeddings,
    JointMAEPositionEmbeddings,
)


_BLOCKS = (JointMAEPointEmbeddings, JointMAEImageEmbeddings, JointMAEPositionEmbeddings, JointMAELayer)
# Of all blocks of a process together: with and without mask, gradient or image, and sizes. torch has 8.
_MOST_VARIANTS = 64


def compile_blocks(model: nn.Module):
    """
    Has the embeddings and each transformer block of a model compiled, in place, when first called.

    All blocks of one size share what is compiled, so this takes a fraction of the time that the whole model would,
    which repeats its blocks. Parameters keep their names.

    Args:
        model: any of this package.
    """
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
    setattr(config, limit, max(getattr(config, limit), _MOST_VARIANTS))
    for module in model.modules():
        if isinstance(module, _BLOCKS):
            module.compile(dynamic=False)


def release_blocks(model: nn.Module):
    """Takes [`compile_blocks`] back, so that what comes now may have any size and hooks."""
    for module in model.modules():
        module._compiled_call_impl = None
