"""ONNX Runtime sessions of graphs, and what they take: feeds from batches, and made-up ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from mpocompress.errors import DataError, LoadError
from mpocompress.export.calls import first_line
from mpocompress.export.graphs.model import OnnxModel, attribute, sizes_of
from mpocompress.export.graphs.tensors import FLOATS, from_torch
from mpocompress.export.inputs import (
    InputSpec,
    guessed_spec,
    other_conventions,
    random_tensors,
)

Feed = dict[str, np.ndarray]

_DTYPES = {
    **{code: str(dtype).removeprefix("torch.") for code, dtype in FLOATS.items()},
    **{
        getattr(TensorProto, name.upper()): name
        for name in ("int64", "int32", "int16", "int8", "uint8", "bool")
    },
}
_PASSES_INDICES_ON = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand"})


class Session:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(self, graph: ModelProto | Path, folder: Path, name: str) -> None:
        """Open a session.

        Args:
            graph: a file, or a message whose external data lies in `folder`.
            folder: see there.
            name: of the model, for messages.

        Raises:
            LoadError: ONNX Runtime refuses the graph.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            if isinstance(graph, ModelProto):
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(folder.resolve())
                )
                source: bytes | str = graph.SerializeToString()
            else:
                source = str(graph)
            self._session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise LoadError(
                f"ONNX Runtime cannot run {name}: {first_line(error)}. Check the file with "
                "onnx.checker, or export it again."
            ) from error
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[object]:
        """The outputs asked for, or all.

        Raises:
            RuntimeError: whatever ONNX Runtime says.
        """
        found: list[object] = self._session.run(None if outputs is None else list(outputs), feed)
        return found


class GraphInputs:
    """What a graph takes, and feeds for it."""

    def __init__(self, model: OnnxModel, shapes: Sequence[tuple[int, ...]] = ()) -> None:
        """Read the inputs of a graph.

        Args:
            model: the graph.
            shapes: sizes to use for made-up feeds, one for each input in order.

        Raises:
            DataError: an input that is no tensor of numbers, or shapes that do not fit.
        """
        self.name = model.name
        specs = []
        for position, value in enumerate(model.inputs):
            code = value.type.tensor_type.elem_type
            if code not in _DTYPES:
                kind = value.type.WhichOneof("value") or "value without type"
                what = TensorProto.DataType.Name(code).lower() if code else kind
                raise DataError(
                    f"input {value.name!r} of {model.name} is of type {what}, which data cannot be "
                    "given for. Cut the graph behind it (onnx.utils.extract_model)."
                )
            spec = guessed_spec(
                value.name,
                position,
                _DTYPES[code],
                sizes_of(value) or (),
                _bound(model, value.name),
            )
            specs.append(spec)
        # Inputs of which not even the number of dimensions is known.
        self._open = {value.name for value in model.inputs if sizes_of(value) is None}
        if shapes:
            specs = [*self._shaped(specs, shapes)]
        self.specs = tuple(specs)

    def _shaped(
        self, specs: Sequence[InputSpec], shapes: Sequence[tuple[int, ...]]
    ) -> list[InputSpec]:
        if len(shapes) == len(specs):
            specs = [self._ranked(*pair) for pair in zip(specs, map(len, shapes), strict=True)]
        fits = len(shapes) == len(specs) and all(
            len(shape) == len(spec.shape)
            and all(
                isinstance(want, str) or want == size
                for want, size in zip(spec.shape, shape, strict=True)
            )
            for spec, shape in zip(specs, shapes, strict=False)
        )
        if not fits:
            given = ", ".join("x".join(map(str, shape)) for shape in shapes)
            raise DataError(
                f"shapes {given} do not fit {self.name}, which takes {self.describe(specs)}."
            )
        self._open = set()
        return [
            replace(spec, example_shape=shape) for spec, shape in zip(specs, shapes, strict=True)
        ]

    def _ranked(self, spec: InputSpec, rank: int) -> InputSpec:
        """The spec with so many open dimensions if nothing is known of them."""
        if spec.name not in self._open:
            return spec
        open_ = guessed_spec(spec.name, spec.slot, spec.dtype, [None] * rank, None)
        return replace(open_, high=spec.high)

    def check_ranks(self) -> None:
        """Refuse to make up what has no shape.

        Raises:
            DataError: an input has none, in the graph or in the shapes that were given.
        """
        if self._open:
            names = ", ".join(map(repr, sorted(self._open)))
            raise DataError(
                f"{self.name} does not say how many dimensions {names} has; it takes "
                f"{self.describe()}. Give --data, or the shape of each input as --input."
            )

    def describe(self, specs: Sequence[InputSpec] | None = None) -> str:
        """All inputs, for messages."""
        specs = self.specs if specs is None else specs
        described = (
            f"{spec.name!r}: {spec.dtype} of any shape"
            if spec.name in self._open
            else spec.describe()
            for spec in specs
        )
        return "; ".join(described) or "no inputs"

    @property
    def batch_symbols(self) -> frozenset[str]:
        """Names of the batch dimension; none if some input fixes it."""
        sizes = [spec.shape[0] for spec in self.specs if spec.shape]
        names = frozenset(size for size in sizes if isinstance(size, str))
        return names if all(size in names for size in sizes) else frozenset()

    def feed(self, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], place: str) -> Feed:
        """A batch as the graph takes it: arrays by the inputs' names, or by their order.

        Raises:
            DataError: missing or unknown names, or other dtypes or shapes than the graph's.
        """
        given = dict(zip((spec.name for spec in self.specs), args, strict=False)) | dict(kwargs)
        if len(args) > len(self.specs) or set(given) != {spec.name for spec in self.specs}:
            names = [*(f"argument {n}" for n in range(len(args))), *kwargs]
            raise DataError(
                f"{place} has {', '.join(names)}, but {self.name} takes {self.describe()}. Name "
                "the arrays after these inputs, or give them in this order as arr_0, arr_1, ..."
            )
        sizes: dict[str, int] = {}
        feed = {}
        for spec in self.specs:
            tensor = given[spec.name]
            fits = spec.name in self._open or (
                len(spec.shape) == tensor.ndim
                and all(
                    sizes.setdefault(want, size) == size if isinstance(want, str) else want == size
                    for want, size in zip(spec.shape, tensor.shape, strict=True)
                )
            )
            if not fits or tensor.is_floating_point() != spec.torch_dtype.is_floating_point:
                raise DataError(
                    f"{place}: {spec.name!r} is {str(tensor.dtype).removeprefix('torch.')} "
                    f"{tuple(tensor.shape)}, but {self.name} takes {spec.describe()}."
                )
            feed[spec.name] = _as_array(tensor.to(spec.torch_dtype))
        return feed

    def made_up(self, sizes: Mapping[str, int], generator: torch.Generator) -> Iterator[Feed]:
        """Random numbers of the right kind, with masks as `other_conventions` after the first."""
        for specs in (self.specs, *other_conventions(self.specs)):
            tensors = random_tensors(specs, sizes, generator)
            yield {
                spec.name: _as_array(tensor) for spec, tensor in zip(specs, tensors, strict=True)
            }


def _as_array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        array: np.ndarray = onnx.numpy_helper.to_array(from_torch(tensor, ""))
        return array
    return tensor.contiguous().numpy()


def _bound(model: OnnxModel, value: str) -> int | None:
    """Rows of the smallest table that a value looks up."""
    found: list[int | None] = []
    for consumer in model.consumers.get(value, ()):
        node = consumer.node
        table = model.stored.get(node.input[0]) if node.input else None
        if node.op_type == "Gather" and consumer.position == 1 and table is not None:
            axis = attribute(node, "axis", 0)
            found.append(int(table.dims[axis if isinstance(axis, int) else 0]))
        elif node.op_type in _PASSES_INDICES_ON and consumer.position == 0:
            found.append(_bound(model, node.output[0]))
    return min((rows for rows in found if rows is not None), default=None)
