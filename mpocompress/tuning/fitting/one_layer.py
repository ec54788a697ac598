"""One weight at a time: from moments of its inputs, or counts of look-ups, to its stand-in."""

# Shape suffixes: O out features, I in features.

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpocompress.mpo import MPO
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from mpocompress.tuning.fitting.correction import (
    Regression,
    cross_validated_correction,
    regression,
)
from mpocompress.tuning.fitting.plan import FitOptions, FittedWeight, SitePlan, output_error
from mpocompress.tuning.fitting.rounding import Rounded, Storage, round_table, round_weight, shrunk
from mpocompress.tuning.fitting.tables import fit_table, table_error
from mpocompress.tuning.statistics.later_calls import LaterCalls
from mpocompress.tuning.statistics.layer_rows import adapter_of
from mpocompress.tuning.statistics.moments import RowCounts
from mpocompress.tuning.statistics.shrinkage import shrunk_metric
from mpocompress.tuning.statistics.tables import HeadUse, table_weights
from mpocompress.tuning.statistics.upstream import Moments, merged


def fit_layer(
    layer: nn.Module,
    plan: SitePlan,
    folds: Sequence[Moments],
    later: LaterCalls | None,
    output_metric_OO: Tensor | None,
    options: FitOptions,
    shared: Collection[int],
) -> FittedWeight:
    """Fit what multiplies rows to what the dense layer gives.

    Args:
        layer: the dense one, at its first call.
        plan: of its weight.
        folds: moments of its inputs and of what its outputs should be, in two halves of the data.
        later: what is known of its later calls, if a forward pass has such.
        output_metric_OO: covariance of the loss gradient at its outputs; None for the identity.
        options: ridge and round trips.
        shared: ids of parameters that other modules use, too.

    Raises:
        MPOCompressError: see `fit` and `regression`.
    """
    site = plan.site
    bias = getattr(layer, "bias", None)
    # The mean is the bias's business, unless others use the weight or the bias, too.
    centered = (
        adapter_of(layer).has_offset(layer) and len(site.modules) == 1 and id(bias) not in shared
    )
    weight_OI = site.matrix()
    rows = sum(fold.inputs.rows for fold in folds)
    if later is not None:
        rows += later.rows
        folds = [later.pooled(fold) for fold in folds]
    whole = regression(weight_OI, merged(folds), centered=centered)
    if plan.stays_dense and len(folds) < 2:  # no other rows to check a correction on
        unchanged = MPO([weight_OI.reshape(1, *site.shape, 1)], shape=site.shape)
        return FittedWeight(mpo=unchanged, bias=None, relative_output_error=0.0, rows=rows)
    weight_OI = weight_OI.to(whole.inputs_II)
    target_OI = weight_OI + cross_validated_correction(weight_OI, folds, whole, centered=centered)
    if plan.stays_dense:
        mpo = MPO([target_OI.to(site.dtype).reshape(1, *site.shape, 1)], shape=site.shape)
        return FittedWeight(
            mpo=mpo,
            bias=_new_bias(bias if centered else None, weight_OI, mpo, whole),
            relative_output_error=0.0,
            rows=rows,
        )
    metric = None
    if bool(whole.inputs_II.any()):  # else nothing but zeros came in: fit the weights themselves
        useful = output_metric_OO is not None and bool(output_metric_OO.any())
        metric = shrunk_metric(
            whole.inputs_II,
            rows,
            output_metric_OO if useful else None,
            least=options.ridge,
        )
        if options.output_metric == "sites" and not plan.layout.is_svd:
            metric = metric.over_sites(plan.layout)
    result = fit(
        target_OI,
        metric,
        plan.layout,
        plan.bond_dims,
        round_trips=(options.sweeps + 1) // 2,
    )
    mpo = MPO(result.cores, shape=site.shape).to(dtype=site.dtype)
    rounded = None
    if plan.storage.rounds:
        rounded = _rounded(mpo, plan.storage, metric, rows)
        mpo = rounded.mpo
    return FittedWeight(
        mpo=mpo,
        bias=_new_bias(bias if centered else None, weight_OI, mpo, whole),
        relative_output_error=output_error(whole.inputs_II, target_OI, mpo),
        rows=rows,
        rounded=rounded,
    )


def _new_bias(
    bias_O: Tensor | None, weight_OI: Tensor, mpo: MPO, whole: Regression
) -> Tensor | None:
    """The bias with the mean of the error taken out; None without one."""
    if bias_O is None:
        return None
    lost_OI = weight_OI - mpo.to(dtype=torch.float64).to_dense().to(weight_OI)
    shift_O = lost_OI @ whole.mean_I + whole.residual_mean_O
    return (bias_O.detach().double() + shift_O).to(bias_O.dtype)


def _rounded(mpo: MPO, storage: Storage, metric: Metric | None, rows: int) -> Rounded:
    if metric is None:
        return round_weight(mpo, storage)
    return round_weight(mpo, storage, input_II=shrunk(metric.ridged_input_II, rows))


def fit_looked_up(
    plan: SitePlan,
    counts: RowCounts,
    output_metric_II: Tensor | None,
    heads: Sequence[HeadUse],
    options: FitOptions,
) -> FittedWeight:
    """Fit a table by how often each row is looked up.

    Args:
        plan: of the table.
        counts: of look-ups.
        output_metric_II: covariance of the loss gradient at what is looked up; None if unknown.
        heads: how output layers that are tied to it use it.
        options: ridge and round trips.

    Raises:
        MPOCompressError: see `fit_table`.
    """
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
