"""Fitting to data: activation statistics, sequential fitting, sweeps on the loss."""

from mpocompress.tuning.gradients import output_metrics
from mpocompress.tuning.loss_sweeps import sweep_on_loss
from mpocompress.tuning.objectives import Distillation, Loss
from mpocompress.tuning.sequential import FitOptions, FittedWeight, SitePlan, fit_in_sequence
from mpocompress.tuning.sweep_options import LocalOptions, LossSweepOptions, LossSweepRecord

__all__ = [
    "Distillation",
    "FitOptions",
    "FittedWeight",
    "LocalOptions",
    "Loss",
    "LossSweepOptions",
    "LossSweepRecord",
    "SitePlan",
    "fit_in_sequence",
    "output_metrics",
    "sweep_on_loss",
]
