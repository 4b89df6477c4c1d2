# Copyright 2026 The jointmae_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Joint-MAE: 2D-3D joint masked autoencoder for point clouds (arXiv 2302.14007).

Notable choices:

- One pass of farthest point sampling serves all scales: its order is nested, coarser centres are a prefix of finer.
- Masked tokens are never embedded. In pre-training each scale is computed for the children of visible tokens only, and
  the 2D embedding works inside each visible patch, so nothing of a masked token can reach the encoder.
- The joint encoder is 12 plain pre-norm blocks; local-aligned attention is one boolean mask for each third of them.
- Without an image the model is a 3D encoder: this is how features are extracted after pre-training.
"""

# Ablation switches and options: published checkpoints keep their defaults, and the tests run both sides of each.
# trf-ignore: TRF041 use_image_branch, use_local_alignment, use_cross_loss, position_every_layer
# trf-ignore: TRF041 modality_dropout, norm_point_loss, norm_pixel_loss, num_object_classes, agreement_of_visible

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_joint_mae import JointMAEConfig
from .geometry_joint_mae import (
    chamfer_distance,
    depth_consistency,
    gather_points,
    group_nearest,
    interpolate_features,
    multiscale_groups,
    neighborhood_moments,
    patch_index,
    project_depth,
    project_points,
    view_projection,
)


_EPS = 1e-6
_CHUNK_SIZE = 1 << 21  # elements of the longest tensors of the 3D embedding on a CPU


@dataclass
class JointMAEModelOutput(ModelOutput):
    """
    Output of [`JointMAEModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`):
            Normalised tokens of the joint encoder, 3D tokens first.
        pooler_output (`torch.FloatTensor` of shape `(batch, config.pooled_size)`):
            Mean and maximum over the 3D tokens of the last block, or what `config.pooling_layers` and
            `config.pooling_deviation` say: the feature of a cloud.
        centers (`torch.FloatTensor` of shape `(batch, num_centers[-1], 3)`):
            Centre of every 3D token, visible or not, in the coordinates of `point_values`.
        fine_features (`torch.FloatTensor` of shape `(batch, num_centers[0], point_embed_sizes[0])`, *optional*):
            Features of the finest groups, where no token was left out.
        fine_centers (`torch.FloatTensor` of shape `(batch, num_centers[0], 3)`, *optional*): Their centres.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Input of the first block, then the output of each; that of the last one is normalised.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of each block.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    centers: torch.FloatTensor | None = None
    fine_features: torch.FloatTensor | None = None
    fine_centers: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class JointMAEForPreTrainingOutput(ModelOutput):
    """
    Output of [`JointMAEForPreTraining`]. Reconstructions are of the masked tokens only.

    Args:
        loss (`torch.FloatTensor` of shape `()`): Weighted sum of the losses.
        loss_3d (`torch.FloatTensor` of shape `()`): Chamfer distance of masked groups, in squared input units.
        loss_2d (`torch.FloatTensor` of shape `()`, *optional*): Mean squared depth error of masked patches.
        loss_cross (`torch.FloatTensor` of shape `()`, *optional*):
            How far reconstructed points stand before the depth image, squared.
        loss_agreement (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of finding the other view of each shape among those of the batch.
        view_features (`torch.FloatTensor` of shape `(2, batch, 2 * hidden_size)`, *optional*):
            What that compares: the 3D tokens of the last block, pooled, of both views.
        reconstructed_points (`torch.FloatTensor` of shape `(batch, masked tokens, num_target_points, 3)`):
            In the coordinates of `point_values`.
        reconstructed_patches (`torch.FloatTensor` of shape `(batch, masked patches, patch_size ** 2 * num_channels)`):
            Depth in [0, 1], row by row.
        mask_3d (`torch.FloatTensor` of shape `(batch, num_centers[-1])`): 1 where a 3D token is masked, else 0.
        mask_2d (`torch.FloatTensor` of shape `(batch, num_patches)`): 1 where a patch is masked, else 0.
        masked_tokens (`torch.LongTensor` of shape `(batch, masked tokens)`): Which 3D token each reconstruction is of.
        masked_patches (`torch.LongTensor` of shape `(batch, masked patches)`): Which patch each reconstruction is of.
        centers (`torch.FloatTensor` of shape `(batch, num_centers[-1], 3)`): Centre of every 3D token.
        pixel_values (`torch.FloatTensor` of shape `(batch, 1, height, width)`): The image, given or projected.
        projection (`torch.FloatTensor` of shape `(batch, 3, 4)`): The map that made it.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Input of the first encoder block, then the output of each; that of the last one is normalised.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of each encoder block.
    """

    loss: torch.FloatTensor | None = None
    loss_3d: torch.FloatTensor | None = None
    loss_2d: torch.FloatTensor | None = None
    loss_cross: torch.FloatTensor | None = None
    loss_agreement: torch.FloatTensor | None = None
    view_features: torch.FloatTensor | None = None
    reconstructed_points: torch.FloatTensor | None = None
    reconstructed_patches: torch.FloatTensor | None = None
    mask_3d: torch.FloatTensor | None = None
    mask_2d: torch.FloatTensor | None = None
    masked_tokens: torch.LongTensor | None = None
    masked_patches: torch.LongTensor | None = None
    centers: torch.FloatTensor | None = None
    pixel_values: torch.FloatTensor | None = None
    projection: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class JointMAEHeadOutput(ModelOutput):
    """
    Output of the classification and part segmentation models.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Given `labels`.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)` or `(batch, num_points, num_labels)`): Scores.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Input of the first block, then the output of each; that of the last one is normalised.
        attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of each block.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def sincos_2d(grid_size: int, width: int) -> torch.Tensor:
    """Fixed 2D sin-cos positions of a square grid, `(grid_size ** 2, width)`: of rows, then of columns."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (grid_size, width / 2)
    rows = axis.unsqueeze(1).expand(-1, grid_size, -1)
    columns = axis.unsqueeze(0).expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(batch, channels, height, width)` to `(batch, num_patches, patch_size ** 2 * channels)`, row by row."""
    batch_size, channels, height, width = pixel_values.shape
    tiles = pixel_values.reshape(
        batch_size, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, -1, patch_size * patch_size * channels)


def random_mask(noise: torch.Tensor, num_visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of visible and of masked tokens: those with the lowest noise stay visible. `(batch, tokens)` in."""
    order = noise.argsort(dim=1)
    return order[:, :num_visible], order[:, num_visible:]


class GroupMax(torch.autograd.Function):
    """`amax(2)` with the gradient shared by equals, as torch has it, but without its slow arithmetic with booleans."""

    @staticmethod
    def forward(features: torch.Tensor) -> torch.Tensor:
        return features.amax(2)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        features, maximum = (tensor.detach() for tensor in ctx.saved_tensors)
        share = torch.eq(features, maximum.unsqueeze(2), out=torch.empty_like(features))
        return share * (gradient / share.sum(2)).unsqueeze(2)


def group_max(features: torch.Tensor) -> torch.Tensor:
    """Maximum over the points of each group, `(batch, groups, k, width)` to `(batch, groups, width)`."""
    return GroupMax.apply(features) if features.requires_grad and _is_eager_cpu(features) else features.amax(2)


def _is_eager_cpu(tensor: torch.Tensor) -> bool:
    """Whether operators run one by one on a CPU; what is compiled or exported needs no help with them."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


class JointMAEPointEmbeddings(nn.Module):
    """Hierarchical 3D embedding: a small PointNet over the finest groups, then merging by MLP and maximum."""

    def __init__(self, config: JointMAEConfig):
        super().__init__()
        self.num_centers = config.num_centers
        self.num_neighbors = config.num_neighbors
        self.group_embedding = JointMAEGroupEmbedding(config)
        self.mergers = nn.ModuleList(
            [JointMAEGroupMerging(config, scale) for scale in range(1, len(config.num_centers))]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, points: torch.Tensor, point_mask: torch.Tensor | None, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            points: `(batch, num_points, 3)`.
            point_mask: optional boolean `(batch, num_points)`.
            visible: optional indices `(batch, visible)` of the coarsest tokens to embed; all when left out.

        Returns:
            tokens `(batch, visible, hidden_size)`, all coarsest centres `(batch, num_centers[-1], 3)`, features of the
            finest groups that were embedded, and the centres of all finest groups.
        """
        centers, indices, offsets = multiscale_groups(
            points, self.num_centers, self.num_neighbors, point_mask, visible
        )
        radii = self._radii(points, point_mask)
        offsets = [offset / radius for offset, radius in zip(offsets, radii, strict=True)]
        chunk_size, num_scales = self._chunk_size(offsets[0]), len(offsets)
        chunks = zip(*(tensor.split(chunk_size) for tensor in (*indices, *offsets)), strict=True)
        embedded = [self._embed(chunk[:num_scales], chunk[num_scales:]) for chunk in chunks]
        finest_features, features = (torch.cat(parts) for parts in zip(*embedded, strict=True))
        # Coarser centres are a prefix of the finest ones.
        return self.norm(features), centers[:, : self.num_centers[-1]], finest_features, centers

    def _chunk_size(self, offsets: torch.Tensor) -> int:
        """
        How many clouds are embedded at once, given the finest offsets `(batch, groups, k, 3)`: on a CPU, few.

        The tensors of more would leave its caches, and the system would clear their pages anew in every operation.
        """
        batch_size, num_groups, k, _ = offsets.shape
        if not _is_eager_cpu(offsets):
            return batch_size
        return max(1, _CHUNK_SIZE // (num_groups * k * self.group_embedding.point_proj.out_features))

    def _embed(
        self, indices: tuple[torch.Tensor, ...], offsets: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(batch, groups, width)` of the finest scale and of the coarsest."""
        finest_features = features = self.group_embedding(offsets[0])
        for merger, index, offset in zip(self.mergers, indices[1:], offsets[1:], strict=True):
            features = merger(features, index, offset)
        return finest_features, features

    def _radii(self, points: torch.Tensor, point_mask: torch.Tensor | None) -> list[float | torch.Tensor]:
        """
        At each scale the radius of a patch of surface that holds k of n points: the unit of local coordinates.

        At the finest, n is how many points a cloud has, `(batch, 1, 1, 1)` where that differs: to a network that knew
        one density alone, clouds of another would be other surfaces.
        """
        present = points.shape[1]
        if point_mask is not None:
            present = point_mask.sum(1).clamp_min(1).view(-1, 1, 1, 1)
        populations = [present, *self.num_centers[:-1]]
        return [(k / n) ** 0.5 for k, n in zip(self.num_neighbors, populations, strict=True)]


def keep_variance(*layers: nn.Linear):
    """Has linear layers drawn such that they keep the variance: 0.02 would shrink what narrow ones get to nothing."""
    for layer in layers:
        layer.init_std = layer.in_features**-0.5


class JointMAEGroupEmbedding(nn.Module):
    """A small PointNet with two stages: `(batch, groups, k, 3)` to `(batch, groups, point_embed_sizes[0])`."""

    def __init__(self, config: JointMAEConfig):
        super().__init__()
        width = config.point_embed_sizes[0]
        self.point_proj = nn.Linear(3, width)
        self.first_fc = nn.Linear(width, width)
        # One linear layer over concat(pooled, point), split: the pooled part is computed once for each group.
        self.pooled_proj = nn.Linear(width, width)
        self.feature_proj = nn.Linear(width, width, bias=False)
        self.second_fc = nn.Linear(width, width)
        keep_variance(self.point_proj, self.first_fc, self.pooled_proj, self.feature_proj, self.second_fc)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        features = self.first_fc(self.activation_fn(self.point_proj(groups.to(self.point_proj.weight.dtype))))
        pooled = self.pooled_proj(group_max(features)).unsqueeze(2)
        features = self.activation_fn(self.feature_proj(features) + pooled)
        return group_max(self.second_fc(features))


class JointMAEGroupMerging(GradientCheckpointingLayer):
    """Merges the features of neighbouring finer groups into one coarser group by MLP and maximum."""

    def __init__(self, config: JointMAEConfig, scale: int):
        super().__init__()
        width = config.point_embed_sizes[scale]
        self.offset_proj = nn.Linear(3, width)
        # Applied before the gather, so once for each child and not once for each slot.
        self.feature_proj = nn.Linear(config.point_embed_sizes[scale - 1], width, bias=False)
        self.fc = nn.Linear(width, width)
        keep_variance(self.offset_proj, self.feature_proj, self.fc)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, features: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Features `(batch, children, width)`, index and offsets `(batch, groups, k[, 3])`."""
        gathered = gather_points(self.feature_proj(features), index)  # (batch, groups, k, width)
        hidden = self.activation_fn(gathered + self.offset_proj(offsets.to(self.offset_proj.weight.dtype)))
        return group_max(self.fc(hidden))


class JointMAEImageEmbeddings(nn.Module):
    """
    Hierarchical 2D embedding of single patches: strided patch convolutions with depth-wise blocks between them.

    ConvMAE masks its convolutions so that visible patches do not see masked ones. Here each patch is embedded alone,
    which costs nothing for masked patches and is the same in pre-training and after it; patches meet in the encoder.
    """

    def __init__(self, config: JointMAEConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.strides = config.patch_strides
        fan_in = [config.num_channels, *config.image_embed_sizes[:-1]]
        self.projections = nn.ModuleList(
            [
                nn.Linear(stride * stride * width, out)
                for stride, width, out in zip(config.patch_strides, fan_in, config.image_embed_sizes, strict=True)
            ]
        )
        keep_variance(*self.projections)
        self.blocks = nn.ModuleList(
            [
                JointMAEConvLayer(config, scale)
                for scale in range(len(config.patch_strides) - 1)
                for _ in range(config.image_embed_depth)
            ]
        )
        self.depth = config.image_embed_depth
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """Image `(batch, channels, height, width)` and optional patch indices to `(batch, patches, hidden_size)`."""
        tiles = patchify(pixel_values, self.patch_size)
        if visible is not None:
            tiles = gather_points(tiles, visible)
        batch_size, num_tiles, _ = tiles.shape
        cells = tiles.reshape(batch_size * num_tiles, self.patch_size, self.patch_size, -1)
        cells = cells.to(self.projections[0].weight.dtype)
        for scale, (stride, projection) in enumerate(zip(self.strides, self.projections, strict=True)):
            side = cells.shape[1] // stride
            cells = cells.reshape(-1, side, stride, side, stride, cells.shape[-1]).transpose(2, 3)
            cells = projection(cells.reshape(cells.shape[0], side, side, -1))  # (tiles, side, side, width)
            for block in self.blocks[scale * self.depth : (scale + 1) * self.depth]:
                cells = block(cells)
        return self.norm(cells.reshape(batch_size, num_tiles, -1))


class JointMAEConvLayer(GradientCheckpointingLayer):
    """Depth-wise convolution between two point-wise layers, and an MLP, each with a residual (ConvMAE's block)."""

    def __init__(self, config: JointMAEConfig, scale: int):
        super().__init__()
        width = config.image_embed_sizes[scale]
        kernel_size = config.image_kernel_size
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.in_proj = nn.Linear(width, width)
        self.conv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.out_proj = nn.Linear(width, width)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`(tiles, side, side, width)` to the same."""
        mixed = self.in_proj(self.layernorm_before(cells)).permute(0, 3, 1, 2)
        with torch.autocast("cpu", enabled=False):  # in bfloat16 its gradient takes a CPU three times as long
            mixed = self.conv(mixed.to(self.conv.weight.dtype))
        cells = cells + self.out_proj(mixed.permute(0, 2, 3, 1))
        return cells + self.fc2(self.activation_fn(self.fc1(self.layernorm_after(cells))))


class JointMAEPositionEmbeddings(nn.Module):
    """Positions of both modalities: an MLP of the centre in 3D, fixed sin-cos in 2D."""

    def __init__(self, config: JointMAEConfig, in_decoder: bool = False):
        super().__init__()
        width = config.decoder_hidden_size if in_decoder else config.hidden_size
        self.grid_size = config.image_size // config.patch_size
        self.fc1 = nn.Linear(3, width)
        self.fc2 = nn.Linear(width, width)
        keep_variance(self.fc1, self.fc2)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.image_positions = nn.Buffer(sincos_2d(self.grid_size, width), persistent=False)

    def forward(self, centers: torch.Tensor, patches: torch.Tensor | None) -> torch.Tensor:
        """Centres `(batch, n, 3)` and optional patch indices `(batch, m)` to `(batch, n + m, width)`."""
        positions = self.fc2(self.activation_fn(self.fc1(centers.to(self.fc1.weight.dtype))))
        if patches is None:
            return positions
        return torch.cat([positions, self.image_positions[patches].to(positions.dtype)], dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = nn.functional.softmax(weights, dim=-1)  # computes in float32 within
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class JointMAEAttention(nn.Module):
    def __init__(self, config: JointMAEConfig, in_decoder: bool = False):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size if in_decoder else config.hidden_size
        num_heads = config.decoder_num_attention_heads if in_decoder else config.num_attention_heads
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_keys: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens attend to the first `num_keys`, or to all of them."""
        input_shape = hidden_states.shape[:-1]
        device_type = hidden_states.device.type
        # Compiled code needs no help, and torch 2.11 cannot trace the question.
        if not torch.compiler.is_compiling() and torch.amp.is_autocast_available(device_type):
            if torch.is_autocast_enabled(device_type):  # one copy for all three projections
                hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        context = hidden_states if num_keys is None else hidden_states[:, :num_keys]
        query, key, value = (
            projection(states).view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for projection, states in (
                (self.q_proj, hidden_states),
                (self.k_proj, context),
                (self.v_proj, context),
            )
        )
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and query.dtype == torch.bfloat16 and query.device.type == "cpu":
            implementation = "eager"  # with as few tokens as here, 4 times as fast as torch's fused one in training
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class JointMAEMLP(nn.Module):
    def __init__(self, config: JointMAEConfig, in_decoder: bool = False):
        super().__init__()
        width = config.decoder_hidden_size if in_decoder else config.hidden_size
        inner = config.decoder_intermediate_size if in_decoder else config.intermediate_size
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class JointMAEDropPath(nn.Module):
    """Stochastic depth for each sample, on residual branches."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob
        self.drops = drop_prob > 0
        # A tensor, so that what is compiled for one block serves all; the same one draws and scales, in any precision.
        self.keep_prob = nn.Buffer(torch.tensor(1 - drop_prob), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not (self.drops and self.training):
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) < self.keep_prob
        return hidden_states * keep.to(hidden_states.dtype) / self.keep_prob


class JointMAELayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: JointMAEConfig, drop_prob: float = 0.0, in_decoder: bool = False):
        super().__init__()
        width = config.decoder_hidden_size if in_decoder else config.hidden_size
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = JointMAEAttention(config, in_decoder)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = JointMAEMLP(config, in_decoder)
        self.drop_path = JointMAEDropPath(drop_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_keys: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, num_keys, **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class JointMAEPreTrainedModel(PreTrainedModel):
    config: JointMAEConfig
    config_class = JointMAEConfig
    base_model_prefix = "joint_mae"
    main_input_name = "point_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # for `Trainer`: losses are means over the batch that they are given
    _no_split_modules = ["JointMAEPointEmbeddings", "JointMAEImageEmbeddings", "JointMAELayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": JointMAELayer, "attentions": JointMAEAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # A layer says so itself: of custom code, transformers skips modules that hold no parameter of their own.
        if hasattr(module, "init_std"):
            init.normal_(module.weight, std=module.init_std)
        if isinstance(module, JointMAEPositionEmbeddings):
            init.copy_(module.image_positions, sincos_2d(module.grid_size, module.image_positions.shape[-1]))
        elif isinstance(module, JointMAEDropPath):
            init.constant_(module.keep_prob, 1 - module.drop_prob)
        elif isinstance(module, (JointMAEModel, JointMAEDecoder)):
            init.normal_(module.modality_embeddings, std=self.config.initializer_range)
        if isinstance(module, JointMAEDecoder):
            init.normal_(module.mask_tokens, std=self.config.initializer_range)


class JointMAEModel(JointMAEPreTrainedModel):
    """
    The joint encoder. Given points alone it is the 3D feature extractor.

    Args:
        config (`JointMAEConfig`): The configuration.
        add_image_embeddings (`bool`, defaults to `True`):
            Whether to build the 2D embedding, if the configuration has an image branch at all. Models of clouds alone
            go without: parameters that the loss does not reach break distributed training.
    """

    # What a pre-training checkpoint or a head holds besides the encoder.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\.", r"^segmenter\."]

    def __init__(self, config: JointMAEConfig, add_image_embeddings: bool = True):
        super().__init__(config)
        self.point_embeddings = JointMAEPointEmbeddings(config)
        has_images = add_image_embeddings and config.use_image_branch
        self.image_embeddings = JointMAEImageEmbeddings(config) if has_images else None
        self.position_embeddings = JointMAEPositionEmbeddings(config)
        self.modality_embeddings = nn.Parameter(torch.empty(2, config.hidden_size))
        depth = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            [JointMAELayer(config, config.drop_path_rate * i / depth) for i in range(config.num_hidden_layers)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooled_layers = config.pooling_layers or [config.num_hidden_layers]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.point_embeddings.group_embedding.point_proj

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        point_values: torch.FloatTensor,
        pixel_values: torch.FloatTensor | None = None,
        projection: torch.FloatTensor | None = None,
        point_mask: torch.BoolTensor | None = None,
        visible_tokens: torch.LongTensor | None = None,
        visible_patches: torch.LongTensor | None = None,
        image_dropped: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JointMAEModelOutput:
        r"""
        Args:
            point_values (`torch.FloatTensor` of shape `(batch, num_points, 3)`):
                Clouds, centred and scaled to the unit sphere.
            pixel_values (`torch.FloatTensor` of shape `(batch, 1, image_size, image_size)`, *optional*):
                Depth images of the same clouds. Left out for features from 3D alone.
            projection (`torch.FloatTensor` of shape `(batch, 3, 4)`, *optional*):
                The map from points to (pixel row, pixel column, depth) that made the images; required with them.
            point_mask (`torch.BoolTensor` of shape `(batch, num_points)`, *optional*): False marks padding.
            visible_tokens (`torch.LongTensor` of shape `(batch, visible)`, *optional*): 3D tokens to encode, or all.
            visible_patches (`torch.LongTensor` of shape `(batch, visible)`, *optional*): Patches to encode, or all.
            image_dropped (`torch.BoolTensor` of shape `(batch,)`, *optional*):
                Where true, the 3D tokens of that sample do not attend to its 2D tokens.

        Raises:
            ValueError: if a shape or an index is wrong, or if there are fewer points than a group has neighbours.
        """
        self._check_inputs(point_values, pixel_values, projection)
        batch_size = point_values.shape[0]
        check_shape("point_mask", point_mask, point_values.shape[:2], torch.bool)
        check_shape("visible_tokens", visible_tokens, (batch_size, None), torch.int64)
        check_shape("visible_patches", visible_patches, (batch_size, None), torch.int64)
        check_shape("image_dropped", image_dropped, (batch_size,), torch.bool)
        if visible_tokens is not None:
            check_range("visible_tokens", visible_tokens, self.config.num_centers[-1])
        if visible_patches is not None:
            check_range("visible_patches", visible_patches, self.config.num_patches)
        tokens, centers, fine_features, fine_centers = self.point_embeddings(point_values, point_mask, visible_tokens)
        token_centers = centers if visible_tokens is None else gather_points(centers, visible_tokens)
        num_tokens = tokens.shape[1]
        hidden_states = tokens + self.modality_embeddings[0]
        patches, masks = None, [None] * len(self.config.alignment_radii)
        if pixel_values is not None:
            patches = visible_patches
            if patches is None:
                patches = torch.arange(self.config.num_patches, device=point_values.device)
                patches = patches.unsqueeze(0).expand(point_values.shape[0], -1)
            image_tokens = self.image_embeddings(pixel_values, visible_patches) + self.modality_embeddings[1]
            hidden_states = torch.cat([hidden_states, image_tokens], dim=1)
            masks = self._alignment_masks(token_centers, patches, projection, image_dropped)
        positions = self.position_embeddings(token_centers, patches)

        pooled = {}
        for index, layer in enumerate(self.layers):
            if index == 0 or self.config.position_every_layer:
                hidden_states = hidden_states + positions
            mask = masks[index * len(masks) // len(self.layers)]
            hidden_states = layer(hidden_states, mask, **kwargs)
            if index + 1 == len(self.layers):
                hidden_states = self.layernorm(hidden_states)
            if index + 1 in self.pooled_layers:
                pooled[index + 1] = pool_tokens(hidden_states[:, :num_tokens], self.config.pooling_deviation)
        return JointMAEModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=torch.cat([pooled[layer] for layer in self.pooled_layers], dim=-1),
            centers=centers,
            fine_features=None if visible_tokens is not None else fine_features,
            fine_centers=None if visible_tokens is not None else fine_centers,
        )

    def _check_inputs(self, points: torch.Tensor, pixel_values: torch.Tensor | None, projection: torch.Tensor | None):
        if points.ndim != 3 or points.shape[-1] != 3 or points.shape[0] == 0:
            raise ValueError(f"`point_values` has shape {tuple(points.shape)}, expected (batch, num_points, 3).")
        if points.shape[1] < self.config.num_neighbors[0]:
            raise ValueError(
                f"`point_values` holds {points.shape[1]} points for each cloud, expected at least the "
                f"{self.config.num_neighbors[0]} of a group (`num_neighbors[0]`)."
            )
        if pixel_values is None:
            return
        if self.image_embeddings is None:
            why = "it is part of a head" if self.config.use_image_branch else "`use_image_branch` is false"
            raise ValueError(f"`pixel_values` was given, but this encoder has no image branch: {why}.")
        expected = (points.shape[0], self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape) != expected:
            raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected {expected}.")
        if projection is None:
            raise ValueError("`pixel_values` was given without `projection`, the map from points to its pixels.")
        check_shape("projection", projection, (points.shape[0], 3, 4))

    def _alignment_masks(
        self,
        centers: torch.Tensor,
        patches: torch.Tensor,
        projection: torch.Tensor,
        image_dropped: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """
        Local-aligned attention: for each radius, which tokens may attend to which, `(batch, 1, tokens, tokens)`.

        Pairs of one modality always may. A 3D and a 2D token may when the patch under the projected centre lies within
        the radius of the 2D token (Chebyshev).
        """
        config = self.config
        grid = config.image_size // config.patch_size
        under = patch_index(project_points(centers, projection), config.image_size, config.patch_size)
        position = torch.stack([patches // grid, patches % grid], dim=-1)
        distance = (under.unsqueeze(2) - position.unsqueeze(1)).abs().amax(-1)  # (batch, 3D tokens, 2D tokens)
        num_points, num_patches = centers.shape[1], patches.shape[1]
        same_3d = distance.new_ones(centers.shape[0], num_points, num_points, dtype=torch.bool)
        same_2d = distance.new_ones(centers.shape[0], num_patches, num_patches, dtype=torch.bool)
        masks = {}
        for radius in config.alignment_radii if config.use_local_alignment else [None]:
            if radius is None and image_dropped is None:
                masks[radius] = None
                continue
            close = torch.ones_like(distance, dtype=torch.bool) if radius is None else distance <= radius
            seen = close if image_dropped is None else close & ~image_dropped.view(-1, 1, 1)
            rows_3d = torch.cat([same_3d, seen], dim=2)
            rows_2d = torch.cat([close.transpose(1, 2), same_2d], dim=2)
            masks[radius] = torch.cat([rows_3d, rows_2d], dim=1).unsqueeze(1)
        return [masks[radius if config.use_local_alignment else None] for radius in config.alignment_radii]


def pool_tokens(tokens: torch.Tensor, deviation: bool = False) -> torch.Tensor:
    """
    Mean and maximum over tokens, `(batch, n, width)` to `(batch, 2 * width)` [relative]; with `deviation` also their
    standard deviation, to `(batch, 3 * width)` [ours].
    """
    pooled = [tokens.mean(1), tokens.amax(1)]
    if deviation:
        pooled.append((tokens.var(1, unbiased=False) + _EPS).sqrt())
    return torch.cat(pooled, dim=-1)


def agreement_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    How well each shape's second view is told from those of the other shapes, and back: InfoNCE both ways [ours].

    Features are compared as a linear classifier will see them, each standardised over the batch, and not behind a
    projection head, behind which they may collapse onto few directions.

    Args:
        first, second: pooled tokens `(batch, width)` of two views of the same shapes; the batch is what is compared.
        temperature: of the cosine similarities.

    Returns:
        float32 `()`, log(batch) by chance.
    """
    first, second = (
        nn.functional.normalize((view - view.mean(0)) / (view.var(0, unbiased=False) + _EPS).sqrt(), dim=1)
        for view in (first.float(), second.float())
    )
    with torch.autocast(first.device.type, enabled=False):
        scores = first @ second.T / temperature  # (batch, batch)
    same = torch.arange(len(scores), device=scores.device)
    return (nn.functional.cross_entropy(scores, same) + nn.functional.cross_entropy(scores.T, same)) / 2


class JointMAEDecoder(nn.Module):
    """
    Joint decoder: mask tokens enter before the modal-shared part, then one decoder for each modality.

    All tokens attend to visible ones only, as in CrossMAE. If mask tokens saw each other, the centres of all groups
    would tell the decoder the shape, and it would learn to do without the encoder.
    """

    def __init__(self, config: JointMAEConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_tokens = nn.Parameter(torch.empty(2, width))
        self.modality_embeddings = nn.Parameter(torch.empty(2, width))
        self.position_embeddings = JointMAEPositionEmbeddings(config, in_decoder=True)
        self.shared_layers = nn.ModuleList(
            [JointMAELayer(config, in_decoder=True) for _ in range(config.decoder_num_shared_layers)]
        )
        self.point_layers = nn.ModuleList(
            [JointMAELayer(config, in_decoder=True) for _ in range(config.decoder_num_specific_layers)]
        )
        self.point_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.point_head = nn.Linear(width, 3 * config.num_target_points)
        if config.use_image_branch:
            self.image_layers = nn.ModuleList(
                [JointMAELayer(config, in_decoder=True) for _ in range(config.decoder_num_specific_layers)]
            )
            self.image_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.image_head = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        centers: torch.Tensor,
        num_visible: int,
        patches: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: encoder output `(batch, visible 3D + visible 2D, hidden_size)`.
            centers: `(batch, 3D tokens, 3)`, visible ones first.
            num_visible: number of visible 3D tokens.
            patches: optional patch indices `(batch, patches)`, visible ones first.

        Returns:
            Predictions for the masked tokens: `(batch, masked, 3 * num_target_points)` and
            `(batch, masked patches, patch_size ** 2 * num_channels)`.
        """
        num_tokens, num_keys = centers.shape[1], hidden_states.shape[1]
        encoded = self.embed(hidden_states).split([num_visible, num_keys - num_visible], dim=1)
        positions = self.position_embeddings(centers, patches).tensor_split([num_tokens], dim=1)
        visible, masked = [], []
        for modality in range(1 if patches is None else 2):
            seen, unseen = positions[modality].tensor_split([encoded[modality].shape[1]], dim=1)
            visible.append(encoded[modality] + seen + self.modality_embeddings[modality])
            masked.append(self.mask_tokens[modality] + unseen + self.modality_embeddings[modality])
        states = torch.cat(visible + masked, dim=1)
        for layer in self.shared_layers:
            states = layer(states, num_keys=num_keys, **kwargs)
        parts = states.split([part.shape[1] for part in visible + masked], dim=1)

        points = torch.cat(parts[:: len(visible)], dim=1)
        for layer in self.point_layers:
            points = layer(points, num_keys=num_visible, **kwargs)
        point_output = self.point_head(self.point_norm(points[:, num_visible:]))
        if patches is None:
            return point_output, None
        image = torch.cat(parts[1::2], dim=1)
        for layer in self.image_layers:
            image = layer(image, num_keys=num_keys - num_visible, **kwargs)
        return point_output, self.image_head(self.image_norm(image[:, num_keys - num_visible :]))


class JointMAEForPreTraining(JointMAEPreTrainedModel):
    """Joint-MAE with its decoders and the three losses; on demand, agreement with another view as a fourth."""

    def __init__(self, config: JointMAEConfig):
        super().__init__(config)
        self.joint_mae = JointMAEModel(config)
        self.decoder = JointMAEDecoder(config)
        # Radius of a patch of surface that holds the target points; the head predicts in this unit.
        self.target_radius = (config.num_target_points / config.num_points) ** 0.5
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        point_values: torch.FloatTensor,
        pixel_values: torch.FloatTensor | None = None,
        projection: torch.FloatTensor | None = None,
        point_mask: torch.BoolTensor | None = None,
        view: torch.LongTensor | None = None,
        point_noise: torch.FloatTensor | None = None,
        patch_noise: torch.FloatTensor | None = None,
        image_dropped: torch.BoolTensor | None = None,
        second_point_values: torch.FloatTensor | None = None,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JointMAEForPreTrainingOutput:
        r"""
        Args:
            point_values (`torch.FloatTensor` of shape `(batch, num_points, 3)`):
                Clouds, centred and scaled to the unit sphere.
            pixel_values (`torch.FloatTensor` of shape `(batch, 1, image_size, image_size)`, *optional*):
                Their depth images; projected from the points when left out.
            projection (`torch.FloatTensor` of shape `(batch, 3, 4)`, *optional*):
                The map from points to (pixel row, pixel column, depth) that made the images; required with them.
            point_mask (`torch.BoolTensor` of shape `(batch, num_points)`, *optional*): False marks padding.
            view (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Which of the three views to project when no image is given; random in training, else the first.
            point_noise (`torch.FloatTensor` of shape `(batch, num_centers[-1])`, *optional*):
                Decides the 3D mask: the lowest stay visible. Random when left out.
            patch_noise (`torch.FloatTensor` of shape `(batch, num_patches)`, *optional*): The same for the 2D mask.
            image_dropped (`torch.BoolTensor` of shape `(batch,)`, *optional*):
                Where true, 3D tokens do not see 2D tokens. Drawn with `modality_dropout` in training when left out.
            second_point_values (`torch.FloatTensor` of shape `(batch, num_points, 3)`, *optional*):
                Another view of the same shapes - another augmentation, and other points where there are more of them -
                without padding. Required in training with `agreement_loss_weight`; outside of it that loss is left out
                along with them.
            return_loss (`bool`, defaults to `True`): Kept for `Trainer`; the losses are always returned.

        Raises:
            ValueError: if a shape is wrong, or an input that the configuration asks for is missing.
        """
        config = self.config
        self.joint_mae._check_inputs(point_values, pixel_values, projection)
        self._check_second(point_values, second_point_values)
        if point_values.shape[1] < config.num_target_points:
            raise ValueError(
                f"`point_values` holds {point_values.shape[1]} points for each cloud, expected at least the "
                f"{config.num_target_points} that a group is reconstructed as (`num_target_points`)."
            )
        batch_size, device = point_values.shape[0], point_values.device
        check_shape("point_mask", point_mask, point_values.shape[:2], torch.bool)
        check_shape("view", view, (batch_size,), torch.int64)
        if view is not None:
            check_range("view", view, 3)
        check_shape("point_noise", point_noise, (batch_size, config.num_centers[-1]))
        check_shape("patch_noise", patch_noise, (batch_size, config.num_patches))
        if projection is not None and pixel_values is None:
            raise ValueError("`projection` was given without `pixel_values`, the images that it made.")
        if config.use_image_branch and pixel_values is None:
            if view is None:
                view = (
                    torch.randint(3, (batch_size,), device=device)
                    if self.training
                    else torch.zeros(batch_size, dtype=torch.int64, device=device)
                )
            projection = view_projection(point_values, view, config.image_size, point_mask)
            pixel_values = project_depth(point_values, projection, config.image_size, config.splat_size, point_mask)
        if point_noise is None:
            point_noise = torch.rand(batch_size, config.num_centers[-1], device=device)
        visible_tokens, masked_tokens = random_mask(point_noise, config.num_visible_tokens)
        visible_patches = masked_patches = patches = None
        if config.use_image_branch:
            if patch_noise is None:
                patch_noise = torch.rand(batch_size, config.num_patches, device=device)
            visible_patches, masked_patches = random_mask(patch_noise, config.num_visible_patches)
            patches = torch.cat([visible_patches, masked_patches], dim=1)
            if image_dropped is None and self.training and config.modality_dropout > 0:
                image_dropped = torch.rand(batch_size, device=device) < config.modality_dropout

        outputs: JointMAEModelOutput = self.joint_mae(
            point_values,
            pixel_values=pixel_values,
            projection=projection,
            point_mask=point_mask,
            visible_tokens=visible_tokens,
            visible_patches=visible_patches,
            image_dropped=image_dropped,
            return_dict=True,
            **kwargs,
        )
        ordered = gather_points(outputs.centers, torch.cat([visible_tokens, masked_tokens], dim=1))
        point_output, patch_output = self.decoder(
            outputs.last_hidden_state, ordered, config.num_visible_tokens, patches
        )

        masked_centers = ordered[:, config.num_visible_tokens :].float()
        offsets = point_output.float().unflatten(-1, (config.num_target_points, 3)) * self.target_radius
        loss_3d = self._point_loss(offsets, masked_centers, point_values, point_mask)
        reconstructed = offsets + masked_centers.unsqueeze(2)
        loss = config.point_loss_weight * loss_3d
        loss_2d = loss_cross = None
        if config.use_image_branch:
            loss_2d = self._patch_loss(patch_output, pixel_values, masked_patches)
            loss = loss + config.pixel_loss_weight * loss_2d
            if config.use_cross_loss:
                loss_cross = depth_consistency(reconstructed.flatten(1, 2), projection, pixel_values).mean()
                loss = loss + config.cross_loss_weight * loss_cross
        loss_agreement = view_features = None
        if second_point_values is not None:
            first = outputs
            if not config.agreement_of_visible:
                first = self.joint_mae(point_values, point_mask=point_mask, return_dict=True)
            second: JointMAEModelOutput = self.joint_mae(second_point_values, return_dict=True)
            seen = config.num_visible_tokens if config.agreement_of_visible else config.num_centers[-1]
            # Tokens of the last block alone, whatever the features of a cloud are.
            views = (first.last_hidden_state[:, :seen], second.last_hidden_state)
            view_features = torch.stack([pool_tokens(tokens) for tokens in views])
            loss_agreement = agreement_loss(*view_features, config.agreement_temperature)
            loss = loss + config.agreement_loss_weight * loss_agreement
        return JointMAEForPreTrainingOutput(
            loss=loss,
            loss_3d=loss_3d,
            loss_2d=loss_2d,
            loss_cross=loss_cross,
            loss_agreement=loss_agreement,
            view_features=view_features,
            reconstructed_points=reconstructed,
            reconstructed_patches=patch_output,
            mask_3d=self._mask(masked_tokens, config.num_centers[-1]),
            mask_2d=None if masked_patches is None else self._mask(masked_patches, config.num_patches),
            masked_tokens=masked_tokens,
            masked_patches=masked_patches,
            centers=outputs.centers,
            pixel_values=pixel_values,
            projection=projection,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_second(self, points: torch.Tensor, second: torch.Tensor | None):
        compares = self.config.agreement_loss_weight > 0
        if second is not None and not compares:
            raise ValueError(
                "`second_point_values` was given, but the model compares no views (`agreement_loss_weight` is 0)."
            )
        if second is None and compares and self.training:
            raise ValueError(
                "`second_point_values` is missing; training with `agreement_loss_weight` "
                f"{self.config.agreement_loss_weight} expects another view of each cloud."
            )
        if second is not None and second.shape != points.shape:
            raise ValueError(
                f"`second_point_values` has shape {tuple(second.shape)}, expected that of `point_values`, "
                f"{tuple(points.shape)}."
            )

    def _point_loss(
        self, offsets: torch.Tensor, centers: torch.Tensor, points: torch.Tensor, point_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Chamfer distance between predicted offsets and the points nearest to each masked centre."""
        _, target = group_nearest(points, centers, self.config.num_target_points, point_mask)
        distance = chamfer_distance(offsets, target)  # (batch, masked)
        if self.config.norm_point_loss:
            distance = distance / target.square().sum(-1).mean(-1).clamp_min(1e-6)
        return distance.mean()

    def _patch_loss(
        self, patch_output: torch.Tensor, pixel_values: torch.Tensor, masked_patches: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error on masked patches."""
        target = gather_points(patchify(pixel_values.float(), self.config.patch_size), masked_patches)
        if self.config.norm_pixel_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return nn.functional.mse_loss(patch_output.float(), target)

    @staticmethod
    def _mask(masked: torch.Tensor, total: int) -> torch.Tensor:
        return torch.zeros(masked.shape[0], total, device=masked.device).scatter(1, masked, 1.0)


class JointMAEBatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a batch of one in training, too, by the statistics so far."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and features.shape[0] == 1:
            statistics = (self.running_mean, self.running_var, self.weight, self.bias)
            return nn.functional.batch_norm(features, *statistics, eps=self.eps)
        return super().forward(features)


class JointMAEClassificationHead(nn.Module):
    """
    256-256-classes with batch normalisation, ReLU and dropout [relative], on pooled features that are standardised, as
    those of MAE are for a linear classifier [relative].
    """

    def __init__(self, config: JointMAEConfig):
        super().__init__()
        num_hidden, width = config.classifier_num_layers - 1, config.classifier_hidden_size
        sizes = [config.pooled_size] + [width] * num_hidden
        self.input_norm = JointMAEBatchNorm(config.pooled_size, affine=False)
        self.hidden_layers = nn.ModuleList([nn.Linear(size, width) for size in sizes[:-1]])
        self.norms = nn.ModuleList([JointMAEBatchNorm(width) for _ in range(num_hidden)])
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(sizes[-1], config.num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.input_norm(features)
        for layer, norm in zip(self.hidden_layers, self.norms, strict=True):
            features = self.dropout(nn.functional.relu(norm(layer(features))))
        return self.out_proj(features)


class JointMAEForPointCloudClassification(JointMAEPreTrainedModel):
    """Joint-MAE's 3D encoder with a classification head."""

    _keys_to_ignore_on_load_unexpected = [r"image_embeddings\.", r"^decoder\."]

    def __init__(self, config: JointMAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_type = "ForSequenceClassification"
        self.joint_mae = JointMAEModel(config, add_image_embeddings=False)
        self.classifier = JointMAEClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        point_values: torch.FloatTensor,
        point_mask: torch.BoolTensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_outputs: JointMAEModelOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JointMAEHeadOutput:
        r"""
        Args:
            point_values (`torch.FloatTensor` of shape `(batch, num_points, 3)`):
                Clouds, centred and scaled to the unit sphere.
            point_mask (`torch.BoolTensor` of shape `(batch, num_points)`, *optional*): False marks padding.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*):
                Classes, or targets of regression or of multi-label classification (`config.problem_type`).
            encoder_outputs (`JointMAEModelOutput`, *optional*): What the encoder made of these clouds, if it is known.
        """
        outputs = encoder_outputs
        if outputs is None:
            outputs = self.joint_mae(point_values, point_mask=point_mask, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            check_labels(labels, self.num_labels)
            loss = self.loss_function(labels, logits, self.config)
        return JointMAEHeadOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class JointMAESegmentationHead(nn.Module):
    """
    A shared MLP over each point: the features of its nearest groups, coarse and fine, its place, the shape of its
    surroundings, and the class of the object, if the head is told. All of these begin with about the same weight.

    It is not given the pooled features: they tell one training shape from another, and the tokens know the whole.
    """

    def __init__(self, config: JointMAEConfig):
        super().__init__()
        width, fine_width = config.classifier_hidden_size, config.point_embed_sizes[0]
        self.token_proj = nn.Linear(config.hidden_size, width)
        self.fine_norm = nn.LayerNorm(fine_width, eps=config.layer_norm_eps)
        self.fine_proj = nn.Linear(fine_width, width, bias=False)
        self.neighborhood_sizes = config.segmentation_neighbors
        self.point_proj = nn.Linear(3 + 10 * len(self.neighborhood_sizes), width, bias=False)
        num_classes = config.num_object_classes
        self.class_embedding = nn.Embedding(num_classes, width) if num_classes else None
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(width, config.num_labels)
        keep_variance(self.token_proj, self.fine_proj, self.point_proj, self.fc)
        if num_classes:
            self.class_embedding.init_std = 1.0

    def forward(
        self,
        points: torch.Tensor,
        tokens: torch.Tensor,
        centers: torch.Tensor,
        fine_features: torch.Tensor,
        fine_centers: torch.Tensor,
        object_class: torch.Tensor | None = None,
        point_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Each part of the first linear layer is applied where it is cheapest: wide features before they are spread to
        # the points, narrow ones after.
        coarse = self.token_proj(tokens)
        if self.class_embedding is not None:
            coarse = coarse + self.class_embedding(object_class).unsqueeze(1)
        hidden = interpolate_features(points, centers, coarse)
        fine = interpolate_features(points, fine_centers, self.fine_norm(fine_features))
        place = 2 * points  # of variance 1, about
        if self.neighborhood_sizes:
            moments = neighborhood_moments(points, self.neighborhood_sizes, point_mask)
            place = torch.cat([place, 5 * moments], dim=-1)
        hidden = hidden + self.fine_proj(fine) + self.point_proj(place.to(hidden.dtype))
        hidden = self.dropout(nn.functional.relu(self.norm1(hidden)))
        hidden = nn.functional.relu(self.norm2(self.fc(hidden)))
        return self.out_proj(hidden)


class JointMAEForPartSegmentation(JointMAEPreTrainedModel):
    """Joint-MAE's 3D encoder with a head that labels every point."""

    _keys_to_ignore_on_load_unexpected = [r"image_embeddings\.", r"^decoder\."]

    def __init__(self, config: JointMAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.joint_mae = JointMAEModel(config, add_image_embeddings=False)
        self.segmenter = JointMAESegmentationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        point_values: torch.FloatTensor,
        point_mask: torch.BoolTensor | None = None,
        object_class: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        encoder_outputs: JointMAEModelOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JointMAEHeadOutput:
        r"""
        Args:
            point_values (`torch.FloatTensor` of shape `(batch, num_points, 3)`):
                Clouds, centred and scaled to the unit sphere.
            point_mask (`torch.BoolTensor` of shape `(batch, num_points)`, *optional*): False marks padding.
            object_class (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Class of the object, if `config.num_object_classes` is not 0; `config.object_classes` may name them.
            labels (`torch.LongTensor` of shape `(batch, num_points)`, *optional*): Parts; -100 is ignored.
            encoder_outputs (`JointMAEModelOutput`, *optional*): What the encoder made of these clouds, if it is known.

        Raises:
            TypeError: if `object_class` is no tensor of integers.
            ValueError: if `object_class` is missing or not asked for, its shape is wrong, or a class or part is out of
                range.
        """
        outputs = encoder_outputs
        if outputs is None:
            outputs = self.joint_mae(point_values, point_mask=point_mask, return_dict=True, **kwargs)
        if self.config.num_object_classes > 0:
            self._check_object_class(object_class, point_values.shape[0])
        elif object_class is not None:
            raise ValueError("`object_class` was given to a head that is not told it (`num_object_classes` is 0).")
        logits = self.segmenter(
            point_values,
            outputs.last_hidden_state,
            outputs.centers,
            outputs.fine_features,
            outputs.fine_centers,
            object_class,
            point_mask,
        )
        loss = None
        if labels is not None:
            check_labels(labels, self.num_labels)
            if point_mask is not None:
                labels = labels.masked_fill(~point_mask, -100)
            total = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            loss = total / (labels != -100).sum().clamp_min(1)  # 0, not NaN, for a batch without a labelled point
        return JointMAEHeadOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _check_object_class(self, object_class: torch.LongTensor | None, batch_size: int):
        num_classes = self.config.num_object_classes
        if object_class is None:
            raise ValueError(
                "`object_class` is missing; the configuration expects one of "
                f"{num_classes} classes for each cloud (`num_object_classes`)."
            )
        if getattr(object_class, "dtype", None) != torch.int64:
            came = getattr(object_class, "dtype", type(object_class).__name__)
            raise TypeError(f"`object_class` is of type {came}, expected a tensor of torch.int64, shape (batch,).")
        if object_class.shape != (batch_size,):
            raise ValueError(
                f"`object_class` has shape {tuple(object_class.shape)}, expected (batch,), here ({batch_size},)."
            )
        check_range("object_class", object_class, num_classes)


def check_shape(
    name: str, values: torch.Tensor | None, expected: tuple[int | None, ...], dtype: torch.dtype | None = None
):
    """
    Raises:
        ValueError: if a tensor that is given has another shape than expected (`None`: any size) or another type.
    """
    if values is None:
        return
    fits = values.ndim == len(expected)
    fits = fits and all(size in (None, found) for size, found in zip(expected, values.shape, strict=True))
    if not fits or (dtype is not None and values.dtype != dtype):
        shape = ", ".join("any" if size is None else str(size) for size in expected)
        of_type = "" if dtype is None else f" of {dtype}"
        raise ValueError(f"`{name}` has shape {tuple(values.shape)} of {values.dtype}, expected ({shape}){of_type}.")


def check_labels(labels: torch.Tensor, num_labels: int):
    """
    Raises:
        ValueError: if integer labels on the CPU are out of range; on a GPU looking would stall it.
    """
    if num_labels > 1 and not labels.is_floating_point():
        check_range("labels", labels, num_labels, ignored=-100)


def check_range(name: str, values: torch.Tensor, stop: int, ignored: int | None = None):
    """
    Raises:
        ValueError: if integers on the CPU are not in `range(stop)`; on a GPU looking would stall it.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (values < 0) | (values >= stop)
    if ignored is not None:
        wrong &= values != ignored
    if wrong.any():
        raise ValueError(f"`{name}` holds {values[wrong][0].item()}, expected 0 to {stop - 1}.")


__all__ = [
    "JointMAEForPartSegmentation",
    "JointMAEForPointCloudClassification",
    "JointMAEForPreTraining",
    "JointMAEModel",
    "JointMAEPreTrainedModel",
]
