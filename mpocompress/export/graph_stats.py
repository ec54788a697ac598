"""What an ONNX file contains: operators, weights, and the ranks of its tensors."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mpocompress.errors import LoadError
from mpocompress.export.calls import first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphStats:
    """Structure of an ONNX graph.

    Attributes:
        operators: how often each operator occurs, subgraphs included.
        ranks: number of dimensions of every tensor whose rank can be inferred, by name.
        initializers: shape of each stored tensor, by name.
        inputs: shape of each input, by name; text for a dynamic size, None for an unnamed one.
        outputs: shape of each output, likewise.
        opset: version of the default operator set.
    """

    operators: Mapping[str, int]
    ranks: Mapping[str, int]
    initializers: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int | str | None, ...]]
    outputs: Mapping[str, tuple[int | str | None, ...]]
    opset: int


def graph_stats(path: str | os.PathLike[str]) -> GraphStats:
    """Read the structure of an ONNX file; the data file of a large model is not needed.

    Raises:
        LoadError: the file cannot be read as ONNX.
    """
    import onnx
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    try:
        model = ir.serde.deserialize_model(onnx.load(path, load_external_data=False))
        passes.ShapeInferencePass()(model)
    except Exception as error:
        raise LoadError(
            f"{path} cannot be read as ONNX: {type(error).__name__}: {first_line(error)}."
        ) from error
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    outputs = [value for node in nodes for value in node.outputs]
    values = [*model.graph.inputs, *model.graph.initializers.values(), *outputs]
    return GraphStats(
        operators=Counter(node.op_type for node in nodes),
        ranks={str(v.name): len(v.shape) for v in values if v.shape is not None},
        initializers={
            name: tuple(int(size) for size in value.const_value.shape.numpy())
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        },
        inputs={str(value.name): _sizes(value) for value in model.graph.inputs},
        outputs={str(value.name): _sizes(value) for value in model.graph.outputs},
        opset=model.opset_imports.get("", 0),
    )


def _sizes(value: object) -> tuple[int | str | None, ...]:
    shape = getattr(value, "shape", None)
    return tuple(size if isinstance(size, int) else size.value for size in shape or ())
