"""What a short pre-training run owes to single choices: each trial changes one of them and is judged like all others.

    python benchmarks/trials.py --output outputs/trials
    python benchmarks/trials.py --output outputs/trials --trials "mask ratio 0.5" "3D only" --seeds 0 1 2
    python benchmarks/trials.py --output benchmarks/results/ladder --ladder --seeds 0 1 2 --num_threads 1

Writes one JSON for each trial and seed into OUTPUT, leaves out what is there already, and prints a table of all of it.
Several processes may share the work. The protocol is that of `learning_curve.py`; nothing is chosen on test data, but
whoever picks a recipe from this table does choose on it, so a recipe is to be confirmed on other sets.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from learning_curve import EMBEDDED_DATASET, evaluate

from jointmae_hf import JointMAEForPreTraining
from jointmae_hf.data.loading import load_point_table
from jointmae_hf.training import PreTrainingArguments, pretrain
from jointmae_hf.training.arguments import build_config
from jointmae_hf.training.pretraining import build_untrained_model, device_name, git_commit, versions


# Arguments of `examples/pretrain.py`, and fields of the configuration, that differ from the defaults.
TRIALS: dict[str, tuple[dict, str]] = {
    "untrained": ({}, ""),
    "default": ({}, ""),
    "mask ratio 0.5": ({}, "mask_ratio=0.5"),
    "mask ratio 0.9": ({}, "mask_ratio=0.9"),
    "32 target points": ({}, "num_target_points=32,point_loss_weight=16"),
    "128 target points": ({}, "num_target_points=128,point_loss_weight=6"),
    "64 tokens of 32 target points": ({}, "num_centers=[256,64],num_target_points=32,point_loss_weight=16"),
    "targets in units of their own size": ({}, "norm_point_loss=true,point_loss_weight=0.2"),
    "positions at the first block only": ({}, "position_every_layer=false"),
    "learning rate 5e-4": ({"learning_rate": 5e-4}, ""),
    "learning rate 2e-3": ({"learning_rate": 2e-3}, ""),
    "batch size 32": ({"batch_size": 32}, ""),
    "modality dropout 0.25": ({}, "modality_dropout=0.25"),
    "modality dropout 0.5": ({}, "modality_dropout=0.5"),
    "alignment radii 1 2 4": ({}, "alignment_radii=[1,2,4]"),
    "alignment radii 4 8 any": ({}, "alignment_radii=[4,8,null]"),
    "2D loss weight 0.2": ({}, "pixel_loss_weight=0.2"),
    "cross loss weight 1": ({}, "cross_loss_weight=1"),
    "no local alignment": ({}, "use_local_alignment=false"),
    # What the paper adds to masked reconstruction in 3D, one by one, up to `default`.
    "3D only": ({}, "use_image_branch=false"),
    "no local alignment, no cross loss": ({}, "use_local_alignment=false,use_cross_loss=false"),
    "no cross loss": ({}, "use_cross_loss=false"),
}
LADDER = (
    "untrained",
    "3D only",
    "no local alignment, no cross loss",
    "no cross loss",
    "default",
    "modality dropout 0.5",
)


def run(name: str, seed: int, samples: int, tables: dict, threads: int | None) -> dict:
    """Trains and evaluates one trial."""
    overrides, config_overrides = TRIALS[name]
    with tempfile.TemporaryDirectory() as folder:
        arguments = PreTrainingArguments(
            **{
                "dataset": str(EMBEDDED_DATASET),
                "output_dir": folder,
                "config_overrides": config_overrides or None,
                "seed": seed,
                "num_threads": threads,
                "evaluate": False,
                "save_steps": 0,
                **overrides,
                "max_steps": samples // overrides.get("batch_size", PreTrainingArguments.batch_size),
            }
        )
        if name == "untrained":
            model, seconds = build_untrained_model(build_config(arguments), seed), 0
        else:
            seconds = pretrain(arguments)["seconds"]
            model = JointMAEForPreTraining.from_pretrained(folder)
    num_points = model.config.num_points
    found = evaluate(model, {key: load(num_points) for key, load in tables.items()}, last_only=True)
    return {
        "trial": name,
        "seed": seed,
        "samples": 0 if name == "untrained" else samples,
        "overrides": overrides,
        "config_overrides": config_overrides,
        "arguments": asdict(arguments) | {"dataset": "examples/data/kicad-parts", "output_dir": None},
        "versions": versions(),
        "git_commit": git_commit(),
        "device": device_name(model.device),
        "seconds": seconds,
        **found,
    }


def table(output: Path, names: Sequence[str]) -> str:
    """All results of some trials, as Markdown: means over seeds, with the deviation where there are several."""
    records = defaultdict(list)
    for path in sorted(output.glob("*.json")):
        record = json.loads(path.read_text())
        records[record["trial"], record["samples"]].append(record)

    def cell(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{round(statistics.mean(values), 1) + 0.0:.1f}{deviation}"  # no negative zero

    sets = list(next(iter(records.values()))[0]["accuracy_by_layer"])
    head = ["trial", "samples", "seeds", *(f"{name}, SVM %" for name in sets), "rank", "3D gap %", "2D gap %"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in names:
        for (trial, samples), found in sorted(records.items()):
            if trial == name:
                columns = [[r["accuracy_by_layer"][key][-1] for r in found] for key in sets]
                columns.append([r["effective_rank"][sets[0]] for r in found])
                for term in ("loss_3d", "loss_2d"):
                    columns.append([gap(r, term) for r in found if term in r["held_out"]])
                cells = [cell(values) if values else "" for values in columns]
                lines.append([name, f"{samples:,}", str(len(found)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gap(record: dict, term: str) -> float:
    """By how many percent a held-out loss is below the one with the encoder's output averaged."""
    return 100 * (1 - record["held_out"][term] / record["encoder_output_averaged"][term])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME")
    parser.add_argument("--ladder", action="store_true", help="the trials that add the parts of the method one by one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=9600, help="samples of each run")
    parser.add_argument("--num_threads", type=int, help="threads of this process (default: all cores)")
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=FOLDER", help="further labelled sets")
    arguments = parser.parse_args()

    folders = {"KiCad parts": str(EMBEDDED_DATASET), **dict(entry.split("=", 1) for entry in arguments.dataset)}
    tables = {
        name: lambda num_points, folder=folder: tuple(
            load_point_table(folder, split, num_points=num_points) for split in ("train", "test")
        )
        for name, folder in folders.items()
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    trials = LADDER if arguments.ladder else arguments.trials
    for seed in arguments.seeds:
        for name in trials:
            path = arguments.output / f"{name.replace(' ', '_')}-{arguments.samples}-seed{seed}.json"
            claim = path.with_suffix(".running")
            if path.exists() or claim.exists():
                print(f"left out, since it is there: {path if path.exists() else claim}")
                continue
            claim.touch()
            try:
                record = run(name, seed, arguments.samples, tables, arguments.num_threads)
                path.write_text(json.dumps(record, indent=1) + "\n")
            finally:
                claim.unlink()
    print(table(arguments.output, LADDER if arguments.ladder else list(TRIALS)))


if __name__ == "__main__":
    main()
