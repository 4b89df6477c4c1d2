"""The tiny model of the common and export tests, and its inputs."""

import torch
from torch import nn

from jointmae_hf import JointMAEConfig
from jointmae_hf.geometry_joint_mae import project_depth, view_projection


BATCH_SIZE = 2
# The encoder of pre-training sees 2 of 8 tokens of the cloud and 6 of 9 of the image: 8 tokens, as many as the models
# that are given the cloud alone. The common tests want one length of attention for all classes.
NUM_TOKENS = 8
NUM_PATCHES = 9


def tiny_config_fields() -> dict:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_points": 32,
        "num_centers": [16, NUM_TOKENS],
        "num_neighbors": [8, 4],
        "point_embed_sizes": [16, 32],
        "image_size": 12,
        "splat_size": 3,
        "patch_strides": [2, 2],
        "image_embed_sizes": [16, 32],
        "mask_ratio": 0.75,
        "image_mask_ratio": 1 / 3,
        "alignment_radii": [1, None],
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "decoder_num_shared_layers": 1,
        "num_target_points": 8,
        "classifier_hidden_size": 16,
    }


def tiny_points(seed: int = 0, batch_size: int = BATCH_SIZE, num_points: int = 32) -> torch.Tensor:
    """Points on ellipsoids."""
    points = torch.randn(batch_size, num_points, 3, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(points, dim=-1) * torch.tensor([1.0, 0.7, 0.4])


def image_of(points: torch.Tensor, config: JointMAEConfig) -> dict[str, torch.Tensor]:
    """The depth image of each cloud in its first view, and the map that made it."""
    projection = view_projection(points, torch.zeros(points.shape[0], dtype=torch.int64), config.image_size)
    pixel_values = project_depth(points, projection, config.image_size, config.splat_size)
    return {"pixel_values": pixel_values, "projection": projection}


def mask_noise(batch_size: int = BATCH_SIZE) -> dict[str, torch.Tensor]:
    """The noise that decides both masks of pre-training."""
    generator = torch.Generator().manual_seed(0)
    return {
        "point_noise": torch.rand(batch_size, NUM_TOKENS, generator=generator),
        "patch_noise": torch.rand(batch_size, NUM_PATCHES, generator=generator),
    }
