"""Fit layer after layer, in forward order, each on the inputs that the compressed prefix produces.

The layer at hand sees x^ from the compressed prefix where the dense model sees x, and is fitted to
the dense layer's outputs: min E |y - W^ x^ - b^|^2. With second moments that is again a matrix and
a metric: the target T = E[y x^T] E[x^ x^T]^-1 in the metric C = E[x^ x^T]. Where the output is
added to a residual stream h, y also contains h - h^: each block repairs what those before it broke.
A weight that is called more than once is fitted at its first call, see `later_calls` for the rest.

Batches need not call the same layers: experts without rows are skipped, deep layers are left out. A
layer is fitted on the batches that call it, once all of them wait there.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, MPOCompressError, NoRowsError
from mpocompress.layers.modes import cuda_devices, evaluation_mode, seeded
from mpocompress.layers.opened import layers_called
from mpocompress.mpo.contract import apply_cores
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.dense_layers import is_corrected
from mpocompress.tuning.fitting.one_layer import fit_layer, fit_looked_up
from mpocompress.tuning.fitting.plan import (
    FitOptions,
    FittedWeight,
    OutputMetric,
    SitePlan,
    exact_takes_long,
)
from mpocompress.tuning.fitting.residual import StreamWatcher
from mpocompress.tuning.fitting.state import FitStore
from mpocompress.tuning.lockstep import (
    Call,
    OperationRecorder,
    Runner,
    stopping_layers,
    version_of,
)
from mpocompress.tuning.padding import keep_mask
from mpocompress.tuning.statistics.later_calls import LaterCalls
from mpocompress.tuning.statistics.layer_rows import adapter_of
from mpocompress.tuning.statistics.tables import HeadUse
from mpocompress.tuning.statistics.upstream import Collector, Place


def fit_in_sequence(
    model: nn.Module,
    plans: Sequence[SitePlan],
    calls: Sequence[Call],
    *,
    output_metrics: Mapping[nn.Module, Tensor] | None = None,
    heads: Mapping[WeightSite, Sequence[HeadUse]] | None = None,
    later: Mapping[WeightSite, LaterCalls] | None = None,
    options: FitOptions | None = None,
    store: FitStore | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[WeightSite, FittedWeight]:
    """Fit all planned weights in one simultaneous pass of the dense and the compressed model.

    The activations of all batches at one layer are alive at the same time, as are those that the
    rest of their forward passes still needs.

    Args:
        model: dense; it is not changed.
        plans: weights to fit.
        calls: batches.
        output_metrics: for a module, the covariance (out, out) of the loss gradient at its outputs.
        heads: for a table, how output layers that are tied to it use it.
        later: for a weight that a forward pass calls more than once, what is known of its later
            calls, from `later_calls`; without it the first call alone counts.
        options: ridge and round trips.
        store: keeps each fitted layer on disk; those that it has are not fitted again.
        progress: called with the layer, how many are done, and of how many.

    Returns:
        The fitted weights; those that no row of the data reaches are missing.

    Raises:
        DataError: no data, no row that is not padding, or NaN activations.
        LoadError: a layer of the store that is truncated.
        SaveError: the store cannot be written.
    """
    if not calls:
        raise DataError("there are no batches to fit on.")
    given = (model, plans, calls, output_metrics or {}, heads or {}, later or {})
    how = (options or FitOptions(), store, progress)
    try:
        return _fit_in_sequence(*given, *how, copies=False)
    except _OverwrittenError:
        pass  # with the activations that it holds
    return _fit_in_sequence(*given, *how, copies=True)


class _OverwrittenError(Exception):
    """The dense model has changed what a layer read before it could be looked at."""


def _fit_in_sequence(
    model: nn.Module,
    plans: Sequence[SitePlan],
    calls: Sequence[Call],
    output_metrics: Mapping[nn.Module, Tensor],
    heads: Mapping[WeightSite, Sequence[HeadUse]],
    later: Mapping[WeightSite, LaterCalls],
    options: FitOptions,
    store: FitStore | None,
    progress: Callable[[str, int, int], None] | None,
    *,
    copies: bool,
) -> dict[WeightSite, FittedWeight]:
    """The same; with copies of what the dense layers read."""
    if options.output_metric == "auto":
        swept = [plan.site.shape for plan in plans if not (plan.stays_dense or plan.layout.is_svd)]
        metric: OutputMetric = "sites" if exact_takes_long(swept) else "exact"
        options = replace(options, output_metric=metric)
    by_module = {module: plan for plan in plans for module in plan.site.modules}
    fitted: dict[WeightSite, FittedWeight] = {}
    without_rows: set[WeightSite] = set()
    ranks: dict[nn.Module, int] = {}
    pairs = [
        (
            Runner(model, call, StreamWatcher(), seed=number),
            Runner(model, call, OperationRecorder(), seed=number),
        )
        for number, call in enumerate(calls)
    ]
    dense_runners = {id(dense) for dense, _ in pairs}
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}

    def is_done(layer: nn.Module) -> bool:
        site = by_module[layer].site
        return site in fitted or site in without_rows

    def compressed_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        if layer not in forwards:
            plan = by_module[layer]
            if plan.site in without_rows:
                return _dense_forward(layer)
            done = fitted[plan.site]
            same = plan.stays_dense and not is_corrected(plan.site, done)
            # What is as it was gives what it gave, to the bit.
            forwards[layer] = _dense_forward(layer) if same else _compressed_forward(layer, done)
        return forwards[layer]

    def compute(layer: nn.Module, runner: Runner, value: Tensor) -> Tensor:
        if not is_done(layer):
            return runner.stop_at(layer, value)
        # Used again: a shared layer, or one tied to a layer that has been fitted.
        is_dense = id(runner) in dense_runners
        forward = _dense_forward(layer) if is_dense else compressed_forward(layer)
        return runner.call_layer(layer, forward, value)

    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {parameter for parameter, count in uses.items() if count > 1}
    if store is not None:
        store.begin(model, calls, output_metrics, later, options)
    collector = Collector([keep_mask(call.kwargs) for call in calls])
    with (
        evaluation_mode(model),
        layers_called(model),
        stopping_layers(list(by_module), compute),
        _abandoning(pairs),
    ):
        for pair in pairs:
            for runner in pair:
                runner.start()
        while waiting := _layers_waited_at(pairs):
            if len(waiting) > 1 and not ranks:
                ranks = _ranks(model, list(by_module), calls)
            # What no batch calls in the dense model comes last.
            layer = min(waiting, key=lambda found: ranks.get(found, len(ranks)))
            plan = by_module[layer]
            if progress is not None:
                progress(plan.site.name, len(fitted), len(plans))
            places = [_place(layer, pair, options.repair_streams, copies) for pair in pairs]
            output_metric, again = output_metrics.get(layer), later.get(plan.site)
            done = None if store is None else store.reach(plan)
            if done is None:
                try:
                    if adapter_of(layer).looks_up:
                        counts = collector.count(layer, places)
                        if again is not None:
                            counts = again.pooled_counts(counts)
                        tied = heads.get(plan.site, ())
                        if counts.rows:
                            done = fit_looked_up(plan, counts, output_metric, tied, options)
                    else:
                        folds = collector.collect(layer, places)
                        if any(fold.inputs.rows for fold in folds):
                            done = fit_layer(
                                layer, plan, folds, again, output_metric, options, shared
                            )
                except MPOCompressError as error:
                    raise type(error)(f"layer {plan.site.label}: {error}") from error
                if store is not None and done is not None:
                    store.put(plan, done)
            if done is None:
                without_rows.add(plan.site)
            else:
                fitted[plan.site] = done
            del places
            for dense, compressed in pairs:
                # They may wait at a layer that is tied to what was just fitted, too.
                while compressed.arrival and is_done(compressed.arrival.layer):
                    compressed.resume(compressed_forward(compressed.arrival.layer))
                while dense.arrival and is_done(dense.arrival.layer):
                    dense.resume(_dense_forward(dense.arrival.layer))
    if without_rows and not fitted:
        raise NoRowsError(
            "no row of the data reaches a layer that is to be fitted: its mask marks everything as "
            "padding, or the model leaves these layers out."
        )
    return fitted


def _place(
    layer: nn.Module, pair: tuple[Runner, Runner], repair_streams: bool, copies: bool
) -> Place | None:
    """Read where a pair waits, and let the dense runner go on to the next layer.

    It runs one layer ahead: only what follows the layer tells which stream its output goes into.

    Returns:
        None, and nothing goes on, if not both wait at this layer.

    Raises:
        _OverwrittenError: on its way it has changed what it was to be read, and there is no copy.
    """
    dense, ours = pair
    at, ours_at = dense.arrival, ours.arrival
    if at is None or ours_at is None or not at.layer is layer is ours_at.layer:
        return None
    dense_input = at.input.clone() if copies else at.input
    version = version_of(dense_input)
    # Behind a compressed router one model may have called what the other has not; the numbers of
    # their operations then say nothing.
    aligned = dense.recorder.count == ours.recorder.count
    dense.resume(_dense_forward(layer))
    if version_of(dense_input) != version:
        raise _OverwrittenError
    streams = None
    watcher = dense.recorder
    if repair_streams and aligned and isinstance(watcher, StreamWatcher):
        found = watcher.take_stream(layer)
        our_stream = None if found is None else ours.recorder.output(found[0])
        if found is not None and our_stream is not None and found[1].shape == our_stream.shape:
            streams = (found[1], our_stream)
    return Place(dense_input, ours_at.input, streams)


def _dense_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer's own forward, whatever has been put in front of it."""

    def forward(value: Tensor) -> Tensor:
        output: Tensor = type(layer).forward(layer, value)
        return output

    return forward


def _compressed_forward(layer: nn.Module, fitted: FittedWeight) -> Callable[[Tensor], Tensor]:
    mpo = fitted.mpo
    adapter = adapter_of(layer)
    if not adapter.takes_rows:
        built = adapter.build(layer, mpo)
        if fitted.bias is not None and isinstance(built.bias, nn.Parameter):
            built.bias.data.copy_(fitted.bias)
        for name, attribute in vars(layer).items():  # as surgery does
            if name != "forward" and name not in vars(built) and not hasattr(type(built), name):
                setattr(built, name, attribute)
        return built
    bias = getattr(layer, "bias", None) if fitted.bias is None else fitted.bias

    def forward(value: Tensor) -> Tensor:
        output = apply_cores(mpo.cores, value, shape=mpo.shape)
        return output if bias is None else output + bias

    return forward


Pair = tuple[Runner, Runner]


def _layers_waited_at(pairs: Sequence[Pair]) -> list[nn.Module]:
    """Each once, in the order of the batches; none when all have finished."""
    arrivals = (runner.arrival for pair in pairs for runner in pair)
    return list(dict.fromkeys(arrival.layer for arrival in arrivals if arrival is not None))


def _ranks(
    model: nn.Module, layers: Sequence[nn.Module], calls: Sequence[Call]
) -> dict[nn.Module, int]:
    """An order in which no batch calls a layer for the first time after a later one.

    Where there is none, as some batches call two layers one way round and some the other, that of
    their latest places in any batch.

    Args:
        model: dense; it is run on all batches.
        layers: to be ordered.
        calls: batches.
    """
    order: TopologicalSorter[nn.Module] = TopologicalSorter()
    path: dict[nn.Module, None] = {}
    latest: dict[nn.Module, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda called, _args: path.setdefault(called))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            for number, call in enumerate(calls):
                path.clear()
                with seeded(cuda_devices(model), number):
                    model(*call.args, **call.kwargs)
                for place, layer in enumerate(path):
                    latest[layer] = max(place, latest.get(layer, 0))
                    order.add(layer)
                for before, after in pairwise(path):
                    order.add(after, before)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        found = list(order.static_order())
    except CycleError:
        found = sorted(latest, key=lambda layer: latest[layer])
    return {layer: place for place, layer in enumerate(found)}


@contextmanager
def _abandoning(pairs: Sequence[Pair]) -> Iterator[None]:
    try:
        yield
    finally:
        for pair in pairs:
            for runner in pair:
                runner.abandon()
