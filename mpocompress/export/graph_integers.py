"""Initializers that are stored as integers: the nodes that make floats of them at the load.

Integers of 4 and 8 bits have types of their own in the format; others are cut into bit fields that
fill bytes. Everything here depends on stored tensors only, so ONNX Runtime folds it when a session
starts.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mpocompress.mpo.integers import Stored, StoredHalf, StoredIntegers, StoredRows, planes

_FLOAT, _INT32 = 1, 6  # of onnx.TensorProto


def store_integers(
    model: ir.Model, integers: Mapping[str, Stored], first_names: Mapping[str, str]
) -> None:
    """Replace float initializers by integers, scales, and the nodes that multiply them, in place.

    Args:
        model: its initializers carry the prefix of parameters.
        integers: by first name of the parameter.
        first_names: see `graph.rename`.
    """
    from mpocompress.export.graph import PARAMETER_PREFIX

    first: list[ir.Node] = []
    for value in tuple(model.graph.initializers.values()):
        name = str(value.name)
        own = name.removeprefix(PARAMETER_PREFIX)
        first_name = first_names.get(own, own)
        stored = integers.get(first_name)
        if stored is None or own == name:
            continue
        nodes = _nodes(model, f"{PARAMETER_PREFIX}{first_name}", stored)
        result = nodes[-1].outputs[0]
        shape = stored.values.shape if isinstance(stored, StoredHalf) else stored.shape
        result.shape, result.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(result)
        model.graph.initializers.pop(name)
        first += nodes
    start = next(iter(model.graph))
    for node in first:
        model.graph.insert_before(start, node)


class _Nodes:
    """Nodes in their order, and the initializers that they read, under names of one parameter."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self.made: list[ir.Node] = []
        self._model, self._name = model, name

    def constant(self, array: np.ndarray, suffix: str) -> ir.Value:
        """A named initializer; "int4" is packed by the format."""
        four = suffix.endswith("int4")
        name = f"{self._name}.{suffix}"
        tensor = ir.Tensor(
            array.astype(ml_dtypes.int4) if four else array,
            dtype=ir.DataType.INT4 if four else None,
            name=name,
        )
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._model.graph.initializers[name] = value
        return value

    def node(self, operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """The output of a new node."""
        made = ir.node(operator, list(inputs), attributes or None)
        self.made.append(made)
        return made.outputs[0]

    def small(self, array: np.ndarray) -> ir.Value:
        """A nameless constant."""
        return self.node("Constant", value=ir.tensor(array))

    def sizes(self, *numbers: int) -> ir.Value:
        """A shape."""
        return self.small(np.array(numbers, dtype=np.int64))


def _nodes(model: ir.Model, name: str, stored: Stored) -> list[ir.Node]:
    graph = _Nodes(model, name)
    if isinstance(stored, StoredRows):
        parts = [_matrix(graph, part, f"rows{k}.") for k, part in enumerate(stored.parts)]
        whole = graph.node("Concat", *parts, axis=0)
        result = graph.node("Gather", whole, _places(graph, stored), axis=0)
    else:
        result = _matrix(graph, stored, "")
    shape = stored.values.shape if isinstance(stored, StoredHalf) else stored.shape
    graph.node("Reshape", result, graph.sizes(*shape))
    return graph.made


def _places(graph: _Nodes, stored: StoredRows) -> ir.Value:
    """Two bytes a row where they are enough."""
    places = stored.places.numpy()
    if len(places) > 1 << 16:
        return graph.constant(places, "places")
    return graph.node("Cast", graph.constant(places.astype(np.uint16), "places"), to=_INT32)


def _matrix(graph: _Nodes, stored: StoredIntegers | StoredHalf, prefix: str) -> ir.Value:
    if isinstance(stored, StoredHalf):
        half = graph.constant(stored.values.numpy(), f"{prefix}float16")
        return graph.node("Cast", half, to=_FLOAT)
    rows, columns = stored.values.shape
    blocks = stored.scales.shape[1]
    if stored.bits in (4, 8):
        kind = f"{prefix}int{stored.bits}"
        values = graph.node("Cast", graph.constant(stored.values.numpy(), kind), to=_FLOAT)
    else:
        values = _unpacked(graph, stored, prefix)
    scales = graph.constant(stored.scales.numpy(), f"{prefix}scales")
    if stored.scales.element_size() < 4:
        scales = graph.node("Cast", scales, to=_FLOAT)
    if blocks > 1:
        scales = graph.node("Reshape", scales, graph.sizes(rows, blocks, 1))
        scales = graph.node("Expand", scales, graph.sizes(rows, blocks, stored.block))
        scales = graph.node("Reshape", scales, graph.sizes(rows, -1))
        if blocks * stored.block > columns:
            scales = _columns(graph, scales, columns)
    result = graph.node("Mul", values, scales)
    return graph.node("Transpose", result, perm=[1, 0]) if stored.transposed else result


def _unpacked(graph: _Nodes, stored: StoredIntegers, prefix: str) -> ir.Value:
    """The integers with their offset as floats, from bit fields in bytes.

    A byte holds 8 / width fields, the first one lowest; the rows are filled up to whole bytes.
    """
    rows, columns = stored.values.shape
    fields, below = [], stored.bits
    unsigned = stored.values.numpy().astype(np.int16) + (1 << (stored.bits - 1))
    for width in planes(stored.bits):
        below -= width
        packed = pack_fields((unsigned >> below) & ((1 << width) - 1), width)
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        value = graph.constant(packed, f"{prefix}bits{width}")
        value = graph.node("Reshape", value, graph.sizes(rows, -1, 1))
        value = graph.node("BitShift", value, graph.small(shifts), direction="RIGHT")
        mask = np.array((1 << width) - 1, dtype=np.uint8)
        value = graph.node("BitwiseAnd", value, graph.small(mask))
        if below:
            up = graph.small(np.array(below, dtype=np.uint8))
            value = graph.node("BitShift", value, up, direction="LEFT")
        value = graph.node("Reshape", value, graph.sizes(rows, -1))
        if packed.shape[1] * len(shifts) > columns:
            value = _columns(graph, value, columns)
        fields.append(value)
    whole = fields[0] if len(fields) == 1 else graph.node("BitwiseOr", *fields)
    middle = np.array((1 << (stored.bits - 1)) - stored.offset, dtype=np.float32)
    return graph.node("Sub", graph.node("Cast", whole, to=_FLOAT), graph.small(middle))


def pack_fields(values: np.ndarray, width: int) -> np.ndarray:
    """Unsigned integers below 2^width, (X, Y), as bytes (X, ceil(Y * width / 8)), uint8."""
    each = 8 // width
    rows, columns = values.shape
    filled = np.zeros((rows, -(-columns // each) * each), dtype=np.uint8)
    filled[:, :columns] = values
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return (filled.reshape(rows, -1, each) << shifts).sum(-1, dtype=np.uint8)


def _columns(graph: _Nodes, value: ir.Value, columns: int) -> ir.Value:
    return graph.node("Slice", value, graph.sizes(0), graph.sizes(columns), graph.sizes(1))
