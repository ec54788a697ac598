"""From what a run did to its report: every figure is measured on the compressed weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mpocompress._version import __version__
from mpocompress.layers import MPOLayer
from mpocompress.mpo import Layout
from mpocompress.mpo.linalg import weight_of, working_dtype
from mpocompress.mpo.spectra import entropy_nats
from mpocompress.mpo.weight import Weight, as_mpo
from mpocompress.planning import LayerPlan, Plan, chain_macs
from mpocompress.planning.plan import CandidateFigures
from mpocompress.report.layer import Candidate, Change, LayerReport
from mpocompress.report.quantities import Scope, Size, Total, Totals
from mpocompress.report.schema import CompressionReport, Parity, Source
from mpocompress.surgery import Inventory, KeptEntry, WeightSite
from mpocompress.surgery.inventory import MULTIPLIED, RECURRENT

if TYPE_CHECKING:
    from mpocompress.export.verify import ParityResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one weight.

    Attributes:
        layout: the sites.
        bond_dims: that were kept.
        parameters: stored numbers: entries of the cores, or the free ones of a gauge.
        bytes: of the cores as stored; with the indices of a gauge.
        macs: multiply-adds for one input row along the chain.
        relative_weight_error: norm(W - W_mpo) / norm(W) with the cores in their final dtype.
        discarded_weight_bound: the same from the discarded weights, before rounding to the dtype;
            None for a weight that was fitted to data.
        relative_output_error: of the layer's outputs on the data; None without data.
        schmidt_values: of the compressed matrix at every bond.
        entropies_nats: from the Schmidt values.
    """

    layout: Layout
    bond_dims: tuple[int, ...]
    parameters: int
    bytes: int
    macs: int
    relative_weight_error: float
    discarded_weight_bound: float | None
    relative_output_error: float | None
    schmidt_values: tuple[tuple[float, ...], ...]
    entropies_nats: tuple[float, ...]


def measure(
    site: WeightSite,
    weight: Weight,
    *,
    discarded_weight_bound: float | None = None,
    relative_output_error: float | None = None,
    num_bytes: int | None = None,
) -> Outcome:
    """Measure one compressed weight against the dense one; the errors given are passed on.

    Args:
        site: the dense weight.
        weight: what stands for it.
        discarded_weight_bound: see `Outcome`.
        relative_output_error: see `Outcome`.
        num_bytes: of what is stored, if it is not the cores in their dtype.
    """
    mpo = as_mpo(weight)
    spectra = mpo.schmidt_spectra()
    return Outcome(
        layout=mpo.layout,
        bond_dims=mpo.bond_dims,
        parameters=weight.num_parameters,
        bytes=weight.num_bytes if num_bytes is None else num_bytes,
        macs=chain_macs(mpo.layout, mpo.bond_dims),
        relative_weight_error=weight_error(site, mpo),
        discarded_weight_bound=discarded_weight_bound,
        relative_output_error=relative_output_error,
        schmidt_values=tuple(tuple(float(s) for s in spectrum) for spectrum in spectra),
        entropies_nats=tuple(entropy_nats(spectrum) for spectrum in spectra),
    )


def collect_report(
    inventory: Inventory,
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    *,
    source: Source,
    seconds: Mapping[str, float],
    settings: Mapping[str, Any],
    corrected: Collection[str] = (),
    uncorrected: Mapping[str, str] | None = None,
) -> CompressionReport:
    """Account for every parameter and buffer of the model.

    Args:
        inventory: of the dense model.
        plan: what was decided for each convertible weight, and why.
        outcomes: by name of the weight, for those that were compressed.
        source: where the model came from.
        seconds: wall time by stage.
        settings: what was asked for.
        corrected: names of weights that stay dense but have other values than before.
        uncorrected: why weights that were to have other values have not, by name.
    """
    plans = {layer.name: layer for layer in plan.layers}
    layers: list[LayerReport] = []
    sizes: list[tuple[bool, Size]] = []  # compressed?, bytes
    for entry in inventory.entries:
        if isinstance(entry, WeightSite):
            outcome = outcomes.get(entry.name)
            layer = _weight(entry, plans[entry.name], outcome)
            if outcome is None:
                layer = layer.model_copy(
                    update={
                        "changes": ["corrected"] if entry.name in corrected else [],
                        "uncorrected": (uncorrected or {}).get(entry.name),
                    }
                )
            layers.append(layer)
            after = entry.bytes if outcome is None else outcome.bytes
            sizes.append((outcome is not None, Size(dense=entry.bytes, compressed=after)))
        else:
            layers.append(_kept(entry))
            sizes.append((False, Size(dense=entry.bytes, compressed=entry.bytes)))
    changed = [layer.status == "compressed" for layer in layers]
    return CompressionReport(
        tool_version=__version__,
        source=source,
        settings=dict(settings),
        totals=Totals(
            parameters=_scope([layer.parameters for layer in layers], changed),
            bytes=_scope([size for _, size in sizes], changed),
            macs=_scope([layer.macs for layer in layers], changed),
        ),
        layers=layers,
        seconds=dict(seconds),
    )


def remeasure(
    report: CompressionReport,
    before: Mapping[str, Tensor],
    inventory: Inventory | None,
    model: nn.Module,
    *,
    trained: Change,
) -> CompressionReport:
    """The report of a model whose weights have moved since: every figure anew, on its cores.

    What would need statistics of activations is unknown now: `relative_output_error` becomes None,
    and so does the bound on the weight error. A kept entry that moved says so in its `changes`.

    Args:
        report: from before; what is not about weights stays.
        before: the state of the compressed model that the report is about.
        inventory: of the dense model; without it errors of weights are unknown, too.
        model: the compressed model as it is now; bond dimensions may be others.
        trained: how entries that were kept got other values, "healed" or "swept".
    """
    dense = {} if inventory is None else {site.name or "(model)": site for site in inventory.sites}
    modules = dict(model.named_modules(remove_duplicate=False))
    after = model.state_dict()
    layers = []
    more_bytes = 0
    for layer in report.layers:
        site = dense.get(layer.name)
        name = "" if layer.name == "(model)" else layer.name
        module = modules.get(name)
        if layer.status == "compressed" and isinstance(module, MPOLayer):
            mpo = module.to_mpo()
            spectra = mpo.schmidt_spectra()
            update: dict[str, Any] = {
                "relative_weight_error": None if site is None else weight_error(site, mpo),
                "relative_output_error": None,
                "discarded_weight_bound": None,
                "entropies_nats": [entropy_nats(spectrum) for spectrum in spectra],
                "schmidt_values": [[float(s) for s in spectrum] for spectrum in spectra],
            }
            if list(mpo.bond_dims) != layer.bond_dims:
                stored = sum(parameter.numel() for parameter in module.cores.parameters())
                macs = layer.macs.compressed
                if macs and layer.kind != RECURRENT:
                    macs = chain_macs(mpo.layout, mpo.bond_dims)
                update |= {
                    "bond_dims": list(mpo.bond_dims),
                    "parameters": Size(dense=layer.parameters.dense, compressed=stored),
                    "macs": Size(dense=layer.macs.dense, compressed=macs),
                }
                more_bytes += _bytes_below(after, name) - _bytes_below(before, name)
            layers.append(layer.model_copy(update=update))
            continue
        moved = any(
            key in before and key in after and not torch.equal(before[key], after[key])
            for key in (layer.name, f"{name}.weight" if name else "weight")
        )
        if layer.status == "kept" and moved and trained not in layer.changes:
            layer = layer.model_copy(update={"changes": [*layer.changes, trained]})
        layers.append(layer)
    changed = [layer.status == "compressed" for layer in layers]
    in_bytes = report.totals.bytes
    totals = Totals(
        parameters=_scope([layer.parameters for layer in layers], changed),
        bytes=Scope(
            model=Total.of(in_bytes.model.dense, in_bytes.model.compressed + more_bytes),
            layers=Total.of(in_bytes.layers.dense, in_bytes.layers.compressed + more_bytes),
        ),
        macs=_scope([layer.macs for layer in layers], changed),
    )
    return report.model_copy(update={"layers": layers, "totals": totals})


def weight_error(site: WeightSite, weight: Weight) -> float:
    """norm(W - W_mpo) / norm(W), with the cores in their dtype; 0 for a weight of zeros."""
    mpo = as_mpo(weight)
    wide = working_dtype(mpo.dtype)
    weight_OI = site.matrix().to(wide)
    total = weight_of(weight_OI)
    difference = mpo.to(dtype=wide).to_dense() - weight_OI
    return float((weight_of(difference) / total) ** 0.5) if total > 0 else 0.0


def _bytes_below(state: Mapping[str, Tensor], name: str) -> int:
    """Of all tensors of a module."""
    prefix = f"{name}." if name else ""
    return sum(tensor.nbytes for key, tensor in state.items() if key.startswith(prefix))


def parity_of(
    found: "ParityResult", *, reference: Literal["pytorch", "graph"] = "pytorch"
) -> Parity:
    """What the report says of a comparison in ONNX Runtime.

    Args:
        found: the comparison.
        reference: what the file was held against, see `Parity`.
    """
    return Parity(
        max_abs_difference=found.max_abs_difference,
        max_relative_difference=found.max_relative_difference,
        tolerance=found.tolerance,
        batch_sizes=list(found.batch_sizes),
        argmax_agreement=found.argmax_agreement,
        passed=found.passed,
        outputs=list(found.outputs),
        reference=reference,
    )


def _scope(sizes: Sequence[Size], changed: Sequence[bool]) -> Scope:
    of_layers = [size for size, flag in zip(sizes, changed, strict=True) if flag]
    return Scope(model=_total(sizes), layers=_total(of_layers))


def _total(sizes: Sequence[Size]) -> Total:
    return Total.of(sum(size.dense for size in sizes), sum(size.compressed for size in sizes))


def _weight(site: WeightSite, plan: LayerPlan, outcome: Outcome | None) -> LayerReport:
    dense = site.shape[0] * site.shape[1]
    multiplied = site.kind in MULTIPLIED
    macs = dense if multiplied else 0
    common: dict[str, Any] = {
        "name": site.name or "(model)",
        "also_known_as": list(site.names[1:]),
        "kind": site.kind,
        "reason": plan.reason,
        "shape": list(site.shape),
    }
    if outcome is None:
        return LayerReport(
            status="kept",
            parameters=Size(dense=dense, compressed=dense),
            macs=Size(dense=macs, compressed=macs),
            **common,
        )
    return LayerReport(
        status="compressed",
        layout=[list(pair) for pair in outcome.layout.pairs],
        bond_dims=list(outcome.bond_dims),
        precision=plan.storage if plan.rounds else None,
        parameters=Size(dense=dense, compressed=outcome.parameters),
        macs=Size(dense=macs, compressed=outcome.macs if multiplied and not site.rebuilt else macs),
        relative_weight_error=outcome.relative_weight_error,
        relative_output_error=outcome.relative_output_error,
        discarded_weight_bound=outcome.discarded_weight_bound,
        entropies_nats=list(outcome.entropies_nats),
        schmidt_values=[list(values) for values in outcome.schmidt_values],
        candidates=[
            Candidate(
                layout=[list(pair) for pair in figures.layout],
                bond_dims=list(figures.bond_dims),
                parameters=figures.parameters,
                macs=figures.macs,
                relative_weight_error=figures.relative_weight_error,
                chosen=_is_chosen(figures, plan),
                precision=None if figures.bytes is None else figures.storage,
                bytes=figures.bytes,
                output_change=None if figures.loss is None else sqrt(max(figures.loss, 0.0)),
            )
            for figures in plan.candidates
        ],
        **common,
    )


def _is_chosen(figures: CandidateFigures, plan: LayerPlan) -> bool:
    """Whether a candidate is what the entry says, which may have been edited since."""
    if plan.predicted is None or plan.fresh_prediction is not None:
        return figures.chosen
    bonds = plan.sites().clip(plan.bond_dims or ())
    edited = (plan.layout, bonds, plan.gauge, plan.storage)
    return (figures.layout, figures.bond_dims, figures.gauge, figures.storage) == edited


def _kept(entry: KeptEntry) -> LayerReport:
    macs = entry.parameters if entry.kind in MULTIPLIED and len(entry.shape) == 2 else 0
    return LayerReport(
        name=entry.name,
        also_known_as=list(entry.also_known_as),
        kind=entry.kind,
        status="kept",
        reason=entry.reason,
        shape=list(entry.shape),
        parameters=Size(dense=entry.parameters, compressed=entry.parameters),
        macs=Size(dense=macs, compressed=macs),
    )
