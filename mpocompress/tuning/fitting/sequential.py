"""Fit layer after layer, in forward order, each on the inputs that the compressed prefix produces.

The layer at hand sees x^ from the compressed prefix where the dense model sees x, and is fitted to
the dense layer's outputs: min E |y - W^ x^ - b^|^2. With second moments that is again a matrix and
a metric: the target T = E[y x^T] E[x^ x^T]^-1 in the metric C = E[x^ x^T]. Where the output is
added to a residual stream h, y also contains h - h^: each block repairs what those before it broke.
A weight that is called more than once is fitted at its first call, see `later_calls` for the rest.

Batches need not call the same layers: experts without rows are skipped, deep layers are left out. A
layer is fitted on the batches that call it, once all of them wait there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from mpocompress.errors import DataError, MPOCompressError, NoRowsError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.opened import layers_called
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.call_order import call_ranks
from mpocompress.tuning.fitting.dense_layers import is_corrected, shared_parameters
from mpocompress.tuning.fitting.forwards import Forward, dense_forward, fitted_forward
from mpocompress.tuning.fitting.one_layer import fit_layer, fit_looked_up
from mpocompress.tuning.fitting.plan import (
    FitOptions,
    FittedWeight,
    SitePlan,
    with_output_metric,
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
        return _Pass(*given, *how, copies=False).run()
    except _OverwrittenError:
        pass  # with the activations that it holds
    return _Pass(*given, *how, copies=True).run()


Pair = tuple[Runner, Runner]
"""One batch in the dense and in the compressed model."""


class _OverwrittenError(Exception):
    """The dense model has changed what a layer read before it could be looked at."""


class _Pass:
    """Both models on their way through all batches, and what has been fitted by now.

    Its arguments are those of `fit_in_sequence`, and whether to keep `copies` of what the dense
    layers read, which a model may overwrite.
    """

    def __init__(
        self,
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
    ) -> None:
        self._model = model
        self._plans = {module: plan for plan in plans for module in plan.site.modules}
        self._calls = calls
        self._output_metrics = output_metrics
        self._heads = heads
        self._later = later
        self._options = with_output_metric(options, plans)
        self._store = store
        self._progress = progress
        self._copies = copies
        self._total = len(plans)
        self._shared = shared_parameters(model)
        self._pairs = [_pair(model, call, number) for number, call in enumerate(calls)]
        self._dense = {dense for dense, _ in self._pairs}
        self._collector = Collector([keep_mask(call.kwargs) for call in calls])
        self._ranks: dict[nn.Module, int] = {}
        self._forwards: dict[nn.Module, Forward] = {}
        self._fitted: dict[WeightSite, FittedWeight] = {}
        self._without_rows: set[WeightSite] = set()

    def run(self) -> dict[WeightSite, FittedWeight]:
        """From the first layer to the last.

        Raises:
            _OverwrittenError: only copies of what the dense layers read would do.
        """
        if self._store is not None:
            self._store.begin(
                self._model, self._calls, self._output_metrics, self._later, self._options
            )
        with (
            evaluation_mode(self._model),
            layers_called(self._model),
            stopping_layers(list(self._plans), self._compute),
            _abandoning(self._pairs),
        ):
            for runner in chain.from_iterable(self._pairs):
                runner.start()
            while waiting := _layers_waited_at(self._pairs):
                self._reach(self._first_of(waiting))
                if len(self._fitted) + len(self._without_rows) == self._total:
                    break  # what comes after the last layer tells nothing
                self._go_on()
        if self._without_rows and not self._fitted:
            raise NoRowsError(
                "no row of the data reaches a layer that is to be fitted: its mask marks "
                "everything as padding, or the model leaves these layers out."
            )
        return self._fitted

    # -- what stands for a layer

    def _compute(self, layer: nn.Module, runner: Runner, value: Tensor) -> Tensor:
        """A call of a layer inside a runner, which waits there until the layer is fitted."""
        if not self._is_done(layer):
            return runner.stop_at(layer, value)
        # Used again: a shared layer, or one tied to a layer that has been fitted.
        return runner.call_layer(layer, self._forward(layer, runner), value)

    def _is_done(self, layer: nn.Module) -> bool:
        site = self._plans[layer].site
        return site in self._fitted or site in self._without_rows

    def _forward(self, layer: nn.Module, runner: Runner) -> Forward:
        """That of the runner's model, for a layer that is done."""
        plan = self._plans[layer]
        if runner in self._dense or plan.site in self._without_rows:
            return dense_forward(layer)
        if layer not in self._forwards:
            done = self._fitted[plan.site]
            same = plan.stays_dense and not is_corrected(plan.site, done)
            # What is as it was gives what it gave, to the bit.
            self._forwards[layer] = dense_forward(layer) if same else fitted_forward(layer, done)
        return self._forwards[layer]

    # -- one layer after the other

    def _first_of(self, waiting: Sequence[nn.Module]) -> nn.Module:
        """Of several layers the one that no batch calls after another of them."""
        if len(waiting) > 1 and not self._ranks:
            self._ranks = call_ranks(self._model, list(self._plans), self._calls)
        # What no batch calls in the dense model comes last.
        return min(waiting, key=lambda layer: self._ranks.get(layer, len(self._ranks)))

    def _reach(self, layer: nn.Module) -> None:
        """Fit a layer on the batches that wait there, or take the fit that is in the store."""
        plan = self._plans[layer]
        if self._progress is not None:
            self._progress(plan.site.name, len(self._fitted), self._total)
        repair = self._options.repair_streams
        places = [_place(layer, pair, repair, self._copies) for pair in self._pairs]
        done = None if self._store is None else self._store.reach(plan)
        if done is None:
            try:
                done = self._fit(layer, plan, places)
            except MPOCompressError as error:
                raise type(error)(f"layer {plan.site.label}: {error}") from error
            if self._store is not None and done is not None:
                self._store.put(plan, done)
        if done is None:
            self._without_rows.add(plan.site)
        else:
            self._fitted[plan.site] = done

    def _fit(
        self, layer: nn.Module, plan: SitePlan, places: Sequence[Place | None]
    ) -> FittedWeight | None:
        """None where no row of the data reaches the layer."""
        output_metric, later = self._output_metrics.get(layer), self._later.get(plan.site)
        if adapter_of(layer).looks_up:
            counts = self._collector.count(layer, places)
            if later is not None:
                counts = later.pooled_counts(counts)
            if not counts.rows:
                return None
            tied = self._heads.get(plan.site, ())
            return fit_looked_up(plan, counts, output_metric, tied, self._options)
        folds = self._collector.collect(layer, places)
        if not any(fold.inputs.rows for fold in folds):
            return None
        return fit_layer(layer, plan, folds, later, output_metric, self._options, self._shared)

    def _go_on(self) -> None:
        """Past what was just fitted; some may wait at a layer that is tied to it, too."""
        for dense, compressed in self._pairs:
            for runner in (compressed, dense):
                while runner.arrival and self._is_done(runner.arrival.layer):
                    runner.resume(self._forward(runner.arrival.layer, runner))


def _pair(model: nn.Module, call: Call, number: int) -> Pair:
    """One batch in the dense and in the compressed model, which draw the same at random."""
    return (
        Runner(model, call, StreamWatcher(), seed=number),
        Runner(model, call, OperationRecorder(), seed=number),
    )


def _place(layer: nn.Module, pair: Pair, repair_streams: bool, copies: bool) -> Place | None:
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
    dense.resume(dense_forward(layer))
    if version_of(dense_input) != version:
        raise _OverwrittenError
    streams, weight = None, 1.0
    watcher = dense.recorder
    if repair_streams and aligned and isinstance(watcher, StreamWatcher):
        found = watcher.take_stream(layer)
        our_stream = None if found is None else ours.recorder.output(found.number)
        if found is not None and our_stream is not None and found.value.shape == our_stream.shape:
            streams, weight = (found.value, our_stream), found.weight
    return Place(dense_input, ours_at.input, streams, weight)


def _layers_waited_at(pairs: Sequence[Pair]) -> list[nn.Module]:
    """Each once, in the order of the batches; none when all have finished."""
    arrivals = (runner.arrival for pair in pairs for runner in pair)
    return list(dict.fromkeys(arrival.layer for arrival in arrivals if arrival is not None))


@contextmanager
def _abandoning(pairs: Sequence[Pair]) -> Iterator[None]:
    try:
        yield
    finally:
        for pair in pairs:
            for runner in pair:
                runner.abandon()
