"""Sampling, neighbours, multi-scale groups and Chamfer on the CPU: our kernels beside packages and plain torch.

    pip install torch_quickfps pykdtree fpsample
    python benchmarks/geometry.py --output benchmarks/results/geometry

Packages that are not installed are left out. Writes OUTPUT.json and OUTPUT.png; takes about four minutes on two cores,
which should have nothing else to do.

All contenders of a task run in this process and take turns, round by round: ratios are of neighbours in time. Clouds
are spheres with noise. Everybody samples and searches exactly. The pair of packages is torch_quickfps for sampling,
with the best of several bucket heights, and pykdtree for neighbours, with the best of several leaf sizes, alone with
its own threads or in a pool of threads over clouds, whichever is faster; their best times are added, which leaves out
the gather between them. Plain torch is the reference in `geometry_joint_mae.py`; where it takes long, in fewer rounds.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from step import summary

from jointmae_hf import geometry_joint_mae as geometry
from jointmae_hf.training.pretraining import device_name, versions


PACKAGES = ("numba", "torch_quickfps", "pykdtree", "fpsample")
# Points, samples, neighbours, clouds in a batch; each also alone.
SIZES = [(1024, 64, 32, 32), (2048, 512, 16, 32), (8192, 512, 32, 32), (100_000, 2048, 32, 4)]
CENTERS, NEIGHBORS = [512, 256, 64], [16, 8, 8]  # of `base`
HEIGHTS, LEAF_SIZES = (3, 5, 7), (8, 16, 32)
GROWTH = {"points": [1024, 2048, 4096, 8192, 16384, 65536, 262_144, 1_000_000], "batch": [1, 2, 4, 8, 16, 32, 64]}
SLOW = 0.5  # seconds of a call, above which there are only two rounds
OURS, PAIR, PLAIN = "ours", "torch_quickfps + pykdtree", "plain torch"

Run = Callable[[], Any]


def clouds(batch_size: int, num_points: int, seed: int = 0) -> torch.Tensor:
    """Points near a sphere `(batch, num_points, 3)`."""
    points = torch.randn(batch_size, num_points, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=-1) + 0.01 * points


def plain(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same call without kernels."""
    kernels, geometry.kernels = geometry.kernels, None
    try:
        return function(*arguments)
    finally:
        geometry.kernels = kernels


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- Contenders


def samplers(points: torch.Tensor, num_samples: int) -> dict[str, Run]:
    """Exact farthest point sampling of a batch by packages."""
    found: dict[str, Run] = {}
    if installed("torch_quickfps"):
        import torch_quickfps

        for height in HEIGHTS:
            found[f"torch_quickfps, height {height}"] = lambda h=height: torch_quickfps.sample_idx(
                points, num_samples, h=h, start_idx=0
            )
    if installed("fpsample"):
        import fpsample

        arrays = [cloud.numpy() for cloud in points]
        found["fpsample"] = lambda: [
            fpsample.bucket_fps_kdline_sampling(cloud, num_samples, h=7, start_idx=0) for cloud in arrays
        ]
    return found


def trees(points: torch.Tensor, centers: torch.Tensor, k: int, pool: ThreadPoolExecutor) -> dict[str, Run]:
    """Exact neighbours of a batch by pykdtree."""
    if not installed("pykdtree"):
        return {}
    from pykdtree.kdtree import KDTree

    pairs = list(zip(points.numpy(), centers.numpy(), strict=True))
    found: dict[str, Run] = {}
    for size in LEAF_SIZES:

        def search(pair, size=size):
            return KDTree(pair[0], leafsize=size).query(pair[1], k, sqr_dists=True)

        found[f"pykdtree, leaves of {size}"] = lambda search=search: [search(pair) for pair in pairs]
        if len(pairs) > 1:
            found[f"pykdtree, leaves of {size}, pool"] = lambda search=search: list(pool.map(search, pairs))
    return found


def sample_and_group(points: torch.Tensor, num_samples: int, k: int) -> torch.Tensor:
    return geometry.knn(geometry.gather_points(points, geometry.farthest_point_sample(points, num_samples)), points, k)


def chamfer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    first = first.clone().requires_grad_()
    return torch.autograd.grad(geometry.chamfer_distance(first, second).sum(), first)[0]


def chamfer_by_trees(first: torch.Tensor, second: torch.Tensor, pool: ThreadPoolExecutor) -> dict[str, Run]:
    if not installed("pykdtree"):
        return {}
    from pykdtree.kdtree import KDTree

    pairs = list(zip(first.numpy(), second.numpy(), strict=True))

    def indices(pair):
        return KDTree(pair[1]).query(pair[0], 1)[1].astype("int64"), KDTree(pair[0]).query(pair[1], 1)[1].astype(
            "int64"
        )

    def gradient():
        found = list(pool.map(indices, pairs))
        to_second, to_first = (torch.stack([torch.from_numpy(one[i]) for one in found]) for i in range(2))
        moved = first.clone().requires_grad_()
        forward = (moved - geometry.gather_points(second, to_second)).square().sum(-1).mean(-1)
        backward = (geometry.gather_points(moved, to_first) - second).square().sum(-1).mean(-1)
        return torch.autograd.grad((forward + backward).sum(), moved)[0]

    return {"pykdtree": gradient}


# ---- Measuring


def seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def alternate(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of all runs: all of them in every round. The slow ones stop after two rounds."""
    first = {name: seconds(run) for name, run in runs.items()}  # compiles and warms up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            if turn < 2 or first[name] < SLOW:
                times[name].append(seconds(run))
    return times


def best(times: dict[str, list[float]], prefix: str) -> str | None:
    names = [name for name in times if name.startswith(prefix)]
    return min(names, key=lambda name: statistics.median(times[name]), default=None)


def result_of(times: dict[str, list[float]], batch_size: int, **derived: list[float] | None) -> dict[str, Any]:
    """Milliseconds of a cloud, and how many times as long as ours each other takes, round by round."""
    times = times | {name: values for name, values in derived.items() if values}
    per_cloud = {name: summary([1e3 * value / batch_size for value in values]) for name, values in times.items()}
    ratios = {
        name: summary([theirs / own for own, theirs in zip(times[OURS], values, strict=False)])
        for name, values in times.items()
        if name != OURS
    }
    return {"batch_size": batch_size, "ms_per_cloud": per_cloud, "ratio_to_ours": ratios}


def added(times: dict[str, list[float]]) -> list[float] | None:
    """Sampling and neighbours by the pair of packages, each in its best setting."""
    sampler, tree = best(times, "torch_quickfps"), best(times, "pykdtree")
    if sampler is None or tree is None:
        return None
    return [a + b for a, b in zip(times[sampler], times[tree], strict=False)]


def sampling_and_neighbors(sizes: tuple[int, ...], batch_size: int, rounds: int, pool: ThreadPoolExecutor):
    num_points, num_samples, k, _ = sizes
    points = clouds(batch_size, num_points)
    centers = geometry.gather_points(points, geometry.farthest_point_sample(points, num_samples))
    runs = {
        OURS: lambda: sample_and_group(points, num_samples, k),
        "ours, sampling alone": lambda: geometry.farthest_point_sample(points, num_samples),
        **samplers(points, num_samples),
        **trees(points, centers, k, pool),
        PLAIN: lambda: plain(sample_and_group, points, num_samples, k),
    }
    times = alternate(runs, rounds)
    return result_of(times, batch_size, **{PAIR: added(times)})


def multiscale(batch_size: int, rounds: int, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """All three scales by us, against the first scale alone by packages, and all scales by plain torch."""
    points = clouds(batch_size, 2048)
    centers = geometry.gather_points(points, geometry.farthest_point_sample(points, CENTERS[0]))
    runs = {
        OURS: lambda: geometry.multiscale_groups(points, CENTERS, NEIGHBORS),
        **samplers(points, CENTERS[0]),
        **trees(points, centers, NEIGHBORS[0], pool),
        PLAIN: lambda: plain(geometry.multiscale_groups, points, CENTERS, NEIGHBORS),
    }
    times = alternate(runs, rounds)
    return result_of(times, batch_size, **{f"{PAIR}, first scale alone": added(times)})


def chamfers(num_pairs: int, num_points: int, rounds: int, pool: ThreadPoolExecutor) -> dict[str, Any]:
    first, second = clouds(num_pairs, num_points, 1), clouds(num_pairs, num_points, 2)
    runs = {OURS: lambda: chamfer(first, second), PLAIN: lambda: plain(chamfer, first, second)}
    if num_points > 64:
        runs |= chamfer_by_trees(first, second, pool)
    times = alternate(runs, rounds)
    return {**result_of(times, num_pairs), "ms_of_all": 1e3 * statistics.median(times[OURS])}


def growth(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of a cloud against its points (2,048 samples at most, 32 neighbours), and against the batch."""
    curves: dict[str, list[dict[str, Any]]] = {"points": [], "batch": []}
    for num_points in GROWTH["points"]:
        points = clouds(1, num_points)
        num_samples = min(2048, num_points // 4)
        times = alternate({"all": lambda p=points, n=num_samples: sample_and_group(p, n, 32)}, rounds)
        row = {"points": num_points, "samples": num_samples, "ms": 1e3 * statistics.median(times["all"])}
        curves["points"].append(row)
    for batch_size in GROWTH["batch"]:
        points = clouds(batch_size, 2048)
        times = alternate({"all": lambda p=points: geometry.multiscale_groups(p, CENTERS, NEIGHBORS)}, rounds)
        row = {"batch": batch_size, "ms_per_cloud": 1e3 * statistics.median(times["all"]) / batch_size}
        curves["batch"].append(row)
    return curves


def print_row(name: str, row: dict[str, Any]):
    print(name, flush=True)
    for contender, value in row["ms_per_cloud"].items():
        ratio = row["ratio_to_ours"].get(contender)
        times = "" if ratio is None else f"  {ratio['median']:8.2f} x"
        print(f"  {value['median']:10.4f} ms{times}  {contender}", flush=True)


def draw(result: dict[str, Any], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, points, batch) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    rows = {name: row for name, row in result["tasks"].items() if "Chamfer" not in name}
    for offset, (prefix, color) in enumerate(((OURS, "#d95f02"), (PAIR, "#9a9a9a"), (PLAIN, "#d0d0d0"))):
        for place, row in enumerate(rows.values()):
            name = next((name for name in row["ms_per_cloud"] if name.startswith(prefix)), None)
            if name is not None:
                value = row["ms_per_cloud"][name]["median"]
                bars.barh(place + 0.27 * offset, value, 0.25, color=color, label=prefix if place == 0 else None)
    bars.set_yticks([place + 0.27 for place in range(len(rows))], list(rows), fontsize=7)
    bars.set(xscale="log", xlabel="ms/cloud")
    bars.invert_yaxis()
    bars.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    for axis, name, key in ((points, "points", "ms"), (batch, "batch", "ms_per_cloud")):
        curve = result["growth"][name]
        axis.plot([row[name] for row in curve], [row[key] for row in curve], marker="o", color="#d95f02")
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms/cloud")
        axis.grid(alpha=0.3)
    points.set_title("sampling and 32 neighbours of one cloud", fontsize=9)
    batch.set_title("groups of three scales, 2,048 points", fontsize=9)
    figure.suptitle(result["machine"]["device"], fontsize=10)
    figure.savefig(path, dpi=90)


def package_versions() -> dict[str, str]:
    found = versions()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the JSON and the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/geometry.py", *sys.argv[1:]]),
        "machine": {
            "device": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "load_average_at_start": os.getloadavg(),
        },
        "versions": package_versions(),
        "rounds": arguments.rounds,
        "tasks": {},
    }
    rounds, tasks = arguments.rounds, result["tasks"]
    with ThreadPoolExecutor(arguments.threads) as pool:
        for batch_size in (32, 1):
            name = f"2048 -> 512 / 256 / 64, all scales, batch {batch_size}"
            tasks[name] = multiscale(batch_size, rounds, pool)
            print_row(name, tasks[name])
        for sizes in SIZES:
            for batch_size in (sizes[3], 1):
                name = f"{sizes[0]} -> {sizes[1]} x {sizes[2]}, batch {batch_size}"
                tasks[name] = sampling_and_neighbors(sizes, batch_size, rounds, pool)
                print_row(name, tasks[name])
        for num_pairs, num_points in ((2048, 32), (16, 2048)):
            name = f"Chamfer with gradient, {num_pairs} pairs of {num_points} x {num_points}"
            tasks[name] = chamfers(num_pairs, num_points, rounds, pool)
            print_row(name, tasks[name])
    result["growth"] = growth(min(rounds, 5))
    result["machine"]["load_average_at_end"] = os.getloadavg()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
