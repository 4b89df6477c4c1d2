"""What a training step must cost: multiply-adds and bytes of each stage, and the floors that they set.

    python benchmarks/budget.py                 # the base size beside Point-MAE, as a table
    python benchmarks/budget.py --preset small --batch_size 128

Counted is what cannot be left out: matrix products, attention, and distances between points. A matrix product reads
both operands and writes its result once. Everything element by element (activations, normalisation, maxima, gathers)
is counted as free, as if fused into the products around it; what a real step takes beyond the floor is mostly that.
The backward pass of a product is two products of the same size.
"""

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining


# NVIDIA's data sheet of the H100 SXM: dense bfloat16 without sparsity, and HBM3.
H100 = {"flops_per_second": 989e12, "bytes_per_second": 3.35e12}
# Forward, and with backward: two more products. Attention recomputes its weights, half of its forward pass.
TRAINING_PRODUCTS, TRAINING_ATTENTION = 3.0, 3.5


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


def point_mae(pretraining: bool = True) -> list[Work]:
    """Point-MAE as published: 1024 points, 64 groups of 32 of which 60 % are masked, 12 + 4 blocks of width 384."""
    points, groups, k, width = 1024, 64, 32, 384
    visible = groups - int(0.6 * groups) if pretraining else groups
    stage = "first scale"
    work = [Work("sampling", distances=groups * points), Work("neighbours", distances=groups * points)]
    work += [linear(stage, groups * k, *size) for size in ((3, 128), (128, 256), (512, 512), (512, width))]
    work += [linear("encoder", visible, 3, 128), linear("encoder", visible, 128, width)]
    for _ in range(12):
        work += block("encoder", visible, visible, width, 4 * width)
    if pretraining:
        work += [linear("shared decoder", groups, 3, 128), linear("shared decoder", groups, 128, width)]
        for _ in range(4):
            work += block("shared decoder", groups, groups, width, 4 * width)
        work.append(linear("heads", groups - visible, width, 3 * k))
        work.append(Work("losses", distances=(groups - visible) * k * k))
    return work


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


def optimizer_cost(num_parameters: int) -> Cost:
    """AdamW in float32: weight, gradient and both moments read, all but the gradient written."""
    return Cost(12.0 * num_parameters, 7.0 * 4 * num_parameters)


def stages(work: list[Work], batch_size: int, element_size: int, training: bool) -> dict[str, Cost]:
    names = dict.fromkeys(part.stage for part in work)
    return {
        name: cost([part for part in work if part.stage == name], batch_size, element_size, training) for name in names
    }


def counted_multiply_adds(config: JointMAEConfig) -> float:
    """Multiply-adds of one forward pass of pre-training for each sample, as torch counts them on the real model."""
    model = JointMAEForPreTraining(config).train()
    model.set_attn_implementation("eager")
    points = torch.randn(2, config.num_points, 3)
    with FlopCounterMode(display=False) as counter:
        model(points)
    return counter.get_total_flops() / (2 * len(points))


def matmul_rate(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: str, rounds: int = 9) -> dict:
    """Measured FLOP/s of a linear layer, forward and both backward products, for shapes (rows, fan in, fan out)."""
    rates = {}
    for rows, fan_in, fan_out in shapes:
        inputs, weight, gradient = (
            torch.randn(shape, dtype=dtype, device=device)
            for shape in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out))
        )
        seconds = []
        for _ in range(rounds):
            _wait(device)
            started = time.perf_counter()
            torch.mm(inputs, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), inputs)
            _wait(device)
            seconds.append(time.perf_counter() - started)
        rates[f"{rows} x {fan_in} x {fan_out}"] = 6 * rows * fan_in * fan_out / statistics.median(seconds[2:])
    return rates


def copy_rate(device: str, num_bytes: int = 1 << 28, rounds: int = 9) -> float:
    """Measured bytes per second of reading and writing memory."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / statistics.median(seconds[2:])


def _wait(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def linear_shapes(config: JointMAEConfig, batch_size: int) -> list[tuple[int, int, int]]:
    """The linear layers that hold most of the multiply-adds of a training step."""
    visible = config.num_visible_tokens + config.num_visible_patches
    all_tokens = config.num_centers[-1] + config.num_patches
    width, inner, fine = config.hidden_size, config.intermediate_size, config.point_embed_sizes[0]
    return [
        (batch_size * visible, width, width),
        (batch_size * visible, width, inner),
        (batch_size * all_tokens, config.decoder_hidden_size, config.decoder_intermediate_size),
        (batch_size * config.num_centers[0] * config.num_neighbors[0], fine, fine),
    ]


def table(work: list[Work], batch_size: int, element_size: int = 2) -> str:
    """Markdown: each stage of a training step, for one sample and for a batch."""
    lines = [
        "| stage | multiply-adds, forward, M | share, % | GFLOP a step | MB a step | H100 floor, us |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total = sum(part.multiply_adds for part in work)
    for name, spent in stages(work, batch_size, element_size, training=True).items():
        forward = sum(part.multiply_adds for part in work if part.stage == name)
        lines.append(
            f"| {name} | {forward / 1e6:.1f} | {100 * forward / total:.1f} | {spent.flops / 1e9:.1f} "
            f"| {spent.bytes / 1e6:.0f} | {1e6 * spent.seconds(**H100):.1f} |"
        )
    spent = cost(work, batch_size, element_size, training=True)
    floor = sum(part.seconds(**H100) for part in stages(work, batch_size, element_size, training=True).values())
    lines.append(
        f"| **all** | {total / 1e6:.1f} | 100 | {spent.flops / 1e9:.1f} | {spent.bytes / 1e6:.0f} "
        f"| {1e6 * floor:.1f} |"
    )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="base", help="size of the model")
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args()
    config = JointMAEConfig.from_preset(arguments.preset)
    work = joint_mae(config)
    expected, counted = sum(part.multiply_adds for part in work), counted_multiply_adds(config)
    print(f"{arguments.preset}, batch {arguments.batch_size}, bfloat16")
    print(table(work, arguments.batch_size))
    print("\nPoint-MAE")
    print(table(point_mae(), arguments.batch_size))
    if abs(counted - expected) > 0.01 * expected:
        raise SystemExit(f"the budget holds {expected} multiply-adds, but torch counts {counted:.0f}")


if __name__ == "__main__":
    main()
