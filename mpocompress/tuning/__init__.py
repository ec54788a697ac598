"""Fitting to data: activation statistics, sequential fitting, sweeps on the loss, distillation."""

from mpocompress.tuning.fitting.dense_layers import correction_plans, is_corrected
from mpocompress.tuning.fitting.fitted_model import with_fitted
from mpocompress.tuning.fitting.independent import fit_alone
from mpocompress.tuning.fitting.plan import FitOptions, FittedWeight, SitePlan
from mpocompress.tuning.fitting.sequential import fit_in_sequence
from mpocompress.tuning.fitting.state import FitStore
from mpocompress.tuning.healing.distill import check_apart, distill_
from mpocompress.tuning.healing.options import DistillOptions
from mpocompress.tuning.healing.state import DistillRecord
from mpocompress.tuning.healing.trainer import DistillResult
from mpocompress.tuning.healing.trial import effect_alone, effect_together
from mpocompress.tuning.objectives import Distillation, Loss
from mpocompress.tuning.statistics.gradients import LayerMoments, Statistics, take_statistics
from mpocompress.tuning.statistics.later_calls import LaterCalls, later_calls
from mpocompress.tuning.statistics.output_errors import OutputErrors, output_errors
from mpocompress.tuning.statistics.sensitivity import (
    OutputMetrics,
    gain_of_bonds,
    output_error_curve,
    tied_heads,
)
from mpocompress.tuning.sweeps.on_loss import sweep_on_loss
from mpocompress.tuning.sweeps.options import LocalOptions, LossSweepOptions, LossSweepRecord
from mpocompress.tuning.training.label_scores import Accuracy, RSquared
from mpocompress.tuning.training.options import TrainOptions, TrainRecord, TrainResult
from mpocompress.tuning.training.supervised import Supervised, SupervisedLoss, supervised_loss
from mpocompress.tuning.training.task_score import TaskScore, task_score
from mpocompress.tuning.training.train import train_

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
    "OutputMetrics",
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
    "effect_alone",
    "effect_together",
    "supervised_loss",
    "sweep_on_loss",
    "take_statistics",
    "task_score",
    "tied_heads",
    "train_",
    "with_fitted",
]
