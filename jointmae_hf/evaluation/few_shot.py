"""Few-shot classification: K classes of N labelled shapes each."""

from dataclasses import dataclass

import numpy as np

from ..data.augmentation import counter_generator


# Keeps the folds apart from other random numbers of a seed.
FOLDS = 64


@dataclass
class Fold:
    """
    One few-shot problem.

    Args:
        classes: the `K` classes drawn, as numbers of the data set.
        support: indices into the training split, `N` a class.
        queries: indices into the test split, the same number for each class.
    """

    classes: np.ndarray
    support: np.ndarray
    queries: np.ndarray


def draw_fold(
    train_labels: np.ndarray, test_labels: np.ndarray, ways: int, shots: int, queries: int, seed: int
) -> Fold:
    """
    Draws a fold: `ways` classes at random among those that are large enough, then shapes of each.

    Args:
        train_labels, test_labels: integers; the support comes from the one, the queries from the other, so a split
            by families stays one.
        ways: classes of the fold.
        shots: labelled shapes of each class.
        queries: test shapes of each class; 20 in the literature.
        seed: decides everything.

    Raises:
        ValueError: if fewer than `ways` classes are large enough; the message says what would be possible.
    """
    classes = np.unique(np.concatenate([train_labels, test_labels]))
    supply = np.array([(np.sum(train_labels == label), np.sum(test_labels == label)) for label in classes])
    large = classes[(supply[:, 0] >= shots) & (supply[:, 1] >= queries)]
    if len(large) < ways:
        raise ValueError(_too_small(supply, ways, shots, queries, len(large)))
    generator = counter_generator(seed, FOLDS, ways, shots)
    drawn = generator.choice(large, ways, replace=False)

    def draw(labels: np.ndarray, count: int) -> np.ndarray:
        return np.concatenate([generator.choice(np.flatnonzero(labels == c), count, replace=False) for c in drawn])

    return Fold(drawn, draw(train_labels, shots), draw(test_labels, queries))


def _too_small(supply: np.ndarray, ways: int, shots: int, queries: int, num_large: int) -> str:
    """The error, with the largest number of test shapes that `ways` classes have beside enough training shapes."""
    enough = np.sort(supply[supply[:, 0] >= shots, 1])[::-1]
    hint = f"only {len(enough)} classes have {shots} training shapes at all"
    if len(enough) >= ways:
        hint = f"with `queries` up to {enough[ways - 1]} there are {ways} such classes"
    return (
        f"`ways` is {ways}, but {num_large} of {len(supply)} classes have {shots} training shapes (`shots`) and "
        f"{queries} test shapes (`queries`); {hint}."
    )
