"""Fitting to data: activation statistics, sequential fitting."""

from mpocompress.tuning.gradients import LayerMoments, layer_moments
from mpocompress.tuning.sensitivity import gain_of_bonds
from mpocompress.tuning.sequential import FitOptions, FittedWeight, SitePlan, fit_in_sequence

__all__ = [
    "FitOptions",
    "FittedWeight",
    "LayerMoments",
    "SitePlan",
    "fit_in_sequence",
    "gain_of_bonds",
    "layer_moments",
]
