"""What frozen features make of test clouds that are not like the training clouds: turned, sparse, noisy, torn.

    python benchmarks/robustness.py outputs/pretrain --output benchmarks/results/robustness.json
    python benchmarks/robustness.py outputs/pretrain --datasets examples/data/kicad-parts outputs/ldraw_parts \
        --output robustness.json --table model_cards/notes.md

The linear SVM of `linear_svm` learns from the training split as it is; each row spoils the test split in one way,
before it is normalised. Twice the points can only be had of sets that hold as many. `--table` rewrites the block
`robustness` of a Markdown file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from jointmae_hf.data.augmentation import Augmentation, axis_rotation, normalize_clouds
from jointmae_hf.data.loading import load_point_table
from jointmae_hf.evaluation import extract_features, linear_svm
from jointmae_hf.evaluation.results import command_line, weights_digest
from jointmae_hf.evaluation.tasks import load_encoder
from jointmae_hf.files import replace_text
from jointmae_hf.publishing import rewrite_block
from jointmae_hf.training.pretraining import device_name, git_commit, versions


EMBEDDED_DATASET = Path("examples/data/kicad-parts")


def thin(share: float) -> Callable:
    return lambda cloud, rng: cloud[rng.permutation(len(cloud))[: round(share * len(cloud))]]


def turn(rotation: str) -> Callable:
    augmentation = Augmentation((1, 1), 0.0, rotation)
    return lambda cloud, rng: cloud @ augmentation.draw(rng)[0].T


def lean(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned by 15 degrees about any axis."""
    return cloud @ axis_rotation(rng.normal(size=3), np.deg2rad(15)).T


def tear(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Without the 30 % of its points that lie farthest in some direction."""
    direction = rng.normal(size=3)
    return cloud[(cloud @ direction).argsort()[: round(0.7 * len(cloud))]]


def pollute(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """5 % of its points are anywhere in the cube around the unit sphere."""
    cloud = cloud.copy()
    rows = rng.permutation(len(cloud))[: round(0.05 * len(cloud))]
    cloud[rows] = rng.uniform(-1, 1, (len(rows), 3))
    return cloud


DENSE = "twice the points"
SPOILT: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as they are": lambda cloud, rng: cloud,
    DENSE: lambda cloud, rng: cloud,
    "half of the points": thin(0.5),
    "a quarter of the points": thin(0.25),
    "an eighth of the points": thin(0.125),
    "noise of 1 % of the radius": lambda cloud, rng: cloud + rng.normal(0, 0.01, cloud.shape),
    "noise of 3 % of the radius": lambda cloud, rng: cloud + rng.normal(0, 0.03, cloud.shape),
    "5 % outliers": pollute,
    "30 % missing on one side": tear,
    "turned by 15 degrees about any axis": lean,
    "turned about z": turn("z"),
    "turned anyhow": turn("so3"),
}


def spoil_clouds(clouds: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Clouds `(n, num_points, 3)` spoilt in the way of that name, and normalised after it: float32."""
    rng = np.random.default_rng(seed)
    return normalize_clouds(np.stack([SPOILT[name](cloud, rng) for cloud in clouds]).astype(np.float32))


def measure(dataset: str, models: dict[str, PreTrainedModel], seed: int) -> dict[str, Any]:
    """Sizes of a set, and what the SVM reaches on its test clouds spoilt in every way, for each kind of model."""
    num_points = models["pretrained"].config.num_points
    train, test, dense = (
        load_point_table(dataset, split, num_points=times * num_points, seed=seed)
        for split, times in (("train", 1), ("test", 1), ("test", 2))
    )
    found: dict[str, dict[str, float]] = {}
    for kind, model in models.items():
        features = extract_features(model, train.points)
        for name in SPOILT:
            points = (dense if name == DENSE else test).points
            if name == DENSE and points.shape[1] < 2 * num_points:
                continue
            spoilt = extract_features(model, spoil_clouds(points, name, seed))
            accuracy = linear_svm(features, train.labels, spoilt, test.labels)["accuracy"]
            found.setdefault(name, {})[kind] = accuracy
            print(f"{dataset}, {kind}, {name}: {accuracy:.1f}", flush=True)
    return {"sizes": {"train": len(train.points), "test": len(test.points)}, "accuracy": found}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of what was found on each set."""
    head = [f"{Path(dataset).name}, {kind}" for dataset in found for kind in ("pre-trained", "untrained")]
    lines = ["| " + " | ".join(["test clouds", *head]) + " |", "| --- |" + " ---: |" * len(head)]
    for name in SPOILT:
        rows = [measured["accuracy"].get(name, {}) for measured in found.values()]
        cells = [f"{row[kind]:.1f}" if row else "" for row in rows for kind in ("pretrained", "untrained")]
        if any(cells):
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="pre-trained model")
    parser.add_argument("--datasets", nargs="+", default=[str(EMBEDDED_DATASET)], help="sets with train and test")
    parser.add_argument("--seed", type=int, default=0, help="of subsamples, spoiling and the untrained network")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--table", type=Path, help="Markdown file with a block `robustness`")
    arguments = parser.parse_args()

    models = {
        kind: load_encoder(arguments.model, kind == "untrained", arguments.seed)
        for kind in ("pretrained", "untrained")
    }
    found = {dataset: measure(dataset, models, arguments.seed) for dataset in arguments.datasets}
    record = {
        "command": command_line(),
        "protocol": "linear SVM on standardised features of clean training clouds, C = 0.01; test clouds spoilt",
        "weights": weights_digest(models["pretrained"]),
        "datasets": found,
        "seed": arguments.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "device": device_name(models["pretrained"].device),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.table is not None:
        text = arguments.table.read_text(encoding="utf-8")
        replace_text(arguments.table, rewrite_block(text, "robustness", table(found)))


if __name__ == "__main__":
    main()
