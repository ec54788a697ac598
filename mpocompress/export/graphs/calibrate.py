"""Second moments of what the products of a graph see on data, by running it in ONNX Runtime."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from onnx import ModelProto, ValueInfoProto
from torch import Tensor

from mpocompress.errors import DataError
from mpocompress.export.calls import first_line
from mpocompress.export.graphs.find import GraphSite, Product
from mpocompress.export.graphs.model import (
    OnnxModel,
    attribute,
    copy_graph_frame,
    copy_without_graph,
)
from mpocompress.export.graphs.sessions import Feed, Session
from mpocompress.export.graphs.tensors import to_torch
from mpocompress.tuning.padding import keep_mask, real_rows
from mpocompress.tuning.statistics.moments import CrossMoment

_MOMENT_BYTES = 1 << 30


def input_moments(
    model: OnnxModel,
    sites: Sequence[GraphSite],
    feeds: Callable[[], Iterable[Feed]],
    *,
    moment_bytes: int = _MOMENT_BYTES,
) -> Iterator[dict[GraphSite, CrossMoment]]:
    """Moments of the inputs of weights, some weights at a time, in the order of the graph.

    The data is passed over once for each group of weights. Alive at a time are the moments of a
    group and what one batch computes of its inputs.

    Args:
        model: the graph.
        sites: its weights.
        feeds: starts a pass over the data.
        moment_bytes: size of a group; a single weight may exceed it.

    Yields:
        For each group the moments by weight. Padding is left out, as the inputs' mask marks it.

    Raises:
        DataError: no data, data that the graph does not run on, or NaN activations.
    """
    for group in _groups(model, sites, moment_bytes):
        values = tuple(dict.fromkeys(_read(p) for site in group for p in site.products))
        session = Session(_tapped(model, values), model.folder, model.name)
        moments = {value: CrossMoment() for value in values}
        turned = {
            _read(product)
            for site in group
            for product in site.products
            if attribute(product.node, "transA", 0)
        }
        empty = True
        for number, feed in enumerate(feeds()):
            empty = False
            keep = keep_mask({name: torch.from_numpy(array) for name, array in feed.items()})
            wanted = [value for value in values if value not in feed]
            try:
                found = dict(zip(wanted, session.run(feed, wanted), strict=True)) if wanted else {}
            except Exception as error:
                raise DataError(
                    f"batch {number}: {model.name} does not run on it: {first_line(error)}."
                ) from error
            for value in values:
                array = feed[value] if value in feed else found[value]
                rows = _rows(array, keep, turned=value in turned)
                moments[value].add(rows, rows)
            del found
        if empty:
            raise DataError("there are no batches to fit on.")
        yield {site: _sum(moments[_read(p)] for p in site.products) for site in group}


def _read(product: Product) -> str:
    return str(product.node.input[0])


def _groups(model: OnnxModel, sites: Sequence[GraphSite], limit: int) -> Iterator[list[GraphSite]]:
    position = {node.output[0]: n for n, node in enumerate(model.graph.node) if node.output}
    group: list[GraphSite] = []
    values: set[str] = set()
    size = 0
    for site in sorted(sites, key=lambda site: position[site.products[0].node.output[0]]):
        new = {_read(product) for product in site.products} - values
        cost = 8 * site.shape[1] ** 2 * len(new)
        if group and size + cost > limit:
            yield group
            group, values, size = [], set(), 0
            new = {_read(product) for product in site.products}
            cost = 8 * site.shape[1] ** 2 * len(new)
        group.append(site)
        values |= new
        size += cost
    if group:
        yield group


def _tapped(model: OnnxModel, values: Sequence[str]) -> ModelProto:
    """The model with these values among its outputs."""
    made = copy_without_graph(model.proto)
    copy_graph_frame(model.graph, made.graph)
    made.graph.node.extend(model.graph.node)
    made.graph.initializer.extend(model.graph.initializer)
    made.graph.value_info.extend(model.graph.value_info)
    known = model.outputs | {value.name for value in model.graph.input}
    made.graph.output.extend(ValueInfoProto(name=value) for value in values if value not in known)
    return made


def _rows(array: object, keep: Tensor | None, *, turned: bool) -> Tensor:
    activation = to_torch(np.asarray(array))
    if activation is None:
        raise DataError(f"an activation is of a type that cannot be measured: {type(array)}.")
    if turned:
        activation = activation.mT
    if keep is not None and activation.ndim == 2 and activation.shape[0] == keep.numel():
        return activation[keep.reshape(-1)]  # all tokens of all rows, one under the other
    return real_rows(activation, keep)


def _sum(moments: Iterable[CrossMoment]) -> CrossMoment:
    total = CrossMoment()
    for moment in moments:
        total.merge(moment)
    return total
