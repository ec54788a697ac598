"""Fitting to data: activation statistics, sequential fitting, distillation."""

from mpocompress.tuning.distill import DistillOptions, DistillResult, check_steps, distill_
from mpocompress.tuning.distill_state import DistillRecord
from mpocompress.tuning.gradients import output_metrics
from mpocompress.tuning.sequential import FitOptions, FittedWeight, SitePlan, fit_in_sequence

__all__ = [
    "DistillOptions",
    "DistillRecord",
    "DistillResult",
    "FitOptions",
    "FittedWeight",
    "SitePlan",
    "check_steps",
    "distill_",
    "fit_in_sequence",
    "output_metrics",
]
