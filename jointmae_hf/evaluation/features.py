"""Features of whole clouds from a frozen encoder, from 3D alone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import PreTrainedModel

from ..modeling_joint_mae import pool_tokens


def extract_features(
    model: PreTrainedModel, points: np.ndarray, layers: Sequence[int] | None = None, batch_size: int = 64
) -> np.ndarray | list[np.ndarray]:
    """
    Mean and maximum over the 3D tokens of every cloud, without masks and without an image.

    On a CPU each thread takes batches of its own: for a small model that is faster than threads inside the operators.

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

    @torch.no_grad()  # of each thread
    def pooled(start: int) -> list[torch.Tensor]:
        batch = torch.from_numpy(points[start : start + batch_size]).to(encoder.device)
        outputs = encoder(batch, output_hidden_states=layers is not None)
        if layers is None:
            return [outputs.pooler_output.float().cpu()]
        return [pool_tokens(outputs.hidden_states[layer]).float().cpu() for layer in layers]

    threads = torch.get_num_threads() if encoder.device.type == "cpu" and layers is None else 1
    starts = range(0, len(points), batch_size)
    was_training = encoder.training
    encoder.eval()
    try:
        if threads == 1:
            parts = [pooled(start) for start in starts]
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                parts = list(executor.map(pooled, starts))
    finally:
        encoder.train(was_training)
    features = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    return features[0] if layers is None else features
