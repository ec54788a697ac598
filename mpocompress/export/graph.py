"""Clean-up of the graph that torch's exporter writes: folding, names, and no traces of machines."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer

from mpocompress.export.graph_integers import store_integers
from mpocompress.mpo.integers import Stored

# The model is a submodule of the traced wrapper.
PARAMETER_PREFIX = "model."

# Operators that only give a constant another shape, when they keep its number of elements.
_RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})

# Between an input and the table that it looks up.
_PASSES_INDICES_ON = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand"})


def simplify(
    model: ir.Model,
    integers: Mapping[str, Stored] | None = None,
    first_names: Mapping[str, str] | None = None,
) -> None:
    """Optimize a freshly exported graph in place, leaving one initializer for each parameter.

    onnxscript's optimizer folds the arithmetic of shapes and fuses what it can. It is kept away
    from the parameters, which it would fold into nameless constants, of any size (a chain of cores
    into the dense matrix): `fold_parameter_views` folds what only rearranges them. It does not even
    see their values: it merges parameters that are equal, such as biases of zeros, and a file would
    grow as they come to differ.

    Args:
        model: the graph.
        integers: parameters that are stored as integers, by their first name in the model.
        first_names: see `rename`.
    """
    values = {v: v.const_value for v in model.graph.initializers.values() if _is_parameter(v)}
    for parameter in values:
        parameter.const_value = None
    optimizer.optimize_ir(
        model, should_fold=lambda node: False if any(map(_is_parameter, node.inputs)) else None
    )
    for parameter, value in values.items():
        parameter.const_value = value
    if integers:
        store_integers(model, integers, first_names or {})
    fold_parameter_views(model)
    passes.RemoveUnusedNodesPass()(model)


def fold_parameter_views(model: ir.Model) -> None:
    """Apply transpositions and reshapes of parameters to what is stored, in place.

    Only where all uses of a parameter want the same view of it: otherwise (a table of embeddings
    that also is the output layer's weight) the file would hold several copies, and the node is
    left to the runtime, which folds it when the session starts.
    """
    for value in tuple(model.graph.initializers.values()):
        if _is_parameter(value):
            while _fold_one_view(value):
                pass


def _fold_one_view(value: ir.Value) -> bool:
    nodes = [node for node, _ in value.uses()]
    views = {_view(node, value) for node in nodes}
    if len(views) != 1 or None in views:
        return False
    view = next(iter(views))
    stored = value.const_value
    if view is None or stored is None or any(n.outputs[0].is_graph_output() for n in nodes):
        return False
    axes, shape = view

    def rearranged() -> ir.Tensor:
        array = stored.numpy() if axes is None else stored.numpy().transpose(axes)
        return ir.Tensor(np.ascontiguousarray(array.reshape(shape)))

    # Evaluated when the file is written, one parameter at a time: no second copy of the model.
    value.const_value = ir.LazyTensor(
        rearranged, dtype=stored.dtype, shape=ir.Shape(shape), name=value.name
    )
    value.shape = ir.Shape(shape)
    for node in nodes:
        node.outputs[0].replace_all_uses_with(value)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    return True


def _view(node: ir.Node, value: ir.Value) -> tuple[tuple[int, ...] | None, tuple[int, ...]] | None:
    """Permutation of the axes (or None) and new shape that a node gives to an initializer."""
    old, new = _static_shape(value), _static_shape(node.outputs[0])
    if node.domain not in ("", "ai.onnx") or old is None or node.inputs[0] is not value:
        return None
    if node.op_type == "Transpose":
        attribute = node.attributes.get("perm")
        axes = tuple(attribute.as_ints()) if attribute else tuple(reversed(range(len(old))))
        return axes, tuple(old[axis] for axis in axes)
    if node.op_type in _RESHAPES and new is not None and prod(old) == prod(new):
        return None, new
    return None


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    shape = value.shape if value.const_value is None else value.const_value.shape
    if shape is None or not all(str(size).isdigit() for size in shape):
        return None
    return tuple(int(str(size)) for size in shape)


def _is_parameter(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and str(value.name).startswith(PARAMETER_PREFIX)
    )


def rename(
    model: ir.Model,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    first_names: Mapping[str, str],
) -> None:
    """Give inputs, outputs and parameters their names, in place; clashes get a suffix.

    Args:
        model: the graph; its parameters still carry `PARAMETER_PREFIX`.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        first_names: the name that a parameter with several names has first in the model, by name.
    """
    for value in _all_values(model):
        # Out of the way, whatever it was called: `NameFixPass` numbers the clashes.
        if value.name in {*inputs, *outputs}:
            value.name = f"{value.name}_value"
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    for value in tuple(model.graph.initializers.values()):
        if _is_parameter(value):
            name = str(value.name).removeprefix(PARAMETER_PREFIX)
            name = first_names.get(name, name)
            taken = {*inputs, *outputs, *model.graph.initializers}
            value.name = name if name not in taken else f"{name}_parameter"
    passes.NameFixPass()(model)


def strip(model: ir.Model) -> None:
    """Remove doc strings, metadata (stack traces with paths) and shapes of inner values, in place.

    Shapes of inner values are the tracer's: with its own names of sizes, they would only repeat
    what shape inference finds, or contradict it.
    """
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    passes.ClearMetadataAndDocStringPass()(model)
    for value in _all_values(model):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            if value.const_value.doc_string:  # which tensors read from a file cannot change
                value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
            value.const_value.metadata_props.clear()
        if not (value.is_graph_output() or value.is_graph_input()):
            value.shape = None
            value.type = None


def name_sizes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Rename symbolic sizes of inputs and outputs in place; sizes computed from them lose theirs.

    Args:
        model: the graph.
        names: new names by old ones.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(str(size), names) for size in value.shape])


def _renamed(size: str, names: Mapping[str, str]) -> int | str | None:
    # A size that was fixed while the model was traced is a symbol called "784".
    return int(size) if size.isdigit() else names.get(size)


def table_sizes(model: ir.Model) -> dict[str, int]:
    """How many rows the tables have that integer inputs look up (the vocabulary), by input."""
    found: dict[str, int] = {}
    for graph_input in model.graph.inputs:
        bounds = list(_looked_up(graph_input))
        if bounds and graph_input.dtype is not None and graph_input.dtype.is_integer():
            found[str(graph_input.name)] = min(bounds)
    return found


def _looked_up(value: ir.Value) -> Iterator[int]:
    for node, position in value.uses():
        table = node.inputs[0]
        if node.op_type == "Gather" and position == 1 and table is not None:
            axis = node.attributes.get("axis")
            shape = _static_shape(table)
            if shape is not None:
                yield shape[axis.as_int() if axis else 0]
        elif node.op_type in _PASSES_INDICES_ON and position == 0:
            yield from _looked_up(node.outputs[0])


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from tuple(model.graph.initializers.values())
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                body = attribute.as_graph()
                yield from body.inputs
                yield from tuple(body.initializers.values())
