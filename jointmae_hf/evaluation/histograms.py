"""Hand-made descriptors of shapes, for the baseline that every learned feature has to beat: a random forest.

All are computed on the normalised cloud. Those of the first three rows do not change when the shape is turned, the
others know the axes, as the network does.

    64   D2: distances of random pairs of points (Osada et al., 2002)
    32   D1: distances to the centroid
    32   A3: angles at the first of three random points
    3x24 distribution of the coordinates along each axis
    3x6  mean, deviation, skewness, kurtosis, minimum, maximum along each axis
    3    covariances between axes
    3    square roots of the eigenvalues of the covariance, largest first
    3    sides of the box around the shape, largest first, divided by the largest
    3    sides of the box along the axes
    3x16 of the filled cells of a 4 x 4 grid, seen along each axis
"""

import numpy as np

from ..data.augmentation import counter_generator


_PAIRS = 4096
_DESCRIPTORS = 65  # purpose of random numbers, beside those of `data.augmentation` and `few_shot`
_CHUNK = 64


def shape_histograms(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Descriptors of clouds.

    Args:
        points: float32 `(clouds, num_points, 3)`, normalised.
        seed: fixes the random pairs and triples, the same for all clouds.

    Returns:
        float32 `(clouds, 278)`; distributions sum to 1.
    """
    triples = counter_generator(seed, _DESCRIPTORS, 0).integers(points.shape[1], size=(3, _PAIRS))
    chunks = [_describe(points[start : start + _CHUNK], triples) for start in range(0, len(points), _CHUNK)]
    return np.concatenate(chunks).astype(np.float32)


def random_forest(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    seed: int = 0,
    num_trees: int = 500,
) -> np.ndarray:
    """Classes that a random forest (scikit-learn's defaults but for the number of trees) gives the test shapes."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(num_trees, random_state=seed, n_jobs=-1)
    return forest.fit(train_features, train_labels).predict(test_features)


def _describe(points: np.ndarray, triples: np.ndarray) -> np.ndarray:
    first, second, third = (points[:, index] for index in triples)
    centered = points - points.mean(1, keepdims=True)
    deviation = np.maximum(centered.std(1), 1e-6)
    covariance = np.einsum("bni,bnj->bij", centered, centered) / points.shape[1]
    low, high = points.min(1), points.max(1)
    sides = high - low
    one, other = second - first, third - first
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    cosine = (one * other).sum(-1) / np.maximum(lengths, 1e-9)
    standard = centered / deviation[:, None]
    parts = [
        _histogram(np.linalg.norm(one, axis=-1), 64, 0, 2),
        _histogram(np.linalg.norm(centered, axis=-1), 32, 0, 1),
        _histogram(np.arccos(np.clip(cosine, -1, 1)), 32, 0, np.pi),
        *(_histogram(points[..., axis], 24, -1, 1) for axis in range(3)),
        points.mean(1),
        deviation,
        (standard**3).mean(1),
        (standard**4).mean(1),
        low,
        high,
        covariance[:, [0, 0, 1], [1, 2, 2]],
        np.sqrt(np.maximum(np.linalg.eigvalsh(covariance)[:, ::-1], 0)),
        np.sort(sides, axis=1)[:, ::-1] / np.maximum(sides.max(1, keepdims=True), 1e-9),
        sides,
        *(_silhouette(points, low, sides, axis) for axis in range(3)),
    ]
    return np.concatenate(parts, axis=1)


def _histogram(values: np.ndarray, bins: int, low: float, high: float) -> np.ndarray:
    """Distribution of each row of `(clouds, values)` over equal bins; what lies outside counts in the outermost."""
    index = np.clip(((values - low) / (high - low) * bins).astype(np.int64), 0, bins - 1)
    return _count(index, bins) / values.shape[1]


def _silhouette(points: np.ndarray, low: np.ndarray, sides: np.ndarray, axis: int) -> np.ndarray:
    """Which share of the points lies in each cell of a 4 x 4 grid over the box, seen along an axis."""
    cells = np.clip((4 * (points - low[:, None]) / np.maximum(sides, 1e-9)[:, None]).astype(np.int64), 0, 3)
    row, column = (cells[..., other] for other in range(3) if other != axis)
    return _count(4 * row + column, 16) / points.shape[1]


def _count(index: np.ndarray, bins: int) -> np.ndarray:
    offsets = bins * np.arange(len(index))[:, None]
    return np.bincount((index + offsets).ravel(), minlength=bins * len(index)).reshape(len(index), bins)
