"""What a training step must cost: multiply-adds and bytes of each stage, and the floors that they set.

    python benchmarks/budget.py                 # the base size beside Point-MAE, as a table
    python benchmarks/budget.py --preset small --batch_size 128

`jointmae_hf.training.flops` says what is counted: matrix products, attention and distances, but nothing that could be
fused into them. What a real step takes beyond the floor is mostly that.
"""

import argparse
import statistics
import time
from collections.abc import Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining
from jointmae_hf.training.flops import PEAKS, Cost, Work, block, cost, joint_mae, linear


# NVIDIA's data sheet of the H100 SXM: dense bfloat16 without sparsity, and HBM3.
H100 = {"flops_per_second": PEAKS["H100"], "bytes_per_second": 3.35e12}


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
