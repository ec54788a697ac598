"""Initializers that are stored as integers: the nodes that make floats of them at the load."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mpocompress.export.integers import StoredIntegers


def store_integers(
    model: ir.Model, integers: Mapping[str, StoredIntegers], first_names: Mapping[str, str]
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
        result.shape, result.type = ir.Shape(stored.shape), ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(result)
        model.graph.initializers.pop(name)
        first += nodes
    start = next(iter(model.graph))
    for node in first:
        model.graph.insert_before(start, node)


def _nodes(model: ir.Model, name: str, stored: StoredIntegers) -> list[ir.Node]:
    nodes: list[ir.Node] = []

    def constant(array: np.ndarray, suffix: str) -> ir.Value:
        four = suffix == "int4"
        tensor = ir.Tensor(
            array.astype(ml_dtypes.int4) if four else array,
            dtype=ir.DataType.INT4 if four else None,
            name=f"{name}.{suffix}",
        )
        value = ir.Value(
            name=f"{name}.{suffix}",
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        model.graph.initializers[str(value.name)] = value
        return value

    def node(operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        made = ir.node(operator, list(inputs), attributes or None)
        nodes.append(made)
        return made.outputs[0]

    def sizes(*numbers: int) -> ir.Value:
        return node("Constant", value=ir.tensor(np.array(numbers, dtype=np.int64)))

    rows, columns = stored.values.shape
    blocks = stored.scales.shape[1]
    values = node("Cast", constant(stored.values.numpy(), f"int{stored.bits}"), to=1)
    scales = constant(stored.scales.numpy(), "scales")
    if stored.scales.element_size() < 4:
        scales = node("Cast", scales, to=1)
    if blocks > 1:
        scales = node("Reshape", scales, sizes(rows, blocks, 1))
        scales = node("Expand", scales, sizes(rows, blocks, stored.block))
        scales = node("Reshape", scales, sizes(rows, -1))
        if blocks * stored.block > columns:
            scales = node("Slice", scales, sizes(0), sizes(columns), sizes(1))
    result = node("Mul", values, scales)
    if stored.transposed:
        result = node("Transpose", result, perm=[1, 0])
    node("Reshape", result, sizes(*stored.shape))
    return nodes
