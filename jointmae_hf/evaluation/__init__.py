"""What a pre-trained model is worth: frozen features under a linear SVM, and reconstruction of held-out shapes."""

from .features import extract_features
from .linear_svm import linear_svm
from .reconstruction import reconstruction_losses
from .report import pretraining_report


__all__ = ["extract_features", "linear_svm", "pretraining_report", "reconstruction_losses"]
