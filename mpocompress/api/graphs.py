"""Compress an ONNX graph: plan its weights, fit them on data, put cores in their place."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mpocompress import saving
from mpocompress._version import __version__
from mpocompress.api.compression import check_belongs, check_ratio
from mpocompress.api.result import Clock
from mpocompress.api.stored_weights import factorize_site
from mpocompress.errors import MPOCompressError, NoLayerMatched, PlanError
from mpocompress.export.graphs import (
    Feed,
    GraphInputs,
    GraphSite,
    OnnxModel,
    bias_of,
    compare_graphs,
    find_graph_weights,
    graph_sites,
    input_moments,
    raise_if_failed,
    read_array,
    to_torch,
    tolerance_of,
    with_cores,
    with_matrices,
    write_graph,
)
from mpocompress.loading import Batches, parse_input_spec
from mpocompress.mpo import MPO
from mpocompress.mpo.identity_gauge import stored_parameters
from mpocompress.planning import LayerPlan, Plan, PlanOptions, Progress
from mpocompress.planning.entries import why_nothing
from mpocompress.report import CompressionReport, Parity, Source
from mpocompress.report.collect import Outcome, collect_report, parity_of
from mpocompress.surgery import Inventory, KeptEntry, WeightSite, check_finite
from mpocompress.tuning import FitOptions, FittedWeight, SitePlan, fit_alone

# Of data, about: a comparison of every sample would prove nothing more.
_COMPARED_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GraphResult:
    """A compressed graph, not yet written.

    Attributes:
        weights: cores in the place of these weights.
        vectors: biases that took up the mean of an error, by name of the tensor.
        report: what was measured.
        plan: what was executed.
    """

    weights: Mapping[GraphSite, MPO]
    vectors: Mapping[str, Tensor]
    report: CompressionReport
    plan: Plan

    def metadata(self) -> dict[str, str]:
        """What the ONNX file says of itself."""
        layers = {
            layer.name: {"layout": layer.layout, "bond_dims": layer.bond_dims}
            for layer in self.report.compressed_layers
        }
        return {
            "mpocompress.version": __version__,
            "mpocompress.source_name": self.report.source.name,
            "mpocompress.source_sha256": self.report.source.sha256 or "",
            "mpocompress.layers": json.dumps(layers, separators=(",", ":")),
        }


def plan_graph(
    model: OnnxModel, options: PlanOptions, *, progress: Progress | None = None
) -> tuple[Plan, Inventory]:
    """Decide for every weight of a graph whether, and with which layout, it becomes an MPO.

    As `plan` does for a module. A weight that the file stores in fewer bytes than its cores would
    take (an int8 one, say) stays as it is.

    Args:
        model: the graph.
        options: what is asked for.
        progress: called as `progress(weight, done, total)`.

    Raises:
        MPOCompressError: as `plan`.
    """
    inventory = find_graph_weights(model)
    while True:
        made = options.make(inventory, progress=progress)
        sites = {site.name: site for site in graph_sites(inventory)}
        larger = {
            layer.name: f"cores of {reached} bytes would not be smaller than its {stored}"
            for layer in made.compressed
            if (reached := _core_bytes(layer, sites[layer.name]))
            >= (stored := sites[layer.name].bytes)
        }
        if not larger:
            # Each weight is fitted by itself: what is lost before a dense one is not known.
            layers = [layer.model_copy(update={"corrects": False}) for layer in made.layers]
            return made.model_copy(update={"layers": tuple(layers)}), inventory
        # Planned again, so that a ratio is met by the others.
        inventory = replace(
            inventory,
            entries=tuple(
                _kept(entry, larger[entry.name])
                if isinstance(entry, WeightSite) and entry.name in larger
                else entry
                for entry in inventory.entries
            ),
            refused={**inventory.refused, **larger},
        )


def _core_bytes(layer: LayerPlan, site: GraphSite) -> int:
    layout = layer.sites()
    bonds = layout.clip(layer.bond_dims or ())
    return stored_parameters(layout, bonds, layer.gauge) * site.dtype.itemsize


def _kept(site: WeightSite, reason: str) -> KeptEntry:
    return KeptEntry(
        name=site.name,
        also_known_as=site.names[1:],
        kind=site.kind,
        shape=site.shape,
        parameters=site.parameters,
        bytes=site.bytes,
        reason=reason,
        is_buffer=False,
    )


def check_plan(plan: Plan, model: OnnxModel) -> Inventory:
    """The weights of a graph, if a plan is of them and can be carried out.

    Raises:
        PlanError: a plan of another model, or with a gauge or a precision that graphs have not.
    """
    inventory = find_graph_weights(model)
    check_belongs(plan, inventory)
    for layer in plan.compressed:
        if layer.gauge != "none" or layer.rounds:
            what = layer.storage if layer.rounds else f"gauge {layer.gauge!r}"
            raise PlanError(
                f"layer {layer.name!r}: {what} is for PyTorch models; an ONNX graph is written "
                'with float32 chains. Set gauge "none" and precision "float32", without tiers.'
            )
    return inventory


def compress_graph(
    model: OnnxModel,
    options: PlanOptions | Plan,
    *,
    feeds: Callable[[], Iterable[Feed]] | None = None,
    sweeps: int = 16,
    seed: int = 0,
    source: Source,
    progress: Progress | None = None,
) -> GraphResult:
    """Find cores for the planned weights of a graph. The graph itself is untouched.

    Args:
        model: the graph.
        options: what is asked for, or a plan; cores are stored whole, without a gauge.
        feeds: starts a pass over the data. With data every weight is fitted to the outputs that it
            has on it, by the activations of the dense graph; without, to the weights.
        sweeps: at most so many passes over the sites in the fit of a weight.
        seed: of the randomized range finder for large matrices.
        source: name and hash of the file, for the report.
        progress: called as `progress(weight, done, total)`.

    Raises:
        NoLayerMatched: nothing becomes smaller.
        BudgetError: the ratio cannot be reached, or was not.
        DataError: data that the graph does not run on.
        MPOCompressError: as `compress`.
    """
    clock = Clock()
    with clock("planning"):
        if isinstance(options, Plan):
            plan, inventory = options, check_plan(options, model)
        else:
            plan, inventory = plan_graph(model, options, progress=progress)
    if not plan.compressed:
        why = why_nothing(plan.layers)
        raise NoLayerMatched(f"nothing to compress: every weight stays dense ({why}).")
    by_name = {site.name: site for site in graph_sites(inventory)}
    planned = {
        by_name[layer.name]: SitePlan(
            site=by_name[layer.name],
            layout=layer.sites(),
            bond_dims=layer.sites().clip(layer.bond_dims or ()),
        )
        for layer in plan.compressed
    }
    for site in planned:
        check_finite(site)
    fitted: dict[WeightSite, FittedWeight] = {}
    vectors: dict[str, Tensor] = {}
    settings = {**plan.asked, "seed": seed}
    if feeds is not None:
        settings |= {"sweeps": sweeps, "rows_of_data": sum(_num_rows(feed) for feed in feeds())}
        with clock("fitting"):
            fitted = _fit(model, planned, feeds, FitOptions(sweeps=sweeps), vectors, progress)
    weights: dict[GraphSite, MPO] = {}
    outcomes: dict[str, Outcome] = {}
    with clock("factorization"):
        for done, (site, entry) in enumerate(planned.items()):
            if progress is not None:
                progress(site.name, done, len(planned))
            weights[site], outcomes[site.name] = factorize_site(entry, fitted, seed)
    report = collect_report(
        inventory, plan, outcomes, source=source, seconds=clock.total(), settings=settings
    )
    if isinstance(options, PlanOptions) and options.ratio is not None:
        check_ratio(report, options.ratio, options.of)
    return GraphResult(weights=weights, vectors=vectors, report=report, plan=plan)


def _num_rows(feed: Feed) -> int:
    return next((len(array) for array in feed.values() if array.ndim), 1)


def _fit(
    model: OnnxModel,
    planned: Mapping[GraphSite, SitePlan],
    feeds: Callable[[], Iterable[Feed]],
    options: FitOptions,
    vectors: dict[str, Tensor],
    progress: Progress | None,
) -> dict[WeightSite, FittedWeight]:
    """Fit the weights; biases that took up a mean are put into `vectors`."""
    fitted: dict[WeightSite, FittedWeight] = {}
    if progress is not None:
        progress("running the graph on the data", 0, len(planned))
    for moments in input_moments(model, list(planned), feeds):
        for site, moment in moments.items():
            if progress is not None:
                progress(site.name, len(fitted), len(planned))
            bias = bias_of(model, site)
            vector = None
            if bias is not None:
                vector = to_torch(read_array(model.stored[bias.stored], model.folder))
            try:
                done = fit_alone(
                    site.matrix().to(site.dtype),
                    moment,
                    planned[site].layout,
                    planned[site].bond_dims,
                    bias_O=None if vector is None else vector.reshape(-1).to(torch.float64),
                    options=options,
                )
            except MPOCompressError as error:
                raise type(error)(f"layer {site.label}: {error}") from error
            fitted[site] = done
            if bias is not None and vector is not None and done.bias is not None:
                moved_O = (done.bias - vector.reshape(-1).to(torch.float64)) / bias.scale
                vectors[bias.stored] = (vector + moved_O.reshape(vector.shape)).to(vector.dtype)
    return fitted


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GraphCalls:
    """How a graph is called.

    Attributes:
        inputs: what it takes.
        feeds: starts a pass over the data; None without data.
    """

    inputs: GraphInputs
    feeds: Callable[[], Iterator[Feed]] | None


def calls_of_graph(
    model: OnnxModel, *, data: Batches | None = None, shapes: Sequence[str] = ()
) -> GraphCalls:
    """Feeds of a graph from the user's batches.

    Args:
        model: the graph.
        data: batches, by the names of the graph's inputs or in their order.
        shapes: of inputs that are made up where there is no data, as in "1x784".

    Raises:
        DataError: an input that data cannot be given for, data or shapes that do not fit, or
            neither for an input without a shape.
    """
    inputs = GraphInputs(model, [parse_input_spec(text).shape for text in shapes])
    if data is None:
        inputs.check_ranks()
        return GraphCalls(inputs=inputs, feeds=None)

    def feeds() -> Iterator[Feed]:
        for number, batch in enumerate(data):
            yield inputs.feed(batch.args, batch.kwargs, f"{data.place}, batch {number}")

    next(feeds())  # what does not fit is refused now, and not after the planning
    return GraphCalls(inputs=inputs, feeds=feeds)


def save_graph(model: OnnxModel, result: GraphResult, path: Path) -> None:
    """Write the cores and all other tensors of the graph that safetensors can hold.

    Raises:
        SaveError: the file cannot be written.
    """
    gone = {name for site in result.weights for name in (site.stored, *site.helpers)}
    others = {}
    for name, tensor in model.stored.items():
        if name in result.vectors:
            others[name] = result.vectors[name]
        elif name not in gone:
            kept = to_torch(read_array(tensor, model.folder))
            if kept is not None:
                others[name] = kept
    weights = [
        saving.GraphWeight(
            name=site.name,
            mpo=mpo,
            stored=site.original.name,
            stored_shape=site.original.shape,
            transposed=site.original.transposed,
        )
        for site, mpo in result.weights.items()
    ]
    saving.save_graph_weights(weights, others, path)


def write_compressed(model: OnnxModel, result: GraphResult, path: Path) -> dict[str, int]:
    """Write the ONNX file with the cores; bytes of the files by name.

    Raises:
        SaveError: it cannot be written.
    """
    made = with_cores(model, result.weights, result.vectors, result.metadata())
    return write_graph(made, model.folder, path)


def lost_inputs(model: OnnxModel, result: GraphResult) -> tuple[str, ...]:
    """Names of inputs with a default that are no inputs of the result: its weights, by cores now.

    Exporters of long ago made all weights such inputs, so this is no reason to keep them dense.
    """
    gone = {name for site in result.weights for name in (site.stored, *site.helpers)}
    return tuple(sorted(gone & model.defaults))


def verify_graph(
    model: OnnxModel,
    result: GraphResult,
    path: Path,
    calls: GraphCalls,
    *,
    seed: int = 0,
) -> Parity:
    """Hold the written file against the original graph with the densified weights.

    Args:
        model: the original.
        result: the weights.
        path: of the written file.
        calls: data, or what can be made up.
        seed: of what is made up.

    Raises:
        ParityError: they disagree.
        DataError: the original does not run on the inputs.
    """
    reference = with_matrices(model, result.weights, result.vectors)
    found = compare_graphs(
        path,
        reference,
        model.folder,
        calls.inputs,
        None if calls.feeds is None else _few(calls.feeds()),
        tolerance=tolerance_of(model, list(result.weights)),
        seed=seed,
    )
    raise_if_failed(found)
    return parity_of(found, reference="graph")


def _few(feeds: Iterator[Feed]) -> Iterator[Feed]:
    seen = 0
    for feed in feeds:
        yield feed
        seen += _num_rows(feed)
        if seen >= _COMPARED_ROWS:
            return
