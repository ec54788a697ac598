"""What a plan is expected to give: size, multiply-adds, time, and what it does to the outputs.

The change of the model's outputs is predicted to second order at the dense model: the squared
singular values that each layer discards in the metric of its inputs and of the gradients at its
outputs, summed over the layers. Errors of different layers are taken as independent, and nothing is
known here of what later layers repair.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from mpocompress.mpo.identity_gauge import stored_parameters
from mpocompress.planning.layouts import make_candidate
from mpocompress.planning.objective import Objective
from mpocompress.planning.parts import Gains
from mpocompress.planning.plan import CandidateFigures, LayerPlan, LayerPrediction, Plan
from mpocompress.planning.trials import Trials
from mpocompress.surgery import Inventory, WeightSite


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """Figures of the whole model, dense and as planned.

    Attributes:
        parameters: dense, planned.
        bytes: of stored tensors, likewise, in the dtypes of the model; None if not known.
        macs: multiply-adds of one row through the listed layers.
        seconds: of a batch through the listed layers; None unless times were measured.
        relative_output_error: norm of the change of the model's outputs over their norm; None if a
            layer's part in it is not known.
    """

    parameters: tuple[int, int] | None
    bytes: tuple[int, int] | None
    macs: tuple[int, int]
    seconds: tuple[float, float] | None
    relative_output_error: float | None


def with_predictions(
    plan: Plan,
    inventory: Inventory,
    *,
    objective: Objective,
    gains: Gains | None = None,
    trials: Trials | None = None,
    output_energy: float | None = None,
) -> Plan:
    """The plan with what is expected of each entry.

    Args:
        plan: to complete.
        inventory: of its model.
        objective: with the table of times, if there is one.
        gains: what each bond dimension of the layout ((out, 1), (1, in)) is worth, if known.
        trials: those that were made of other layouts.
        output_energy: sum of the squares of the model's outputs on the data that `gains` are from.
    """
    sites = {site.name: site for site in inventory.sites}
    layers = tuple(
        _predicted(layer, sites[layer.name], objective, gains, trials, output_energy)
        for layer in plan.layers
    )
    return plan.model_copy(
        update={
            "layers": layers,
            "parameters_elsewhere": inventory.parameters
            - sum(site.parameters for site in inventory.sites),
            "bytes_elsewhere": inventory.bytes - sum(site.bytes for site in inventory.sites),
            "bytes_listed": sum(site.bytes for site in inventory.sites),
        }
    )


def predicted_totals(plan: Plan) -> Predicted:
    """Sum up what a plan is expected to give; edited entries have sizes, but nothing else."""
    dense = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
    after = sum(layer.parameters for layer in plan.layers)
    predictions = [layer.fresh_prediction for layer in plan.layers]
    seconds = None
    if all(p is not None and p.seconds is not None for p in predictions):
        seconds = (
            sum(p.dense_seconds or 0.0 for p in predictions if p),
            sum(p.seconds or 0.0 for p in predictions if p),
        )
    losses = [
        None if prediction is None else prediction.loss
        for layer, prediction in zip(plan.layers, predictions, strict=True)
        if layer.action == "compress"
    ]
    known = [loss for loss in losses if loss is not None]
    error = sqrt(max(sum(known), 0.0)) if known and len(known) == len(losses) else None
    stored = None
    if any(layer.rounds for layer in plan.compressed):  # models that are rounded are float32
        stored = sum(layer.bytes for layer in plan.layers)
    elsewhere, rest, listed = plan.parameters_elsewhere, plan.bytes_elsewhere, plan.bytes_listed
    return Predicted(
        parameters=None if elsewhere is None else (elsewhere + dense, elsewhere + after),
        bytes=None
        if rest is None or listed is None
        else (rest + listed, rest + (stored or round(listed * after / dense))),
        macs=(
            sum(layer.dense_macs for layer in plan.layers),
            sum(layer.macs for layer in plan.layers),
        ),
        seconds=seconds,
        relative_output_error=error,
    )


def _predicted(
    layer: LayerPlan,
    site: WeightSite,
    objective: Objective,
    gains: Gains | None,
    trials: Trials | None,
    output_energy: float | None,
) -> LayerPlan:
    layout = None if layer.action == "keep" else layer.sites()
    bonds = () if layout is None else layout.clip(layer.bond_dims or ())
    seconds = dense_seconds = None
    if objective.latency is not None:
        seconds = objective.latency(layer.shape, layout, bonds)
        dense_seconds = objective.latency(layer.shape, None, ())
    loss = None
    candidates = layer.candidates
    if layer.rounds:
        chosen = next((found for found in layer.candidates if found.chosen), None)
        loss = None if chosen is None else chosen.loss
    elif layout is not None and layout.is_svd and not layout.pad:
        known = None if gains is None or not output_energy else gains(site)
        if known is not None and output_energy:
            lost_D = _beyond(known) / output_energy
            loss = float(lost_D[bonds[0]])
            candidates = _curve(layer, lost_D)
    elif layout is not None and trials is not None and output_energy:
        found = trials(site, layout, bonds)
        loss = None if found is None else found.loss / output_energy
    prediction = LayerPrediction(
        choice=layer.choice, seconds=seconds, dense_seconds=dense_seconds, loss=loss
    )
    return layer.model_copy(update={"predicted": prediction, "candidates": candidates})


def _beyond(gains_D: Tensor) -> Tensor:
    """What is lost at each bond dimension from 0 on, summed from the small gains up."""
    lost_D = gains_D.flip(0).cumsum(0).flip(0)
    return torch.cat([lost_D, lost_D.new_zeros(1)])


def _curve(layer: LayerPlan, lost_D: Tensor) -> tuple[CandidateFigures, ...]:
    """What the layer would lose at other bond dimensions: its Pareto curve.

    At powers of 2, the largest that makes it smaller, and the chosen one.
    """
    layout, (chosen,) = layer.sites(), layer.sites().clip(layer.bond_dims or ())
    dense = layer.shape[0] * layer.shape[1]
    all_bonds = range(1, min(*layer.shape, len(lost_D) - 1) + 1)
    smaller = bisect_left(
        all_bonds, dense, key=lambda bond: stored_parameters(layout, (bond,), layer.gauge)
    )
    powers = {2**power for power in range(smaller.bit_length())}
    bonds = (powers | {smaller, chosen}) - {0}
    return tuple(
        CandidateFigures.of(
            make_candidate(layout, bond, gauge=layer.gauge),
            chosen=bond == chosen,
            loss=float(lost_D[bond]),
        )
        for bond in sorted(bonds)
    )
