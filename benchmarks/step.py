"""A training step and features of `base` beside its peers, in one run: time, memory, ratios, and how cost grows.

    python benchmarks/step.py --point_mae FOLDER --point_m2ae FOLDER --output benchmarks/results/step

Peers are brought by whoever runs it (`peers.py` says how); without a folder a peer is left out. Writes OUTPUT.json and
OUTPUT.png. Takes half an hour on two cores, which should have nothing else to do; `--compiled` adds what torch.compile
makes of every contender, which takes far longer to compile than to measure.

Every contender runs in a process of its own, in each of several settings, and all of them take turns, round by round:
ratios are of neighbours in time. Two comparisons are made, in any precision and in float32:

- as published: what a user of each has. Peers run with plain torch in the place of their CUDA extensions, we as in the
  programs of this package, where the threads share a batch; the C library's allocator is left as it was found.
- best: of all settings, for each side the one with the lowest median. Peers have our geometry, and both an allocator
  that keeps what is freed.

A training step is forward pass, backward pass and fused AdamW; random masks, views and stochastic depth are drawn as
in training. Memory is the highest resident set of a process over some training steps, less what it held before the
model was built. bfloat16 is measured where the processor computes in it.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import budget
import torch
from peers import PEERS

from jointmae_hf import JointMAEConfig
from jointmae_hf.evaluation.features import map_batches
from jointmae_hf.training.pretraining import device_name, git_commit, versions
from jointmae_hf.training.threads import ReplicaThreads


OURS = "Joint-MAE"
PUBLISHED = "as published"
# Task, batch size, calls in a turn.
TASKS = {"training": (16, 2), "features": (32, 3), "latency": (1, 20)}
# What this project wants of the ratio to a peer, best settings of both sides.
AIMS = {
    ("training", "Point-MAE"): 1.5,
    ("training", "Point-M2AE"): 7.0,
    ("features", "Point-MAE"): 1.3,
    ("features", "Point-M2AE"): 6.0,
    ("latency", "Point-MAE"): 1 / 0.6,
}
MEMORY_AIM_GB = 1.2
GROWTH = {
    "batch": [1, 2, 4, 8, 16, 32, 64],
    "points": [512, 1024, 2048, 4096, 8192],
    "width": [128, 192, 256, 384, 512, 768],
}
# Of which settings each side takes its fastest: those with these words in their names.
COMPARISONS = {
    PUBLISHED: {PUBLISHED},
    f"{PUBLISHED}, fp32": {PUBLISHED, "fp32"},
    "best": set(),
    "best, fp32": {"fp32"},
}
_PATIENCE = 1800  # seconds for one answer of a contender, compilation included


@dataclass(frozen=True)
class Setting:
    """
    How a contender runs.

    Args:
        as_published: plain torch for the extensions of peers, threads that share batches for us, and the allocator as
            it is found; else see [`keep_freed_memory`].
        compiled: by torch.compile.
        precision: bfloat16 by autocast.
    """

    as_published: bool = False
    compiled: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.precision}, {PUBLISHED if self.as_published else 'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Spec:
    """What a process is to build."""

    contender: str
    folder: str | None = None
    setting: Setting = Setting()
    threads: int = 2
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)


def keep_freed_memory():
    """
    Lets the C library keep large blocks instead of returning them to the system, which must clear their pages again
    for the next tensor: a quarter of the time of a step with tensors of 50 MB. glibc only; elsewhere it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap, which frees at once
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ---- In the process of a contender


def serve(connection: Connection, spec: Spec):
    """Builds a contender and answers requests `(task, batch size, calls)` with measurements, until it gets `None`."""
    torch.set_num_threads(spec.threads)
    torch.manual_seed(0)
    if not spec.setting.as_published:
        keep_freed_memory()
    if spec.setting.compiled:  # the compiler's own memory is not the model's
        importlib.import_module("torch._inductor.compile_fx")
    try:
        bench = Bench(spec)
        connection.send({"parameters": sum(parameter.numel() for parameter in bench.contender.model.parameters())})
        while (request := connection.recv()) is not None:
            task, *sizes = request
            connection.send(getattr(bench, task)(*sizes))
    except Exception:
        traceback.print_exc()
        connection.send({"error": traceback.format_exc(limit=0).strip().splitlines()[-1]})


class Bench:
    """One contender in one setting, with its optimizer."""

    def __init__(self, spec: Spec):
        self.before = resident_bytes()
        peer = {} if spec.folder is None else {"folder": spec.folder, "plain": spec.setting.as_published}
        self.contender = PEERS[spec.contender](**peer, **spec.overrides)
        self.setting = spec.setting
        self.replicas = None
        if spec.contender == OURS and spec.setting.as_published:
            self.replicas = ReplicaThreads(self.contender.model.train(), spec.threads, self._precision)
        self.loss = self._prepared(self.contender.loss)
        self.pooled = self._prepared(self.contender.features)
        self.optimizer = torch.optim.AdamW(self.contender.model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.setting.precision == "bf16")

    def _prepared(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        function = torch.compile(function) if self.setting.compiled else function

        def run(batch: torch.Tensor) -> torch.Tensor:
            with self._precision():
                return function(batch)

        return run

    def _step(self, batch: torch.Tensor):
        if self.replicas is None:
            self.loss(batch).backward()
        else:
            self.replicas.backward({"point_values": batch}, ["loss"])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _pooled(self, batch: torch.Tensor):
        if self.replicas is None:
            self.pooled(batch)
        else:
            size = math.ceil(len(batch) / torch.get_num_threads())
            map_batches(lambda rows: self.pooled(batch[rows]), len(batch), size, batch.device)

    def training(self, batch_size: int, calls: int) -> dict[str, Any]:
        self.contender.model.train()
        return self._timed(self._step, batch_size, calls)

    @torch.inference_mode()
    def features(self, batch_size: int, calls: int) -> dict[str, Any]:
        self.contender.model.eval()
        return self._timed(self._pooled, batch_size, calls)

    latency = features

    def _timed(self, function: Callable[[torch.Tensor], Any], batch_size: int, calls: int) -> dict[str, Any]:
        batch, seconds = self.contender.sample(batch_size), []
        for _ in range(calls):
            started = time.perf_counter()
            function(batch)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def memory(self, batch_size: int, calls: int) -> dict[str, Any]:
        """Highest resident set over some steps after the first, less what there was before the model."""
        self.training(batch_size, 1)
        reset_peak()
        self.training(batch_size, calls)
        return {"bytes": peak_bytes() - self.before}


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# ---- In the process that compares them


class Worker:
    """A contender in its process, from the outside."""

    def __init__(self, spec: Spec):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, spec), daemon=True)
        self.process.start()
        other.close()
        self.spec, self.error = spec, None
        self.parameters = self._answer().get("parameters")

    def ask(self, task: str, batch_size: int, calls: int) -> dict[str, Any]:
        """The measurements, or nothing once something went wrong; `error` says what."""
        if self.error is None:
            self.connection.send((task, batch_size, calls))
            return self._answer()
        return {}

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self.connection.recv() if self.connection.poll(_PATIENCE) else {"error": "no answer in time"}
        except EOFError:
            answer = {"error": f"the process ended with code {self.process.exitcode}"}
        self.error = answer.get("error")
        if self.error is not None:
            print(f"{self.spec.contender}, {self.spec.setting}: {self.error}", flush=True)
        return answer

    def close(self):
        self.process.kill()
        self.process.join()


def compare(specs: list[Spec], rounds: int) -> dict[str, Any]:
    """Seconds of every contender and setting: all of them in turn, round by round, task after task."""
    found: dict[str, Any] = {}
    workers = [Worker(spec) for spec in specs]
    for worker in workers:
        contender = found.setdefault(worker.spec.contender, {"parameters": worker.parameters, "settings": {}})
        contender["settings"][str(worker.spec.setting)] = {}
    for task, (batch_size, calls) in TASKS.items():
        for turn in range(-1, rounds):  # the first is for compilation and warming up
            for worker in workers:
                answer = worker.ask(task, batch_size, max(calls, 3) if turn < 0 else calls)
                setting = found[worker.spec.contender]["settings"][str(worker.spec.setting)]
                if worker.error is not None:
                    setting["error"] = worker.error
                    setting.pop(task, None)
                elif turn >= 0:
                    setting.setdefault(task, []).append(answer["seconds"])
            print(f"{task}: round {turn + 1} of {rounds}", flush=True)
    for worker in workers:
        worker.close()
    for contender in found.values():
        for name, words in COMPARISONS.items():
            contender[name] = {task: best_setting(contender["settings"], task, words) for task in TASKS}
    return found


def best_setting(settings: dict[str, Any], task: str, words: set[str]) -> str | None:
    """The one with the lowest median, of those with all `words` in their names."""
    names = [name for name, measured in settings.items() if task in measured and words <= set(name.split(", "))]
    return min(names, key=lambda name: statistics.median(sum(settings[name][task], [])), default=None)


def ratios(found: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times faster we are than each peer, from the turns of one round each, in every comparison."""
    rows = []
    for task in TASKS:
        for peer in [name for name in found if name != OURS]:
            for best in COMPARISONS:
                sides = {name: found[name][best][task] for name in (OURS, peer)}
                if None in sides.values():
                    continue
                turns = [
                    [statistics.median(turn) for turn in found[name]["settings"][setting][task]]
                    for name, setting in sides.items()
                ]
                ratio = summary([theirs / own for own, theirs in zip(*turns, strict=True)])
                row = {"task": task, "peer": peer, "settings": best, "ratio": ratio}
                if "fp32" not in best and (task, peer) in AIMS:
                    row |= {"aim": AIMS[task, peer], "reached": ratio["median"] >= AIMS[task, peer]}
                rows.append(row)
    return rows


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "lower quartile": low, "upper quartile": high, "min": min(values)}


def summarise(found: dict[str, Any]):
    """Replaces the seconds of each setting by their summary, and adds samples per second."""
    for contender in found.values():
        for measured in contender["settings"].values():
            for task, (batch_size, _) in TASKS.items():
                if task in measured:
                    measured[task] = {"seconds": summary(sum(measured[task], []))}
                    measured[task]["samples_per_second"] = batch_size / measured[task]["seconds"]["median"]


def measure_alone(spec: Spec, *requests: tuple[str, int, int]) -> list[dict[str, Any]]:
    """The answers of a fresh process."""
    worker = Worker(spec)
    answers = [worker.ask(*request) for request in requests]
    worker.close()
    return answers


def growth(threads: int, setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Seconds and memory of a training step, and seconds of features, against batch, points and width."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, values in GROWTH.items():
        for value in values:
            batch_size = value if name == "batch" else TASKS["training"][0]
            overrides = {"points": {"num_points": value}, "width": scaled_widths(value)}.get(name, {})
            spec = Spec(OURS, None, setting, threads, overrides)
            memory, training, features = measure_alone(
                spec, ("memory", batch_size, 1), ("training", batch_size, 3), ("features", batch_size, 3)
            )
            point = {name: value, "batch_size": batch_size}
            for task, answer in (("training", training), ("features", features)):
                if "seconds" in answer:
                    point[f"{task}_seconds_per_sample"] = statistics.median(answer["seconds"]) / batch_size
            if "bytes" in memory:
                point["training_gb"] = memory["bytes"] / 1e9
            curves.setdefault(name, []).append(point)
            print(json.dumps(point), flush=True)
    return curves


def scaled_widths(width: int) -> dict[str, Any]:
    """`base` with another width, everything in proportion."""
    sizes = [width // 4, width // 2, width]
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "point_embed_sizes": sizes,
        "image_embed_sizes": sizes,
        "decoder_hidden_size": width // 2,
        "decoder_intermediate_size": 2 * width,
        "decoder_num_attention_heads": width // 64,
    }


def floors(threads: int) -> dict[str, Any]:
    """Seconds of each stage on this machine, at the rates measured here, for us and Point-MAE; and on an H100."""
    torch.set_num_threads(threads)
    config, batch_size = JointMAEConfig.from_preset("base"), TASKS["training"][0]
    keep_freed_memory()
    rates = budget.matmul_rate(budget.linear_shapes(config, batch_size), torch.float32, "cpu")
    machine = {"flops_per_second": max(rates.values()), "bytes_per_second": budget.copy_rate("cpu")}
    result: dict[str, Any] = {"matmul_flops_per_second": rates, "machine": machine, "H100": budget.H100}
    for name, work in ((OURS, budget.joint_mae(config)), ("Point-MAE", budget.point_mae())):
        stages = {}
        for stage, spent in budget.stages(work, batch_size, 4, training=True).items():
            forward = sum(part.multiply_adds for part in work if part.stage == stage)
            stages[stage] = {
                "multiply_adds_per_sample_forward": forward,
                "flops": spent.flops,
                "bytes_fp32": spent.bytes,
                "floor_seconds": spent.seconds(**machine),
                "floor_seconds_H100_bf16": budget.stages(work, batch_size, 2, True)[stage].seconds(**budget.H100),
            }
        result[name] = {
            "stages": stages,
            "floor_seconds": sum(stage["floor_seconds"] for stage in stages.values()),
            "floor_seconds_H100_bf16": sum(stage["floor_seconds_H100_bf16"] for stage in stages.values()),
        }
    return result


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def settings(compiled: bool) -> list[Setting]:
    precisions = ["fp32", "bf16"] if has_bfloat16() else ["fp32"]
    ways = [{"as_published": True}, {}, {"compiled": True}] if compiled else [{"as_published": True}, {}]
    return [Setting(**way, precision=precision) for way in ways for precision in precisions]


def draw(result: dict[str, Any], path: Path):
    """Training and features of all contenders, and how cost grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5))
    contenders = result["contenders"]
    for axis, (task, (batch_size, _)) in zip(axes[0], TASKS.items(), strict=True):
        names = [name for name, contender in contenders.items() if contender["best"][task]]
        values = [contenders[name]["settings"][contenders[name]["best"][task]][task] for name in names]
        if task == "latency":
            values, label = [1e3 * value["seconds"]["median"] for value in values], "features, batch 1, ms"
        else:
            values, label = [value["samples_per_second"] for value in values], f"{task}, batch {batch_size}, clouds/s"
        bars = axis.barh(names, values, color=["#d95f02" if name == OURS else "#9a9a9a" for name in names])
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=label)
        axis.margins(x=0.15)
    for axis, (name, curve) in zip(axes[1], result["growth"].items(), strict=True):
        for key, label in (("training_seconds_per_sample", "training"), ("features_seconds_per_sample", "features")):
            known = [point for point in curve if key in point]
            axis.plot([p[name] for p in known], [1e3 * p[key] for p in known], marker="o", label=f"{label}, ms/cloud")
        axis.set(xlabel=name, xscale="log", yscale="log", title=f"cost against {name}")
        axis.set_xticks(GROWTH[name], [str(value) for value in GROWTH[name]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        memory = axis.twinx()
        known = [point for point in curve if "training_gb" in point]
        memory.plot([p[name] for p in known], [p["training_gb"] for p in known], "k:", label="training, GB")
        memory.set_ylim(bottom=0)
        axis.plot([], [], "k:", label="training, GB (right)")
    axes[1, 0].legend(fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result["machine"]["device"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--point_mae", help="clone of Point-MAE")
    parser.add_argument("--point_m2ae", help="clone of Point-M2AE")
    parser.add_argument("--torch_pointcloud", help="folder that torch-pointcloud is installed in")
    parser.add_argument("--vit_mae", action="store_true", help="measure transformers' ViTMAE of the same width, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="measure every contender compiled, too")
    parser.add_argument("--no_growth", action="store_true", help="leave out the curves of cost")
    parser.add_argument("--only_growth", action="store_true", help="measure these curves anew for a result there is")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the JSON and the picture")
    arguments = parser.parse_args()
    if arguments.only_growth:
        result = json.loads(arguments.output.with_suffix(".json").read_text())
        result |= {"growth": growth(arguments.threads, Setting()), "growth_commit": git_commit()}
        write(result, arguments.output)
        return

    folders = {
        OURS: None,
        "ViTMAE": None,
        "Point-MAE": arguments.point_mae,
        "Point-M2AE": arguments.point_m2ae,
        "Point-MAE (torch-pointcloud)": arguments.torch_pointcloud,
        "Point-M2AE (torch-pointcloud)": arguments.torch_pointcloud,
    }
    own = {OURS, "ViTMAE"} if arguments.vit_mae else {OURS}
    present = {name: folder for name, folder in folders.items() if folder or name in own}
    specs = [
        Spec(name, folder, setting, arguments.threads)
        for name, folder in present.items()
        for setting in settings(arguments.compiled)
    ]
    torch.set_num_threads(arguments.threads)
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/step.py", *words]),
        "machine": {
            "device": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "has_bfloat16": has_bfloat16(),
            "load_average_at_start": os.getloadavg(),
        },
        "versions": versions(),
        "git_commit": git_commit(),
        "tasks": {task: {"batch_size": size, "calls_in_a_turn": calls} for task, (size, calls) in TASKS.items()},
        "rounds": arguments.rounds,
        "budget": floors(arguments.threads),
    }
    found = compare(specs, arguments.rounds)
    result["ratios"] = ratios(found)
    summarise(found)
    for spec in specs:
        (answer,) = measure_alone(spec, ("memory", TASKS["training"][0], 2))
        if "bytes" in answer:
            found[spec.contender]["settings"][str(spec.setting)]["training_gb"] = answer["bytes"] / 1e9
    result["contenders"] = found
    result["memory_aim_gb"] = MEMORY_AIM_GB
    result["growth"] = {} if arguments.no_growth else growth(arguments.threads, Setting())
    result["growth_commit"] = result["git_commit"]
    result["machine"]["load_average_at_end"] = os.getloadavg()
    write(result, arguments.output)


def write(result: dict[str, Any], output: Path):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if result["growth"]:
        draw(result, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
