"""Class scores of a fine-tuned classifier, from one look at each cloud or from several."""

import numpy as np
import torch

from ..data.augmentation import Augmentation, apply_affine, counter_generator, normalize_clouds, subsample
from ..data.loading import PointClouds
from ..modeling_joint_mae import JointMAEForPointCloudClassification
from .features import map_batches


_VOTES = 67  # purpose of random numbers: what a vote looks at


def predict_logits(model: JointMAEForPointCloudClassification, points: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """
    Scores of classes, float32 `(clouds, num_labels)`.

    Args:
        model: used in evaluation mode, and left in the mode it was in.
        points: float32 `(clouds, num_points, 3)`, normalised.
        batch_size: clouds at a time.
    """
    modes = {module: module.training for module in model.modules()}  # a frozen encoder may be in another than its head
    model.eval()

    def scores_of(rows: slice) -> torch.Tensor:
        return model(torch.from_numpy(points[rows]).to(model.device)).logits.float().cpu()

    try:
        scores = map_batches(scores_of, len(points), batch_size, model.device)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(scores).numpy()


def vote(
    model: JointMAEForPointCloudClassification,
    clouds: PointClouds,
    num_points: int,
    augmentation: Augmentation,
    num_votes: int,
    seed: int = 0,
) -> np.ndarray:
    """
    Scores summed over several augmented subsamples of each cloud, drawn once: the literature draws anew until the test
    accuracy is high, which is a choice on test data.

    Args:
        model: a classifier.
        clouds: the clouds.
        num_points: points of a subsample.
        augmentation: the recipe that the model was trained with.
        num_votes: looks at each cloud.
        seed: fixes them.

    Returns:
        Summed probabilities, float32 `(clouds, num_labels)`.
    """
    total = 0
    for number in range(num_votes):
        points = np.empty((len(clouds), num_points, 3), dtype=np.float32)
        matrix, shift = np.empty((len(clouds), 3, 3)), np.empty((len(clouds), 3))
        for index in range(len(clouds)):
            generator = counter_generator(seed, _VOTES, number, index)
            points[index] = clouds[index][subsample(generator, len(clouds[index]), num_points)]
            matrix[index], shift[index] = augmentation.draw(generator)
        logits = predict_logits(model, apply_affine(normalize_clouds(points), matrix, shift))
        total = total + torch.from_numpy(logits).softmax(-1).numpy()
    return total
