"""Pre-training and features of `base` on one GPU: samples per second, share of the peak, memory, losses in bfloat16.

    python benchmarks/gpu_step.py --output benchmarks/results/gpu_step.json

Needs a CUDA device and less than ten minutes. A training step is forward pass under autocast, backward pass, clipping
and fused AdamW, on clouds that are on the device already. The share of the peak counts the products that `budget.py`
counts, at the data sheet's rate of an H100; on other devices it is left out.

Every section runs in a process of its own, most wanted first. One that fails or hangs leaves its traceback in the
result, which is written after each section, and the others run as long as time is left.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import budget
import torch
from torch import nn

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining
from jointmae_hf.data.loading import load_point_table
from jointmae_hf.training.optimization import build_optimizer
from jointmae_hf.training.pretraining import build_untrained_model, versions


DEVICE = "cuda"
EMBEDDED_DATASET = Path(__file__).resolve().parent.parent / "examples" / "data" / "kicad-parts"
AIM_SAMPLES_PER_SECOND = {"least": 5000, "wanted": 15000}
CURVE_STEPS, CURVE_BATCH, CURVE_WINDOW = 1000, 64, 50
TOTAL_SECONDS, SECTION_SECONDS = 570, 200


class Training:
    """
    Pre-training of `base` without anything around the step.

    Args:
        batch_size: clouds of a step.
        bfloat16: by autocast, else float32 throughout.
        mode: of torch.compile: `None` for eager, `"default"`, or `"reduce-overhead"` for CUDA graphs.
    """

    def __init__(self, batch_size: int, bfloat16: bool = True, mode: str | None = "reduce-overhead"):
        self.batch_size, self.bfloat16, self.mode = batch_size, bfloat16, mode
        self.config = JointMAEConfig.from_preset("base")
        self.model = build_untrained_model(self.config, seed=0).to(DEVICE)
        self.forward: Callable[..., Any] = self.model if mode is None else torch.compile(self.model, mode=mode)
        self.optimizer = build_optimizer(self.model, 1e-3, 0.05, (0.9, 0.95))

    def step(self, points: torch.Tensor, **noise: torch.Tensor) -> torch.Tensor:
        """One step; returns the loss."""
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, torch.bfloat16) if self.bfloat16 else nullcontext():
            loss = self.forward(points, **noise).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().clone()


def surfaces(batch_size: int, num_points: int = 2048) -> torch.Tensor:
    """Points on ellipsoids `(batch, num_points, 3)`, in the unit sphere."""
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(batch_size, num_points, 3, generator=generator), dim=-1)
    return (directions * torch.rand(batch_size, 1, 3, generator=generator).clamp_min(0.2)).to(DEVICE)


def seconds_of(run: Callable[[], Any], warm_up: int = 5, rounds: int = 5, calls: int = 8) -> dict[str, Any]:
    """Median and extremes over rounds of the seconds of one call."""
    for _ in range(warm_up):
        run()
    taken = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        taken.append((time.perf_counter() - started) / calls)
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}


def synchronize():
    torch.cuda.synchronize()


def throughput(batch_size: int, mode: str | None) -> dict[str, Any]:
    """Samples per second, share of the peak and memory of a training step."""
    training, points = Training(batch_size, mode=mode), surfaces(batch_size)
    started = time.perf_counter()
    training.step(points)
    synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: training.step(points))
    spent = budget.cost(budget.joint_mae(training.config), batch_size, 2, training=True)
    result = {
        "batch_size": batch_size,
        "mode": mode or "eager",
        "first_step_seconds": first,
        "step_seconds": seconds,
        "samples_per_second": batch_size / seconds["median"],
        "tflops_per_second": spent.flops / seconds["median"] / 1e12,
        "peak_memory_gb": torch.cuda.max_memory_reserved() / 1e9,
    }
    if "H100" in torch.cuda.get_device_name():
        result["share_of_peak"] = spent.flops / seconds["median"] / budget.H100["flops_per_second"]
        result["floor_seconds"] = spent.seconds(**budget.H100)
    return result


def shares(batch_size: int = 512) -> dict[str, Any]:
    """Where the device's time goes in a compiled step: our own kernels by name, and the slowest of all."""
    from jointmae_hf.kernels import gpu

    training, points = Training(batch_size, mode="default"), surfaces(batch_size)
    for _ in range(4):
        training.step(points)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            training.step(points)
        synchronize()
    spent = {
        event.key: event.self_device_time_total
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
    total = sum(spent.values())
    share = {name: time / total for name, time in sorted(spent.items(), key=lambda item: -item[1])}
    geometry = {name: share[name] for name in share if hasattr(gpu, name)}
    return {
        "batch_size": batch_size,
        "device_seconds_of_a_step": total / 3e6,
        "geometry": geometry,
        "sampling_and_grouping": sum(
            geometry[name] for name in geometry if name.startswith(("_sample", "_nearest_k"))
        ),
        "sampling_and_grouping_aim": 0.1,
        "slowest_kernels": {name[:90]: share[name] for name in list(share)[:25]},
    }


def curves(bfloat16: bool) -> dict[str, Any]:
    """Losses of 1,000 steps on real shapes; weights, batches, views and masks are the same in both precisions."""
    training = Training(CURVE_BATCH, bfloat16, mode=None)
    table = load_point_table(str(EMBEDDED_DATASET), "train", num_points=training.config.num_points)
    shapes = torch.from_numpy(table.points).to(DEVICE)
    config, generator = training.config, torch.Generator(DEVICE).manual_seed(0)
    losses = []
    for step in range(CURVE_STEPS):
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100)

        def noise(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=DEVICE)

        chosen = torch.randint(len(shapes), (CURVE_BATCH,), generator=generator, device=DEVICE)
        points = shapes[chosen] * (2 / 3 + 5 / 6 * noise(CURVE_BATCH, 1, 3))
        torch.manual_seed(step)  # stochastic depth
        losses.append(
            training.step(
                points,
                view=(3 * noise(CURVE_BATCH)).long().clamp_max(2),
                point_noise=noise(CURVE_BATCH, config.num_centers[-1]),
                patch_noise=noise(CURVE_BATCH, config.num_patches),
            )
        )
    return {"steps": CURVE_STEPS, "batch_size": CURVE_BATCH, "losses": torch.stack(losses).tolist()}


def compared_curves(bf16: list[float], fp32: list[float]) -> dict[str, Any]:
    """Relative difference of means over windows of steps, of which the largest is to be 0.02."""
    windows = [
        [statistics.fmean(losses[i : i + CURVE_WINDOW]) for i in range(0, CURVE_STEPS, CURVE_WINDOW)]
        for losses in (bf16, fp32)
    ]
    differences = [(a - b) / b for a, b in zip(*windows, strict=True)]
    return {
        "window": CURVE_WINDOW,
        "bf16": windows[0],
        "fp32": windows[1],
        "largest_difference": max(differences, key=abs),
        "last_difference": differences[-1],
        "aim": "largest at most 0.02 either way",
    }


def inference(batch_size: int) -> dict[str, Any]:
    """Features from 3D alone, in bfloat16: eager and with CUDA graphs."""
    model = JointMAEForPreTraining(JointMAEConfig.from_preset("base")).joint_mae.to(DEVICE).eval()
    points, result = surfaces(batch_size), {"batch_size": batch_size}
    compiled = torch.compile(model, mode="reduce-overhead")
    for name, function in (("eager", model), ("CUDA graphs", compiled)):

        def run(function: Callable[..., Any] = function) -> torch.Tensor:
            with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
                return function(points).pooler_output

        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(run, warm_up=5, calls=20)
        result[name] = {
            "seconds": seconds,
            "clouds_per_second": batch_size / seconds["median"],
            "peak_memory_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
    return result


def rates() -> dict[str, Any]:
    """What products of the sizes in a step and copies reach on this device."""
    shapes = budget.linear_shapes(JointMAEConfig.from_preset("base"), 512)
    return {
        "matmul_flops_per_second": budget.matmul_rate(shapes, torch.bfloat16, DEVICE),
        "copied_bytes_per_second": budget.copy_rate(DEVICE, 1 << 30),
    }


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "training, batch 512": lambda: throughput(512, "reduce-overhead"),
    "training, batch 128": lambda: throughput(128, "reduce-overhead"),
    "losses, bf16": lambda: curves(True),
    "losses, fp32": lambda: curves(False),
    "features, batch 1": lambda: inference(1),
    "features, batch 256": lambda: inference(256),
    "training, batch 2048": lambda: throughput(2048, "reduce-overhead"),
    "shares": shares,
    "training, batch 512, eager": lambda: throughput(512, None),
    "rates": rates,
}


def run_section(name: str, seconds: float) -> dict[str, Any]:
    """The result of a section, from a process of its own, or what went wrong."""
    command = [sys.executable, __file__, "--section", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} seconds"}
    if done.returncode:
        return {"error": done.stderr[-4000:] or f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="path of the JSON")
    parser.add_argument("--section", choices=list(SECTIONS), help="only this one, printed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_step.py needs a CUDA device, and torch sees none.")
    if arguments.section:
        torch.set_float32_matmul_precision("highest")
        print(json.dumps(SECTIONS[arguments.section]()))
        return
    if arguments.output is None:
        parser.error("--output is missing")

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    started, failed = time.perf_counter(), False
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "aim_samples_per_second": AIM_SAMPLES_PER_SECOND,
        "sections": {},
    }
    for name in SECTIONS:
        left = TOTAL_SECONDS - (time.perf_counter() - started)
        section = run_section(name, min(left, SECTION_SECONDS)) if left > 20 else {"error": "no time was left"}
        failed |= "error" in section
        result["sections"][name] = section
        if all("losses" in result["sections"].get(f"losses, {kind}", {}) for kind in ("bf16", "fp32")):
            bf16, fp32 = (result["sections"][f"losses, {kind}"]["losses"] for kind in ("bf16", "fp32"))
            result["bf16 against fp32"] = compared_curves(bf16, fp32)
        result["seconds"] = time.perf_counter() - started
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        shown = {key: value for key, value in section.items() if key != "losses"}
        print(name, json.dumps(shown)[:600], flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
