"""The Python API: thin functions that compose the rooms."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpocompress import saving
from mpocompress.errors import (
    BudgetError,
    DataError,
    MPOCompressError,
    NoLayerMatched,
    PlanError,
)
from mpocompress.layers.gauges import plain_gauge
from mpocompress.loading import Batch, as_batches
from mpocompress.mpo import MPO, sequential_svd
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge, fix_identity_gauge
from mpocompress.planning import LayoutChoice, Of, Plan, PlanOptions, Progress
from mpocompress.report import CompressionReport, Source
from mpocompress.report.collect import Outcome, collect_report, measure, remeasure
from mpocompress.surgery import (
    Inventory,
    WeightSite,
    check_finite,
    copy_with_replacements,
    find_weights,
    select_sites,
)
from mpocompress.tuning import (
    Distillation,
    DistillOptions,
    DistillResult,
    FitOptions,
    FittedWeight,
    LayerMoments,
    LocalOptions,
    Loss,
    LossSweepOptions,
    LossSweepRecord,
    SitePlan,
    check_steps,
    distill_,
    fit_in_sequence,
    gain_of_bonds,
    layer_moments,
    sweep_on_loss,
)
from mpocompress.tuning.distill_loss import OutputLoss
from mpocompress.tuning.sweep_options import GradientPath, Optimizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompressionResult:
    """What `compress` returns.

    Attributes:
        model: a new module with MPO layers inside; same call signature, trainable.
        report: what was measured.
        plan: what was executed.
    """

    model: nn.Module
    report: CompressionReport
    plan: Plan


def plan(
    model: nn.Module,
    *,
    bond_dim: int | None = None,
    ratio: float | None = None,
    of: Of = "model",
    layout: LayoutChoice = "auto",
    sites: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    if_smaller: bool = True,
    gauge: Gauge = "none",
    data: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Decide for every convertible weight whether, and with which layout, it becomes an MPO.

    Args:
        model: any module; it is only read.
        bond_dim: largest bond dimension of every layer; or
        ratio: how many times fewer parameters: a ceiling for what is stored, met as closely as
            whole bond dimensions allow. With data, layers in which an error does more to the
            model's output get more of the parameters; without, all layers get smaller alike.
        of: whether the ratio counts the whole "model" or the compressed "layers" only.
        layout: "auto", "svd", "balanced", (out, in) pairs, text, a `Layout`, or a dict from layer
            pattern to one of these. At a bond dimension, "auto" takes the layout with the least
            weight error that makes the layer smaller; for a ratio it is "svd".
        sites: force balanced layouts of so many sites.
        include: globs on qualified names, or regular expressions after "re:"; default: all.
        exclude: likewise; they win.
        if_smaller: at a bond dimension: keep layers dense that would not get smaller.
        gauge: "identity" stores every layer with as many numbers as it has degrees of freedom:
            nothing is lost, and more layers get smaller. "none" stores all entries of the cores.
        data: for a ratio: batches of forward arguments, as in `compress`.
        seed: of the random directions of the gradients.
        progress: called as `progress(layer, done, total)`.

    Raises:
        PlanError: neither or both of bond_dim and ratio, or a ratio of 1 or less.
        BudgetError: a ratio that cannot be reached; the message says what can.
        BondDimError: `bond_dim` below 1.
        LayoutError: a forced layout that cannot be read, or fits no layer that it is for.
        NoLayerMatched: a pattern that matches nothing, or nothing to convert.
        ConversionError: NaN or Inf in a selected weight.
        DataError: data that does not fit the model.
    """
    options = PlanOptions(
        bond_dim=bond_dim,
        ratio=ratio,
        of=of,
        layout=layout,
        sites=sites,
        include=include,
        exclude=exclude,
        if_smaller=if_smaller,
        gauge=gauge,
    )
    inventory = find_weights(model)
    moments = None
    if data is not None and ratio is not None:
        moments = _selected_moments(
            model, inventory, options, _calls(data, model), seed=seed, progress=progress
        )
    return _plan(inventory, options, moments, progress)


def _plan(
    inventory: Inventory,
    options: PlanOptions,
    moments: Mapping[nn.Module, LayerMoments] | None,
    progress: Progress | None,
) -> Plan:
    gains = None if moments is None else partial(gain_of_bonds, moments=moments)
    return options.make(inventory, gains=gains, progress=progress)


def _selected_moments(
    model: nn.Module,
    inventory: Inventory,
    options: PlanOptions,
    calls: Sequence[Batch],
    *,
    seed: int,
    progress: Progress | None,
) -> dict[nn.Module, LayerMoments]:
    sites = select_sites(inventory, options.include, options.exclude)
    return _moments(model, sites, calls, seed=seed, progress=progress)


def _moments(
    model: nn.Module,
    sites: Sequence[WeightSite],
    calls: Sequence[Batch],
    *,
    seed: int,
    progress: Progress | None,
) -> dict[nn.Module, LayerMoments]:
    """What the dense model shows of these weights on the data."""
    if progress is not None:
        progress("inputs of the layers and gradients at their outputs", 0, len(sites))
    modules = [module for site in sites for module in site.modules]
    return layer_moments(model, modules, calls, seed=seed)


def compress(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    bond_dim: int | None = None,
    ratio: float | None = None,
    of: Of = "model",
    layout: LayoutChoice = "auto",
    sites: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    if_smaller: bool = True,
    gauge: Gauge = "none",
    data: Any = None,
    sweeps: int = 16,
    distill: int = 0,
    seed: int = 0,
    source: Source | None = None,
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
        of: see `plan`.
        layout: see `plan`.
        sites: see `plan`.
        include: see `plan`.
        exclude: see `plan`.
        if_smaller: see `plan`.
        gauge: see `plan`; layers are fitted first and brought into their gauge at the end.
        data: batches of forward arguments (a tensor, a tuple or a dict each); labels are not
            needed. With data every layer is fitted to the outputs that the dense model has on it,
            in the order of the forward pass, instead of to its weights.
        sweeps: at most so many passes over the sites in the fit of a layer; the layout
            ((out, 1), (1, in)) needs none.
        distill: after that, heal the whole model for so many optimizer steps; needs data. For its
            other options give 0 here and call `distill` on the result.
        seed: of the order of the data in healing, of random directions and of the randomized
            range finder for large matrices.
        source: name and hash of where the model came from, for the report.
        progress: called as `progress(layer, done, total)`.

    Raises:
        PlanError: neither plan nor bond_dim, both, or a plan of another model.
        BudgetError: the ratio cannot be reached, or was not.
        NoLayerMatched: the plan compresses nothing.
        DataError: data that does not fit the model, batches that take different paths, or
            `distill` without data.
        MPOCompressError: see `plan`.
    """
    check_steps(distill, "distill")
    if distill and data is None:
        raise DataError(
            f"distill={distill} trains on data, and there is none. Give batches of forward "
            "arguments: data=batches (--data on the command line); labels are not needed."
        )
    clock = Clock()
    with clock("inventory"):
        inventory = find_weights(model)
    options = PlanOptions(
        bond_dim=bond_dim,
        ratio=ratio,
        of=of,
        layout=layout,
        sites=sites,
        include=include,
        exclude=exclude,
        if_smaller=if_smaller,
        gauge=gauge,
    )
    if (plan is None) != options.is_given:
        raise PlanError("compress needs either a plan, or a bond_dim or ratio. Try bond_dim=16.")
    calls = None if data is None else _calls(data, model)
    moments: Mapping[nn.Module, LayerMoments] | None = None
    if plan is None:
        if calls is not None and ratio is not None:
            with clock("statistics"):
                moments = _selected_moments(
                    model, inventory, options, calls, seed=seed, progress=progress
                )
        with clock("planning"):
            plan = _plan(inventory, options, moments, progress)
    _check_belongs(plan, inventory)
    if not plan.compressed:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in plan.layers[:3])
        raise NoLayerMatched(f"nothing to compress: every layer stays dense ({reasons}).")
    by_name = {site.name: site for site in inventory.sites}
    planned = [
        SitePlan(
            site=by_name[layer.name],
            layout=layer.sites(),
            bond_dims=layer.sites().clip(layer.bond_dims or ()),
        )
        for layer in plan.compressed
    ]
    for entry in planned:
        check_finite(entry.site)
    gauges: dict[str, Gauge] = {layer.name: layer.gauge for layer in plan.compressed}
    # As executed: a plan that was edited may give each layer its own.
    used = set(gauges.values())
    gauge_setting = used.pop() if len(used) == 1 else gauges
    settings: dict[str, Any] = {**plan.settings, "gauge": gauge_setting, "seed": seed}
    fitted: dict[WeightSite, FittedWeight] = {}
    if calls is not None:
        settings |= {"sweeps": sweeps, "rows_of_data": sum(call.num_rows for call in calls)}
        if moments is None:
            with clock("statistics"):
                weights = [entry.site for entry in planned]
                moments = _moments(model, weights, calls, seed=seed, progress=progress)
        with clock("fitting"):
            fitted = fit_in_sequence(
                model,
                planned,
                calls,
                output_metrics={
                    module: metric
                    for module, moment in moments.items()
                    if (metric := moment.output_metric) is not None
                },
                options=FitOptions(sweeps=sweeps),
                progress=progress,
            )
        moments = None  # the largest thing that is no longer needed
    mpos: dict[WeightSite, MPO | IdentityGauge] = {}
    outcomes: dict[str, Outcome] = {}
    with clock("factorization"):
        for done, entry in enumerate(planned):
            if progress is not None:
                progress(entry.site.name, done, len(planned))
            mpos[entry.site], outcomes[entry.site.name] = _factorize(
                entry, fitted, seed, gauges[entry.site.name]
            )
    with clock("surgery"):
        compressed = copy_with_replacements(model, mpos)
        for site, weight in fitted.items():
            if weight.bias is not None:
                bias = compressed.get_submodule(site.name).get_parameter("bias")
                bias.data.copy_(weight.bias)
    report = collect_report(
        inventory,
        plan,
        outcomes,
        source=source or Source(name=type(model).__name__),
        seconds=clock.total(),
        settings=settings,
    )
    if ratio is not None:
        _check_ratio(report, ratio, of)
    result = CompressionResult(model=compressed, report=report, plan=plan)
    if calls is not None and distill:
        healing = DistillOptions(seed=seed)
        _heal(result, model, calls, distill, healing, None, progress, inventory)
    return result


def distill(
    result: CompressionResult | nn.Module,
    *,
    reference: nn.Module,
    data: Any,
    steps: int = 500,
    blockwise_steps: int = 0,
    output_loss: OutputLoss = "auto",
    hidden_weight: float = 1.0,
    learning_rate: float | Literal["auto"] = "auto",
    batch_size: int | None = None,
    held_out: float = 0.1,
    evaluate_every: int | None = None,
    patience: int | None = 10,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> DistillResult:
    """Heal a compressed model: train it, in place, to do what the dense model does.

    All floating parameters that require gradients are trained, in evaluation mode, in float32 or
    float64, with Adam, warm-up, a cosine and clipped gradients. The best weights on the held-out
    part of the data are kept: there the model is never worse than before. A result's report is
    brought up to date, so that what `save` writes is what is true of the healed weights.

    Args:
        result: from `compress`, or its model.
        reference: the dense model; it is only read.
        data: batches of forward arguments, without labels; held in memory.
        steps: of the optimizer.
        blockwise_steps: before these, steps in which each repeated block is trained by itself on
            the inputs of the dense block; skipped where a model has no such blocks.
        output_loss: "kl" (temperature 2), "mse" (relative), "cosine"; "auto" is "mse", plus "kl"
            where the output may be logits.
        hidden_weight: weight of the relative errors of the repeated blocks' outputs.
        learning_rate: peak of the schedule; "auto" tries three in short runs of their own.
        batch_size: rows of a minibatch; None takes batches of up to 128 rows as they come, and
            cuts larger ones, or a single one, into 64.
        held_out: share of the data that is never trained on.
        evaluate_every: steps between evaluations; None for 25 in all.
        patience: stop after so many evaluations that were not better; None: never.
        seed: of the order and of the held-out part.
        checkpoint: file to go on from if a run with the same arguments was interrupted.
        progress: called as `progress(what, done, total)`.

    Returns:
        All evaluations, the losses before and after, and the learning rates.

    Raises:
        DataError: see `tuning.distill_`.
        LoadError: a truncated checkpoint.
        SaveError: the checkpoint cannot be written.
    """
    options = DistillOptions(
        blockwise_steps=blockwise_steps,
        output_loss=output_loss,
        hidden_weight=hidden_weight,
        learning_rate=learning_rate,
        batch_size=batch_size,
        held_out=held_out,
        evaluate_every=evaluate_every,
        patience=patience,
        seed=seed,
    )
    calls = _calls(data, reference)
    if isinstance(result, CompressionResult):
        return _heal(result, reference, calls, steps, options, checkpoint, progress, None)
    return distill_(
        result,
        reference,
        calls,
        steps=steps,
        options=options,
        checkpoint=checkpoint,
        progress=progress,
    )


def _heal(
    result: CompressionResult,
    reference: nn.Module,
    calls: Sequence[Batch],
    steps: int,
    options: DistillOptions,
    checkpoint: str | Path | None,
    progress: Progress | None,
    inventory: Inventory | None,
) -> DistillResult:
    """Distill a result's model and bring its report up to date."""
    clock = Clock()
    clock.add(result.report.seconds)
    with clock("distillation"):
        found = distill_(
            result.model,
            reference,
            calls,
            steps=steps,
            options=options,
            checkpoint=checkpoint,
            progress=progress,
        )
    report = remeasure(result.report, reference, inventory or find_weights(reference), result.model)
    healing = {
        "steps": steps,
        "blockwise_steps": options.blockwise_steps,
        "best_step": found.best_step,
        "learning_rates": found.learning_rates,
        "output_loss": options.output_loss,
        "held_out_loss": {"before": found.start_loss, "after": found.end_loss},
        "seed": options.seed,
    }
    update = {"settings": {**report.settings, "distill": healing}, "seconds": clock.total()}
    # The model was trained in place, so its report changes in place, too.
    object.__setattr__(result, "report", report.model_copy(update=update))
    return found


def _check_ratio(report: CompressionReport, ratio: float, of: Of) -> None:
    """A budget holds for what comes out, whatever the plan predicted."""
    totals = report.totals.parameters
    reached = totals.model.ratio if of == "model" else totals.layers.ratio
    if reached < ratio * (1 - 1e-9):
        raise BudgetError(
            f"a ratio of {ratio:g} of the {of} was asked for, but the result has {reached:.4g}. "
            f"Ask for a ratio of {reached:.4g}, and please report this."
        )


def _calls(data: Any, model: nn.Module) -> list[Batch]:
    """The batches of the user's data in the model's dtype and on its device."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    batches = as_batches(data)
    if parameter is None:
        return list(batches)
    return [batch.to(parameter.device) for batch in batches.cast(parameter.dtype)]


def _factorize(
    entry: SitePlan, fitted: Mapping[WeightSite, FittedWeight], seed: int, gauge: Gauge
) -> tuple[MPO | IdentityGauge, Outcome]:
    """The fitted MPO or, without data or where data did not come by, the sequential SVD."""
    site = entry.site
    with _naming(site):
        if site in fitted:
            found = fitted[site]
            error = found.relative_output_error
            weight = _in_gauge(found.mpo, gauge)
            return weight, measure(site, weight, relative_output_error=error)
        factorization = sequential_svd(
            site.matrix(),
            entry.layout,
            bond_dim=entry.bond_dims,
            generator=torch.Generator(device=site.device).manual_seed(seed),
        )
        mpo = MPO(factorization.cores, shape=site.shape)
        weight = _in_gauge(mpo, gauge).to(dtype=site.dtype)
        bound = factorization.relative_error
        return weight, measure(site, weight, discarded_weight_bound=bound)


def _in_gauge(mpo: MPO, gauge: Gauge) -> MPO | IdentityGauge:
    return mpo if gauge == "none" else fix_identity_gauge(mpo.cores, shape=mpo.shape)


def sweep(
    model: nn.Module | CompressionResult,
    *,
    reference: nn.Module | None = None,
    data: Any,
    loss: Loss | Literal["outputs", "logits"] = "outputs",
    sweeps: int = 4,
    sites: int = 1,
    local_steps: int = 8,
    optimizer: Optimizer = "adam",
    learning_rate: float | None = None,
    gradient: GradientPath = "manual",
    bond_dim: int | None = None,
    cutoff: float = 0.0,
    eval_batches: int | None = 4,
    train_dense: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[LossSweepRecord, ...]:
    """Tune a compressed model by sweeps on the loss, in place: one core at a time, all else frozen.

    Args:
        model: with MPO layers, or the result of `compress`, whose model is changed; its report goes
            on to describe the model as `compress` left it.
        reference: the dense model whose outputs are the target; not needed with a `loss` of yours.
        data: batches of forward arguments; a gradient step takes one.
        loss: "outputs" (normalized squared error of all outputs), "logits" (Kullback-Leibler
            divergence of class probabilities), or a function `loss(model, batch)` that gives a
            scalar, where `batch` has `args`, `kwargs` and `labels`.
        sweeps: passes over the sites of every layer, to the right and to the left in turn.
        sites: 1, or 2 for merged neighbours that are split again, so that bond dimensions change.
        local_steps: gradient steps at each position.
        optimizer: "adam", "sgd" or "lbfgs", of each open core anew.
        learning_rate: relative to the size of the open core, see `tuning.LocalOptions`.
        gradient: "manual", contracted by hand, or "autograd"; the results agree.
        bond_dim: for two sites, the largest bond dimension; default: the layer's largest now, or no
            limit with a cutoff.
        cutoff: for two sites, the largest truncation error of a split.
        eval_batches: so many batches, chosen by the seed, judge every update; None for all. On them
            the loss does not rise: an update that would raise it is rolled back.
        train_dense: train all other parameters along.
        include: patterns of layer names; default: all MPO layers.
        exclude: likewise; they win.
        seed: of the order of the batches.
        state: file to write after each layer and to go on from if it exists.
        progress: called as `progress(layer, done, total)`.

    Returns:
        One record for each sweep along a layer.

    Raises:
        NoLayerMatched: no MPO layer, or patterns that match none.
        DataError: no data, no reference, or an impossible option.
        MPOCompressError: see `tuning.sweep_on_loss`.
    """
    target = model.model if isinstance(model, CompressionResult) else model
    options = LossSweepOptions(
        sweeps=sweeps,
        sites=sites,
        local=LocalOptions(
            steps=local_steps, optimizer=optimizer, learning_rate=learning_rate, gradient=gradient
        ),
        bond_dim=bond_dim,
        cutoff=cutoff,
        eval_batches=eval_batches,
        train_dense=train_dense,
        seed=seed,
    )
    calls = _calls(data, target)
    if not callable(loss):
        if reference is None:
            raise DataError(
                f"loss {loss!r} is a distance to a dense model. Give it as reference=..., or a "
                "function loss(model, batch)."
            )
        loss = Distillation(reference, calls, kind=loss)
    with plain_gauge(target):
        return sweep_on_loss(
            target,
            loss,
            calls,
            options=options,
            include=include,
            exclude=exclude,
            state=None if state is None else Path(state),
            progress=progress,
        )


def save(
    result: CompressionResult | nn.Module, directory: str | Path, *, force: bool = False
) -> Path:
    """Write `model.mpo.safetensors` and, for a result, the plan's report; never a pickle.

    Args:
        result: from `compress`, or a module with MPO layers.
        directory: made if missing. All files appear together, or none does.
        force: replace our files in a directory that exists.

    Returns:
        The directory.

    Raises:
        OutputExistsError: the directory exists and is not empty, without `force`.
        SaveError: it cannot be written.
    """
    with saving.staged_output(directory, force=force) as scratch:
        path = scratch / saving.CORES_FILE
        if isinstance(result, CompressionResult):
            saving.save_model(result.model, path)
            write_report(with_files(result.report, scratch), scratch)
        else:
            saving.save_model(result, path)
    return Path(directory)


def load(directory: str | Path, *, model: nn.Module) -> nn.Module:
    """Load a saved result into a copy of its dense architecture; it stays compressed.

    Args:
        directory: that `save` or the command line wrote.
        model: a skeleton: the dense architecture with any weights; untouched.

    Returns:
        The compressed model, with bit-identical outputs, in the mode of the skeleton.

    Raises:
        LoadError: missing or foreign file, or another architecture.
    """
    return saving.load_model(directory, model)


def densify(directory: str | Path) -> dict[str, Tensor]:
    """The state dict of the ordinary dense model that a saved result stands for.

    Raises:
        LoadError: missing or foreign file.
    """
    return saving.densify_state(directory)


def save_dense(directory: str | Path, path: str | Path) -> None:
    """Write `densify(directory)` to a file: `.safetensors`, or a state dict as `.pt` or `.pth`.

    Raises:
        LoadError: missing or foreign result.
        SaveError: another suffix, or the file cannot be written.
    """
    saving.save_state(saving.densify_state(directory), Path(path))


def write_report(report: CompressionReport, directory: Path) -> None:
    """Write report.html, report.md and report.json, each atomically.

    Raises:
        SaveError: the directory cannot be written.
    """
    for suffix, text in (
        ("html", report.to_html()),
        ("md", report.to_markdown()),
        ("json", report.to_json()),
    ):
        with saving.replacing(directory / f"report.{suffix}") as scratch:
            scratch.write_text(text, encoding="utf-8")


def with_files(report: CompressionReport, directory: Path) -> CompressionReport:
    """The report with the bytes of the model files that lie in `directory`."""
    names = (saving.CORES_FILE, saving.ONNX_FILE, saving.ONNX_DATA_FILE)
    sizes = {
        name: (directory / name).stat().st_size for name in names if (directory / name).exists()
    }
    return report.model_copy(update={"files": sizes})


def _check_belongs(plan: Plan, inventory: Inventory) -> None:
    """Refuse a plan that was made for another model, by name and shape."""
    shapes = {site.name: site.shape for site in inventory.sites}
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
    missing = [name for name in shapes if name not in {layer.name for layer in plan.layers}]
    if missing:
        raise PlanError(
            f"the plan says nothing of layer {missing[0]!r} ({len(missing)} such layers). Add an "
            'entry with action "keep", or plan again.'
        )


@contextmanager
def _naming(site: WeightSite) -> Iterator[None]:
    """Put the layer's name before what goes wrong inside."""
    try:
        yield
    except MPOCompressError as error:
        raise type(error)(f"layer {site.label}: {error}") from error


class Clock:
    """Wall time by stage, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as part of `stage`."""
        start = time.perf_counter()
        yield
        self.add({stage: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add times that were taken elsewhere, but for their total."""
        for stage, taken in seconds.items():
            if stage != "total":
                self._seconds[stage] = self._seconds.get(stage, 0.0) + taken

    def total(self) -> dict[str, float]:
        """All stages, and "total"."""
        return {**self._seconds, "total": sum(self._seconds.values())}
