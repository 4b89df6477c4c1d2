"""The report at the end of a pre-training run."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data.loading import PointTable
from ..modeling_joint_mae import JointMAEForPreTraining
from ..visualization import draw_reconstructions
from .features import extract_features
from .linear_svm import linear_svm
from .reconstruction import averaged_encoder_output, reconstruction_losses


def pretraining_report(
    model: JointMAEForPreTraining,
    untrained: JointMAEForPreTraining,
    train: PointTable,
    test: PointTable,
    output_dir: Path,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Held-out reconstruction with and without the encoder's output, a linear SVM, also untrained, and a picture.

    There is no SVM where shapes have no labels, or those of the training split are of one class.

    The headline accuracy is that of the final normalised tokens, decided beforehand; those of other layers are listed
    for diagnosis only.

    Args:
        model: the trained model.
        untrained: the same network with its initial weights.
        train, test: shapes of the training and the held-out split, prepared alike.
        output_dir: where `reconstructions.png` is written.
        seed: fixes masks.

    Returns:
        A dictionary that can be written as JSON; accuracies in percent.
    """
    losses = reconstruction_losses(model, test.points, seed)
    with averaged_encoder_output(model):
        averaged = reconstruction_losses(model, test.points, seed)
    report: dict[str, Any] = {
        "reconstruction": {
            "shapes": len(test.points),
            "held_out": losses,
            "encoder_output_averaged": averaged,
            "ratio": {name: losses[name] / averaged[name] for name in losses if averaged[name] > 0},
        }
    }
    if train.labels is not None and test.labels is not None and len(np.unique(train.labels)) > 1:
        report["linear_svm"] = {
            "protocol": "frozen encoder, 3D alone, standardised features, SVC(kernel='linear', C=0.01), last step",
            "train_shapes": len(train.points),
            "test_shapes": len(test.points),
            "classes": len(set(train.labels.tolist())),
            "pretrained": _accuracies(model, train, test),
            "untrained": _accuracies(untrained, train, test),
        }
    picture = draw_reconstructions(model, test.points, output_dir / "reconstructions.png", seed=seed)
    report["picture"] = picture.name
    return report


def _accuracies(model: JointMAEForPreTraining, train: PointTable, test: PointTable) -> dict[str, Any]:
    """Accuracy of the final tokens, and of every layer."""
    layers = list(range(model.config.num_hidden_layers + 1))
    train_features = extract_features(model, train.points, layers)
    test_features = extract_features(model, test.points, layers)
    by_layer = [
        linear_svm(of_train, train.labels, of_test, test.labels)
        for of_train, of_test in zip(train_features, test_features, strict=True)
    ]
    return {**by_layer[-1], "accuracy_by_layer": [entry["accuracy"] for entry in by_layer]}
