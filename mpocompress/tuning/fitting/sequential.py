"""Fit layer after layer, in forward order, each on the inputs that the compressed prefix produces.

The layer at hand sees x^ from the compressed prefix where the dense model sees x, and is fitted to
the dense layer's outputs: min E |y - W^ x^ - b^|^2. With second moments that is again a matrix and
a metric: the target T = E[y x^T] E[x^ x^T]^-1 in the metric C = E[x^ x^T]. Where the output is
added to a residual stream h, y also contains h - h^: each block repairs what those before it broke.
A weight that is called more than once is fitted at its first call, see `later_calls` for the rest.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from mpocompress.errors import DataError, MPOCompressError, PathsDifferError
from mpocompress.layers.modes import evaluation_mode
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
        The fitted weights; those that the data does not reach are missing.

    Raises:
        DataError: no data, batches that take different paths through the model, or NaN activations.
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
    pairs = [
        (
            Runner(model, call, StreamWatcher(), seed=number),
            Runner(model, call, OperationRecorder(), seed=number),
        )
        for number, call in enumerate(calls)
    ]
    dense_runners = {id(dense) for dense, _ in pairs}
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}

    def compressed_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        if layer not in forwards:
            plan = by_module[layer]
            done = fitted[plan.site]
            same = plan.stays_dense and not is_corrected(plan.site, done)
            # What is as it was gives what it gave, to the bit.
            forwards[layer] = _dense_forward(layer) if same else _compressed_forward(layer, done)
        return forwards[layer]

    def compute(layer: nn.Module, runner: Runner, value: Tensor) -> Tensor:
        done = fitted.get(by_module[layer].site)
        if done is None:
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
        while (layer := _common_layer(pairs)) is not None:
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
                        done = fit_looked_up(plan, counts, output_metric, tied, options)
                    else:
                        folds = collector.collect(layer, places)
                        done = fit_layer(layer, plan, folds, again, output_metric, options, shared)
                except MPOCompressError as error:
                    raise type(error)(f"layer {plan.site.label}: {error}") from error
                if store is not None:
                    store.put(plan, done)
            fitted[plan.site] = done
            del places
            for dense, compressed in pairs:
                compressed.resume(compressed_forward(layer))
                # Being one layer ahead, it may wait at one that is tied to what was just fitted.
                while dense.arrival and by_module[dense.arrival.layer].site in fitted:
                    dense.resume(_dense_forward(dense.arrival.layer))
    return fitted


def _place(
    layer: nn.Module, pair: tuple[Runner, Runner], repair_streams: bool, copies: bool
) -> Place:
    """Read where a pair waits, and let the dense runner go on to the next layer.

    It runs one layer ahead: only what follows the layer tells which stream its output goes into.

    Raises:
        _OverwrittenError: on its way it has changed what it was to be read, and there is no copy.
    """
    dense, ours = pair
    if dense.arrival is None or ours.arrival is None:
        raise PathsDifferError("a batch ended before it reached the layer that others wait at.")
    dense_input, our_input = dense.arrival.input, ours.arrival.input
    if copies:
        dense_input = dense_input.clone()
    version = version_of(dense_input)
    dense.resume(_dense_forward(layer))
    if version_of(dense_input) != version:
        raise _OverwrittenError
    streams = None
    watcher = dense.recorder
    if repair_streams and isinstance(watcher, StreamWatcher):
        found = watcher.take_stream(layer)
        our_stream = None if found is None else ours.recorder.output(found[0])
        if found is not None and our_stream is not None and found[1].shape == our_stream.shape:
            streams = (found[1], our_stream)
    return Place(dense_input, our_input, streams)


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


def _common_layer(pairs: Sequence[Pair]) -> nn.Module | None:
    """The layer at which all runners wait; None once all have finished."""
    layers = {
        None if runner.arrival is None else runner.arrival.layer
        for pair in pairs
        for runner in pair
    }
    if len(layers) > 1:
        raise PathsDifferError(
            "batches take different paths through the model, so its layers cannot be fitted in "
            "sequence. Fit the layers of one path at a time (include)."
        )
    return layers.pop()


@contextmanager
def _abandoning(pairs: Sequence[Pair]) -> Iterator[None]:
    try:
        yield
    finally:
        for pair in pairs:
            for runner in pair:
                runner.abandon()
