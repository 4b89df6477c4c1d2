"""What frozen features make of test clouds that are not like the training clouds: turned, sparse, noisy, torn.

    python benchmarks/robustness.py outputs/pretrain --output benchmarks/results/robustness.json
    python benchmarks/robustness.py outputs/pretrain --dataset outputs/ldraw_parts --output robustness.json
    python benchmarks/robustness.py outputs/pretrain --output robustness.json --table model_cards/notes.md

The linear SVM of `linear_svm` learns from the training split as it is; each row spoils the test split in one way,
before it is normalised. `--table` rewrites the block `robustness` of a Markdown file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jointmae_hf.data.augmentation import Augmentation, axis_rotation, normalize_clouds
from jointmae_hf.data.loading import load_point_table
from jointmae_hf.evaluation import extract_features, linear_svm
from jointmae_hf.evaluation.results import command_line, weights_digest
from jointmae_hf.evaluation.tasks import load_encoder
from jointmae_hf.publishing import rewrite_block
from jointmae_hf.training.checkpoints import replace_file
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="pre-trained model")
    parser.add_argument("--dataset", default=str(EMBEDDED_DATASET), help="labelled set with splits train and test")
    parser.add_argument("--seed", type=int, default=0, help="of subsamples, spoiling and the untrained network")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--table", type=Path, help="Markdown file with a block `robustness`")
    arguments = parser.parse_args()

    found: dict[str, dict[str, float]] = {name: {} for name in SPOILT}
    trained, untrained = (
        load_encoder(arguments.model, is_untrained, arguments.seed) for is_untrained in (False, True)
    )
    num_points = trained.config.num_points
    train, test, dense = (
        load_point_table(arguments.dataset, split, num_points=times * num_points, seed=arguments.seed)
        for split, times in (("train", 1), ("test", 1), ("test", 2))
    )
    for kind, model in (("pretrained", trained), ("untrained", untrained)):
        features = extract_features(model, train.points)
        for name in SPOILT:
            points = spoil_clouds((dense if name == DENSE else test).points, name, arguments.seed)
            spoilt = extract_features(model, points)
            found[name][kind] = linear_svm(features, train.labels, spoilt, test.labels)["accuracy"]
            print(f"{kind}, {name}: {found[name][kind]:.1f}", flush=True)

    record = {
        "command": command_line(),
        "protocol": "linear SVM on standardised features of clean training clouds, C = 0.01; test clouds spoilt",
        "dataset": arguments.dataset,
        "sizes": {"train": len(train.points), "test": len(test.points)},
        "weights": weights_digest(trained),
        "accuracy": found,
        "seed": arguments.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "device": device_name(trained.device),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.table is not None:
        lines = ["| test clouds | pre-trained | untrained |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {row['pretrained']:.1f} | {row['untrained']:.1f} |" for name, row in found.items()]
        text = arguments.table.read_text(encoding="utf-8")
        replace_file(arguments.table, rewrite_block(text, "robustness", "\n".join(lines)))


if __name__ == "__main__":
    main()
