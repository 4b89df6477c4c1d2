"""From result files to tables, model cards and repositories on the Hub."""

from .cards import build_model_folder, model_card
from .curves import draw_label_curve, draw_losses
from .hub import PublishingError, check_model_folder, publish_folder
from .tables import commands_table, report_table, results_table, rewrite_block


__all__ = [
    "PublishingError",
    "build_model_folder",
    "check_model_folder",
    "commands_table",
    "draw_label_curve",
    "draw_losses",
    "model_card",
    "publish_folder",
    "report_table",
    "results_table",
    "rewrite_block",
]
