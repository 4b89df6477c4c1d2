"""Reconstruction of held-out shapes, and how much of it the encoder's output is needed for."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..modeling_joint_mae import JointMAEForPreTraining


@contextmanager
def averaged_encoder_output(model: JointMAEForPreTraining) -> Iterator[None]:
    """
    Inside, the decoder is given the mean of the encoder's output over the batch and the tokens of each modality.

    What it then still reconstructs it takes from positions alone.
    """
    num_tokens = model.config.num_visible_tokens

    def average(module, arguments, output):
        parts = output.last_hidden_state.split([num_tokens, output.last_hidden_state.shape[1] - num_tokens], dim=1)
        parts = [part.mean((0, 1), keepdim=True).expand_as(part) if part.shape[1] else part for part in parts]
        output["last_hidden_state"] = torch.cat(parts, dim=1)
        return output

    handle = model.joint_mae.register_forward_hook(average)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def reconstruction_losses(
    model: JointMAEForPreTraining, points: np.ndarray, seed: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """
    Mean losses over clouds, with masks fixed by the seed and the first view, unweighted.

    Args:
        model: left in the mode it was in.
        points: float32 `(clouds, num_points, 3)`, normalised, not augmented.
        seed: fixes the masks.
        batch_size: clouds at a time.

    Returns:
        `loss_3d` (Chamfer, squared input units), `loss_2d` (squared depth) and `loss_cross`, those that the model has.
    """
    config, device = model.config, model.device
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, float] = {}
    try:
        for start in range(0, len(points), batch_size):
            batch = torch.from_numpy(points[start : start + batch_size]).to(device)
            size = len(batch)
            outputs = model(
                batch,
                view=torch.zeros(size, dtype=torch.int64, device=device),
                point_noise=torch.rand(size, config.num_centers[-1], generator=generator).to(device),
                patch_noise=torch.rand(size, config.num_patches, generator=generator).to(device),
            )
            for name in ("loss_3d", "loss_2d", "loss_cross"):
                if name in outputs:  # a model without the 2D branch or the cross loss goes without theirs
                    totals[name] = totals.get(name, 0.0) + outputs[name].item() * size
    finally:
        model.train(was_training)
    return {name: total / len(points) for name, total in totals.items()}
