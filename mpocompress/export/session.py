"""ONNX files in ONNX Runtime: opening one, what its inputs look like, feeding batches to it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpocompress.errors import DataError, LoadError
from mpocompress.export import inputs
from mpocompress.export.calls import Slot, first_line
from mpocompress.export.inputs import INPUTS_KEY, InputSpec

# ONNX Runtime's names of the dtypes that PyTorch has, too.
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def open_session(path: Path, *, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        path: the file.
        threads: within one operator; default: as many as PyTorch uses.

    Raises:
        LoadError: there is no such file, or ONNX Runtime does not take it.
    """
    import onnxruntime

    if not path.is_file():
        raise LoadError(f"{path}: there is no such file. Export the model first.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: warnings are about optimizations
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LoadError(
            f"ONNX Runtime cannot open {path}: {first_line(error)}. Export the model again."
        ) from error


def described_inputs(
    session: Any, path: Path, *, arguments: frozenset[str] | None = None
) -> tuple[tuple[InputSpec, ...], tuple[tuple[Slot, Any], ...]]:
    """What a file says of its inputs, and the constant arguments that it was exported with.

    Args:
        session: of the file.
        path: of the file.
        arguments: names that a model's `forward` has, for a file that somebody else wrote: where
            it uses the same ones, its inputs are these, and otherwise they go by order. None if
            there is no model: by name.

    Raises:
        LoadError: an input of a type that PyTorch does not have, or damaged metadata.
    """
    metadata = session.get_modelmeta().custom_metadata_map
    if INPUTS_KEY in metadata:
        return inputs.from_json(metadata[INPUTS_KEY])
    return tuple(_guessed_specs(session, path, arguments)), ()


def _guessed_specs(
    session: Any, path: Path, arguments: frozenset[str] | None
) -> Iterator[InputSpec]:
    tables = _table_sizes(path)
    values = session.get_inputs()
    by_name = arguments is None or {value.name for value in values} <= arguments
    for position, value in enumerate(values):
        if value.type not in DTYPES:
            raise LoadError(
                f"{path}: input {value.name!r} is a {value.type}, which PyTorch cannot "
                f"feed. Possible are {', '.join(DTYPES)}."
            )
        yield inputs.guessed_spec(
            value.name,
            value.name if by_name else position,
            DTYPES[value.type],
            value.shape,
            tables.get(value.name),
        )


def _table_sizes(path: Path) -> dict[str, int]:
    """See `table_sizes`; none where the library for graphs does not read what ONNX Runtime runs."""
    import onnx
    import onnx_ir as ir

    from mpocompress.export.graph import table_sizes

    proto = onnx.load(path, load_external_data=False)
    # The library knows neither maps nor sequences of them, as scikit-learn's classifiers return.
    for values in (proto.graph.output, proto.graph.value_info):
        tensors = [value for value in values if value.type.HasField("tensor_type")]
        del values[:]
        values.extend(tensors)
    try:
        return table_sizes(ir.serde.deserialize_model(proto))
    except Exception:  # they only make inputs that are made up better
        return {}


def arrays_of(value: object) -> list[np.ndarray]:
    """The numbers of an output: a tensor, or a sequence of tensors or of maps from classes."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [np.array(list(value.values()))]
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return [np.array([list(row.values()) for row in value])]
        return [array for entry in value for array in arrays_of(entry)]
    return [] if value is None else [np.asarray(value)]


def named_arrays(names: Sequence[str], values: Sequence[object]) -> dict[str, np.ndarray]:
    """The arrays of several outputs; those of a sequence have their positions behind its name."""
    found: dict[str, np.ndarray] = {}
    for name, value in zip(names, values, strict=True):
        arrays = arrays_of(value)
        one = not isinstance(value, list) or (value and isinstance(value[0], dict))
        for position, array in enumerate(arrays):
            found[name if one else f"{name}.{position}"] = array
    return found


class OnnxFile:
    """An ONNX file that is fed with arrays by name, without the model that it came from.

    Args:
        path: the file.
        threads: see `open_session`.

    Raises:
        LoadError: see `open_session` and `described_inputs`.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.session = open_session(self.path, threads=threads)
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        self.specs, self.constants = described_inputs(self.session, self.path)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    def feed(self, arrays: Mapping[Slot, Tensor], *, other: Sequence[str] = ()) -> dict[str, Any]:
        """The arrays as this file's inputs.

        Args:
            arrays: by name (of the input, or of the argument that it is) or by position.
            other: names that may be left over, because somebody else takes them.

        Raises:
            DataError: an input has no array, an array no input, or a shape or dtype does not fit.
        """
        found: dict[str, Any] = {}
        left = dict(arrays)
        sizes: dict[str, int] = {}
        for position, spec in enumerate(self.specs):
            key = next((k for k in (spec.name, spec.slot, position) if k in left), None)
            if key is None:
                raise DataError(
                    f"{self.path} needs {spec.describe()}, but the data has "
                    f"{', '.join(map(repr, arrays))}. Name the arrays like its inputs."
                )
            found[spec.name] = self._checked(spec, left.pop(key), sizes)
        spare = [str(key) for key in left if str(key) not in other]
        if spare:
            raise DataError(
                f"the data has {', '.join(map(repr, spare))}, which {self.path} does not take; its "
                f"inputs are {'; '.join(spec.describe() for spec in self.specs)}."
            )
        return found

    def _checked(self, spec: InputSpec, tensor: Tensor, sizes: dict[str, int]) -> np.ndarray:
        fits = tensor.ndim == len(spec.shape) and all(
            sizes.setdefault(size, actual) == actual if isinstance(size, str) else size == actual
            for size, actual in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.is_floating_point() != spec.dtype.startswith("float"):
            raise DataError(
                f"{self.path} takes {spec.describe()}, but the data has "
                f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}. Pass tensors "
                "of that dtype and shape."
            )
        return tensor.to("cpu", spec.torch_dtype).numpy()

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name; see `named_arrays`.

        Raises:
            DataError: ONNX Runtime does not run on this.
        """
        try:
            values = self.session.run(None, feed)
        except Exception as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
            raise DataError(
                f"ONNX Runtime does not run {self.path} on {shapes}: {first_line(error)}."
            ) from error
        return named_arrays(self.outputs, values)

    def made_up(
        self, rows: int, generator: torch.Generator, sizes: Mapping[str, int] | None = None
    ) -> dict[Slot, Tensor]:
        """Inputs of the right kind, by input name, with `rows` rows where the batch is open.

        Args:
            rows: size of dimension 0 where it is open.
            generator: source of randomness.
            sizes: of other open dimensions, by name; default: those of the export's example.
        """
        wanted = dict(sizes or {})
        for spec in self.specs:
            if spec.shape and isinstance(spec.shape[0], str):
                wanted[spec.shape[0]] = rows
        tensors = inputs.random_tensors(self.specs, wanted, generator)
        return {spec.name: tensor for spec, tensor in zip(self.specs, tensors, strict=True)}
