"""What pre-training does to a cloud at random, and where its random numbers come from.

Every random number of a sample - which points, which scale, which view, which mask - comes from a generator of its
own, keyed by (seed, epoch, index of the sample). What a sample becomes therefore does not depend on the number of
processes or workers, nor on whether the run was interrupted and resumed: there is no random state to carry along.
"""

from dataclasses import dataclass

import numpy as np


ROTATIONS = ("none", "x", "y", "z", "so3")

# The least squared radius whose parts float32 squares without loss.
_LEAST_SQUARE = 1e-30

# Purposes of random numbers: the second half of a generator's key, so that no two of them share numbers.
SAMPLES, ORDER, FIXED_SUBSAMPLE, STEPS = range(4)


def counter_generator(seed: int, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
    """
    The generator of one sample in one epoch.

    Philox is counter-based: (seed, purpose) is its key, (epoch, index) the upper half of its counter, so any generator
    is made at once and none overlaps another before 2 ** 128 draws.

    Args:
        seed: seed of the run, 0 to 2 ** 64 - 1.
        purpose: one of `SAMPLES`, `ORDER`, `FIXED_SUBSAMPLE`, `STEPS`.
        epoch: epoch, or pass over a stream.
        index: index of the sample in its data set.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, epoch, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def subsample(generator: np.random.Generator, num_available: int, num_points: int) -> np.ndarray | slice:
    """
    Which `num_points` of a cloud's points to take: without replacement, or each as often as it fits and a random rest.

    Returns:
        An index into the first axis of the cloud: int64 `(num_points,)`, or a slice if all are taken as they are.
    """
    if num_available == num_points:
        return slice(None)
    whole = np.tile(np.arange(num_available), num_points // num_available)
    rest = generator.choice(num_available, num_points % num_available, replace=False, shuffle=False)
    return np.concatenate([whole, rest]) if len(whole) else rest


def normalize_clouds(points: np.ndarray) -> np.ndarray:
    """
    Clouds centred on their mean and scaled so that the farthest point has distance 1.

    Args:
        points: `(batch, num_points, 3)` in any unit, of any size that float32 holds.

    Returns:
        float32 `(batch, num_points, 3)`. A cloud whose points are all equal becomes zeros.
    """
    # Reductions over a last axis that is long: five times as fast as over the others.
    by_axis = np.ascontiguousarray(points.transpose(0, 2, 1))
    mean = by_axis.mean(axis=2, dtype=np.float64).astype(points.dtype)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        centered = (points - mean).astype(np.float32, copy=False)
        x, y, z = np.moveaxis(centered, 2, 0)
        square = (x * x + y * y + z * z).max(axis=1)
        normalized = centered / np.maximum(np.sqrt(square), np.finfo(np.float32).tiny)[:, None, None]
    extreme = ~((square >= _LEAST_SQUARE) & (square < np.inf))
    if extreme.any():  # float64 squares every float32; it would change the last digits of other clouds
        centered = points[extreme].astype(np.float64)
        centered -= centered.mean(axis=1, keepdims=True)
        radius = np.linalg.norm(centered, axis=2).max(axis=1)
        normalized[extreme] = centered / np.maximum(radius, np.finfo(np.float64).tiny)[:, None, None]
    return normalized


@dataclass(frozen=True)
class Augmentation:
    """
    What happens to each sample at random: rotation, a scale for each axis, a shift, noise on each point.

    Args:
        scale: range of the uniform factor of each axis [relative, Point-MAE].
        max_shift: each axis moves by a uniform amount up to this, either way, in unit-sphere coordinates [relative].
        rotation: `"none"`, about the axis `"x"`, `"y"` or `"z"`, or any of `"so3"`.
        max_tilt: degrees; after that a turn about any axis by a uniform angle up to this [ours].
        max_jitter: points move by Gaussian noise, in unit-sphere coordinates, whose deviation is uniform up to this
            for each sample [ours].

    Raises:
        ValueError: if a range is empty or reaches 0, or `rotation` is unknown.
    """

    scale: tuple[float, float] = (2 / 3, 3 / 2)
    max_shift: float = 0.2
    rotation: str = "none"
    max_tilt: float = 0.0
    max_jitter: float = 0.0

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"`scale` is {self.scale}, expected two positive numbers, the smaller first.")
        for name in ("max_shift", "max_jitter"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 or more.")
        if not 0 <= self.max_tilt <= 180:
            raise ValueError(f"`max_tilt` is {self.max_tilt}, expected 0 to 180 degrees.")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"`rotation` is {self.rotation!r}, expected one of {ROTATIONS}.")

    def draw(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random map `(matrix, shift)` of shapes `(3, 3)` and `(3,)`: a point becomes `matrix @ point + shift`."""
        scale = generator.uniform(*self.scale, size=3)
        shift = generator.uniform(-self.max_shift, self.max_shift, size=3)
        rotation = _random_rotation(generator, self.rotation)
        if self.max_tilt > 0:  # else it draws nothing
            angle = np.deg2rad(generator.uniform(0, self.max_tilt))
            rotation = axis_rotation(generator.standard_normal(3), angle) @ rotation
        return scale[:, None] * rotation, shift

    def draw_jitter(self, generator: np.random.Generator, num_points: int) -> np.ndarray:
        """What is added to the points of a sample: float32 `(num_points, 3)`."""
        deviation = np.float32(generator.uniform(0, self.max_jitter))
        return deviation * generator.standard_normal((num_points, 3), dtype=np.float32)


def apply_affine(points: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Maps `(batch, num_points, 3)` by one `(3, 3)` matrix and `(3,)` shift a cloud; float32."""
    return points @ matrix.astype(np.float32).transpose(0, 2, 1) + shift.astype(np.float32)[:, None]


def axis_rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """The rotation `(3, 3)` by an angle in radians about an axis `(3,)` of any length above 0 (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _random_rotation(generator: np.random.Generator, rotation: str) -> np.ndarray:
    if rotation == "none":
        return np.eye(3)
    if rotation == "so3":  # a uniform unit quaternion is a uniform rotation
        quaternion = generator.standard_normal(4)
        w, x, y, z = quaternion / np.linalg.norm(quaternion)
        return np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
    return axis_rotation(np.eye(3)["xyz".index(rotation)], generator.uniform(0, 2 * np.pi))
