"""Thresholds and initial potentials for T timesteps: the loss, the coarse search before it, folding after it."""

from .coarse import coarse_search, start_calibration
from .folding import fold_thresholds
from .loss import calibration_loss, freeze_for_calibration


__all__ = ["calibration_loss", "coarse_search", "fold_thresholds", "freeze_for_calibration", "start_calibration"]
