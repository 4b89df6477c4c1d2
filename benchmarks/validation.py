"""How good frozen features are on a labelled set, to choose recipes by: cross-validation without the test split.

    python benchmarks/validation.py outputs/pretrain outputs/other --data ldraw_parts.npz --output validation.json
    python benchmarks/validation.py outputs/pretrain --data examples/data/kicad-parts --few 300 \\
        --config_overrides "pooling_layers=[2,4,6],pooling_deviation=true" --spoil --output validation.json
    python benchmarks/validation.py outputs/pretrain --data ldraw_parts.npz --test --output test.json

The data are an npz of `points` (n, any, 3), `labels`, `group` (shapes never kept apart) and `is_test`, or a folder of
`points`, `label` and `family` with a train split. There are five folds over the groups of the training split; each is
predicted from all others, and from a few shapes of them. The protocol is that of `linear_svm`: 3D alone, standardised
features, C = 0.01. Each model is compared with the same network untrained. `--spoil` also predicts shapes that are
spoilt in the ways of `robustness.py`, from clean ones. With `--test` the test split of an npz is predicted instead:
once, for what has been chosen.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import load_dataset
from robustness import spoil_clouds

from jointmae_hf import JointMAEForPreTraining
from jointmae_hf.data.augmentation import normalize_clouds
from jointmae_hf.data.loading import load_point_table
from jointmae_hf.evaluation import extract_features
from jointmae_hf.evaluation.linear_svm import standardize
from jointmae_hf.training.arguments import parse_config_overrides
from jointmae_hf.training.pretraining import build_untrained_model, device_name, versions


NUM_FOLDS = 5
SPOILS = ("noise of 1 % of the radius", "noise of 3 % of the radius", "turned by 15 degrees about any axis")


def read(path: Path, num_points: int, seed: int) -> dict[str, np.ndarray]:
    """The arrays of the data; points subsampled, the same places for all shapes of an npz, and normalised."""
    if path.is_dir():
        table = load_point_table(str(path), "train", num_points=num_points, seed=seed)
        family = load_dataset(str(path), split="train")["family"]
        group = np.unique(family, return_inverse=True)[1]
        return {
            "points": table.points,
            "labels": table.labels,
            "group": group,
            "is_test": np.zeros(len(group), dtype=bool),
        }
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in ("points", "labels", "group", "is_test")}
    chosen = np.random.default_rng(seed).permutation(data["points"].shape[1])[:num_points]
    data["points"] = normalize_clouds(data["points"][:, chosen].astype(np.float32))
    return data


def splits(data: dict[str, np.ndarray], test: bool, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to learn from and rows to predict: in the folds of the training split, or in both splits."""
    if test:
        yield np.flatnonzero(~data["is_test"]), np.flatnonzero(data["is_test"])
        return
    train = np.flatnonzero(~data["is_test"])
    groups, group = np.unique(data["group"][train], return_inverse=True)
    fold = np.random.default_rng(seed).integers(0, NUM_FOLDS, len(groups))[group]
    for number in range(NUM_FOLDS):
        yield train[fold != number], train[fold == number]


def accuracy(
    features: np.ndarray, looked_at: np.ndarray, data: dict[str, np.ndarray], arguments: argparse.Namespace
) -> dict[str, float]:
    """
    Accuracy in percent over all rows that are predicted, learnt from all shapes and from a few.

    Args:
        features: what is learnt from.
        looked_at: features of the same shapes, of which the rows to predict are taken.
    """
    right = {"all": [], "few": []}
    for number, (train, held_out) in enumerate(splits(data, arguments.test, arguments.seed)):
        few = np.random.default_rng(number).permutation(train)[: arguments.few]
        for name, rows in (("all", train), ("few", few)):
            predicted = predict(features[rows], data["labels"][rows], looked_at[held_out])
            right[name].append(predicted == data["labels"][held_out])
    return {name: round(100 * float(np.concatenate(found).mean()), 2) for name, found in right.items()}


def predict(train: np.ndarray, labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Labels of `features` by the classifier of `linear_svm`, its kernel computed beforehand, which is faster."""
    from sklearn.svm import SVC

    train, features = (part.astype(np.float64) for part in standardize(train, features))
    return SVC(kernel="precomputed", C=0.01).fit(train @ train.T, labels).predict(features @ train.T)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="pre-trained models")
    parser.add_argument("--data", type=Path, required=True, help="labelled set, npz")
    parser.add_argument("--num_points", type=int, help="points of each shape (default: those of the model)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, subsamples and untrained networks")
    parser.add_argument("--test", action="store_true", help="predict the test split, for the final comparison only")
    parser.add_argument("--few", type=int, default=1000, help="shapes that are few")
    parser.add_argument("--spoil", action="store_true", help="predict spoilt shapes, too")
    parser.add_argument("--config_overrides", help="fields of the configuration to replace, as in pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    if arguments.test and arguments.data.is_dir():
        parser.error(f"`--data` is the folder {arguments.data}, expected an npz with `--test`.")

    results = []
    for name in arguments.models:
        overrides = parse_config_overrides(arguments.config_overrides or "")
        trained = JointMAEForPreTraining.from_pretrained(name, **overrides)
        data = read(arguments.data, arguments.num_points or trained.config.num_points, arguments.seed)
        found = {}
        for key, model in (("trained", trained), ("untrained", build_untrained_model(trained.config, arguments.seed))):
            features = extract_features(model, data["points"])
            found[key] = accuracy(features, features, data, arguments)
            for spoil in SPOILS if arguments.spoil else ():
                looked_at = extract_features(model, spoil_clouds(data["points"], spoil, arguments.seed))
                found[f"{key}, {spoil}"] = accuracy(features, looked_at, data, arguments)
        results.append({"model": name, **found})
        print(json.dumps(results[-1]), flush=True)
    record = {
        "split": "test" if arguments.test else f"{NUM_FOLDS}-fold cross-validation of the training split by group",
        "data": arguments.data.name,
        "few": arguments.few,
        "config_overrides": arguments.config_overrides,
        "seed": arguments.seed,
        "versions": versions(),
        "device": device_name(trained.device),
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
