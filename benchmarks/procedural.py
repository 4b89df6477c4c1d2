"""Speed of procedural shapes beside the training step that consumes them, and their contact sheet.

    python benchmarks/procedural.py --output benchmarks/results/procedural.json
    python benchmarks/procedural.py --device cuda --output benchmarks/results/procedural_gpu.json
    python benchmarks/procedural.py --sheet docs/procedural.png

On a CPU, shapes are made by one thread; the step of `tiny` has all cores, as in pre-training. The two alternate, so
that other work on the machine slows both. On a GPU the step is `base` at 2,048 points, in bfloat16 and eager;
recipes are drawn by other processes in pre-training there, so that the GPU's part is measured alone as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jointmae_hf import JointMAEConfig
from jointmae_hf.data.procedural import finish_clouds, procedural_clouds, shape_tables, surface_points
from jointmae_hf.data.procedural_recipes import draw_recipes
from jointmae_hf.training.optimization import build_optimizer
from jointmae_hf.training.pretraining import available_cores, build_untrained_model, device_name, versions
from jointmae_hf.training.threads import ReplicaThreads


SHEET_SIDE, SHEET_POINTS = 8, 8192
# Shapes made at a time, and points of each; the first of the right number of points is how pre-training makes them,
# and the first of twice as many how it does for two views.
SIZES = {"cpu": [(64, 1024), (256, 1024), (64, 2048)], "cuda": [(512, 1024), (512, 2048), (2048, 2048), (512, 4096)]}
STEP = {"cpu": ("tiny", 16), "cuda": ("base", 512)}


def training_step(preset: str, batch_size: int, device: torch.device) -> Callable[[], Any]:
    """A step of pre-training on clouds that are there already."""
    config = JointMAEConfig.from_preset(preset)
    model = build_untrained_model(config, seed=0).to(device)
    optimizer = build_optimizer(model, 1e-4, 0.05, (0.9, 0.95))
    batch = {"point_values": procedural_clouds(range(batch_size), config.num_points, seed=1, device=device)}
    cores = available_cores()
    threads = ReplicaThreads(model, cores) if device.type == "cpu" and batch_size % cores == 0 else None

    def step():
        if threads is not None:
            threads.backward(batch, ["loss"])
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**batch).loss
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(work: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round, one after the other."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 2):
        for name, run in work.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if number > 1:  # warm
                taken[name].append(time.perf_counter() - started)
    return taken


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Clouds per second, and what share of a training step's time its clouds take."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    preset, batch_size = STEP[device.type]
    num_points = JointMAEConfig.from_preset(preset).num_points
    work = {"step": training_step(preset, batch_size, device)}
    numbers = iter(range(1 << 40))

    def make(shapes: int, points: int) -> Callable[[], Any]:
        return lambda: procedural_clouds([next(numbers) for _ in range(shapes)], points, device=device)

    def make_drawn(shapes: int, points: int) -> Callable[[], Any]:
        recipes = draw_recipes(range(shapes))
        tables = {name: table.pin_memory() for name, table in shape_tables(recipes).items()}
        return lambda: finish_clouds(recipes, surface_points(recipes, points, device, tables))

    sizes = {f"{shapes} x {points}": (shapes, points) for shapes, points in SIZES[device.type]}
    work |= {name: make(*size) for name, size in sizes.items()}
    if device.type == "cuda":
        work |= {f"{name}, drawn before": make_drawn(*size) for name, size in sizes.items()}
    taken = {name: statistics.median(times) for name, times in seconds_of(work, rounds, device).items()}
    rates = {name: sizes[name.partition(",")[0]][0] / taken[name] for name in work if name != "step"}
    used = next(name for name, (_, points) in sizes.items() if points == num_points)
    samples = batch_size / taken["step"]
    return {
        "clouds_per_second": {name: round(rate) for name, rate in rates.items()},
        "training_step": {"preset": preset, "batch_size": batch_size, "samples_per_second": round(samples, 1)},
        "seconds_of_clouds_to_a_second_of_steps": round(
            samples / rates[used if device.type == "cpu" else f"{used}, drawn before"], 4
        ),
    }


def draw_sheet(path: Path, seed: int = 0):
    """The first shapes of a seed, seen from above at an angle; near points hide far ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    from jointmae_hf.visualization import scatter_cloud

    figure = Figure(figsize=(1.2 * SHEET_SIDE, 1.2 * SHEET_SIDE))
    FigureCanvasAgg(figure)
    clouds = procedural_clouds(range(SHEET_SIDE**2), SHEET_POINTS, seed)
    for axis, cloud in zip(figure.subplots(SHEET_SIDE, SHEET_SIDE).flat, clouds.numpy(), strict=True):
        scatter_cloud(axis, cloud, "#2f6f9f", size=1.2)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white")
    Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="path of the JSON")
    parser.add_argument("--sheet", type=Path, help="path of the picture")
    parser.add_argument("--device", default="cpu", choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.sheet is not None:
        draw_sheet(arguments.sheet)
    if arguments.output is not None:
        device = torch.device(arguments.device)
        result = {
            "device": device_name(device),
            "threads_of_shapes": 1 if device.type == "cpu" else None,
            "cores": available_cores(),
            "rounds": arguments.rounds,
            "versions": versions(),
            **measure(device, arguments.rounds),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
