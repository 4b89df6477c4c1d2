"""All downstream tasks of one pre-trained model on one data set, each beside what it has to beat.

    python benchmarks/downstream.py outputs/pretrain --output benchmarks/results/downstream/kicad
    python benchmarks/downstream.py outputs/pretrain --data outputs/ldraw --output benchmarks/results/downstream/ldraw
    python benchmarks/downstream.py outputs/pretrain --tasks linear_svm few_shot --output outputs/downstream

Runs the commands of `examples/` one after the other and leaves a result file of each in OUTPUT; what is there already
is not repeated, and what fine-tuning was stopped in goes on. Frozen features stand beside those of the same network
untrained and a random forest on shape histograms; fine-tuning beside training from scratch with the same steps and a
random forest on shape histograms, or on descriptors of points where parts are told. There a head on the frozen encoder
stands beside one on the same network untrained, too.

Everything is fixed beforehand: seeds 0, 1 and 2, shares of the labels, and in fine-tuning 800 steps (600 for parts) of
32 clouds, scaled by 0.8 to 1.25, in bfloat16, whatever the share, at a learning rate of 2e-3, a tenth of it for an
encoder that is pre-trained, with a dropout of 0.1, of 0.5 below half of the labels: chosen on held-out training shapes
(benchmarks/log.md).

`--data` is a folder with a train and a test split (without it KiCad parts), or an npz of `points` (n, any, 3),
`labels`, `class_names` and `is_test`, of which a folder is made in outputs/ first.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jointmae_hf.evaluation.results import read_result, weights_digest
from jointmae_hf.evaluation.tasks import load_encoder


TASKS = ("linear_svm", "few_shot", "retrieval", "classification", "part_segmentation")
FRACTIONS = (0.01, 0.05, 0.1, 0.5, 1.0)
SEEDS = ("--seeds", "0", "1", "2")
STEPS = {"classification": 800, "part_segmentation": 600}
RECIPE = (
    *("--validation_fraction", "0", "--mixed_precision", "bf16", "--scale_min", "0.8", "--scale_max", "1.25"),
    *("--learning_rate", "2e-3"),
)


def tuning(task: str, fraction: float = 1.0) -> list[str]:
    """How a network is tuned with a share of the labels: the fewer, the sooner it knows them by heart."""
    dropout = 0.1 if fraction >= 0.5 else 0.5
    overrides = ["--config_overrides", f"classifier_dropout={dropout}"]
    return ["--max_steps", str(STEPS[task]), *RECIPE, *overrides, *SEEDS]


def commands(model: str, is_kicad: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Task, name of the result, and command without data and output, of everything there is to run."""
    pretrained = ["--model_name_or_path", model]
    untrained, forest = [*pretrained, "--untrained"], ["--baseline", "random_forest"]
    frozen = (("pretrained", pretrained), ("untrained", untrained), ("forest", forest))
    shares = {f: [] if f == 1 else ["--train_fraction", str(f)] for f in reversed(FRACTIONS)}
    for fraction, share in shares.items():
        for kind, source in frozen:
            yield "linear_svm", f"{kind}-{fraction:g}", ["linear_svm.py", *source, *share, *SEEDS]
    queries = ["--queries", "10"] if is_kicad else []  # too few classes of KiCad parts have 20 test shapes
    for ways in ("5", "10"):
        for shots in ("10", "20"):
            sizes = ["--ways", ways, "--shots", shots, *queries]
            for kind, source in frozen:
                yield "few_shot", f"{kind}-{ways}-{shots}", ["few_shot.py", *source, *sizes]
    for kind, source in frozen[:2]:
        yield "retrieval", kind, ["retrieval.py", *source, *SEEDS]
    scratch = [*pretrained, "--from_scratch"]
    tuned = (("pretrained", [*pretrained, "--encoder_lr_scale", "0.1"]), ("scratch", scratch))
    for fraction, share in shares.items():
        for kind, source in tuned:
            command = ["finetune_classification.py", *source, *share, *tuning("classification", fraction)]
            yield "classification", f"{kind}-{fraction:g}", command
        command = ["finetune_classification.py", *forest, *share, "--validation_fraction", "0", *SEEDS]
        yield "classification", f"forest-{fraction:g}", command
    if is_kicad:  # the set that has parts
        for kind, source in tuned:
            yield "part_segmentation", kind, ["finetune_segmentation.py", *source, *tuning("part_segmentation")]
        for kind, source in (("frozen-pretrained", pretrained), ("frozen-untrained", scratch)):
            command = ["finetune_segmentation.py", *source, *tuning("part_segmentation"), "--head", "mlp"]
            yield "part_segmentation", kind, command
        command = ["finetune_segmentation.py", *forest, "--validation_fraction", "0", *SEEDS]
        yield "part_segmentation", "forest", command


def make_table(file: Path) -> Path:
    """The splits of an npz as a folder that `load_dataset` reads."""
    from datasets import Array2D, ClassLabel, Dataset, Features

    folder = Path("outputs") / file.stem
    with np.load(file, allow_pickle=False) as data:
        points, labels, is_test = (data[name] for name in ("points", "labels", "is_test"))
        names = [str(name) for name in data["class_names"]]
    features = Features({"points": Array2D(points.shape[1:], str(points.dtype)), "label": ClassLabel(names=names)})
    for split, rows in (("train", ~is_test), ("test", is_test)):
        columns = {"points": list(points[rows]), "label": labels[rows].astype(int).tolist()}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")
    return folder


def check_results_are_of(model: str, output: Path, parser: argparse.ArgumentParser):
    """What is not repeated must have been measured with this model."""
    found = [read_result(file) for file in sorted(output.glob("*.json"))]
    found = [result for result in found if result.model["initialization"] == "pretrained"]
    if found and {result.model["weights"] for result in found} != {weights_digest(load_encoder(model))}:
        parser.error(f"--output: {output} holds results of other weights than those of {model}; name another folder")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="pre-trained model")
    parser.add_argument("--data", type=Path, help="folder of a data set, or npz (default: KiCad parts)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tasks to run")
    parser.add_argument("--only", default="", help="run what has this in the name of its result")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result files")
    options = parser.parse_args()

    data = make_table(options.data) if options.data is not None and options.data.suffix == ".npz" else options.data
    dataset = [] if data is None else ["--dataset", str(data)]
    options.output.mkdir(parents=True, exist_ok=True)
    check_results_are_of(options.model, options.output, parser)
    for task, name, (script, *arguments) in commands(options.model, is_kicad=data is None):
        result = options.output / f"{task}-{name}.json"
        if task not in options.tasks or options.only not in result.name or result.exists():
            continue
        command = [f"examples/{script}", *arguments, *dataset]
        print("python", *command, flush=True)
        if task in ("classification", "part_segmentation"):
            # The models are many and large; their results are what is kept.
            runs = Path("outputs") / "downstream" / Path(options.model).name / options.output.name / result.stem
            resume = ["--resume_from_checkpoint", "latest", "--save_total_limit", "1"]
            subprocess.run([sys.executable, *command, *resume, "--output_dir", str(runs)], check=True)
            shutil.copyfile(runs / "result.json", result)
        else:
            subprocess.run([sys.executable, *command, "--output", str(result)], check=True)


if __name__ == "__main__":
    main()
