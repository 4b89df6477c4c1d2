"""The baseline that learned part segmentation has to beat: a random forest on hand-made descriptors of points.

Each point is described by its place and by the shape of its neighbourhood at three sizes:

    4      coordinates, distance to the centroid of the cloud
    3 x 10 of the 16, 48 and 128 nearest points: three ratios of the covariance's eigenvalues (linearity, planarity,
           sphericity; Weinmann et al., 2015), their sum, how the direction of least extent lies to each axis, and
           where the point lies from the mean
    c      the class of the shape, if the forest is told

All know the axes, as the network does.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.augmentation import counter_generator
from ..geometry_joint_mae import gather_points, knn


NUM_TREES = 100
POINTS_OF_A_SHAPE = 128  # that the forest learns from: neighbours are much alike
_SIZES = (16, 48, 128)
_CHOSEN = 68  # purpose of random numbers, beside those of `data.augmentation`, `data.labelled` and `histograms`


def point_descriptors(
    points: torch.Tensor, point_mask: torch.Tensor | None = None, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Descriptors of points.

    Args:
        points: float32 `(clouds, num_points, 3)`, normalised.
        point_mask: optional boolean `(clouds, num_points)`, true for real points.
        chosen: optional int64 `(clouds, m)`, the points to describe; all when left out.

    Returns:
        float32 `(clouds, m or num_points, 34)`.
    """
    mask = torch.ones(points.shape[:2], dtype=torch.bool) if point_mask is None else point_mask
    weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
    described = points if chosen is None else gather_points(points, chosen)
    radius = (described - (weights * points).sum(1, keepdim=True)).norm(dim=-1, keepdim=True)
    nearest = knn(described, points, min(max(_SIZES), points.shape[1]), point_mask)
    neighbours = gather_points(points, nearest)
    parts = [described, radius]
    for size in _SIZES:
        group = neighbours[:, :, :size]
        mean = group.mean(2)
        centered = group - mean.unsqueeze(2)
        values, directions = torch.linalg.eigh(centered.transpose(2, 3) @ centered / group.shape[2])
        small, middle, large = values.clamp(min=0).unbind(-1)
        largest = large.clamp(min=1e-12)
        ratios = torch.stack([large - middle, middle - small, small], dim=-1) / largest.unsqueeze(-1)
        parts += [ratios, (small + middle + large).unsqueeze(-1), directions[..., 0].abs(), described - mean]
    return torch.cat(parts, dim=-1)


class PartForest(nn.Module):
    """
    Gives every point the logarithm of a random forest's probability of each part; stands where a model would in
    [`segment_clouds`].

    Args:
        num_parts: how many parts there are.
        num_object_classes: how many classes of shapes the forest is told, or 0.
        seed: of the forest and of the points that it learns from.
    """

    device = torch.device("cpu")

    def __init__(self, num_parts: int, num_object_classes: int, seed: int):
        from sklearn.ensemble import RandomForestClassifier

        super().__init__()
        self.config = SimpleNamespace(num_object_classes=num_object_classes)
        self.num_parts = num_parts
        self.seed = seed
        self.forest = RandomForestClassifier(NUM_TREES, random_state=seed, n_jobs=-1)

    def fit(
        self,
        points: torch.Tensor,
        part_labels: torch.Tensor,
        object_class: torch.Tensor | None = None,
        progress: str | None = None,
    ):
        """
        Learns from some points of each shape.

        Args:
            points: `(clouds, num_points, 3)`, normalised.
            part_labels: `(clouds, num_points)`; -100 where a point has none.
            object_class: `(clouds,)`, if the forest is told.
            progress: name of a progress bar over the shapes; none is shown when left out.
        """
        features, labels = [], []
        for row in tqdm(range(len(points)), progress, leave=False, disable=progress is None, unit="shape"):
            given = None if object_class is None else object_class[row : row + 1]
            chosen = counter_generator(self.seed, _CHOSEN, 0, row).permutation(points.shape[1])[:POINTS_OF_A_SHAPE]
            chosen = torch.from_numpy(chosen[part_labels[row, chosen].numpy() >= 0])
            features.append(self._describe(points[row : row + 1], given, chosen=chosen[None])[0])
            labels.append(part_labels[row, chosen])
        self.forest.fit(torch.cat(features).numpy(), torch.cat(labels).numpy())

    def forward(
        self,
        point_values: torch.Tensor,
        object_class: torch.Tensor | None = None,
        point_mask: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        """`logits` `(clouds, num_points, num_parts)`."""
        described = self._describe(point_values, object_class, point_mask)
        found = self.forest.predict_proba(described.flatten(0, 1).numpy())
        probabilities = np.full((len(found), self.num_parts), 1e-6)  # of a part that was never seen
        probabilities[:, self.forest.classes_] = np.maximum(found, 1e-6)
        logits = torch.from_numpy(np.log(probabilities)).float()
        return SimpleNamespace(logits=logits.view(*described.shape[:2], self.num_parts))

    def _describe(
        self,
        points: torch.Tensor,
        object_class: torch.Tensor | None,
        point_mask: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        described = point_descriptors(points, point_mask, chosen)
        if object_class is None:
            return described
        told = nn.functional.one_hot(object_class, self.config.num_object_classes).to(described.dtype)
        return torch.cat([described, told.unsqueeze(1).expand(-1, described.shape[1], -1)], dim=-1)
