"""Pre-training and features of `base` on one GPU: samples per second, share of the peak, memory, losses in bfloat16.

    python benchmarks/gpu_step.py --output benchmarks/results/gpu_step.json

Needs a CUDA device and some minutes. A training step is forward pass under autocast, backward pass, clipping and fused
AdamW, on clouds that are on the device already; "compiled" is what `--compile` of pre-training does, and "CUDA graph"
what `--cuda_graph` does. The share of the peak counts the products that `budget.py` counts, at the data sheet's rate
of an H100; on other devices it is left out.

Sections run most wanted first, or those that `--sections` names, and are added to a result that is there. One that
fails leaves its traceback, the others run if the device still can, and no section begins after `--time_limit`.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import budget
import torch
from gpu_kernels import captured
from torch import nn

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining
from jointmae_hf.data.loading import load_point_table
from jointmae_hf.modeling_joint_mae import JointMAEForPreTrainingOutput
from jointmae_hf.training.compilation import compile_blocks
from jointmae_hf.training.graphs import GraphedBackward
from jointmae_hf.training.optimization import build_optimizer
from jointmae_hf.training.pretraining import build_untrained_model, versions


DEVICE = "cuda"
EMBEDDED_DATASET = Path(__file__).resolve().parent.parent / "examples" / "data" / "kicad-parts"
AIM_SAMPLES_PER_SECOND = {"least": 5000, "wanted": 15000}
CURVE_STEPS, CURVE_BATCH, CURVE_WINDOW = 1000, 32, 50


class Training:
    """
    Pre-training of `base` without anything around the step.

    Args:
        batch_size: clouds of a step.
        bfloat16: by autocast, else float32 throughout.
        compiled: whether the blocks are compiled.
        graph: whether forward and backward pass are replayed from a CUDA graph.
    """

    def __init__(self, batch_size: int, bfloat16: bool = True, compiled: bool = True, graph: bool = False):
        self.batch_size, self.bfloat16 = batch_size, bfloat16
        self.config = JointMAEConfig.from_preset("base")
        self.model = build_untrained_model(self.config, seed=0).to(DEVICE)
        if compiled:
            compile_blocks(self.model)
        self.optimizer = build_optimizer(self.model, 1e-3, 0.05, (0.9, 0.95))
        self.graphed = GraphedBackward(self.model, self.forward, ["loss"]) if graph else None

    def forward(self, **batch: torch.Tensor) -> JointMAEForPreTrainingOutput:
        with torch.autocast(DEVICE, torch.bfloat16) if self.bfloat16 else nullcontext():
            return self.model(**batch)

    def step(self, points: torch.Tensor, **noise: torch.Tensor) -> torch.Tensor:
        """One step; returns the loss."""
        batch = {"point_values": points, **noise}
        if self.graphed is None:
            loss = self.forward(**batch).loss
            loss.backward()
        else:
            loss = self.graphed.backward(batch)[0]
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


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


def throughput(batch_size: int, compiled: bool = True, graph: bool = False) -> dict[str, Any]:
    """Samples per second, share of the peak and memory of a training step."""
    training, points = Training(batch_size, compiled=compiled, graph=graph), surfaces(batch_size)
    started = time.perf_counter()
    training.step(points)
    synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: training.step(points))
    spent = budget.cost(budget.joint_mae(training.config), batch_size, 2, training=True)
    result = {
        "batch_size": batch_size,
        "compiled": compiled,
        "cuda_graph": graph,
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

    training, points = Training(batch_size), surfaces(batch_size)
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
    training = Training(CURVE_BATCH, bfloat16)
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
    """Features from 3D alone, in bfloat16: as they come, compiled, and the latter replayed from a CUDA graph."""
    model = JointMAEForPreTraining(JointMAEConfig.from_preset("base")).joint_mae.to(DEVICE).eval()
    points, result = surfaces(batch_size), {"batch_size": batch_size}

    def run() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
            return model(points).pooler_output

    for name in ("eager", "compiled", "CUDA graph"):
        if name == "compiled":
            compile_blocks(model)
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(captured(run) if name == "CUDA graph" else run, calls=20)
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
    "training, batch 512": lambda: throughput(512),
    "training, batch 2048": lambda: throughput(2048),
    "training, batch 128": lambda: throughput(128),
    "training, batch 512, eager": lambda: throughput(512, compiled=False),
    "training, batch 512, CUDA graph": lambda: throughput(512, graph=True),
    "training, batch 512, eager, CUDA graph": lambda: throughput(512, compiled=False, graph=True),
    "features, batch 1": lambda: inference(1),
    "features, batch 256": lambda: inference(256),
    "shares": shares,
    "rates": rates,
    "losses, bf16": lambda: curves(True),
    "losses, fp32": lambda: curves(False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="path of the JSON; what it holds is kept")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--time_limit", type=float, default=570.0, help="seconds after which no section begins")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_step.py needs a CUDA device, and torch sees none.")
    torch.set_float32_matmul_precision("highest")
    started, failed = time.perf_counter(), False
    measured_on = {"device": torch.cuda.get_device_name(), "versions": versions() | {"cuda": torch.version.cuda}}
    result: dict[str, Any] = {"aim_samples_per_second": AIM_SAMPLES_PER_SECOND, "sections": {}}
    if arguments.output.exists():
        result["sections"] = json.loads(arguments.output.read_text())["sections"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        if time.perf_counter() - started > arguments.time_limit:
            section = {"error": "no time was left"}
        else:
            try:
                section = SECTIONS[name]() | measured_on
            except Exception:
                section = {"error": traceback.format_exc()[-4000:]}
        if "error" in section:
            failed = True
            result["sections"].setdefault(name, section)
        else:
            result["sections"][name] = section
        if all("losses" in result["sections"].get(f"losses, {kind}", {}) for kind in ("bf16", "fp32")):
            bf16, fp32 = (result["sections"][f"losses, {kind}"]["losses"] for kind in ("bf16", "fp32"))
            result["bf16 against fp32"] = compared_curves(bf16, fp32)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        shown = {key: value for key, value in section.items() if key not in ("losses", "device", "versions")}
        print(f"{time.perf_counter() - started:.0f} s {name}", json.dumps(shown)[:600], flush=True)
        torch._dynamo.reset()  # there is a limit to what a process compiles of one block
        gc.collect()
        torch.cuda.empty_cache()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
