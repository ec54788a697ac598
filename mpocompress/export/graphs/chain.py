"""A chain of cores as nodes of an ONNX graph: the contraction plan of the layers, written out.

As in what torch's exporter makes of an `MPOLinear`: MatMul and Reshape on tensors of rank 3 at
most, each core stored as the matrix that its product takes, so that no constant is transposed.
"""

# Shape suffixes: L left bond, O out, I in, R right bond.

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor

from mpocompress.export.graphs.tensors import ONNX_FLOATS, from_torch
from mpocompress.mpo import MPO, plan_contractions
from mpocompress.mpo.contract import Step


class GraphBuilder:
    """New nodes and tensors of a graph, with names that nothing else in it has."""

    def __init__(self, taken: Sequence[str] | frozenset[str]) -> None:
        self._taken = set(taken)
        self._constants: dict[tuple[str, tuple[int, ...]], str] = {}
        self.tensors: list[TensorProto] = []
        self.nodes: list[NodeProto] = []

    def free(self, wanted: str) -> str:
        """A name like the wanted one that is not taken; it is now."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def store(self, tensor: Tensor, wanted: str) -> str:
        """Add a tensor; its name."""
        name = self.free(wanted)
        self.tensors.append(from_torch(tensor, name))
        return name

    def integers(self, values: Sequence[int], what: str) -> str:
        """A tensor of int64, one for all that ask for the same numbers; its name."""
        key = (what, tuple(values))
        if key not in self._constants:
            text = "x".join(str(value).replace("-1", "any") for value in values)
            name = self.free(f"mpo.{what}.{text}")
            self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
            self._constants[key] = name
        return self._constants[key]

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        place: str,
        output: str | None = None,
        **attributes: object,
    ) -> str:
        """Add a node named after a place; the name of its output."""
        name = self.free(f"{place}/{op_type}")
        made = output or self.free(f"{name}_output")
        self.nodes.append(
            onnx.helper.make_node(op_type, list(inputs), [made], name=name, **attributes)
        )
        return made

    def take(self) -> list[NodeProto]:
        """The nodes since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes


class Chain:
    """The cores of one weight, stored once for all of its products."""

    def __init__(
        self, builder: GraphBuilder, mpo: MPO, name: str, operand_dtype: torch.dtype
    ) -> None:
        """Store the cores.

        Args:
            builder: of the graph.
            mpo: in the dtype that is stored.
            name: of the weight; cores are called `<name>.cores.<site>`.
            operand_dtype: of the activations; cores of another dtype are cast.
        """
        self._builder = builder
        self._mpo = mpo
        self._name = name
        self._operand_dtype = operand_dtype
        layout = mpo.layout
        self._steps = plan_contractions(layout.out_dims, layout.in_dims, mpo.bond_dims).chain.steps
        self._matrices = [
            builder.store(_matrix(mpo.cores[step.group], step), f"{name}.cores.{step.group}")
            for step in self._steps
        ]
        self._cast = ONNX_FLOATS[operand_dtype] if operand_dtype != mpo.dtype else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self._operand_dtype

    def _operands(self) -> list[str]:
        if self._cast is None:
            return self._matrices
        place = f"{self._name}.cores"
        return [
            self._builder.node("Cast", [matrix], place, to=self._cast) for matrix in self._matrices
        ]

    def apply(
        self, value: str, place: str, lead: Sequence[int | None] | None, output: str | None = None
    ) -> str:
        """Add the nodes that multiply by the weight: (..., in) to (..., out).

        Args:
            value: name of the input.
            place: what the nodes are named after.
            lead: sizes of its dimensions but the last, None for an open one; None if not known.
            output: name of the result.

        Returns:
            The name of the result.
        """
        builder = self._builder
        out_features, in_features = self._mpo.shape
        padded_out, padded_in = self._mpo.layout.out_features, self._mpo.layout.in_features
        operands = self._operands()
        state = value
        # Size of the last dimension where the leading ones have been folded into one; 0 where the
        # state has more than two dimensions, None before anything is folded.
        width: int | None = None
        if padded_in > in_features:
            state = self._reshape(state, [-1, in_features], place)
            pads = builder.integers([0, 0, 0, padded_in - in_features], "pads")
            state, width = builder.node("Pad", [state, pads], place), padded_in
        for step, matrix in zip(self._steps, operands, strict=True):
            if step.columns == 1:
                # Without repetition an ordinary product, for any leading dimensions.
                if width is not None or step.rows != 1:
                    if width != step.contracted:
                        state = self._reshape(state, [-1, step.contracted], place)
                    width = step.produced
                state = builder.node("MatMul", [state, matrix], place)
            else:
                shape = [-1, step.contracted, step.columns]
                state, width = self._reshape(state, shape, place), 0
                state = builder.node("MatMul", [matrix, state], place)
        if padded_out > out_features:
            if width not in (None, padded_out):
                state, width = self._reshape(state, [-1, padded_out], place), padded_out
            start, end, axis = (builder.integers([n], "index") for n in (0, out_features, -1))
            state = builder.node("Slice", [state, start, end, axis], place)
            width = None if width is None else out_features
        if width is not None and not (
            width == out_features and lead is not None and len(lead) == 1
        ):
            state = self._unfold(state, value, place, lead)
        if output is not None:
            builder.nodes[-1].output[0] = state = output
        return state

    def _reshape(self, state: str, shape: Sequence[int], place: str) -> str:
        sizes = self._builder.integers(shape, "shape")
        return self._builder.node("Reshape", [state, sizes], place)

    def _unfold(self, state: str, value: str, place: str, lead: Sequence[int | None] | None) -> str:
        """Give the result the leading dimensions of the input."""
        builder, out_features = self._builder, self._mpo.shape[0]
        if lead is not None and sum(size is None for size in lead) <= 1 and 0 not in lead:
            sizes = [-1 if size is None else size for size in lead]
            return self._reshape(state, [*sizes, out_features], place)
        start, end = builder.integers([0], "index"), builder.integers([-1], "index")
        whole = builder.node("Shape", [value], place)
        rows = builder.node("Slice", [whole, start, end], place)
        last = builder.integers([out_features], "index")
        shape = builder.node("Concat", [rows, last], place, axis=0)
        return builder.node("Reshape", [state, shape], place)


def _matrix(core_LOIR: Tensor, step: Step) -> Tensor:
    """The core as the matrix of its product, on the right of the state where it has no columns."""
    rest = tuple(axis for axis in range(4) if axis not in step.order)
    matrix = core_LOIR.permute(*step.order, *rest).reshape(step.produced, step.contracted)
    return matrix.mT if step.columns == 1 else matrix
