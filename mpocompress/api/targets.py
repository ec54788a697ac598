"""From what was asked for to a plan, by what each target is measured on."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mpocompress.api import drop_budget, error_budget
from mpocompress.api.budgets import Met
from mpocompress.api.calling import with_whole_batches
from mpocompress.api.data import forward_arguments, split_calls
from mpocompress.api.drop_budget import EvalFn, meet_drop
from mpocompress.api.error_budget import meet_output_error, meet_weight_error
from mpocompress.api.job import Built, Job
from mpocompress.api.size_budget import OnnxBytes, plan_for_size, plan_storage_for_size
from mpocompress.errors import DataError, PlanError
from mpocompress.loading import Batch
from mpocompress.planning import Plan, PlanOptions


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Task:
    """What a budget is measured with: parts of the data, the user's functions.

    Attributes:
        fit: batches to fit on; None without data.
        held: batches to measure errors on.
        metric: for a drop.
        onnx_bytes: for a size.
    """

    fit: Sequence[Batch] | None
    held: Sequence[Batch] = ()
    metric: drop_budget.Metric | None = None
    onnx_bytes: OnnxBytes | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        options: PlanOptions,
        calls: Sequence[Batch] | None,
        eval_fn: EvalFn | None,
        onnx_bytes: OnnxBytes | None,
        seed: int,
    ) -> "Task":
        """Part the data as the target needs it, and see that there is something to measure with.

        Raises:
            PlanError: a metric without a drop that it would measure.
            DataError: there is nothing to measure with, or too few rows to be parted.
        """
        if eval_fn is not None and options.max_drop is None:
            raise PlanError(
                "eval_fn is the metric that max_drop is about, and without it would not be looked "
                "at. Give max_drop=0.01, or no eval_fn."
            )
        if options.max_error is not None and calls is not None:
            calls = with_whole_batches(model, calls)
            fit, held = split_calls(calls, error_budget.HELD_OUT, seed=seed)
            return cls(fit=fit, held=held)
        if options.max_drop is not None and eval_fn is None:
            if calls is None:
                raise DataError(
                    f"max_drop {options.max_drop:g} needs a metric: data with labels, or in Python "
                    "eval_fn, a function of a model."
                )
            calls = with_whole_batches(model, calls)
            fit, search, final = split_calls(calls, drop_budget.HELD_OUT, seed=seed)
            return cls(fit=fit, held=final, metric=drop_budget.Metric(None, search, final))
        if options.max_size is not None and onnx_bytes is None:
            if not calls:
                raise DataError(
                    f"max_size {options.max_size} is measured on ONNX files, which need an example "
                    "input to be written. Give data, or onnx_bytes."
                )
            onnx_bytes = _writer(calls[0])
        metric = None if eval_fn is None else drop_budget.Metric(eval_fn)
        return cls(fit=calls, metric=metric, onnx_bytes=onnx_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aim:
    """A plan, with the model that it gave where it had to be built to find it."""

    plan: Plan
    built: Built | None = None
    met: Met | None = None


def meet(job: Job, task: Task) -> Aim:
    """The plan for whatever was asked for."""
    options = job.options
    if options.max_size is not None and task.onnx_bytes is not None:
        job.take_statistics()
        aim = plan_storage_for_size if options.quantize == "auto" else plan_for_size
        found, met = aim(job, int(options.max_size), task.onnx_bytes)
        return Aim(plan=found, met=met)
    if options.max_error is not None:
        if task.held:
            built, met = meet_output_error(job, options.max_error, task.held)
        else:
            built, met = meet_weight_error(job, options.max_error)
        return Aim(plan=built.plan, built=built, met=met)
    if options.max_drop is not None and task.metric is not None:
        built, met = meet_drop(job, options.max_drop, task.metric)
        return Aim(plan=built.plan, built=built, met=met)
    if options.ratio is not None:
        job.take_statistics()
    return Aim(plan=job.plan())


def _writer(example: Batch) -> OnnxBytes:
    """Write a model with this batch as the example, into a directory that goes away again."""
    from mpocompress.export import export_onnx

    def onnx_bytes(model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            return export_onnx(model, path, forward_arguments(model, example)).num_bytes

    return onnx_bytes
