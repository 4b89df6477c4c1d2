"""How good frozen features are in the course of pre-training: a linear SVM on every checkpoint of a run, per layer.

    python examples/pretrain.py --output_dir outputs/long --epochs 70 --save_steps 100 --save_total_limit 1000
    python benchmarks/learning_curve.py outputs/long --output benchmarks/results/learning_curve

Writes OUTPUT.json and OUTPUT.png. Other labelled sets are added with `--dataset name=folder`, each with splits train
and test. The protocol is that of `pretraining_report`: 3D alone, standardised features, C = 0.01, nothing chosen on
test data; layer 0 is what enters the first block, the last one the normalised output. Step 0 is the untrained network.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jointmae_hf import JointMAEForPreTraining
from jointmae_hf.data.loading import PointTable, load_point_table
from jointmae_hf.evaluation import extract_features, linear_svm, reconstruction_losses
from jointmae_hf.evaluation.reconstruction import averaged_encoder_output
from jointmae_hf.training.pretraining import build_untrained_model, device_name, versions


EMBEDDED_DATASET = Path(__file__).resolve().parent.parent / "examples" / "data" / "kicad-parts"


def effective_rank(features: np.ndarray) -> float:
    """How many directions standardised features `(clouds, width)` fill: exp of the entropy of their spectrum."""
    deviation = features.std(0)
    standard = (features - features.mean(0))[:, deviation > 1e-6] / deviation[deviation > 1e-6]
    spectrum = np.linalg.svd(standard.astype(np.float64), compute_uv=False) ** 2
    shares = spectrum[spectrum > 0] / spectrum.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def evaluate(
    model: JointMAEForPreTraining, tables: dict[str, tuple[PointTable, PointTable]], last_only: bool = False
) -> dict[str, Any]:
    """Accuracy of every layer or the last and rank of the last on every set, and held-out losses on the first set."""
    layers = list(range(model.config.num_hidden_layers + 1))[-1 if last_only else 0 :]
    result: dict[str, Any] = {"accuracy_by_layer": {}, "effective_rank": {}}
    for name, (train, test) in tables.items():
        features = [extract_features(model, table.points, layers) for table in (train, test)]
        result["accuracy_by_layer"][name] = [
            linear_svm(of_train, train.labels, of_test, test.labels)["accuracy"]
            for of_train, of_test in zip(*features, strict=True)
        ]
        result["effective_rank"][name] = effective_rank(features[0][-1])
    held_out = next(iter(tables.values()))[1].points
    result["held_out"] = reconstruction_losses(model, held_out)
    with averaged_encoder_output(model):
        result["encoder_output_averaged"] = reconstruction_losses(model, held_out)
    return result


def draw(curve: list[dict[str, Any]], names: list[str], path: Path):
    """One panel for each set: accuracy against samples seen, a line for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 3.8), squeeze=False)
    samples = [point["samples"] for point in curve]
    for axis, name in zip(axes[0], names, strict=True):
        num_layers = len(curve[0]["accuracy_by_layer"][name])
        for layer in range(num_layers):
            last = layer == num_layers - 1
            color = "black" if last else plt.colormaps["viridis"](layer / num_layers)
            values = [point["accuracy_by_layer"][name][layer] for point in curve]
            axis.plot(samples, values, color=color, linewidth=2.2 if last else 1.2, label="final" if last else layer)
        axis.axhline(curve[0]["accuracy_by_layer"][name][-1], color="grey", linestyle=":", label="untrained, final")
        axis.set(title=name, xlabel="samples seen", ylabel="linear SVM accuracy, %")
        axis.set_xscale("symlog", linthresh=max(1, samples[1]))
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(fontsize=8, frameon=False, title="layer", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of examples/pretrain.py, with its checkpoints")
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=FOLDER", help="further labelled sets")
    parser.add_argument("--steps", type=int, nargs="+", help="checkpoints to evaluate, rather than all")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the JSON and the picture")
    arguments = parser.parse_args()

    result = json.loads((arguments.run / "result.json").read_text())
    final = JointMAEForPreTraining.from_pretrained(arguments.run)
    folders = {"KiCad parts": str(EMBEDDED_DATASET), **dict(entry.split("=", 1) for entry in arguments.dataset)}
    tables = {
        name: tuple(load_point_table(folder, split, num_points=final.config.num_points) for split in ("train", "test"))
        for name, folder in folders.items()
    }
    batch_size, seed = result["arguments"]["batch_size"], result["arguments"]["seed"]
    checkpoints = {int(re.search(r"\d+$", path.name)[0]): path for path in arguments.run.glob("checkpoint-*")}
    missing = set(arguments.steps or []) - set(checkpoints)
    if missing:
        parser.error(f"--steps: {arguments.run} has no checkpoint of {sorted(missing)}")
    curve = []
    for step in [0, *sorted(arguments.steps or checkpoints)]:
        model = (
            JointMAEForPreTraining.from_pretrained(checkpoints[step])
            if step
            else build_untrained_model(final.config, seed)
        )
        curve.append({"step": step, "samples": step * batch_size, **evaluate(model, tables)})
        print(json.dumps(curve[-1]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "training": {key: result[key] for key in ("command", "git_commit", "arguments", "config")},
        "protocol": "frozen encoder, 3D alone, standardised features, SVC(kernel='linear', C=0.01), every checkpoint",
        "datasets": {name: {"train": len(a.points), "test": len(b.points)} for name, (a, b) in tables.items()},
        "versions": versions(),
        "device": device_name(final.device),
        "curve": curve,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curve, list(tables), arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
