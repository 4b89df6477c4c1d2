"""Features of whole clouds from a frozen encoder, from 3D alone."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..modeling_joint_mae import pool_tokens


@torch.no_grad()
def extract_features(
    model: PreTrainedModel, points: np.ndarray, layers: Sequence[int] | None = None, batch_size: int = 64
) -> np.ndarray | list[np.ndarray]:
    """
    Mean and maximum over the 3D tokens of every cloud, without masks and without an image.

    Args:
        model: a Joint-MAE model of any kind; its encoder is used, in evaluation mode, and left in the mode it was in.
        points: float32 `(clouds, num_points, 3)`, normalised.
        layers: indices into `hidden_states` (0 is what enters the first block, -1 the normalised last); the final
            normalised tokens alone when left out.
        batch_size: clouds at a time.

    Returns:
        float32 `(clouds, 2 * hidden_size)`, or a list of such arrays, one for each of `layers`.
    """
    encoder = model.base_model
    was_training = encoder.training
    encoder.eval()
    pooled: list[list[torch.Tensor]] = [[] for _ in (layers if layers is not None else [-1])]
    try:
        for start in range(0, len(points), batch_size):
            batch = torch.from_numpy(points[start : start + batch_size]).to(encoder.device)
            outputs = encoder(batch, output_hidden_states=layers is not None)
            if layers is None:
                pooled[0].append(outputs.pooler_output.float().cpu())
                continue
            for part, layer in zip(pooled, layers, strict=True):
                part.append(pool_tokens(outputs.hidden_states[layer]).float().cpu())
    finally:
        encoder.train(was_training)
    features = [torch.cat(part).numpy() for part in pooled]
    return features[0] if layers is None else features
