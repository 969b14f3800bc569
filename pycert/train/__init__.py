"""Certified training: schedules, the worst-case loss and a short trainer."""

from pycert.train.loss import (
    certified_loss,
    fused_loss,
    initialize_for_ibp,
    mixed_margins,
    worst_case_loss,
)
from pycert.train.schedules import Ramp, linear, smooth
from pycert.train.trainer import Recipe, train

__all__ = [
    "Ramp",
    "Recipe",
    "certified_loss",
    "fused_loss",
    "initialize_for_ibp",
    "linear",
    "mixed_margins",
    "smooth",
    "train",
    "worst_case_loss",
]
