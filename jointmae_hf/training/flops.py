"""What a training step must compute: multiply-adds of each stage, and the peaks that devices are measured against.

Counted is what cannot be left out: matrix products, attention, and distances between points. A matrix product reads
both operands and writes its result once. Everything element by element (activations, normalisation, maxima, gathers)
is counted as free, as if fused into the products around it. The backward pass of a product is two products of the same
size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..configuration_joint_mae import JointMAEConfig


# Forward, and with backward: two more products. Attention recomputes its weights, half of its forward pass.
TRAINING_PRODUCTS, TRAINING_ATTENTION = 3.0, 3.5
# Dense bfloat16 and float16 products by NVIDIA's data sheets, FLOP/s. The first name that occurs in a device's counts.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Work:
    """
    Part of a stage, for one sample.

    Args:
        stage: what it belongs to.
        multiply_adds: of the forward pass, in matrix products.
        activations: numbers read and written by these.
        weights: numbers that the whole batch reads once.
        distances: squared distances between points, 3 multiply-adds each, without gradient.
        training: cost of forward and backward pass in forward passes.
    """

    stage: str
    multiply_adds: int = 0
    activations: int = 0
    weights: int = 0
    distances: int = 0
    training: float = TRAINING_PRODUCTS


def linear(stage: str, rows: int, fan_in: int, fan_out: int) -> Work:
    return Work(stage, rows * fan_in * fan_out, rows * (fan_in + fan_out), fan_in * fan_out)


def attention(stage: str, queries: int, keys: int, width: int) -> Work:
    """Weights and weighted sum, fused: neither the scores nor the weights leave the chip."""
    return Work(stage, 2 * queries * keys * width, 2 * (queries + keys) * width, training=TRAINING_ATTENTION)


def block(stage: str, queries: int, keys: int, width: int, inner: int) -> list[Work]:
    """A transformer block, of whose tokens the first `keys` are attended to."""
    products = [(queries, width, width), (keys, width, width), (keys, width, width), (queries, width, width)]
    products += [(queries, width, inner), (queries, inner, width)]
    return [linear(stage, *product) for product in products] + [attention(stage, queries, keys, width)]


def joint_mae(config: JointMAEConfig, pretraining: bool = True) -> list[Work]:
    """The work on one cloud: a step of pre-training, or features from 3D alone."""
    tokens = config.num_visible_tokens if pretraining else config.num_centers[-1]
    patches = config.num_visible_patches if pretraining and config.use_image_branch else 0
    work = [*_point_embeddings(config, tokens), *_image_embeddings(config, patches)]
    visible, width = tokens + patches, config.hidden_size
    for _ in range(config.num_hidden_layers):
        work += block("encoder", visible, visible, width, config.intermediate_size)
    if pretraining:
        work += _decoder(config, tokens, patches) + _losses(config)
        if config.agreement_loss_weight > 0:
            work += joint_mae(config, pretraining=False) * (1 if config.agreement_of_visible else 2)
    return work


def _point_embeddings(config: JointMAEConfig, tokens: int) -> list[Work]:
    centers, neighbors, widths = config.num_centers, config.num_neighbors, config.point_embed_sizes
    groups = [tokens]  # of each scale, coarsest first: no more than the children of visible tokens
    for scale in range(len(centers) - 1, 0, -1):
        groups.append(min(groups[-1] * neighbors[scale], centers[scale - 1]))
    groups.reverse()
    rows, width, stage = groups[0] * neighbors[0], widths[0], "first scale"
    work = [
        Work("sampling", distances=centers[0] * config.num_points),
        Work("neighbours", distances=groups[0] * config.num_points),
        linear(stage, rows, 3, width),
        *[linear(stage, count, width, width) for count in (rows, groups[0], rows, rows)],
    ]
    for scale in range(1, len(centers)):
        slots, stage = groups[scale] * neighbors[scale], "merging"
        work += [
            Work("neighbours", distances=groups[scale] * centers[scale - 1]),
            linear(stage, slots, 3, widths[scale]),
            linear(stage, groups[scale - 1], widths[scale - 1], widths[scale]),
            linear(stage, slots, widths[scale], widths[scale]),
        ]
    return work + [linear("encoder", tokens, 3, widths[-1]), linear("encoder", tokens, widths[-1], widths[-1])]


def _image_embeddings(config: JointMAEConfig, patches: int) -> list[Work]:
    if not patches:
        return []
    stage, work, side, fan_in = "2D embedding", [], config.patch_size, config.num_channels
    for scale, (stride, width) in enumerate(zip(config.patch_strides, config.image_embed_sizes, strict=True)):
        side //= stride
        cells = patches * side * side
        work.append(linear(stage, cells, stride * stride * fan_in, width))
        if scale < len(config.patch_strides) - 1:
            taps = config.image_kernel_size**2
            products = [(width, width), (width, width), (width, 2 * width), (2 * width, width)]
            layer = [linear(stage, cells, *product) for product in products]
            layer.append(Work(stage, cells * width * taps, 2 * cells * width, width * taps))
            work += layer * config.image_embed_depth
        fan_in = width
    return work


def _decoder(config: JointMAEConfig, tokens: int, patches: int) -> list[Work]:
    width, inner = config.decoder_hidden_size, config.decoder_intermediate_size
    all_tokens, all_patches = config.num_centers[-1], config.num_patches if patches else 0
    shared, heads = "shared decoder", "heads"
    work = [linear(shared, tokens + patches, config.hidden_size, width)]
    work += [linear(shared, all_tokens, 3, width), linear(shared, all_tokens, width, width)]
    for _ in range(config.decoder_num_shared_layers):
        work += block(shared, all_tokens + all_patches, tokens + patches, width, inner)
    for _ in range(config.decoder_num_specific_layers):
        work += block("specific decoders", all_tokens, tokens, width, inner)
        work += block("specific decoders", all_patches, patches, width, inner)
    work.append(linear(heads, all_tokens - tokens, width, 3 * config.num_target_points))
    if patches:
        work.append(linear(heads, all_patches - patches, width, config.patch_size**2 * config.num_channels))
    return work


def _losses(config: JointMAEConfig) -> list[Work]:
    masked, targets = config.num_centers[-1] - config.num_visible_tokens, config.num_target_points
    return [Work("losses", distances=masked * (config.num_points + targets * targets))]


@dataclass(frozen=True)
class Cost:
    """What some work costs for a batch."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor: computing and moving overlap perfectly."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def cost(work: Iterable[Work], batch_size: int, element_size: int, training: bool) -> Cost:
    """Floating-point operations and bytes of a batch; `element_size` in bytes, coordinates are always float32."""
    flops = moved = 0.0
    for part in work:
        times = part.training if training else 1.0
        flops += batch_size * (2 * part.multiply_adds * times + 8 * part.distances)
        # The backward pass reads and writes the same operands as the forward pass, twice.
        passes = TRAINING_PRODUCTS if training else 1.0
        moved += passes * element_size * (batch_size * part.activations + part.weights)
    return Cost(flops, moved)


def training_flops(config: JointMAEConfig) -> float:
    """Floating-point operations of pre-training on one sample, forward and backward pass."""
    return cost(joint_mae(config), batch_size=1, element_size=2, training=True).flops


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Peak FLOP/s of a device in the precision of a run, where a data sheet tells; else `None`."""
    if device.type != "cuda" or mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)
