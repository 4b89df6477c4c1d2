"""Linear SVM on frozen features, every choice fixed beforehand."""

import numpy as np


def linear_svm(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    C: float = 0.01,
) -> dict[str, float]:
    """
    Accuracy of `SVC(kernel="linear", C=0.01)` on features standardised with the training split's mean and deviation.

    Without standardising, a fixed C depends on the scale of the features, and a comparison of two networks may say
    nothing but which of them has the larger one.

    Args:
        train_features, test_features: `(clouds, width)`.
        train_labels, test_labels: integers `(clouds,)`.
        C: fixed; to choose it, use a part of the training split.

    Returns:
        `accuracy` and `mean_class_accuracy` on the test split, in percent.

    Raises:
        ValueError: if lengths differ, or the training split has fewer than two classes.
    """
    from sklearn.svm import SVC

    for name, features, labels in (
        ("train_labels", train_features, train_labels),
        ("test_labels", test_features, test_labels),
    ):
        if len(features) != len(labels):
            raise ValueError(f"`{name}` has {len(labels)} entries, expected one for each of {len(features)} clouds.")
    if len(np.unique(train_labels)) < 2:
        raise ValueError("`train_labels` holds fewer than two classes; there is nothing to tell apart.")
    train_features, test_features = standardize(train_features, test_features)
    classifier = SVC(kernel="linear", C=C).fit(train_features, train_labels)
    return accuracies(classifier.predict(test_features), test_labels)


def standardize(train_features: np.ndarray, test_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both about the mean of the training split, in units of its deviation; a constant feature keeps its unit."""
    mean, deviation = train_features.mean(0), train_features.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return (train_features - mean) / deviation, (test_features - mean) / deviation


def accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` and `mean_class_accuracy` in percent; integers `(clouds,)`."""
    right = predicted == labels
    by_class = [right[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": 100 * float(right.mean()), "mean_class_accuracy": 100 * float(np.mean(by_class))}
