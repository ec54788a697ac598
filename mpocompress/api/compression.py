"""Decide what becomes of every weight, and do it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from mpocompress.api.budgets import Met
from mpocompress.api.calling import by_itself, uncompiled
from mpocompress.api.data import calls_of, few_rows
from mpocompress.api.drop_budget import EvalFn
from mpocompress.api.error_budget import measured_errors, output_change
from mpocompress.api.job import Built, Job
from mpocompress.api.result import CompressionResult
from mpocompress.api.size_budget import OnnxBytes
from mpocompress.api.targets import Aim, Task, meet
from mpocompress.api.tune import heal
from mpocompress.errors import (
    BudgetError,
    DataError,
    NoLayerMatched,
    PlanError,
)
from mpocompress.loading import Batch
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.planning import (
    Latency,
    LayoutChoice,
    ObjectiveName,
    Of,
    Plan,
    PlanOptions,
    Progress,
)
from mpocompress.planning.entries import why_nothing
from mpocompress.planning.options import PlannedPrecision
from mpocompress.report import CompressionReport, Source
from mpocompress.report.predictions import with_budget, with_comparisons
from mpocompress.scalars import as_count, as_seed
from mpocompress.surgery import Inventory
from mpocompress.tuning import DistillOptions
from mpocompress.tuning.healing.distill import check_trainable


@by_itself
def plan(
    model: nn.Module,
    *,
    bond_dim: int | None = None,
    ratio: float | None = None,
    max_size: int | str | None = None,
    max_error: float | None = None,
    max_drop: float | None = None,
    eval_fn: EvalFn | None = None,
    of: Of = "model",
    objective: ObjectiveName = "size",
    batch: int = 1,
    layout: LayoutChoice = "auto",
    sites: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    if_smaller: bool = True,
    gauge: Gauge = "none",
    quantize: PlannedPrecision = "none",
    data: Any = None,
    onnx_bytes: OnnxBytes | None = None,
    sweeps: int = 16,
    distill: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Decide for every convertible weight whether, and with which layout, it becomes an MPO.

    Exactly one of the first five options says how small.

    Args:
        model: any module; it is only read.
        bond_dim: largest bond dimension of every layer; or
        ratio: how many times fewer parameters: a ceiling for what is stored, met as closely as
            whole bond dimensions allow. With data, layers in which an error does more to the
            model's output get more of the parameters; without, all layers get smaller alike; or
        max_size: bytes of the ONNX file, such as 25_000_000 or "25MB"; files are written to measure
            them; or
        max_error: relative error, norm of the difference over norm, of the outputs of every
            compressed layer and of the model, on a fifth of the data that nothing is fitted on.
            Without data: of every compressed weight; or
        max_drop: how much less of a metric: accuracy or R² from labels in the data (three fifths
            to fit on, one to search with, one to measure with at the end), or `eval_fn`.
        eval_fn: metric of a model, the higher the better, for `max_drop`; all data is then
            fitted on.
        of: whether the ratio counts the whole "model" or the compressed "layers" only.
        objective: what else is to be small: "size", "macs" (multiply-adds) or "latency" (time in
            ONNX Runtime on this machine). By the latter two no layer is compressed that would cost
            more than it does dense, and budgets are shared by what is gained for the cost.
        batch: rows that latency is measured with.
        layout: "auto", "svd", "balanced", (out, in) pairs, text, a `Layout`, or a dict from layer
            pattern to one of these. At a bond dimension, "auto" takes the layout with the least
            weight error that makes the layer smaller. For budgets it is "svd", except where so few
            numbers between two factors would carry too little: with data for a ratio or a size,
            four sites are then fitted on trial, and taken if the model's outputs change less by it.
        sites: force balanced layouts of so many sites.
        include: globs on qualified names, or regular expressions after "re:"; default: all.
        exclude: likewise; they win.
        if_smaller: at a bond dimension: keep layers dense that would not get smaller.
        gauge: "identity" stores every layer with as many numbers as it has degrees of freedom:
            nothing is lost, and more layers get smaller. "none" stores all entries of the cores.
        quantize: "auto", with `max_size`: a storage precision for each layer, dense or factorized
            (float16, or integers of 8 to 2 bits), by what its error does to the model's output.
            Layouts and gauges are then chosen along with it.
        data: batches of forward arguments, as in `compress`. Without any, embedding tables are kept
            unless they are included by name: truncated without regard to how often each row is
            used, they lose the most.
        onnx_bytes: for `max_size`: writes the ONNX file of a model and gives its bytes. Default:
            `export_onnx` with the first batch of the data.
        sweeps: of the fits that are tried for `max_error` and `max_drop`, as in `compress`.
        distill: steps of healing that will follow. For a budget, "auto" then takes four sites in
            place of narrow factors unless a fit on trial is clearly against them; also where none
            can be made because the layers are too large.
        seed: of the random directions of the gradients, and of what is held out.
        progress: called as `progress(layer, done, total)`.

    Raises:
        PlanError: none or several of the five, or one that makes no sense.
        BudgetError: it cannot be met; the message says what can.
        BondDimError: `bond_dim` below 1.
        LayoutError: a forced layout that cannot be read, or fits no layer that it is for.
        NoLayerMatched: a pattern that matches nothing, or nothing to convert.
        ConversionError: NaN or Inf in a selected weight.
        DataError: data that does not fit the model, or none where it is needed.
    """
    model = uncompiled(model)
    distill = as_count("distill", distill, 0, DataError)
    sweeps, seed = as_count("sweeps", sweeps, 0, DataError), as_seed(seed)
    options = PlanOptions(
        bond_dim=bond_dim,
        ratio=ratio,
        max_size=max_size,
        max_error=max_error,
        max_drop=max_drop,
        of=of,
        objective=objective,
        batch=batch,
        layout=layout,
        sites=sites,
        include=include,
        exclude=exclude,
        if_smaller=if_smaller,
        gauge=gauge,
        healed=distill > 0,
        quantize=quantize,
    ).checked()
    calls = None if data is None else calls_of(data, model)
    task = Task.of(model, options, calls, eval_fn, onnx_bytes, seed)
    job = _job(model, options, task.fit, sweeps, seed, progress)
    return meet(job, task).plan


@by_itself
def compress(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    bond_dim: int | None = None,
    ratio: float | None = None,
    max_size: int | str | None = None,
    max_error: float | None = None,
    max_drop: float | None = None,
    eval_fn: EvalFn | None = None,
    of: Of = "model",
    objective: ObjectiveName = "size",
    batch: int = 1,
    layout: LayoutChoice = "auto",
    sites: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    if_smaller: bool = True,
    gauge: Gauge = "none",
    quantize: PlannedPrecision = "none",
    data: Any = None,
    onnx_bytes: OnnxBytes | None = None,
    sweeps: int = 16,
    distill: int = 0,
    seed: int = 0,
    source: Source | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Replace the planned weights of a model by MPOs. The model itself is untouched.

    The dense weights that are replaced are never copied, so the result needs little more memory
    than what is kept and the cores.

    Args:
        model: any module.
        plan: from `plan`, perhaps edited; or None, and the options that make one.
        bond_dim: see `plan`.
        ratio: see `plan`; what is written is counted, and more than asked for is an error.
        max_size: see `plan`.
        max_error: see `plan`; measured on what is returned.
        max_drop: see `plan`; likewise.
        eval_fn: see `plan`.
        of: see `plan`.
        objective: see `plan`.
        batch: see `plan`.
        layout: see `plan`.
        sites: see `plan`.
        include: see `plan`.
        exclude: see `plan`.
        if_smaller: see `plan`.
        gauge: see `plan`; layers are fitted first and brought into their gauge at the end.
        quantize: see `plan`. Layers have the values that their files stand for, and `export_onnx`
            writes them so. Healing then trains scales, norms and biases; integers stay.
        data: batches of forward arguments (a tensor, a tuple or a dict each); labels are not
            needed but for `max_drop`. With data every layer is fitted to the outputs that the dense
            model has on it, in the order of the forward pass, instead of to its weights.
        onnx_bytes: see `plan`.
        sweeps: at most so many passes over the sites in the fit of a layer; the layout
            ((out, 1), (1, in)) needs none.
        distill: after that, heal the whole model for so many optimizer steps; needs data. If a
            maximal error or drop that was met no longer holds then, the healing is undone. For its
            other options give 0 here and call `distill` on the result.
        seed: of the order of the data in healing, of random directions, of what is held out and of
            the randomized range finder for large matrices.
        source: name and hash of where the model came from, for the report.
        state: a folder in which a run keeps its fitted layers and the state of the healing, and
            from which a run with the same arguments goes on that was interrupted: it ends with the
            same result. Statistics and plans are made anew. It stays when the run is done.
        progress: called as `progress(layer, done, total)`.

    Raises:
        PlanError: neither plan nor a way to make one, both, or a plan of another model.
        BudgetError: a budget cannot be met, or was not.
        NoLayerMatched: the plan compresses nothing.
        DataError: data that does not fit the model or reaches no layer, `distill` without data, or
            the state of a run with other arguments.
        LoadError: a truncated state.
        SaveError: the state cannot be written.
        MPOCompressError: see `plan`.
    """
    model = uncompiled(model)
    distill = as_count("distill", distill, 0, DataError)
    sweeps, seed = as_count("sweeps", sweeps, 0, DataError), as_seed(seed)
    if distill and data is None:
        raise DataError(
            f"distill={distill} trains on data, and there is none. Give batches of forward "
            "arguments: data=batches (--data on the command line); labels are not needed."
        )
    options = PlanOptions(
        bond_dim=bond_dim,
        ratio=ratio,
        max_size=max_size,
        max_error=max_error,
        max_drop=max_drop,
        of=of,
        objective=objective,
        batch=batch,
        layout=layout,
        sites=sites,
        include=include,
        exclude=exclude,
        if_smaller=if_smaller,
        gauge=gauge,
        healed=distill > 0,
        quantize=quantize,
    )
    if plan is None and not options.is_given:
        raise PlanError(
            "compress needs either a plan, or a bond_dim or ratio, or another budget, that makes "
            "one. Try bond_dim=16."
        )
    if plan is not None and options.not_default:
        raise PlanError(
            f"the plan says what becomes of each layer, so {' and '.join(options.not_default)} "
            "would not be looked at. Give either the plan, edited or made by plan(model, ...) with "
            "these options, or the options alone."
        )
    options = options if plan is not None else options.checked()
    calls = None if data is None else calls_of(data, model)
    task = Task.of(model, options, calls, eval_fn, onnx_bytes, seed)
    folder = None if state is None else Path(state)
    if distill:
        check_trainable(model.parameters())
    job = _job(model, options, task.fit, sweeps, seed, progress, state=folder)
    if plan is not None:
        check_belongs(plan, job.inventory)
    aim = meet(job, task) if plan is None else Aim(plan=plan)
    if not aim.plan.compressed:
        why = why_nothing(aim.plan.layers)
        raise NoLayerMatched(f"nothing to compress: every layer stays dense ({why}).")
    built = aim.built or job.build(aim.plan)
    result = job.finish(built, source=source)
    if options.ratio is not None:
        check_ratio(result.report, options.ratio, of)
    met = aim.met
    if task.fit is not None and distill:
        met = _heal(job, task, result, built, met, distill)
    report = result.report if met is None else with_budget(result.report, asdict(met))
    error, note = _output_change(job, built, task)
    report = with_comparisons(
        report,
        aim.plan,
        relative_output_error=error,
        note=note,
        seconds=job.measured_seconds(aim.plan),
    )
    return CompressionResult(model=result.model, report=report, plan=aim.plan)


def _output_change(job: Job, built: Built, task: Task) -> tuple[float | None, str]:
    """Relative change of the model's outputs, None without data, and on what it was measured."""
    if task.fit is None:
        return None, ""
    error, why_not = output_change(job.opened, built.model, few_rows(task.held or task.fit))
    if error is None:
        return None, f"not measured: {why_not}"
    rows = "rows held out from fitting" if task.held else "rows that were fitted on"
    return error, f"measured on {rows}"


def _job(
    model: nn.Module,
    options: PlanOptions,
    calls: Sequence[Batch] | None,
    sweeps: int,
    seed: int,
    progress: Progress | None,
    *,
    state: Path | None = None,
) -> Job:
    latency: Latency | None = None
    if options.objective == "latency" and options.is_given:
        from mpocompress.export.latency import LatencyTable

        latency = LatencyTable(options.batch)
    return Job(
        model,
        options,
        calls=calls,
        sweeps=sweeps,
        seed=seed,
        latency=latency,
        state=state,
        progress=progress,
    )


def _heal(
    job: Job, task: Task, result: CompressionResult, built: Built, met: Met | None, steps: int
) -> Met | None:
    """Heal, and measure the budget again; undo the healing if that no longer holds."""
    guarded = met is not None and met.target in ("max_error", "max_drop") and task.fit is not None
    before = copy.deepcopy(result.model.state_dict()) if guarded else None
    report = result.report
    healing = DistillOptions(seed=job.seed)
    checkpoint = None if job.state is None else job.state / "healing.safetensors"
    calls = task.fit or ()
    heal(result, job.model, calls, steps, healing, checkpoint, job.progress, job.inventory)
    if met is None or before is None:
        return met
    reached = met.reached
    if met.target == "max_error" and task.held:
        reached = measured_errors(job, built, task.held).largest
    elif task.metric is not None:
        dense = task.metric.value(job.model, final=True)
        reached = dense - task.metric.value(result.model, final=True)
    if reached <= met.asked:
        return replace(met, reached=reached)
    result.model.load_state_dict(before)
    undone = {"steps": steps, "undone": f"the budget no longer held: {reached:.4g}"}
    settings: Mapping[str, Any] = {**report.settings, "healing": undone}
    result.report = report.model_copy(update={"settings": settings})
    return met


def check_ratio(report: CompressionReport, ratio: float, of: Of) -> None:
    """A budget holds for what comes out, whatever the plan predicted."""
    totals = report.totals.parameters
    reached = totals.model.ratio if of == "model" else totals.layers.ratio
    if reached < ratio * (1 - 1e-9):
        raise BudgetError(
            f"a ratio of {ratio:g} of the {of} was asked for, but the result has {reached:.4g}. "
            f"Ask for a ratio of {reached:.4g}, and please report this."
        )


def check_belongs(plan: Plan, inventory: Inventory) -> None:
    """Refuse a plan that was made for another model, by name, shape and kind."""
    shapes = {site.name: site.shape for site in inventory.sites}
    kinds = {site.name: site.kind for site in inventory.sites}
    for layer in plan.layers:
        if layer.name not in shapes:
            raise PlanError(
                f"the plan names layer {layer.name!r}, which this model does not have or cannot "
                f"convert. Its layers: {', '.join(list(shapes)[:5]) or 'none'}."
            )
        if layer.shape != shapes[layer.name]:
            raise PlanError(
                f"layer {layer.name!r} is {layer.shape[0]}x{layer.shape[1]} in the plan, but "
                f"{shapes[layer.name][0]}x{shapes[layer.name][1]} in this model. Plan it again."
            )
        if layer.kind != kinds[layer.name]:
            raise PlanError(
                f"layer {layer.name!r} is of kind {layer.kind!r} in the plan, but "
                f"{kinds[layer.name]!r} in this model. Plan it again."
            )
    missing = [name for name in shapes if name not in {layer.name for layer in plan.layers}]
    if missing:
        raise PlanError(
            f"the plan says nothing of layer {missing[0]!r} ({len(missing)} such layers). Add an "
            'entry with action "keep", or plan again.'
        )
