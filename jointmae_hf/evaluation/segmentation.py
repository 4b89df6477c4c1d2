"""Part segmentation of clouds of any size, and its intersection over union."""

from collections.abc import Sequence

import numpy as np
import torch

from ..data.augmentation import FIXED_SUBSAMPLE, counter_generator, subsample
from ..geometry_joint_mae import interpolate_features
from ..modeling_joint_mae import JointMAEForPartSegmentation
from .features import map_batches


def segment_clouds(
    model: JointMAEForPartSegmentation,
    clouds: Sequence[np.ndarray],
    num_points: int,
    object_classes: np.ndarray | None = None,
    allowed_parts: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[np.ndarray]:
    """
    The part of every point of clouds of any size.

    The model labels a subsample of `num_points`; its scores are spread to the other points by inverse distance to the
    three nearest. A cloud of no more than `num_points` is labelled directly.

    Args:
        model: used in evaluation mode, and left in the mode it was in.
        clouds: `(n, 3)` each, in any unit.
        num_points: points that the model is given.
        object_classes: class of each cloud, for a model that is told.
        allowed_parts: boolean `(object classes, parts)`: what each class can consist of; everything when left out.
        seed: fixes the subsamples.
        batch_size: clouds at a time.
        progress: name of a progress bar over the batches; none is shown when left out.

    Returns:
        int64 `(n,)` for each cloud.
    """
    device, told = model.device, model.config.num_object_classes > 0

    def parts_of(rows: slice) -> list[np.ndarray]:
        batch = [np.asarray(cloud) for cloud in clouds[rows]]
        chosen = []
        for index, cloud in enumerate(batch, rows.start):
            generator = counter_generator(seed, FIXED_SUBSAMPLE, 0, index)
            chosen.append(subsample(generator, len(cloud), num_points) if len(cloud) > num_points else slice(None))
        # All points of a cloud in the coordinates of its sample, so that distances are of one order in any unit.
        batch = [_normalize(cloud, part) for cloud, part in zip(batch, chosen, strict=True)]
        samples = [cloud[part] for cloud, part in zip(batch, chosen, strict=True)]
        sizes = torch.tensor([len(sample) for sample in samples])
        padded = np.stack([np.resize(sample, (num_points, 3)) for sample in samples])  # repeats a small cloud
        classes = None if object_classes is None else object_classes[rows]
        given = {"object_class": torch.from_numpy(classes).to(device)} if told else {}
        if (sizes < num_points).any():
            given["point_mask"] = (torch.arange(num_points) < sizes.unsqueeze(1)).to(device)
        logits = model(torch.from_numpy(padded).to(device), **given).logits.float().cpu()
        if allowed_parts is not None:
            logits = logits.masked_fill(~torch.from_numpy(allowed_parts[classes])[:, None], -torch.inf)
        scores = [score[:size] for score, size in zip(logits, sizes, strict=True)]
        return [_spread(*parts).argmax(-1).numpy() for parts in zip(batch, samples, scores, strict=True)]

    was_training = model.training
    model.eval()
    try:
        return sum(map_batches(parts_of, len(clouds), batch_size, device, progress), [])
    finally:
        model.train(was_training)


def _normalize(cloud: np.ndarray, chosen: np.ndarray | slice) -> np.ndarray:
    """A cloud `(n, 3)` moved and scaled by what normalises the points chosen of it: float32."""
    centered = cloud - cloud[chosen].mean(0, dtype=np.float64)
    radius = np.sqrt(np.square(centered[chosen]).sum(1).max())
    return (centered / max(radius, np.finfo(np.float32).tiny)).astype(np.float32)


def _spread(cloud: np.ndarray, sample: np.ndarray, scores: torch.Tensor) -> torch.Tensor:
    """Scores of a sample's points for all points of its cloud."""
    if len(cloud) == len(sample):
        return scores
    cloud, sample = (torch.from_numpy(points)[None] for points in (cloud, sample))
    probabilities = scores.softmax(-1)  # forbidden parts have a score of minus infinity, which no weight can scale
    return interpolate_features(cloud, sample, probabilities[None])[0]


def class_parts(part_labels: Sequence[np.ndarray], object_classes: np.ndarray, num_classes: int, num_parts: int):
    """Which parts the shapes of each class consist of, boolean `(num_classes, num_parts)`; -100 is ignored."""
    parts = np.zeros((num_classes, num_parts), dtype=bool)
    for labels, label in zip(part_labels, object_classes, strict=True):
        parts[label, np.unique(labels[labels >= 0])] = True
    return parts


def part_iou(predicted: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> float:
    """
    Mean intersection over union of one shape, in [0, 1], over the parts of its class and those that it has itself.

    A part that is neither there nor predicted counts as 1, as in ShapeNetPart's protocol. Points labelled -100 are
    left out.

    Args:
        predicted, labels: integers `(n,)`.
        parts: boolean `(num_parts,)`: the parts of the shape's class.
    """
    known = labels >= 0
    predicted, labels = predicted[known], labels[known]
    wanted = parts.copy()
    wanted[labels] = True
    scores = []
    for part in np.flatnonzero(wanted):
        union = np.sum((predicted == part) | (labels == part))
        scores.append(np.sum((predicted == part) & (labels == part)) / union if union else 1.0)
    return float(np.mean(scores))


def segmentation_metrics(
    predicted: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    object_classes: np.ndarray,
    allowed_parts: np.ndarray,
) -> dict[str, float]:
    """
    Instance mIoU (mean over shapes), class mIoU (mean over classes of the means over their shapes) and the share of
    points that are right, in percent.

    Args:
        predicted, labels: parts of the points of each shape; -100 is left out.
        object_classes: class of each shape.
        allowed_parts: boolean `(classes, parts)`.

    Raises:
        ValueError: if no shape has a labelled point. Shapes without any are left out.
    """
    shapes = [shape for shape in zip(predicted, labels, object_classes, strict=True) if (shape[1] >= 0).any()]
    if not shapes:
        raise ValueError("`labels` holds no labelled point; there is nothing to measure.")
    predicted, labels, object_classes = zip(*shapes, strict=True)
    object_classes = np.array(object_classes)
    scores = np.array([part_iou(found, wanted, allowed_parts[label]) for found, wanted, label in shapes])
    by_class = [scores[object_classes == label].mean() for label in np.unique(object_classes)]
    found, wanted = np.concatenate(predicted), np.concatenate(labels)
    return {
        "instance_miou": 100 * float(scores.mean()),
        "class_miou": 100 * float(np.mean(by_class)),
        "point_accuracy": 100 * float((found == wanted)[wanted >= 0].mean()),
    }
