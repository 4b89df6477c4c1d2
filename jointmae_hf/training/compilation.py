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
_MOST_VARIANTS = 64  # of the code of a block: with and without mask, gradient, or image, and sizes


def compile_blocks(model: nn.Module):
    """
    Has the embeddings and each transformer block of a model compiled, in place, when first called.

    All blocks of one size share what is compiled, so this takes a fraction of the time that the whole model would,
    which repeats its blocks. Parameters keep their names.

    Args:
        model: any of this package.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    for module in model.modules():
        if isinstance(module, _BLOCKS):
            module.compile(dynamic=False)
