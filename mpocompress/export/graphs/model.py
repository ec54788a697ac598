"""An ONNX model that somebody else wrote, as it stands in its file, and an index of its graph.

The model is kept as the protobuf message that the file holds, so that whatever this program does
not know (operators of other domains, functions, types such as the maps of scikit-learn's
classifiers, annotations) survives untouched.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from mpocompress.export.graphs.tensors import graphs_of, num_bytes

STANDARD = ("", "ai.onnx")
# Stored tensors that shapes may depend on, as targets of Reshape, are below it.
_SMALL_BYTES = 1024

# IR version since when stored tensors need not be inputs, as each of them is in older files. Such
# an input is a default since then, which a caller may replace.
FREE_INITIALIZERS = 4


@dataclass(frozen=True, slots=True)
class Consumer:
    """A node of the main graph that reads a value.

    Attributes:
        node: the node.
        position: index among its inputs; -1 if the value is read inside its subgraphs.
    """

    node: NodeProto
    position: int

    @property
    def label(self) -> str:
        """The node as text for a person."""
        where = " (inside its body)" if self.position < 0 else ""
        return f"{self.node.op_type} {label(self.node)!r}{where}"


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A model and the folder that its external data lies in.

    Attributes:
        proto: the message; external tensors are not loaded. Never changed.
        folder: of the file.
        name: of the file, for messages.
    """

    proto: ModelProto
    folder: Path
    name: str = "the model"

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.proto.graph

    @property
    def opset(self) -> int:
        """Version of the default operator set; 0 if none is imported."""
        found = [entry.version for entry in self.proto.opset_import if entry.domain in STANDARD]
        return max(found, default=0)

    @cached_property
    def stored(self) -> dict[str, TensorProto]:
        """Tensors of the main graph, initializers and Constant nodes, by the value's name."""
        found = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.domain in STANDARD:
                for attribute in node.attribute:
                    if attribute.name == "value":
                        found[node.output[0]] = attribute.t
        return found

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """The node of the main graph that computes a value, by the value's name."""
        return {name: node for node in self.graph.node for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[Consumer]]:
        """Who reads a value of the main graph, by the value's name."""
        found: dict[str, list[Consumer]] = defaultdict(list)
        for node in self.graph.node:
            for position, name in enumerate(node.input):
                if name:
                    found[name].append(Consumer(node, position))
            for name in sorted(set(_read_inside(node))):
                found[name].append(Consumer(node, -1))
        return dict(found)

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Names of the graph's outputs."""
        return frozenset(value.name for value in self.graph.output)

    @cached_property
    def inputs(self) -> tuple[ValueInfoProto, ...]:
        """Inputs that a caller must give: those without a stored value."""
        given = {tensor.name for tensor in self.graph.initializer}
        return tuple(value for value in self.graph.input if value.name not in given)

    @cached_property
    def defaults(self) -> frozenset[str]:
        """Names of inputs that a caller may give, but need not: such with a stored value."""
        if self.proto.ir_version < FREE_INITIALIZERS:
            return frozenset()
        given = {tensor.name for tensor in self.graph.initializer}
        return frozenset(value.name for value in self.graph.input if value.name in given)

    @cached_property
    def names(self) -> frozenset[str]:
        """All names of values, nodes and tensors that are taken."""
        taken = {value.name for value in (*self.graph.input, *self.graph.output)}
        taken |= set(self.stored) | set(self.producers)
        for node in self.graph.node:
            taken |= {node.name, *node.input, *_names_inside(node)}
        return frozenset(taken)

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Sizes of values as far as they follow from inputs and stored tensors.

        None for a dynamic size. Sizes that the file notes of other values are no source: nothing
        holds them to what the graph computes, and ONNX Runtime ignores them where they are wrong.
        """
        light = _without_data(self.proto)
        with suppress(Exception):  # a graph that runs need not pass: shapes only make ours simpler
            light = onnx.shape_inference.infer_shapes(light)
        graph = light.graph
        found = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            sizes = sizes_of(value)
            if sizes is not None:
                found[value.name] = tuple(size if isinstance(size, int) else None for size in sizes)
        return found


def sizes_of(value: ValueInfoProto) -> list[int | str | None] | None:
    """Sizes of a tensor of a graph; None for an open one, and for all where there is no shape.

    Some exporters write 0 or -1 for an open size.
    """
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [
        size.dim_value if size.dim_value > 0 else (size.dim_param or None)
        for size in value.type.tensor_type.shape.dim
    ]


def label(node: NodeProto) -> str:
    """A node's name, or that of its first output."""
    return node.name or next(iter(node.output), "")


def attribute(node: NodeProto, name: str, default: object) -> object:
    """The value of an attribute."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def _without_data(model: ModelProto) -> ModelProto:
    """A copy for inferring shapes anew.

    Stored tensors of more than a kilobyte have type and shape only, and the sizes of all values
    but them and the inputs are forgotten.
    """
    copy = copy_without_graph(model)
    copy_graph_frame(model.graph, copy.graph)
    copy.graph.node.extend(model.graph.node)
    _forget_sizes(copy)
    for tensor in model.graph.initializer:
        if num_bytes(tensor) <= _SMALL_BYTES and tensor.data_location != TensorProto.EXTERNAL:
            copy.graph.initializer.append(tensor)
        else:
            # An input carries the type just as well, and needs no data.
            if all(value.name != tensor.name for value in copy.graph.input):
                copy.graph.input.append(
                    onnx.helper.make_tensor_value_info(
                        tensor.name, tensor.data_type, list(tensor.dims)
                    )
                )
    return copy


def _forget_sizes(model: ModelProto) -> None:
    for number, graph in enumerate(graphs_of(model.graph)):
        del graph.value_info[:]
        for value in (*graph.output, *(graph.input if number else ())):
            value.type.tensor_type.ClearField("shape")
    for function in model.functions:
        del function.value_info[:]


def copy_without_graph(model: ModelProto) -> ModelProto:
    """All of a model but its graph."""
    copy = ModelProto()
    for descriptor, value in model.ListFields():
        if descriptor.name != "graph":
            _copy_field(copy, descriptor.name, value)
    return copy


def copy_graph_frame(graph: GraphProto, target: GraphProto) -> None:
    """All of a graph but nodes, stored tensors and descriptions of inner values."""
    for descriptor, value in graph.ListFields():
        if descriptor.name not in ("node", "initializer", "value_info"):
            _copy_field(target, descriptor.name, value)


def _copy_field(target: object, name: str, value: object) -> None:
    if hasattr(value, "extend"):
        getattr(target, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(target, name).CopyFrom(value)
    else:
        setattr(target, name, value)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for entry in node.attribute:
        if entry.type == AttributeProto.GRAPH:
            yield entry.g
        yield from entry.graphs


def _read_inside(node: NodeProto) -> Iterator[str]:
    """Names that the bodies of a node read; their own values included, which do no harm."""
    for body in _bodies(node):
        yield from (value.name for value in body.output)
        for inner in body.node:
            yield from filter(None, inner.input)
            yield from _read_inside(inner)


def _names_inside(node: NodeProto) -> Iterator[str]:
    for body in _bodies(node):
        yield from (value.name for value in (*body.input, *body.output))
        yield from (tensor.name for tensor in body.initializer)
        for inner in body.node:
            yield from (inner.name, *inner.input, *inner.output)
            yield from _names_inside(inner)
