"""GPU kernels against the reference in plain torch, at full size: are the results the same, and how much faster?

    python benchmarks/gpu_kernels.py --output benchmarks/results/gpu_kernels.json

Needs a CUDA device and takes some minutes. Kernel and reference run in alternation: eager, under torch.compile and
replayed from a CUDA graph. Times are medians over rounds, from CUDA events. Sampling in plain torch is not compiled,
since torch.compile would unroll its loop. `--searches` tries other block sizes after that.

A section that fails leaves its traceback in the result, which is written after each section, and the others run, if
the device still can.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jointmae_hf import geometry_joint_mae as geometry


MODES = ("eager", "compiled", "graph")
Run = Callable[[], tuple[torch.Tensor, ...]]


@dataclass
class Comparison:
    """One function of the geometry, kernel against reference, on inputs of one size."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    reference_modes: tuple[str, ...] = MODES
    exact_modes: tuple[str, ...] = MODES
    tolerance: float = 0.0  # relative to the largest value
    differentiated: bool = False


@dataclass
class Search:
    """One function with other settings of the module of kernels; the first are those that it has."""

    run: Callable[[], Run]
    settings: list[dict[str, Any]]


def surface(batch_size: int, num_points: int, seed: int = 0) -> torch.Tensor:
    """Points near spheres `(batch, num_points, 3)`."""
    points = torch.randn(batch_size, num_points, 3, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.normalize(points, dim=-1) + 0.01 * points).cuda()


def groups_of(batch_size: int, num_points: int, num_centers: int, k: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    points = surface(batch_size, num_points)
    sampled = geometry.farthest_point_sample(points, num_centers)
    return points, geometry.gather_points(points, sampled), k


def patches(requires_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = surface(2048, 32, 1), surface(2048, 32, 2)
    return first.requires_grad_(requires_grad), second.requires_grad_(requires_grad)


def views(batch_size: int, num_points: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    points = surface(batch_size, num_points)
    return points, geometry.view_projection(points, torch.arange(batch_size, device="cuda") % 3, 224), 224


def sampling(batch_size: int, num_points: int, num_samples: int) -> Comparison:
    modes = ("eager", "graph") if num_samples <= 512 else ("eager",)  # a graph of at most some thousand nodes
    return Comparison(geometry.farthest_point_sample, lambda: (surface(batch_size, num_points), num_samples), modes)


def neighbors(*sizes: int) -> Comparison:
    return Comparison(geometry.group_nearest, lambda: groups_of(*sizes))


def searches() -> dict[str, Search]:
    from jointmae_hf.kernels import gpu

    def knn() -> Run:
        points, centers, k = groups_of(128, 2048, 512, 16)
        return lambda: geometry.knn(centers, points, k)

    def small_chamfer() -> Run:
        pair = patches(requires_grad=False)
        return lambda: geometry.chamfer_distance(*pair)

    def large_chamfer() -> Run:
        pair = surface(8, 2048, 1), surface(8, 2048, 2)
        return lambda: geometry.chamfer_distance(*pair)

    def sample(batch_size: int, num_points: int, num_samples: int) -> Run:
        points = surface(batch_size, num_points)
        return lambda: geometry.farthest_point_sample(points, num_samples)

    def tiles(name: str, *others: tuple[int, int]) -> list[dict[str, Any]]:
        return [
            {name: tile, "TILE_WARPS": n} for tile in (getattr(gpu, name), *others) for n in (gpu.TILE_WARPS, 2, 4)
        ]

    buckets = [(gpu.NUM_BUCKETS, gpu.BUCKET_WARPS), (128, 16), (256, 16), (512, 8), (512, 4), (1024, 8)]
    return {
        "search: neighbours 128 x 2048 -> 512 x 16": Search(
            knn, tiles("NEIGHBOR_TILE", (1, 512), (2, 256), (4, 128), (16, 128))
        ),
        "search: Chamfer 2048 x 32 x 32": Search(small_chamfer, tiles("NEAREST_TILE", (32, 32))),
        "search: Chamfer 8 x 2048 x 2048": Search(large_chamfer, tiles("NEAREST_TILE", (32, 64), (16, 128))),
        "search: sampling 128 x 2048 -> 512": Search(
            lambda: sample(128, 2048, 512), [{"POINTS_OF_WARP": n} for n in (gpu.POINTS_OF_WARP, 128, 512, 1024)]
        ),
        "search: sampling 1 x 16384 -> 512": Search(
            lambda: sample(1, 16384, 512), [{"ON_CHIP_POINTS": limit} for limit in (gpu.ON_CHIP_POINTS, 0)]
        ),
        "search: sampling 1 x 1000000 -> 2048": Search(
            lambda: sample(1, 1_000_000, 2048),
            [{"BUCKET_SIZES": (128, 16384), "NUM_BUCKETS": count, "BUCKET_WARPS": warps} for count, warps in buckets],
        ),
    }


def comparisons() -> dict[str, Comparison]:
    return {
        "sampling 128 x 1024 -> 64": sampling(128, 1024, 64),
        "neighbours 128 x 1024 -> 64 x 32": neighbors(128, 1024, 64, 32),
        "sampling 128 x 2048 -> 512": sampling(128, 2048, 512),
        "neighbours 128 x 2048 -> 512 x 16": neighbors(128, 2048, 512, 16),
        "sampling 32 x 8192 -> 512": sampling(32, 8192, 512),
        "neighbours 32 x 8192 -> 512 x 32": neighbors(32, 8192, 512, 32),
        "sampling 1 x 100000 -> 2048": sampling(1, 100_000, 2048),
        "neighbours 1 x 100000 -> 2048 x 32": neighbors(1, 100_000, 2048, 32),
        "sampling 1 x 1000000 -> 2048": sampling(1, 1_000_000, 2048),
        "Chamfer 2048 x 32 x 32, with gradient": Comparison(
            geometry.chamfer_distance, patches, tolerance=1e-6, differentiated=True
        ),
        # Compiled, the projection before the kernel may be rounded otherwise, and a point move by a pixel.
        "depth 128 x 2048 -> 224": Comparison(
            geometry.project_depth, lambda: views(128, 2048), exact_modes=("eager", "graph")
        ),
    }


@contextlib.contextmanager
def plain_torch():
    """Within it the geometry runs without kernels."""
    kernels, geometry.kernels = geometry.kernels, None
    try:
        yield
    finally:
        geometry.kernels = kernels


def runner(section: Comparison, inputs: tuple[Any, ...], kind: str, mode: str) -> Run:
    function = torch.compile(section.function) if mode == "compiled" else section.function

    def run():
        with plain_torch() if kind == "reference" else contextlib.nullcontext():
            outputs = function(*inputs)
        outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
        if not section.differentiated:
            return outputs
        return *outputs, *torch.autograd.grad(sum(output.sum() for output in outputs), inputs)

    return captured(run) if mode == "graph" else run


def captured(run: Run) -> Run:
    """The same, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay():
        graph.replay()
        return outputs

    return replay


@torch.no_grad()
def difference(outputs: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest difference between two results, relative to the largest value."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
        for a, b in zip(outputs, expected, strict=True)
    )


def milliseconds(run: Run, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def alternate(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, Any]]:
    """Times all of them in every round, so that whatever slows the machine down for a while slows all."""
    calls = {name: max(1, min(100, int(5 / max(milliseconds(run, 1), 1e-3)))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, calls[name]))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: {"median_ms": q[1], "quartiles_ms": [q[0], q[2]]} for name, q in quartiles.items()}


def compare(section: Comparison, rounds: int, modes: Sequence[str]) -> dict[str, Any]:
    """Differences from the eager reference, times, and how many times faster the kernels are."""
    inputs = section.inputs()
    expected = tuple(output.detach().clone() for output in runner(section, inputs, "reference", "eager")())
    runs, differences, failures = {}, {}, {}
    for kind, possible in (("kernel", MODES), ("reference", section.reference_modes)):
        for mode in (mode for mode in possible if mode in modes):
            name = f"{kind} {mode}"
            try:
                run = runner(section, inputs, kind, mode)
                differences[name] = difference(run(), expected)
                runs[name] = run
            except Exception:
                failures[name] = traceback.format_exc()
    times = alternate(runs, rounds)
    speedups = {
        mode: times[f"reference {mode}"]["median_ms"] / times[f"kernel {mode}"]["median_ms"]
        for mode in MODES
        if {f"reference {mode}", f"kernel {mode}"} <= times.keys()
    }
    compared = [mode for mode in section.exact_modes if mode in modes]
    within = [differences.get(f"kernel {mode}", float("inf")) <= section.tolerance for mode in compared]
    exact = all(within) if within else None
    return {"exact": exact, "speedups": speedups, "times": times, "differences": differences, "failures": failures}


def search(section: Search, rounds: int) -> dict[str, Any]:
    """Times with every setting; one that does not fit the device is a failure of its own."""
    from jointmae_hf.kernels import gpu

    run, times, failures = section.run(), {}, {}
    run()  # what the settings change must be in place, not what the first call of all costs
    for setting in section.settings:
        kept = {key: getattr(gpu, key) for key in setting}
        vars(gpu).update(setting)
        try:
            run()
            times.update(alternate({str(setting): run}, rounds))
        except Exception:
            failures[str(setting)] = traceback.format_exc()
        finally:
            vars(gpu).update(kept)
    return {"times": times, "failures": failures}


def print_section(name: str, result: dict[str, Any]):
    found = {True: ": exact", False: ": NOT EXACT", None: ""}[result.get("exact")]
    print(name + found)
    for run, times in result.get("times", {}).items():
        low, high = times["quartiles_ms"]
        print(f"  {times['median_ms']:10.3f} ms  ({low:.3f} to {high:.3f})  {run}")
    for mode, ratio in result.get("speedups", {}).items():
        print(f"  {ratio:10.1f} x  {mode}")
    for run, failure in result["failures"].items():
        print(f"  {run} FAILED: {failure.strip().splitlines()[-1]}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_kernels.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--searches", action="store_true", help="search over block sizes, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none.", file=sys.stderr)
        return 1
    import triton

    started = time.monotonic()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
        "rounds": arguments.rounds,
        "sections": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name, section in (comparisons() | (searches() if arguments.searches else {})).items():
        try:
            if isinstance(section, Search):
                found = search(section, arguments.rounds)
            else:
                found = compare(section, arguments.rounds, arguments.modes)
        except Exception:
            found = {"failures": {"section": traceback.format_exc()[-5000:]}}
        result["sections"][name] = found
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print_section(name, found)
    print(f"{arguments.output}: {time.monotonic() - started:.0f} s on {result['device']}")
    wrong = [name for name in comparisons() if result["sections"][name].get("exact", False) is False]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
