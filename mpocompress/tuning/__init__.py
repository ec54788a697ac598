"""Fitting to data: activation statistics, sequential fitting, sweeps on the loss, distillation."""

from mpocompress.tuning.dense_layers import correction_plans, is_corrected
from mpocompress.tuning.distill import DistillResult, check_apart, distill_
from mpocompress.tuning.distill_options import DistillOptions
from mpocompress.tuning.distill_state import DistillRecord
from mpocompress.tuning.fit_plan import FitOptions, FittedWeight, SitePlan
from mpocompress.tuning.fit_state import FitStore
from mpocompress.tuning.gradients import LayerMoments, Statistics, take_statistics
from mpocompress.tuning.independent import fit_alone
from mpocompress.tuning.label_scores import Accuracy, RSquared
from mpocompress.tuning.later_calls import LaterCalls, later_calls
from mpocompress.tuning.loss_sweeps import sweep_on_loss
from mpocompress.tuning.objectives import Distillation, Loss
from mpocompress.tuning.output_errors import OutputErrors, output_errors
from mpocompress.tuning.sensitivity import (
    gain_of_bonds,
    output_error_curve,
    output_metrics,
    tied_heads,
)
from mpocompress.tuning.sequential import fit_in_sequence
from mpocompress.tuning.supervised import Supervised, SupervisedLoss, supervised_loss
from mpocompress.tuning.sweep_options import LocalOptions, LossSweepOptions, LossSweepRecord
from mpocompress.tuning.task_score import TaskScore, task_score
from mpocompress.tuning.train import train_
from mpocompress.tuning.train_options import TrainOptions, TrainRecord, TrainResult
from mpocompress.tuning.trial import effect_alone, with_fitted

__all__ = [
    "Accuracy",
    "DistillOptions",
    "DistillRecord",
    "DistillResult",
    "Distillation",
    "FitOptions",
    "FitStore",
    "FittedWeight",
    "LaterCalls",
    "LayerMoments",
    "LocalOptions",
    "Loss",
    "LossSweepOptions",
    "LossSweepRecord",
    "OutputErrors",
    "RSquared",
    "SitePlan",
    "Statistics",
    "Supervised",
    "SupervisedLoss",
    "TrainOptions",
    "TrainRecord",
    "TrainResult",
    "TaskScore",
    "check_apart",
    "correction_plans",
    "distill_",
    "fit_alone",
    "fit_in_sequence",
    "gain_of_bonds",
    "is_corrected",
    "later_calls",
    "output_error_curve",
    "output_errors",
    "output_metrics",
    "effect_alone",
    "supervised_loss",
    "sweep_on_loss",
    "take_statistics",
    "task_score",
    "tied_heads",
    "train_",
    "with_fitted",
]
