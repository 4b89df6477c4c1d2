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
"""Joint-MAE model configuration."""

from dataclasses import fields
from math import prod

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# Complete whichever class is saved: a pre-training checkpoint also loads as a bare encoder or under a head.
_AUTO_MAP = {
    "AutoConfig": "configuration_joint_mae.JointMAEConfig",
    "AutoModel": "modeling_joint_mae.JointMAEModel",
    "AutoModelForPreTraining": "modeling_joint_mae.JointMAEForPreTraining",
    "AutoModelForImageClassification": "modeling_joint_mae.JointMAEForPointCloudClassification",
    "AutoModelForSemanticSegmentation": "modeling_joint_mae.JointMAEForPartSegmentation",
}
_LISTS = (
    "num_centers",
    "num_neighbors",
    "point_embed_sizes",
    "patch_strides",
    "image_embed_sizes",
    "alignment_radii",
    "pooling_layers",
    "segmentation_neighbors",
    "object_classes",
)


@strict
class JointMAEConfig(PreTrainedConfig):
    r"""
    Configuration of a Joint-MAE model. The defaults are the `base` size; [`JointMAEConfig.from_preset`] knows `tiny`,
    `small` and `base`. Tags: [paper] stated by the paper, [relative] from public work of the same line (Point-MAE,
    Point-M2AE, I2P-MAE, ConvMAE), [ours] our choice.

    Args:
        hidden_size (`int`, defaults to 384): Width of the joint encoder [relative].
        num_hidden_layers (`int`, defaults to 12): Blocks of the joint encoder [relative].
        num_attention_heads (`int`, defaults to 6): Attention heads of each block [relative].
        intermediate_size (`int`, defaults to 1536): Width of the MLP in each block [relative].
        hidden_act (`str`, defaults to `"gelu"`): Activation of every MLP.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on attention weights.
        drop_path_rate (`float`, defaults to 0.1): Stochastic depth, growing linearly up to this value [relative].
        initializer_range (`float`, defaults to 0.02): Standard deviation of the transformer's initial weights.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of layer normalisation.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have a bias.
        num_points (`int`, defaults to 2048):
            Points of a cloud the model is made for. More work nearly as well, the scale of local coordinates follows
            them; with fewer, small parts are lost.
        num_centers (`list[int]`, defaults to `[512, 256, 64]`):
            Groups at each scale of the 3D embedding, finest first [relative]. The last is the number of 3D tokens.
        num_neighbors (`list[int]`, defaults to `[16, 8, 8]`):
            Neighbours in each group, first of points, then of the finer centres [relative].
        point_embed_sizes (`list[int]`, defaults to `[96, 192, 384]`):
            Width at each scale of the 3D embedding [relative]; the last equals `hidden_size`.
        image_size (`int`, defaults to 224): Side of the depth image in pixels [paper].
        num_channels (`int`, defaults to 1): Channels of the image; depth has one.
        splat_size (`int`, defaults to 5): Odd side of the square that a point covers in the image, in pixels [ours].
        patch_strides (`list[int]`, defaults to `[4, 2, 2]`):
            Strides of the 2D embedding [relative]; their product is the patch size.
        image_embed_sizes (`list[int]`, defaults to `[96, 192, 384]`):
            Width at each scale of the 2D embedding [relative]; the last equals `hidden_size`.
        image_kernel_size (`int`, defaults to 5): Odd side of the depth-wise convolutions [relative].
        image_embed_depth (`int`, defaults to 1): Convolution blocks at each scale of the 2D embedding but the last.
        mask_ratio (`float`, defaults to 0.75): Share of 3D tokens masked in pre-training [paper].
        image_mask_ratio (`float`, defaults to 0.75): Share of 2D patches masked in pre-training [paper].
        alignment_radii (`list[int | None]`, defaults to `[2, 4, None]`):
            Local-aligned attention: how many patches apart (Chebyshev) a 3D token and a 2D token may attend to each
            other, over equal parts of the encoder; `None` is unlimited [ours].
        position_every_layer (`bool`, defaults to `True`):
            Whether positions are added at the input of every block [relative] or of the first one only.
        use_image_branch (`bool`, defaults to `True`): Whether pre-training has a 2D branch at all.
        use_local_alignment (`bool`, defaults to `True`): Whether attention across modalities is limited as above.
        use_cross_loss (`bool`, defaults to `True`): Whether the cross-reconstruction loss is added.
        modality_dropout (`float`, defaults to 0.0):
            Probability that the 3D tokens of a sample do not see its 2D tokens in pre-training [ours].
        decoder_hidden_size (`int`, defaults to 192): Width of the decoders [relative].
        decoder_num_attention_heads (`int`, defaults to 6): Attention heads of the decoders.
        decoder_intermediate_size (`int`, defaults to 768): Width of the MLP in the decoders.
        decoder_num_shared_layers (`int`, defaults to 2): Blocks of the modal-shared decoder [paper: that it exists].
        decoder_num_specific_layers (`int`, defaults to 1): Blocks of each modality's own decoder [paper: likewise].
        num_target_points (`int`, defaults to 32): Points reconstructed for each masked 3D token [relative].
        norm_point_loss (`bool`, defaults to `False`):
            Whether the Chamfer distance of a group is divided by the group's mean squared radius.
        norm_pixel_loss (`bool`, defaults to `False`): Whether each target patch is normalised by its own deviation.
        point_loss_weight (`float`, defaults to 10.0):
            Weight of the 3D loss. The defaults balance the gradients on the encoder at the start [ours].
        pixel_loss_weight (`float`, defaults to 1.0): Weight of the 2D loss.
        cross_loss_weight (`float`, defaults to 0.2): Weight of the cross-reconstruction loss.
        agreement_loss_weight (`float`, defaults to 0.0):
            Weight of the agreement loss: the pooled 3D tokens of a shape tell another view of it from those of the
            other shapes that a process has in its batch, so let it have 64 or more [ours]. 0 is the method
            as published, without other views.
        agreement_of_visible (`bool`, defaults to `True`):
            Whether the visible tokens of the first view stand for it, or all of them, at the cost of another pass.
        agreement_temperature (`float`, defaults to 0.1): Temperature of that comparison [relative, CrossPoint].
        pooling_layers (`list[int]`, *optional*):
            Blocks of the encoder, 1 for the first, after which the 3D tokens of a cloud are pooled into its features,
            side by side; the last one's are normalised. Left out, those of the last one alone [ours].
        pooling_deviation (`bool`, defaults to `False`):
            Whether tokens are pooled into their standard deviation as well as their mean and maximum [ours].
        classifier_hidden_size (`int`, defaults to 256): Width of the classification and segmentation heads [relative].
        classifier_dropout (`float`, defaults to 0.5): Dropout in these heads [relative].
        classifier_num_layers (`int`, defaults to 3): Layers of the classification head [relative]; 1 is a linear one.
        segmentation_neighbors (`list[int]`, defaults to `[16, 64]`):
            Sizes of the surroundings of a point whose covariance and mean part segmentation is given, growing [ours].
            An empty list is none.
        num_object_classes (`int`, defaults to 0):
            Object classes that part segmentation is told; 0 when it is told none.
        object_classes (`list[str]`, *optional*): Their names, in the order of the integers.

    Example:

    ```python
    >>> from jointmae_hf import JointMAEConfig, JointMAEModel

    >>> config = JointMAEConfig.from_preset("tiny")
    >>> model = JointMAEModel(config)
    ```"""

    model_type = "joint_mae"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    num_points: int = 2048
    num_centers: list[int] | tuple[int, ...] = (512, 256, 64)
    num_neighbors: list[int] | tuple[int, ...] = (16, 8, 8)
    point_embed_sizes: list[int] | tuple[int, ...] = (96, 192, 384)
    image_size: int = 224
    num_channels: int = 1
    splat_size: int = 5
    patch_strides: list[int] | tuple[int, ...] = (4, 2, 2)
    image_embed_sizes: list[int] | tuple[int, ...] = (96, 192, 384)
    image_kernel_size: int = 5
    image_embed_depth: int = 1
    mask_ratio: float | int = 0.75
    image_mask_ratio: float | int = 0.75
    alignment_radii: list[int | None] | tuple[int | None, ...] = (2, 4, None)
    position_every_layer: bool = True
    use_image_branch: bool = True
    use_local_alignment: bool = True
    use_cross_loss: bool = True
    modality_dropout: float | int = 0.0
    decoder_hidden_size: int = 192
    decoder_num_attention_heads: int = 6
    decoder_intermediate_size: int = 768
    decoder_num_shared_layers: int = 2
    decoder_num_specific_layers: int = 1
    num_target_points: int = 32
    norm_point_loss: bool = False
    norm_pixel_loss: bool = False
    point_loss_weight: float | int = 10.0
    pixel_loss_weight: float | int = 1.0
    cross_loss_weight: float | int = 0.2
    agreement_loss_weight: float | int = 0.0
    agreement_of_visible: bool = True
    agreement_temperature: float | int = 0.1
    pooling_layers: list[int] | tuple[int, ...] | None = None
    pooling_deviation: bool = False
    classifier_hidden_size: int = 256
    classifier_dropout: float | int = 0.5
    classifier_num_layers: int = 3
    segmentation_neighbors: list[int] | tuple[int, ...] = (16, 64)
    num_object_classes: int = 0
    object_classes: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs):
        for name in _LISTS:  # JSON knows no tuples: the same configuration before and after saving
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What is overridden at loading is validated like the rest; transformers would set it afterwards.
        overrides = {name: kwargs.pop(name) for name in own_fields() & kwargs.keys()}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        self.auto_map = dict(_AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "JointMAEConfig":
        """
        A configuration of one of the named sizes, with single fields replaced by `overrides`.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` is {name!r}, expected one of {sorted(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return prod(self.patch_strides)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible_tokens(self) -> int:
        """3D tokens that stay visible in pre-training."""
        return self.num_centers[-1] - round(self.num_centers[-1] * self.mask_ratio)

    @property
    def num_visible_patches(self) -> int:
        """2D patches that stay visible in pre-training."""
        return self.num_patches - round(self.num_patches * self.image_mask_ratio)

    @property
    def pooled_size(self) -> int:
        """Features of a cloud: width of `pooler_output`."""
        return self.hidden_size * len(self.pooling_layers or [-1]) * (3 if self.pooling_deviation else 2)

    def validate_architecture(self):
        """Part of `@strict`: each error names the field, its value and what was expected."""
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            for name in (width, heads):
                self._require(name, getattr(self, name) > 0, "a positive integer")
            divides = getattr(self, width) % getattr(self, heads) == 0
            self._require(width, divides, f"a multiple of `{heads}` ({getattr(self, heads)})")
            self._require(width, getattr(self, width) % 4 == 0, "a multiple of 4, for 2D sin-cos positions")
        for name in (
            "num_hidden_layers",
            "intermediate_size",
            "num_points",
            "image_size",
            "decoder_intermediate_size",
            "num_target_points",
            "classifier_hidden_size",
            "classifier_num_layers",
        ):
            self._require(name, getattr(self, name) > 0, "a positive integer")
        self._require("num_channels", self.num_channels == 1, "1: depth has one")
        self._require("agreement_temperature", self.agreement_temperature > 0, "more than 0")
        for name in (
            "image_embed_depth",
            "decoder_num_shared_layers",
            "decoder_num_specific_layers",
            "num_object_classes",
            "point_loss_weight",
            "pixel_loss_weight",
            "cross_loss_weight",
            "agreement_loss_weight",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("attention_probs_dropout_prob", "drop_path_rate", "classifier_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("modality_dropout", 0 <= self.modality_dropout <= 1, "in [0, 1]")
        for name in ("splat_size", "image_kernel_size"):
            value = getattr(self, name)
            self._require(name, value > 0 and value % 2 == 1, "a positive odd integer")
        layers = self.pooling_layers
        valid = layers is None or (len(layers) > 0 and all(1 <= layer <= self.num_hidden_layers for layer in layers))
        self._require(
            "pooling_layers", valid, f"None or a list of blocks, 1 to `num_hidden_layers` ({self.num_hidden_layers})"
        )
        sizes = self.segmentation_neighbors
        grow = all(a < b for a, b in zip((1, *sizes), sizes, strict=False))
        self._require("segmentation_neighbors", grow, "a growing list of numbers of 2 or more")
        named = self.object_classes is None or len(self.object_classes) == self.num_object_classes
        names = f"None or one name for each of `num_object_classes` ({self.num_object_classes})"
        self._require("object_classes", named, names)
        self._validate_scales()

    def _validate_scales(self):
        """The hierarchies of both modalities, and the masks over their coarsest scale."""
        for name in ("num_neighbors", "point_embed_sizes"):
            same = len(getattr(self, name)) == len(self.num_centers) > 0
            self._require(name, same, f"one entry for each of `num_centers` ({len(self.num_centers)})")
        same = len(self.image_embed_sizes) == len(self.patch_strides) > 0
        self._require("image_embed_sizes", same, f"one entry for each of `patch_strides` ({len(self.patch_strides)})")
        for name in ("num_centers", "num_neighbors", "point_embed_sizes", "image_embed_sizes", "patch_strides"):
            self._require(name, all(value > 0 for value in getattr(self, name)), "positive integers")
        for name in ("point_embed_sizes", "image_embed_sizes"):
            last = getattr(self, name)[-1]
            self._require(name, last == self.hidden_size, f"to end in `hidden_size` ({self.hidden_size})")
        finer_first = all(a >= b for a, b in zip(self.num_centers, self.num_centers[1:], strict=False))
        self._require("num_centers", finer_first, "finest scale first, so never increasing")
        reach = all(k <= n for k, n in zip(self.num_neighbors[1:], self.num_centers, strict=False))
        self._require("num_neighbors", reach, "at most as many neighbours as there are finer centres")
        fits = max(self.num_neighbors[0], self.num_target_points) <= self.num_points
        self._require("num_points", fits, "at least `num_neighbors[0]` and `num_target_points`")
        fits = self.image_size % self.patch_size == 0
        self._require("image_size", fits, f"a multiple of the product of `patch_strides` ({self.patch_size})")
        self._require("image_size", self.image_size > 3, "more than 3 pixels")
        for name, total, visible in (
            ("mask_ratio", self.num_centers[-1], self.num_visible_tokens),
            ("image_mask_ratio", self.num_patches, self.num_visible_patches),
        ):
            works = 0 < getattr(self, name) < 1 and 0 < visible < total
            self._require(name, works, f"in (0, 1), leaving some of {total} tokens visible and some masked")
        radii = len(self.alignment_radii) > 0 and all(r is None or r >= 0 for r in self.alignment_radii)
        self._require("alignment_radii", radii, "a list of radii in patches, 0 or more, or None for unlimited")

    def _require(self, name: str, condition: bool, expected: str):
        if not condition:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected {expected}.")


PRESETS = {
    "tiny": {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "drop_path_rate": 0.0,
        "num_points": 1024,
        "num_centers": [256, 32],
        "num_neighbors": [16, 16],
        "point_embed_sizes": [32, 192],
        "image_size": 64,
        "patch_strides": [4, 2],
        "image_embed_sizes": [32, 192],
        "decoder_hidden_size": 96,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 384,
        "num_target_points": 64,
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "drop_path_rate": 0.05,
        "num_points": 1024,
        "num_centers": [256, 128, 64],
        "num_neighbors": [16, 8, 8],
        "point_embed_sizes": [64, 128, 256],
        "image_size": 112,
        "image_embed_sizes": [64, 128, 256],
        "decoder_hidden_size": 128,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 512,
    },
    "base": {},
}


def own_fields() -> set[str]:
    """Names of the fields that [`JointMAEConfig`] adds to those of every configuration."""
    return {field.name for field in fields(JointMAEConfig)} - {field.name for field in fields(PreTrainedConfig)}


__all__ = ["JointMAEConfig"]
