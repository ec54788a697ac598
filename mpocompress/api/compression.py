"""Decide what becomes of every weight, and do it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from mpocompress.api.data import calls_of
from mpocompress.api.result import Clock, CompressionResult
from mpocompress.api.tune import heal
from mpocompress.errors import (
    BudgetError,
    DataError,
    MPOCompressError,
    NoLayerMatched,
    PlanError,
)
from mpocompress.loading import Batch
from mpocompress.mpo import MPO, sequential_svd
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge, fix_identity_gauge
from mpocompress.planning import LayoutChoice, Of, Plan, PlanOptions, Progress
from mpocompress.report import CompressionReport, Source
from mpocompress.report.collect import Outcome, collect_report, measure
from mpocompress.surgery import (
    Inventory,
    WeightSite,
    check_finite,
    copy_with_replacements,
    find_weights,
    open_modules,
    opened_names,
    select_sites,
)
from mpocompress.tuning import (
    DistillOptions,
    FitOptions,
    FittedWeight,
    LayerMoments,
    SitePlan,
    check_steps,
    fit_in_sequence,
    gain_of_bonds,
    layer_moments,
    tied_heads,
)


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
    distill: int = 0,
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
            weight error that makes the layer smaller; for a ratio it is "svd", unless that
            cannot be made small enough, or see `distill`.
        sites: force balanced layouts of so many sites.
        include: globs on qualified names, or regular expressions after "re:"; default: all.
        exclude: likewise; they win.
        if_smaller: at a bond dimension: keep layers dense that would not get smaller.
        gauge: "identity" stores every layer with as many numbers as it has degrees of freedom:
            nothing is lost, and more layers get smaller. "none" stores all entries of the cores.
        data: batches of forward arguments, as in `compress`; for a ratio. At a bond dimension they
            are not looked at, but without any, embedding tables are kept unless they are included
            by name: truncated without regard to how often each row is used, they lose the most.
        distill: steps of healing that will follow. For a ratio, "auto" then takes four sites where
            two factors would be too narrow for healing to widen, if there is data to tell.
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
        healed=distill > 0,
    )
    opened = open_modules(model)
    inventory = find_weights(opened)
    moments = None
    if data is not None and ratio is not None:
        moments = _selected_moments(
            opened, inventory, options, calls_of(data, model), seed=seed, progress=progress
        )
    return _plan(inventory, options, moments, data is not None, progress)


def _plan(
    inventory: Inventory,
    options: PlanOptions,
    moments: Mapping[nn.Module, LayerMoments] | None,
    tables: bool,
    progress: Progress | None,
) -> Plan:
    gains = None if moments is None else partial(gain_of_bonds, moments=moments)
    return options.make(inventory, gains=gains, tables=tables, progress=progress)


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
        opened = open_modules(model)
        inventory = find_weights(opened)
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
        healed=distill > 0,
    )
    if (plan is None) != options.is_given:
        raise PlanError("compress needs either a plan, or a bond_dim or ratio. Try bond_dim=16.")
    calls = None if data is None else calls_of(data, model)
    moments: Mapping[nn.Module, LayerMoments] | None = None
    if plan is None:
        if calls is not None and ratio is not None:
            with clock("statistics"):
                moments = _selected_moments(
                    opened, inventory, options, calls, seed=seed, progress=progress
                )
        with clock("planning"):
            plan = _plan(inventory, options, moments, calls is not None, progress)
    check_belongs(plan, inventory)
    if not plan.compressed:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in plan.layers[:3])
        raise NoLayerMatched(f"nothing to compress: every layer stays dense ({reasons}).")
    with clock("inventory"):
        opened, moments = _opened_as_planned(model, opened, plan, moments)
        by_name = {site.name: site for site in find_weights(opened).sites}
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
                moments = _moments(opened, weights, calls, seed=seed, progress=progress)
        with clock("fitting"):
            fitted = fit_in_sequence(
                opened,
                planned,
                calls,
                output_metrics={
                    module: metric
                    for module, moment in moments.items()
                    if (metric := moment.output_metric) is not None
                },
                heads={entry.site: tied_heads(entry.site, moments) for entry in planned},
                options=FitOptions(sweeps=sweeps, output_metric="sites" if distill else "exact"),
                progress=progress,
            )
        moments = None  # the largest thing that is no longer needed
    mpos: dict[WeightSite, MPO | IdentityGauge] = {}
    outcomes: dict[str, Outcome] = {}
    with clock("factorization"):
        for done, entry in enumerate(planned):
            if progress is not None:
                progress(entry.site.name, done, len(planned))
            mpos[entry.site], outcomes[entry.site.name] = factorize_site(
                entry, fitted, seed, gauges[entry.site.name]
            )
    with clock("surgery"):
        compressed = copy_with_replacements(opened, mpos)
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
        check_ratio(report, ratio, of)
    result = CompressionResult(model=compressed, report=report, plan=plan)
    if calls is not None and distill:
        healing = DistillOptions(seed=seed)
        heal(result, model, calls, distill, healing, None, progress, inventory)
    return result


def _opened_as_planned(
    model: nn.Module,
    opened: nn.Module,
    plan: Plan,
    moments: Mapping[nn.Module, LayerMoments] | None,
) -> tuple[nn.Module, Mapping[nn.Module, LayerMoments] | None]:
    """The model with those modules opened that hold a weight to compress; the rest as it was.

    Args:
        model: dense.
        opened: with all modules opened that can be.
        plan: what is compressed.
        moments: of modules of `opened`; they are returned for the modules of the result.
    """
    names = opened_names(opened)
    wanted = {
        name
        for name in names
        if any(layer.name.startswith(f"{name}." if name else "") for layer in plan.compressed)
    }
    if len(wanted) == len(names):
        return opened, moments
    result = open_modules(model, wanted) if wanted else model
    if moments is None:
        return result, None
    theirs = dict(result.named_modules())
    return result, {
        theirs[name]: moments[module]
        for name, module in opened.named_modules()
        if module in moments and name in theirs
    }


def check_ratio(report: CompressionReport, ratio: float, of: Of) -> None:
    """A budget holds for what comes out, whatever the plan predicted."""
    totals = report.totals.parameters
    reached = totals.model.ratio if of == "model" else totals.layers.ratio
    if reached < ratio * (1 - 1e-9):
        raise BudgetError(
            f"a ratio of {ratio:g} of the {of} was asked for, but the result has {reached:.4g}. "
            f"Ask for a ratio of {reached:.4g}, and please report this."
        )


def factorize_site(
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


def check_belongs(plan: Plan, inventory: Inventory) -> None:
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
