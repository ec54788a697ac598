"""Fitting to data: activation statistics, sequential fitting."""

from mpocompress.tuning.gradients import output_metrics
from mpocompress.tuning.sequential import FitOptions, FittedWeight, SitePlan, fit_in_sequence

__all__ = ["FitOptions", "FittedWeight", "SitePlan", "fit_in_sequence", "output_metrics"]
