"""Shape retrieval by cosine similarity of features."""

import numpy as np


def retrieval_metrics(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray | None = None,
    gallery_labels: np.ndarray | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    batch_size: int = 1024,
) -> dict[str, float]:
    """
    Mean average precision and top-k of retrieving shapes of a query's class.

    Args:
        queries: `(queries, width)`.
        query_labels: integers `(queries,)`.
        gallery, gallery_labels: what is searched; the queries themselves, each without itself, when left out.
        ks: for each, the share of queries that have a shape of their class among the k nearest.
        batch_size: queries at a time.

    Returns:
        `map`, `top_1` and so on, in percent, over the queries whose class the gallery holds; and `queries`, the number
        of those. Equal similarities are ordered by the gallery.

    Raises:
        ValueError: if no query has a shape of its class to be found.
    """
    leave_out = gallery is None
    if leave_out:
        gallery, gallery_labels = queries, query_labels
    queries, gallery = _unit(queries), _unit(gallery)
    precision, first = [], []
    for start in range(0, len(queries), batch_size):
        rows = np.arange(start, min(start + batch_size, len(queries)))
        similarity = queries[rows] @ gallery.T
        if leave_out:
            similarity[np.arange(len(rows)), rows] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")
        if leave_out:
            order = order[:, :-1]
        relevant = gallery_labels[order] == query_labels[rows][:, None]  # (batch, gallery), nearest first
        relevant = relevant[relevant.any(1)]
        ranks = np.arange(1, relevant.shape[1] + 1)
        precision.append((np.cumsum(relevant, 1) / ranks * relevant).sum(1) / relevant.sum(1))
        first.append(relevant.argmax(1))
    precision, first = np.concatenate(precision), np.concatenate(first)
    if len(precision) == 0:
        raise ValueError("`gallery_labels` holds the class of no query; there is nothing to be found.")
    metrics = {"map": 100 * float(precision.mean())}
    metrics |= {f"top_{k}": 100 * float((first < k).mean()) for k in ks}
    return {**metrics, "queries": len(precision)}


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float64).tiny)
