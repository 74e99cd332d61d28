"""Figures of stored results. They take and return matplotlib Axes, and neither fit nor change anything."""

from neurst.pl._holdout import holdout_score
from neurst.pl._neurtv import gradient, history, superres

__all__ = ["gradient", "history", "holdout_score", "superres"]
