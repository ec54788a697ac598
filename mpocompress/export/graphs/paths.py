"""From a stored tensor to the matrix that a product uses: transposed, cast, dequantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from mpocompress.errors import LoadError
from mpocompress.export.graphs.model import STANDARD, OnnxModel, attribute
from mpocompress.export.graphs.tensors import embed, read_array

# What may stand between a stored tensor (always input 0) and the product that it is a weight of.
_MOVES = frozenset({"Identity", "Transpose"})
_CHANGES = frozenset({"Cast", "DequantizeLinear", "Reshape"})


@dataclass(frozen=True, slots=True, eq=False)
class WeightPath:
    """How a stored tensor becomes an operand.

    Attributes:
        stored: name of the tensor.
        nodes: from the tensor to the operand; empty if it is used as it is stored.
    """

    stored: str
    nodes: tuple[NodeProto, ...]

    @property
    def operand(self) -> str:
        """Name of the value that the product reads."""
        return str(self.nodes[-1].output[0]) if self.nodes else self.stored

    def flips(self, model: OnnxModel) -> bool:
        """Whether rows and columns change places behind all that depends on which is which."""
        behind = self.nodes[self._bound(model) :]
        return sum(map(_swaps, behind)) % 2 == 1

    @property
    def turns(self) -> bool:
        """Whether rows and columns have changed places on the way; never across a Reshape."""
        if any(node.op_type == "Reshape" for node in self.nodes):
            return False
        return sum(_swaps(node) for node in self.nodes) % 2 == 1

    @property
    def reorders(self) -> bool:
        """Whether a Reshape mixes what a Transpose has put into another order."""
        kinds = {node.op_type for node in self.nodes}
        return {"Reshape", "Transpose"} <= kinds

    def signature(self, model: OnnxModel) -> tuple[bytes, ...]:
        """Equal for paths that give the same numbers, but for what `flips` says."""
        bound = self._bound(model)
        return tuple(
            _signature(node)
            for position, node in enumerate(self.nodes)
            if position < bound or node.op_type in _CHANGES
        )

    def _bound(self, model: OnnxModel) -> int:
        """Number of nodes up to the last one that a Transpose may not be moved across."""
        return max(
            (n for n, node in enumerate(self.nodes, 1) if _sees_axes(node, model)), default=0
        )

    def helpers(self, model: OnnxModel) -> frozenset[str]:
        """The other stored tensors on the way: scales, zero points, shapes."""
        return frozenset(
            name for node in self.nodes for name in node.input[1:] if name in model.stored
        )

    def describe(self) -> str:
        """The operators on the way, for messages."""
        return ", ".join(node.op_type for node in self.nodes)


def continues(node: NodeProto, position: int, model: OnnxModel) -> bool:
    """Whether a node takes a constant at this input and only rearranges, casts or scales it."""
    return (
        position == 0
        and node.domain in STANDARD
        and node.op_type in _MOVES | _CHANGES
        and len(node.output) == 1
        and all(name in model.stored for name in node.input[1:] if name)
    )


def operand_shape(model: OnnxModel, path: WeightPath) -> tuple[int, ...] | None:
    """Sizes of the operand; None if nodes on the way do not fit the tensor."""
    shape = tuple(model.stored[path.stored].dims)
    for node in path.nodes:
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", None)
            axes = tuple(perm) if isinstance(perm, Sequence) else tuple(reversed(range(len(shape))))
            if sorted(axes) != list(range(len(shape))):
                return None
            shape = tuple(shape[axis] for axis in axes)
        elif node.op_type == "Reshape":
            wanted = read_array(model.stored[node.input[1]], model.folder).reshape(-1).tolist()
            found = _reshaped(shape, wanted, keeps_zeros=bool(attribute(node, "allowzero", 0)))
            if found is None:
                return None
            shape = found
    return shape


def _reshaped(
    shape: tuple[int, ...], wanted: Sequence[int], *, keeps_zeros: bool
) -> tuple[int, ...] | None:
    """The shape that a Reshape gives: 0 stands for the size in its place, -1 for what is left."""
    sizes = list(wanted)
    for axis, size in enumerate(sizes):
        if size == 0 and not keeps_zeros:
            if axis >= len(shape):
                return None
            sizes[axis] = shape[axis]
    if sizes.count(-1) == 1:
        others = prod(size for size in sizes if size != -1)
        if others < 1:
            return None
        sizes[sizes.index(-1)] = prod(shape) // others
    return tuple(sizes) if min(sizes, default=0) >= 0 and prod(sizes) == prod(shape) else None


def operand_type(model: OnnxModel, path: WeightPath) -> int:
    """ONNX code of the operand's dtype."""
    kind: int = model.stored[path.stored].data_type
    for node in path.nodes:
        if node.op_type == "Cast":
            to = attribute(node, "to", kind)
            kind = to if isinstance(to, int) else kind
        elif node.op_type == "DequantizeLinear":
            wanted = attribute(node, "output_dtype", 0)
            kind = wanted if isinstance(wanted, int) and wanted else 0
            kind = kind or model.stored[node.input[1]].data_type
    return kind


def read_operand(model: OnnxModel, path: WeightPath) -> np.ndarray:
    """The numbers of the operand.

    Transposing is done here, on the mapped data; everything else by ONNX Runtime itself.

    Raises:
        LoadError: the data cannot be read, or ONNX Runtime refuses the nodes on the way.
    """
    if all(node.op_type in _MOVES for node in path.nodes):
        array = read_array(model.stored[path.stored], model.folder)
        for node in path.nodes:
            if node.op_type == "Transpose":
                perm = attribute(node, "perm", None)
                array = array.transpose(perm if isinstance(perm, Sequence) else None)
        return array
    return _evaluate(model, path)


def _evaluate(model: OnnxModel, path: WeightPath) -> np.ndarray:
    import onnxruntime

    small = ModelProto(ir_version=model.proto.ir_version)
    small.opset_import.extend(model.proto.opset_import)
    small.graph.name = "constant"
    for name in (path.stored, *sorted(path.helpers(model))):
        tensor = small.graph.initializer.add()
        tensor.CopyFrom(model.stored[name])
        tensor.name = name
        embed(tensor, model.folder)
    small.graph.node.extend(path.nodes)
    small.graph.output.append(
        onnx.helper.make_tensor_value_info(path.operand, operand_type(model, path), None)
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            small.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found: np.ndarray = session.run_with_ort_values(None, {})[0].numpy()
    except Exception as error:
        raise LoadError(
            f"the weight {path.stored!r} behind {path.describe()} cannot be evaluated: {error}"
        ) from error
    return found


def _sees_axes(node: NodeProto, model: OnnxModel) -> bool:
    """Whether a node does something else to rows than to columns."""
    if node.op_type == "DequantizeLinear":
        return prod(model.stored[node.input[1]].dims) != 1
    return node.op_type == "Reshape"


def _swaps(node: NodeProto) -> bool:
    """Whether a node transposes a matrix."""
    perm = attribute(node, "perm", None)
    return node.op_type == "Transpose" and (not isinstance(perm, Sequence) or list(perm) == [1, 0])


def _signature(node: NodeProto) -> bytes:
    """A node without its name and without what it reads first and writes."""
    bare = NodeProto()
    bare.CopyFrom(node)
    bare.name = ""
    bare.doc_string = ""
    bare.input[0] = ""
    bare.output[0] = ""
    del bare.metadata_props[:]
    return bytes(bare.SerializeToString(deterministic=True))
