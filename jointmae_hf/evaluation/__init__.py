"""What a pre-trained model is worth: tasks on frozen features, reconstruction of held-out shapes, results."""

from .features import extract_features
from .few_shot import draw_fold
from .histograms import random_forest, shape_histograms
from .linear_svm import accuracies, linear_svm
from .reconstruction import reconstruction_losses
from .report import pretraining_report
from .results import ResultError, TaskResult, read_result, read_results, write_result
from .retrieval import retrieval_metrics
from .segmentation import part_iou, segment_clouds, segmentation_metrics


__all__ = [
    "ResultError",
    "TaskResult",
    "accuracies",
    "draw_fold",
    "extract_features",
    "linear_svm",
    "part_iou",
    "pretraining_report",
    "random_forest",
    "read_result",
    "read_results",
    "reconstruction_losses",
    "retrieval_metrics",
    "segment_clouds",
    "segmentation_metrics",
    "shape_histograms",
    "write_result",
]
