"""What layers in a layout would do to the model's outputs: fitted, put in their place, measured.

The second-order prediction (see `statistics.sensitivity`) takes inputs and gradients as
independent. Sweeps find what that overlooks: a layer of a digit classifier in four sites was
predicted to change the outputs by 12 %, and changed them by 32. Closed forms are predicted well
(35 % and 41).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpocompress.layers.modes import evaluation_mode
from mpocompress.mpo import Layout
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.dense_layers import shared_parameters
from mpocompress.tuning.fitting.fitted_model import with_fitted
from mpocompress.tuning.fitting.one_layer import fit_layer
from mpocompress.tuning.fitting.plan import FitOptions, SitePlan, with_output_metric
from mpocompress.tuning.fitting.sequential import fit_in_sequence
from mpocompress.tuning.healing.loss import loss_for, output_loss, vocabularies_of
from mpocompress.tuning.lockstep import Call, floating_outputs, rows_of, seeded_call
from mpocompress.tuning.padding import keep_mask
from mpocompress.tuning.statistics.gradients import LayerMoments
from mpocompress.tuning.statistics.later_calls import LaterCalls, later_calls
from mpocompress.tuning.statistics.output_errors import OutputChange
from mpocompress.tuning.statistics.tables import HeadUse
from mpocompress.tuning.statistics.upstream import Moments


def effect_alone(
    model: nn.Module,
    site: WeightSite,
    layout: Layout,
    bond_dims: Sequence[int],
    calls: Sequence[Call],
    *,
    output_metrics: Mapping[nn.Module, Tensor],
    moments: Mapping[nn.Module, LayerMoments] | None = None,
    sweeps: int = 4,
) -> tuple[float, float]:
    """Fit one weight on what the dense model gives it, all else dense, and run the model.

    Args:
        model: dense, with the modules of `site`; only read.
        site: the weight.
        layout: of its MPO.
        bond_dims: likewise.
        calls: batches to fit and to measure on.
        output_metrics: as in `fit_in_sequence`.
        moments: of its modules, from `take_statistics` on the same batches: what nothing before it
            has changed is then not looked at again.
        sweeps: few: it is a trial.

    Returns:
        See `effect_together`.
    """
    plan = SitePlan(site=site, layout=layout, bond_dims=tuple(bond_dims))
    moments = moments or {}
    layer = site.modules[0]
    later = later_calls([site], moments)
    known = moments[layer].inputs if layer in moments else None
    if known is None or not known.rows or later or len(site.modules) > 1:
        return effect_together(
            model, [plan], calls, output_metrics=output_metrics, later=later, sweeps=sweeps
        )
    fitted = fit_layer(
        layer,
        plan,
        [Moments(inputs=known, cross=known, residual=None)],
        None,
        output_metrics.get(layer),
        with_output_metric(FitOptions(sweeps=sweeps), [plan]),
        shared_parameters(model),
    )
    return _effect(model, with_fitted(model, {site: fitted.mpo}, {site: fitted}), calls)


def effect_together(
    model: nn.Module,
    planned: Sequence[SitePlan],
    calls: Sequence[Call],
    *,
    output_metrics: Mapping[nn.Module, Tensor],
    heads: Mapping[WeightSite, Sequence[HeadUse]] | None = None,
    later: Mapping[WeightSite, LaterCalls] | None = None,
    sweeps: int = 4,
) -> tuple[float, float]:
    """Fit weights one after the other, corrections of dense layers included, and run the model.

    Args:
        model: dense; only read.
        planned: its weights, with their layouts.
        calls: batches to fit and to measure on.
        output_metrics: as in `fit_in_sequence`.
        heads: likewise.
        later: likewise.
        sweeps: few: it is a trial.

    Returns:
        Norm of the change of the model's outputs over their norm, and the mean of the loss that
        healing would have (`loss.loss_for`, "auto"), which sees what a change of logits
        does to probabilities.

    Raises:
        DataError: as `fit_in_sequence`.
        OutputsDifferError: how many outputs there are depends on their values.
    """
    fitted = fit_in_sequence(
        model,
        planned,
        calls,
        output_metrics=output_metrics,
        heads=heads,
        later=later,
        options=FitOptions(sweeps=sweeps),
    )
    dense = {plan.site for plan in planned if plan.stays_dense}
    weights = {site: found.mpo for site, found in fitted.items() if site not in dense}
    return _effect(model, with_fitted(model, weights, fitted), calls)


def _effect(model: nn.Module, compressed: nn.Module, calls: Sequence[Call]) -> tuple[float, float]:
    """See `effect_together`."""
    kind, vocabularies = loss_for("auto", calls), vocabularies_of(model)
    change = OutputChange()
    loss, rows = 0.0, 0
    with evaluation_mode(model), evaluation_mode(compressed), torch.no_grad():
        for number, call in enumerate(calls):
            keep = keep_mask(call.kwargs)
            expected, found = (seeded_call(each, call, number) for each in (model, compressed))
            lost = output_loss(found, expected, keep, kind, vocabularies=vocabularies)
            loss += rows_of(call) * float(lost)
            rows += rows_of(call)
            change.add_all(floating_outputs(expected), floating_outputs(found), keep)
    return change.relative, loss / rows
