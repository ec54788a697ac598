"""Entanglement of a model's weights, of MPO layers and of dense ones alike.

Each weight is a chain of sites. Across every bond it has Schmidt values: those of the MPO, or for
a dense weight those of its exact MPO in a layout, which are the singular values of its unfoldings.
How fast they fall says what a truncation at that bond would lose.

In the *weight metric* every entry counts the same. In the *data metric* the matrix is whitened by
the second moment C of the layer's inputs on data (and, if asked for, by that of the gradients at
its outputs, G): G^½ W C^½. A direction that the data never takes then carries no entanglement. For
the layout ((out, 1), (1, in)) its Schmidt values are what the best fit to the data cuts off. In a
table, whose rows are looked up, each row is weighed by its share of the lookups, and the columns by
what the model's output feels of them.
"""

# Shape suffixes: O rows, I columns of a weight.

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpocompress.analysis.calls import forward_calls
from mpocompress.analysis.growth import EntropyProfile, Frozen, profile_fields
from mpocompress.errors import ConversionError, DataError, LayoutError
from mpocompress.layers import MPOLayer
from mpocompress.mpo import MPO, Layout, LayoutLike
from mpocompress.mpo.factors import balanced_layout, resolve_layout
from mpocompress.mpo.linalg import svd_values, working_dtype
from mpocompress.mpo.metric import Metric
from mpocompress.planning import Progress
from mpocompress.surgery import WeightSite, check_finite, find_weights, open_modules, select
from mpocompress.tuning import LayerMoments, take_statistics
from mpocompress.tuning.statistics.layer_rows import adapter_of
from mpocompress.tuning.statistics.moments import CrossMoment, RowCounts
from mpocompress.tuning.statistics.tables import HeadUse, table_weights

MetricName = Literal["weight", "data"]
Layouts = LayoutLike | Literal["svd", "balanced"] | Mapping[str, LayoutLike]


class LayerEntanglement(EntropyProfile):
    """The entanglement of one weight at every bond.

    Attributes:
        name: of the layer.
        kind: "mpo" for an MPO layer, "dense" for one seen through its exact MPO.
        layout: (out, in) of each site.
        bond_dims: of the MPO as it is stored; of a dense weight the maximal ones.
    """

    name: str
    kind: Literal["mpo", "dense"]
    layout: tuple[tuple[int, int], ...]
    bond_dims: tuple[int, ...]


class Entanglement(Frozen):
    """The entanglement of a model's weights.

    Attributes:
        metric: "weight" or "data".
        layers: in model order.
    """

    metric: MetricName
    layers: tuple[LayerEntanglement, ...]

    def layer(self, name: str) -> LayerEntanglement:
        """The layer of this name.

        Raises:
            KeyError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"{name!r}; there are {', '.join(repr(layer.name) for layer in self.layers)}"
        )

    def weakest(self) -> tuple[LayerEntanglement, ...]:
        """Layers by the share of the possible entanglement that they have, least first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.filling))

    def __str__(self) -> str:
        rows = [("layer", "kind", "sites", "peak entropy (nats)", "of", "filling", "growth")]
        for layer in self.layers:
            peak = layer.peak_entropy_nats
            capacity = max(layer.capacities_nats, default=0.0)
            rows.append(
                (
                    layer.name or "(model)",
                    layer.kind,
                    ",".join(f"{out}x{in_}" for out, in_ in layer.layout),
                    f"{peak:.3f}",
                    f"{capacity:.3f}",
                    f"{100 * layer.filling:.0f} %",
                    layer.growth.verdict,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight to measure, with all modules that use it.

    Attributes:
        name: of the first module.
        names: of all of them.
        source: an MPO layer, the first one that has these cores, or a dense weight.
        modules: that are called with its inputs.
    """

    name: str
    names: tuple[str, ...]
    source: MPOLayer | WeightSite
    modules: tuple[nn.Module, ...]

    @property
    def looked_up(self) -> bool:
        """Whether it is a table, perhaps of a tied output layer too."""
        return any(adapter_of(module).looks_up for module in self.modules)

    def matrix(self) -> Tensor:
        """(out, in), detached."""
        source = self.source
        return source.matrix() if isinstance(source, WeightSite) else source.matrix.detach()


def entanglement(
    model: nn.Module,
    *,
    layout: Layouts | None = None,
    sites: int = 6,
    metric: MetricName = "weight",
    data: Any = None,
    output_metric: bool = False,
    ridge: float = 1e-3,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renyi_orders: Sequence[float] = (2.0,),
    seed: int = 0,
    progress: Progress | None = None,
) -> Entanglement:
    """Measure Schmidt values and entropies along all MPO layers and convertible dense layers.

    Weights that a module reads without calling a layer are named as in a compressed model: those
    of an `nn.LSTM` "lstm" are "lstm.ih_l0", "lstm.hh_l0", ..., of an `nn.MultiheadAttention`
    "attention" there are "attention.q_proj", ..., "attention.out_proj".

    Args:
        model: only looked at. A single `MPOLinear` or `nn.Linear` is a model, too, named "".
        layout: of dense layers: "svd", "balanced" (two sites), pairs, text or a `Layout` for all of
            them, or a mapping from patterns of names to these; default: `sites` balanced sites.
            MPO layers keep theirs.
        sites: number of sites of dense layers that `layout` says nothing of.
        metric: "weight", or "data" for the whitened weight; see this module.
        data: batches of forward arguments for the data metric.
        output_metric: in the data metric, also weigh the outputs by what the model's output feels.
        ridge: of both second moments, as shares of their diagonals.
        include: patterns of layers; default: all.
        exclude: likewise; they win.
        renyi_orders: orders of the Rényi entropies; `inf` is allowed.
        seed: of the random directions for `output_metric`.
        progress: called as `progress(layer, done, total)`.

    Raises:
        NoLayerMatched: nothing to measure, or a pattern that matches nothing.
        ConversionError: NaN or Inf in a weight, or weights that no layer is called with in a model
            that cannot be copied.
        LayoutError: a layout does not fit a layer.
        DataError: no data for the data metric, none that reaches a layer, or that forward does not
            take; or no module.

    A padded layer has the entanglement of the padded matrix. Dense weights, and in the data metric
    all of them, are decomposed bond by bond in float32 or wider: cost is that of an SVD of the
    unfolding in the middle.
    """
    if metric not in ("weight", "data"):
        raise DataError(f"metric {metric!r}: there are 'weight' and 'data'.")
    if (metric == "data") != (data is not None):
        raise DataError(
            "metric='data' needs data=..., batches of forward arguments."
            if data is None
            else "data is used in the data metric only: say metric='data' too."
        )
    if not isinstance(model, nn.Module):
        raise DataError(
            f"a {type(model).__name__} is no nn.Module whose weights could be looked at. Of the "
            "result of compress give result.model."
        )
    model = open_modules(model)
    weights = _weights(model, include, exclude)
    layouts = _layouts(weights, layout, sites)
    moments: dict[nn.Module, LayerMoments] = {}
    if data is not None:
        modules = [module for weight in weights for module in weight.modules]
        calls = list(forward_calls(data, model))
        found = take_statistics(model, modules, calls, seed=seed, all_data=True)
        moments = found.layers
    layers = []
    for done, weight in enumerate(weights):
        if progress is not None:
            progress(weight.name, done, len(weights))
        white = _whitened(weight, moments, output_metric, ridge) if data is not None else None
        layers.append(_measure(weight, layouts[weight.name], white, renyi_orders))
    return Entanglement(metric=metric, layers=tuple(layers))


def unfolding_spectra(matrix_OI: Tensor, layout: Layout) -> list[Tensor]:
    """Schmidt values of the exact MPO of a dense matrix at every bond, without making it."""
    tensor = layout.split(matrix_OI.to(working_dtype(matrix_OI.dtype)))
    sizes, spectra, left = tensor.shape, [], 1
    for size in sizes[:-1]:
        left *= size
        unfolding_LR = tensor.reshape(left, -1)
        spectra.append(
            svd_values(unfolding_LR if left >= unfolding_LR.shape[1] else unfolding_LR.mT)
        )
    return spectra


def _weights(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[_Weight]:
    inventory = find_weights(model)
    sites = {site.name: site for site in inventory.sites}
    sharing: dict[tuple[int, ...], dict[str, MPOLayer]] = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, MPOLayer):
            sharing[tuple(map(id, module.cores.parameters()))][name] = module
    layers = {next(iter(members)): members for members in sharing.values()}
    found: dict[str, _Weight] = {}
    for name, _ in model.named_modules():
        if name in sites:
            found[name] = _Weight(name, sites[name].names, sites[name], sites[name].modules)
        elif name in layers:  # that share their cores are one weight
            members = layers[name]
            found[name] = _Weight(name, tuple(members), members[name], tuple(members.values()))
    chosen = select(
        list(found),
        include,
        exclude,
        aliases={name: weight.names[1:] for name, weight in found.items()},
        refused=inventory.refused,
    )
    return [weight for name, weight in found.items() if name in chosen]


def _layouts(weights: Sequence[_Weight], layout: Layouts | None, sites: int) -> dict[str, Layout]:
    """The layout of every weight; of several patterns that match, the first one holds."""
    dense = {
        weight.name: weight.source.shape
        for weight in weights
        if isinstance(weight.source, WeightSite)
    }
    rules: dict[str, LayoutLike] = {}
    if isinstance(layout, Mapping):
        for pattern, rule in layout.items():
            for name in select(list(dense), [pattern]):
                rules.setdefault(name, rule)
    elif layout is not None:
        rules = dict.fromkeys(dense, layout)
    found = {w.name: w.source.layout for w in weights if isinstance(w.source, MPOLayer)}
    for name, shape in dense.items():
        try:
            found[name] = (
                resolve_layout(rules[name], *shape)
                if name in rules
                else balanced_layout(*shape, sites)
            )
        except LayoutError as error:
            raise LayoutError(f"layer {name!r}: {error}") from error
    return found


def _whitened(
    weight: _Weight, moments: Mapping[nn.Module, LayerMoments], output_metric: bool, ridge: float
) -> Tensor:
    """The matrix in the data metric."""
    _check_finite(weight)
    if weight.looked_up:
        return _whitened_table(weight, moments, output_metric, ridge)
    seen = [moments[module] for module in weight.modules if module in moments]
    inputs = CrossMoment.sum_of([moment.inputs for moment in seen])
    if not inputs.rows:
        raise _unreached(weight)
    outputs_OO = None
    if output_metric:
        outputs_OO = _of_gradients(weight, [moment.gradients for moment in seen])
    inputs_II = _symmetric(inputs.mean(centered=False)[0])
    metric = Metric(inputs_II, outputs_OO, ridge=ridge, output_ridge=ridge)
    return metric.whiten(weight.matrix())


def _whitened_table(
    weight: _Weight, moments: Mapping[nn.Module, LayerMoments], output_metric: bool, ridge: float
) -> Tensor:
    """A table, perhaps of a tied output layer too: rows by their use, columns by their metric."""
    tables: list[LayerMoments] = []
    heads: list[LayerMoments] = []
    for module in weight.modules:
        if module in moments:
            (tables if adapter_of(module).looks_up else heads).append(moments[module])
    counts = RowCounts()
    for moment in tables:
        counts.merge(moment.counts)
    if not counts.rows:
        raise _unreached(weight)
    table_OI = weight.matrix()
    uses: list[HeadUse] = [use for use in (moment.head_use() for moment in heads) if use]
    metric_II: Tensor | None = None
    if output_metric:
        metric_II = _of_gradients(weight, [moment.gradients for moment in tables])
    elif uses:  # both uses on one scale, without what the output feels of either
        uses = [HeadUse(use.input_II, None) for use in uses]
        metric_II = torch.eye(table_OI.shape[1], dtype=torch.float64, device=table_OI.device)
    weights_O, metric_II = table_weights(counts.frequencies(), metric_II, ridge=ridge, heads=uses)
    rows_OI = weights_O.sqrt()[:, None] * table_OI.to(weights_O)
    return rows_OI if metric_II is None else Metric(metric_II, ridge=0.0).whiten(rows_OI)


def _of_gradients(weight: _Weight, gradients: Sequence[CrossMoment]) -> Tensor:
    total = CrossMoment.sum_of(gradients)
    if not total.rows:
        raise DataError(
            f"layer {weight.name!r}: there are no gradients for a metric on its outputs: it has "
            "too many of them, it is a convolution in groups, or nothing that the model returns "
            "depends on it. Drop output_metric, or exclude the layer."
        )
    return _symmetric(total.mean(centered=False)[0])


def _unreached(weight: _Weight) -> DataError:
    return DataError(
        f"layer {weight.name!r}: the data does not reach it. Exclude it, or measure it in the "
        "weight metric."
    )


def _symmetric(matrix_NN: Tensor) -> Tensor:
    """Without the rounding of products in float32, which `Metric` takes for a mistake."""
    return (matrix_NN + matrix_NN.mT) / 2


def _measure(
    weight: _Weight, layout: Layout, white_OI: Tensor | None, orders: Sequence[float]
) -> LayerEntanglement:
    source = weight.source
    return LayerEntanglement.model_validate(
        {
            "name": weight.name,
            "kind": "mpo" if isinstance(source, MPOLayer) else "dense",
            "layout": layout.pairs,
            "bond_dims": (
                source.bond_dims if isinstance(source, MPOLayer) else layout.max_bond_dims()
            ),
            **profile_fields(_spectra(weight, layout, white_OI), layout.max_bond_dims(), orders),
        }
    )


def _spectra(weight: _Weight, layout: Layout, white_OI: Tensor | None) -> list[Tensor]:
    source = weight.source
    if white_OI is not None:
        return unfolding_spectra(white_OI, layout)
    _check_finite(weight)
    if isinstance(source, WeightSite):
        return unfolding_spectra(source.matrix(), layout)
    # The gauge holds to the rounding of the cores only, so nothing is taken for known.
    return MPO([core.detach().double() for core in source.cores]).schmidt_spectra()


def _check_finite(weight: _Weight) -> None:
    source = weight.source
    if isinstance(source, WeightSite):
        check_finite(source)
    elif not all(bool(torch.isfinite(core).all()) for core in source.cores):
        raise ConversionError(
            f"layer {weight.name!r}: a core has NaN or Inf entries. Repair the checkpoint, or "
            "exclude the layer."
        )
