"""Fit layer after layer, in forward order, each on the inputs that the compressed prefix produces.

The layer at hand sees x^ from the compressed prefix where the dense model sees x, and is fitted to
the dense layer's outputs: min E |y - W^ x^ - b^|^2. With second moments that is again a matrix and
a metric: the target T = E[y x^T] E[x^ x^T]^-1 in the metric C = E[x^ x^T]. Where the output is
added to a residual stream h, y also contains h - h^: each block repairs what those before it broke.
"""

# Shape suffixes: O out features, I in features, N rows.

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, MPOCompressError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.opened import layers_called
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.contract import apply_cores
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fit_plan import (
    FitOptions,
    FittedWeight,
    OutputMetric,
    SitePlan,
    exact_takes_long,
)
from mpocompress.tuning.fit_state import FitStore
from mpocompress.tuning.layer_rows import adapter_of, row_pieces
from mpocompress.tuning.lockstep import Call, OperationRecorder, Runner, stopping_layers
from mpocompress.tuning.moments import (
    CrossMoment,
    RowCounts,
    joined_rows,
    keep_mask,
    real_indices,
    real_rows,
)
from mpocompress.tuning.residual import StreamWatcher
from mpocompress.tuning.rounding import Rounded, Storage, round_table, round_weight, shrunk
from mpocompress.tuning.table_fit import HeadUse, fit_table, table_error, table_weights

# Ridges tried for the correction of upstream errors, relative to the mean diagonal.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FIRST_RIDGE = 1.0


def fit_in_sequence(
    model: nn.Module,
    plans: Sequence[SitePlan],
    calls: Sequence[Call],
    *,
    output_metrics: Mapping[nn.Module, Tensor] | None = None,
    heads: Mapping[WeightSite, Sequence[HeadUse]] | None = None,
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
    options = options or FitOptions()
    if options.output_metric == "auto":
        swept = [plan.site.shape for plan in plans if not _is_svd(plan.layout)]
        metric: OutputMetric = "sites" if exact_takes_long(swept) else "exact"
        options = replace(options, output_metric=metric)
    by_module = {module: plan for plan in plans for module in plan.site.modules}
    fitted: dict[WeightSite, FittedWeight] = {}
    pairs = [
        (Runner(model, call, StreamWatcher()), Runner(model, call, OperationRecorder()))
        for call in calls
    ]
    dense_runners = {id(dense) for dense, _ in pairs}
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}

    def compressed_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        if layer not in forwards:
            forwards[layer] = _compressed_forward(layer, fitted[by_module[layer].site])
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
        store.begin(model, calls, output_metrics or {}, options)
    collector = _Collector([keep_mask(call.kwargs) for call in calls])
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
            places = [_place(layer, pair, options.repair_streams) for pair in pairs]
            output_metric = (output_metrics or {}).get(layer)
            done = None if store is None else store.reach(plan)
            if done is None:
                try:
                    if adapter_of(layer).looks_up:
                        counts = collector.count(layer, places)
                        tied = (heads or {}).get(plan.site, ())
                        done = _fit_table(plan, counts, output_metric, tied, options)
                    else:
                        folds = collector.collect(layer, places)
                        done = _fit_layer(layer, plan, folds, output_metric, options, shared)
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


@dataclass(frozen=True, slots=True)
class _Place:
    """One batch at one layer, in both models.

    Attributes:
        dense: input of the layer in the dense model.
        ours: input of the layer after the compressed prefix.
        streams: residual stream that the layer feeds, dense and ours, if there is one.
    """

    dense: Tensor
    ours: Tensor
    streams: tuple[Tensor, Tensor] | None


def _place(layer: nn.Module, pair: tuple[Runner, Runner], repair_streams: bool) -> _Place:
    """Read where a pair waits, and let the dense runner go on to the next layer.

    It runs one layer ahead: only what follows the layer tells which stream its output goes into.
    """
    dense, ours = pair
    if dense.arrival is None or ours.arrival is None:
        raise DataError("a batch ended before it reached the layer that others wait at.")
    dense_input, our_input = dense.arrival.input, ours.arrival.input
    dense.resume(_dense_forward(layer))
    streams = None
    watcher = dense.recorder
    if repair_streams and isinstance(watcher, StreamWatcher):
        found = watcher.take_stream(layer)
        our_stream = None if found is None else ours.recorder.output(found[0])
        if found is not None and our_stream is not None and found[1].shape == our_stream.shape:
            streams = (found[1], our_stream)
    return _Place(dense_input, our_input, streams)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moments:
    """What the fit of one layer needs, from a part of the batches.

    Attributes:
        inputs: of x^ with itself.
        cross: of x with x^; None if W (x - x^) is in `residual`.
        residual: of h - h^ with x^, where the layer feeds a stream; None if it is nothing.
    """

    inputs: CrossMoment
    cross: CrossMoment | None
    residual: CrossMoment | None


class _Collector:
    """Moments of all batches at a layer, in two folds; layers with the same inputs share them.

    They do if they take their inputs as rows; others make rows of their own out of them.
    """

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        self._masks = masks
        self._seen: list[Tensor] = []  # kept alive, so that identity means identity
        self._inputs: list[CrossMoment] = []
        self._cross: list[CrossMoment] | None = None

    def count(self, layer: nn.Module, places: Sequence[_Place]) -> RowCounts:
        """How often each row of a table was looked up."""
        counts = RowCounts()
        table_rows = adapter_of(layer).matrix(layer).shape[0]
        for place, mask in zip(places, self._masks, strict=True):
            counts.add(real_indices(place.ours, mask), table_rows)
        return counts

    def collect(self, layer: nn.Module, places: Sequence[_Place]) -> list[_Moments]:
        """One entry for the even and one for the odd batches; a single entry for one batch."""
        seen = [value for place in places for value in (place.dense, place.ours)]
        plain = adapter_of(layer).takes_rows
        same = (
            plain
            and len(seen) == len(self._seen)
            and all(a is b for a, b in zip(seen, self._seen, strict=True))
        )
        folds = [
            list(zip(places[fold::2], self._masks[fold::2], strict=True))
            for fold in range(min(2, len(places)))
        ]
        if not same:
            # Rows that were sent elsewhere than in the dense model have no counterpart there.
            unchanged = any(place.dense.shape != place.ours.shape for place in places) or all(
                torch.equal(place.dense, place.ours) for place in places
            )
            self._inputs = [_input_moments(layer, fold) for fold in folds]
            self._cross = self._inputs if unchanged else None
            self._seen = seen if plain else []
        weight_OI = adapter_of(layer).matrix(layer)
        if self._cross is None and 2 * weight_OI.shape[0] > weight_OI.shape[1]:
            self._cross = [_cross_moments(layer, fold) for fold in folds]
        crosses: Sequence[CrossMoment | None] = self._cross or [None] * len(folds)
        unseen_OI = weight_OI if self._cross is None else None
        return [
            _Moments(inputs=inputs, cross=cross, residual=_residual_moments(layer, fold, unseen_OI))
            for fold, inputs, cross in zip(folds, self._inputs, crosses, strict=True)
        ]


_Fold = Sequence[tuple[_Place, Tensor | None]]


def _input_moments(layer: nn.Module, fold: _Fold) -> CrossMoment:
    """Of x^ with itself."""
    moment = CrossMoment()
    pieces = (piece for place, mask in fold for piece in row_pieces(layer, (place.ours,), mask))
    for (rows_NI,) in joined_rows(pieces):
        moment.add(rows_NI, rows_NI)
    return moment


def _cross_moments(layer: nn.Module, fold: _Fold) -> CrossMoment:
    """Of x with x^."""
    moment = CrossMoment()
    pieces = (
        piece
        for place, mask in fold
        for piece in row_pieces(layer, (place.dense, place.ours), mask)
    )
    for dense_NI, rows_NI in joined_rows(pieces):
        moment.add(dense_NI, rows_NI)
    return moment


def _residual_moments(
    layer: nn.Module, fold: _Fold, weight_OI: Tensor | None
) -> CrossMoment | None:
    """Of h - h^ with x^, and with a weight of W (x - x^) + h - h^; None if that is nothing.

    Where outputs are fewer than half of the inputs, that costs less than x with x^ does.
    The stream counts if every batch of the fold has one whose rows are those of the input.
    """
    has_stream = adapter_of(layer).takes_rows and all(
        place.streams is not None and place.streams[0].shape[:-1] == place.ours.shape[:-1]
        for place, _ in fold
    )
    if not has_stream and weight_OI is None:
        return None
    if weight_OI is not None:
        weight_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for place, mask in fold:
            wrong = place.streams[0] - place.streams[1] if has_stream and place.streams else None
            if weight_OI is None:
                assert wrong is not None
                yield real_rows(wrong, mask), real_rows(place.ours, mask)
                continue
            for dense_NI, ours_NI in row_pieces(layer, (place.dense, place.ours), mask):
                residual_NO = (dense_NI - ours_NI).to(weight_OI.dtype) @ weight_OI.mT
                if wrong is not None:  # then this is the only piece
                    residual_NO += real_rows(wrong, mask)
                yield residual_NO, ours_NI

    moment = CrossMoment()
    for residual_NO, ours_NI in joined_rows(pieces()):
        moment.add(residual_NO, ours_NI)
    return moment


@dataclass(frozen=True, slots=True)
class _Regression:
    """What is left to explain, e = W (x - x^) + (h - h^), against x^.

    Attributes:
        inputs_II: E[x^ x^T].
        residual_OI: E[e x^T].
        mean_I: E[x^].
        residual_mean_O: E[e].
        rows: that were seen.
    """

    inputs_II: Tensor
    residual_OI: Tensor
    mean_I: Tensor
    residual_mean_O: Tensor
    rows: int

    def single(self) -> "_Regression":
        """The same in float32, in which regressions take half the time."""
        names = ("inputs_II", "residual_OI", "mean_I", "residual_mean_O")
        return replace(self, **{name: getattr(self, name).float() for name in names})

    def correction(self, ridge: float) -> Tensor:
        """K (out, in) that minimizes E|e - K x^|^2 with a ridge relative to the mean diagonal."""
        shifted_II = self.inputs_II.clone()
        shifted_II.diagonal().add_(ridge * float(shifted_II.diagonal().mean()))
        return _solve_right(self.residual_OI, shifted_II)

    def gain(self, correction_OI: Tensor) -> float:
        """How much of E|e|^2 a correction explains here; negative if it does harm."""
        cross = torch.sum(correction_OI * self.residual_OI)
        return float(2 * cross - torch.sum(correction_OI @ self.inputs_II * correction_OI))


def _regression(weight_OI: Tensor, moments: _Moments, *, centered: bool) -> _Regression:
    inputs_II, mean_ours_I, _ = moments.inputs.mean(centered=centered)
    weight_OI = weight_OI.to(inputs_II)
    residual_OI = torch.zeros_like(weight_OI)
    residual_mean_O = weight_OI.new_zeros(weight_OI.shape[0])
    if moments.cross is not None and moments.cross is not moments.inputs:
        cross_II, mean_dense_I, _ = moments.cross.mean(centered=centered)
        residual_OI += weight_OI @ (cross_II - inputs_II)
        residual_mean_O += weight_OI @ (mean_dense_I - mean_ours_I)
    if moments.residual is not None:
        seen_OI, seen_O, _ = moments.residual.mean(centered=centered)
        residual_OI += seen_OI
        residual_mean_O += seen_O
    return _Regression(inputs_II, residual_OI, mean_ours_I, residual_mean_O, moments.inputs.rows)


def _cross_validated_correction(
    weight_OI: Tensor, folds: Sequence[_Moments], whole: _Regression, *, centered: bool
) -> Tensor:
    """The correction K of T = W + K, with the ridge that carries over to the other fold best.

    A regression on a few thousand rows explains a good deal of these very rows and little of
    others; without a check it would spend the bond dimension on noise. No correction at all is
    among the choices.
    """
    none = torch.zeros_like(whole.residual_OI)
    if not bool(whole.residual_OI.any()):
        return none
    if len(folds) < 2:
        return whole.correction(_RIDGES[0])
    # A ridge is known well enough from float32; what it is used for is computed in float64.
    parts = [_regression(weight_OI, fold, centered=centered).single() for fold in folds]

    def gain(ridge: float) -> float:
        found = parts[1].gain(parts[0].correction(ridge))
        return found + parts[0].gain(parts[1].correction(ridge))

    ridge, most = _climb(gain)
    return whole.correction(ridge) if most > 0 else none


def _climb(gain: Callable[[float], float]) -> tuple[float, float]:
    """The ridge with the largest gain, and the gain.

    There is one peak: larger ridges shrink what carries over, smaller ones keep more of the noise.
    """
    place = _RIDGES.index(_FIRST_RIDGE)
    most = gain(_RIDGES[place])
    for step in (-1, 1):
        climbed = False
        while 0 <= place + step < len(_RIDGES) and (found := gain(_RIDGES[place + step])) > most:
            place, most, climbed = place + step, found, True
        if climbed:
            break
    return _RIDGES[place], most


def _merged(folds: Sequence[_Moments]) -> _Moments:
    def sum_of(moments: Sequence[CrossMoment]) -> CrossMoment:
        total = CrossMoment()
        for moment in moments:
            total.merge(moment)
        return total

    inputs = sum_of([fold.inputs for fold in folds])
    crosses = [fold.cross for fold in folds if fold.cross is not None]
    residuals = [fold.residual for fold in folds if fold.residual is not None]
    unchanged = all(fold.cross is fold.inputs for fold in folds)
    return _Moments(
        inputs=inputs,
        cross=inputs if unchanged else sum_of(crosses) if crosses else None,
        residual=sum_of(residuals) if len(residuals) == len(folds) else None,
    )


def _fit_layer(
    layer: nn.Module,
    plan: SitePlan,
    folds: Sequence[_Moments],
    output_metric_OO: Tensor | None,
    options: FitOptions,
    shared: Collection[int],
) -> FittedWeight:
    site = plan.site
    bias = getattr(layer, "bias", None)
    # The mean is the bias's business, unless others use the weight or the bias, too.
    centered = (
        adapter_of(layer).has_offset(layer) and len(site.modules) == 1 and id(bias) not in shared
    )
    weight_OI = site.matrix()
    whole = _regression(weight_OI, _merged(folds), centered=centered)
    weight_OI = weight_OI.to(whole.inputs_II)
    target_OI = weight_OI + _cross_validated_correction(weight_OI, folds, whole, centered=centered)
    metric = None
    if bool(whole.inputs_II.any()):  # else nothing but zeros came in: fit the weights themselves
        useful = output_metric_OO is not None and bool(output_metric_OO.any())
        metric = Metric(whole.inputs_II, output_metric_OO if useful else None, ridge=options.ridge)
        if options.output_metric == "sites" and not _is_svd(plan.layout):
            metric = metric.over_sites(plan.layout)
    result = fit(
        target_OI,
        metric,
        plan.layout,
        plan.bond_dims,
        round_trips=(options.sweeps + 1) // 2,
    )
    mpo, error = MPO(result.cores, shape=site.shape).to(dtype=site.dtype), result.relative_error
    rounded = None
    if plan.storage.rounds:
        rounded = _rounded(mpo, plan.storage, metric, whole.rows)
        mpo = rounded.mpo
        if metric is not None:
            error = metric.relative_error(target_OI, mpo.to_dense().to(target_OI))
    new_bias: Tensor | None = None
    if bias is not None and centered:
        lost_OI = weight_OI - mpo.to(dtype=torch.float64).to_dense().to(weight_OI)
        shift_O = lost_OI @ whole.mean_I + whole.residual_mean_O
        new_bias = (bias.detach().double() + shift_O).to(bias.dtype)
    return FittedWeight(
        mpo=mpo,
        bias=new_bias,
        relative_output_error=error,
        rows=whole.rows,
        rounded=rounded,
    )


def _rounded(mpo: MPO, storage: Storage, metric: Metric | None, rows: int) -> Rounded:
    if metric is None:
        return round_weight(mpo, storage)
    return round_weight(mpo, storage, input_II=shrunk(metric.ridged_input_II, rows))


def _is_svd(layout: Layout) -> bool:
    return layout.pairs == Layout.svd(layout.out_features, layout.in_features).pairs


def _fit_table(
    plan: SitePlan,
    counts: RowCounts,
    output_metric_II: Tensor | None,
    heads: Sequence[HeadUse],
    options: FitOptions,
) -> FittedWeight:
    site = plan.site
    weights_O, metric_II = table_weights(
        counts.frequencies(),
        output_metric_II,
        ridge=options.ridge,
        heads=heads,
    )
    if plan.storage.rounds and plan.layout.num_sites == 1:
        table_OI = site.matrix()
        found = round_table(
            table_OI, plan.storage, frequencies_O=counts.frequencies(), metric_II=metric_II
        )
        return FittedWeight(
            mpo=found.mpo,
            bias=None,
            relative_output_error=table_error(table_OI, found.mpo, weights_O, metric_II),
            rows=counts.rows,
            rounded=found,
        )
    mpo, error = fit_table(
        site.matrix(),
        plan.layout,
        plan.bond_dims,
        weights_O,
        metric_II,
        round_trips=(options.sweeps + 1) // 2,
    )
    done = FittedWeight(
        mpo=mpo.to(dtype=site.dtype), bias=None, relative_output_error=error, rows=counts.rows
    )
    if not plan.storage.rounds:
        return done
    rounded = round_weight(done.mpo, plan.storage, input_II=metric_II)
    error = table_error(site.matrix(), rounded.mpo, weights_O, metric_II)
    return replace(done, mpo=rounded.mpo, rounded=rounded, relative_output_error=error)


def _solve_right(right_OI: Tensor, symmetric_II: Tensor) -> Tensor:
    """X with X A = B for positive definite A; in float64 if rounding leaves A indefinite."""
    exact = symmetric_II.dtype == torch.float64
    factor_II, failed = torch.linalg.cholesky_ex(symmetric_II, check_errors=exact)
    if failed:
        return _solve_right(right_OI.double(), symmetric_II.double()).to(right_OI.dtype)
    return torch.cholesky_solve(right_OI.mT, factor_II).mT


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
        raise DataError(
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
