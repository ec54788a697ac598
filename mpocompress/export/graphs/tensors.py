"""Tensors of an ONNX file: where their bytes lie, and reading them one at a time.

Data outside of the file (above 2 GB there is no other way) is mapped, never loaded as a whole. A
file may name any path for it; only paths that stay inside the file's own folder are followed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

from mpocompress.errors import LoadError

# Types of which several share a byte, in bits.
_PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}

FLOATS = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
ONNX_FLOATS = {dtype: code for code, dtype in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class External:
    """Where the bytes of a tensor lie outside of the ONNX file."""

    path: Path
    offset: int
    length: int


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        yield from _inner(node)


def _inner(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield from graphs_of(attribute.g)
        for graph in attribute.graphs:
            yield from graphs_of(graph)


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model stores, in graphs, subgraphs, functions and attributes."""
    yield from model.graph.initializer
    yield from inner_tensors_of(model)


def inner_tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model stores but the initializers of its main graph."""
    for number, graph in enumerate(graphs_of(model.graph)):
        if number:
            yield from graph.initializer
        yield from _attribute_tensors(graph.node)
    for function in model.functions:
        yield from _attribute_tensors(function.node)


def _attribute_tensors(nodes: object) -> Iterator[TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]  # a repeated field
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def num_bytes(tensor: TensorProto) -> int:
    """Bytes of the numbers, however they are stored; of strings, their characters."""
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    kind = TensorProto.DataType.Name(tensor.data_type)
    if kind in _PACKED_BITS:
        return ceil(prod(tensor.dims) * _PACKED_BITS[kind] / 8)
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return prod(tensor.dims) * itemsize


def flaw(tensor: TensorProto) -> str | None:
    """What is wrong with the description of a tensor, or None; the numbers are not looked at."""
    if tensor.data_type not in TensorProto.DataType.values() or not tensor.data_type:
        return f"has the unknown type {tensor.data_type}"
    if any(size < 0 for size in tensor.dims):
        return f"has the shape {tuple(tensor.dims)}"
    if tensor.HasField("raw_data") and num_bytes(tensor) > tensor.ByteSize():
        return f"has the shape {tuple(tensor.dims)}, for which its data is too short"
    return None


def is_external(tensor: TensorProto) -> bool:
    """Whether the bytes lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def external(tensor: TensorProto, folder: Path) -> External:
    """Where the bytes of an external tensor are, checked against the file system.

    Raises:
        LoadError: a path that leaves the folder, no such file, or one that is too short.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"tensor {tensor.name!r} has its data in {location!r}"
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if (
        not location
        or posix.is_absolute()
        or windows.drive
        or windows.root
        or ".." in windows.parts
        or not (folder / location).resolve().is_relative_to(folder.resolve())
    ):
        raise LoadError(
            f"{what}, which is not inside the model's folder. Nothing outside of it is read; copy "
            "the data file next to the model (links resolved: cp -L) and name it without folders."
        )
    path = folder / location
    if not path.is_file():
        raise LoadError(f"{what}, and there is no such file beside the model. Put it there.")
    expected = num_bytes(tensor)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or expected)
    except ValueError:
        raise LoadError(f"{what} at an offset that is no number. Export the model again.") from None
    size = path.stat().st_size
    if length != expected or offset < 0 or offset + length > size:
        raise LoadError(
            f"{what} at bytes {offset} to {offset + length}, but it needs {expected} bytes and the "
            f"file has {size}: it is truncated, or belongs to another model. Copy it again."
        )
    return External(path, offset, length)


def read_array(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The numbers; mapped (writing changes a private copy) if they lie outside of the file.

    Raises:
        LoadError: the data is not there, or does not fill the shape.
    """
    kind = TensorProto.DataType.Name(tensor.data_type)
    try:
        if not is_external(tensor):
            return numpy_helper.to_array(tensor)
        place = external(tensor, folder)
        if kind in _PACKED_BITS or not place.length:
            whole = TensorProto()
            whole.CopyFrom(tensor)
            embed(whole, folder)
            return numpy_helper.to_array(whole)
        return np.memmap(
            place.path,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
            mode="c",
            offset=place.offset,
            shape=tuple(tensor.dims),
        )
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(
            f"tensor {tensor.name!r} of shape {tuple(tensor.dims)} cannot be read: {error}. The "
            "file is damaged; copy or export it again."
        ) from error


def embed(tensor: TensorProto, folder: Path) -> None:
    """Bring external bytes into the tensor, in place."""
    if not is_external(tensor):
        return
    place = external(tensor, folder)
    with place.path.open("rb") as file:
        file.seek(place.offset)
        tensor.raw_data = file.read(place.length)
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def raw_bytes(tensor: TensorProto) -> bytes:
    """The bytes of an embedded tensor as `raw_data` holds them."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)


def to_torch(array: np.ndarray) -> Tensor | None:
    """As a torch tensor, sharing memory where that may be written to; None if torch has no such."""
    if array.dtype.name == "bfloat16":
        bits = np.require(array.view(np.int16), requirements=["C", "W"])
        return torch.from_numpy(bits).view(torch.bfloat16)
    if array.dtype.kind not in "biuf" or array.dtype.name not in _TORCH_NAMES:
        return None
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


_TORCH_NAMES = frozenset(
    {
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    }
)


def from_torch(tensor: Tensor, name: str) -> TensorProto:
    """A stored tensor with these numbers."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        proto = TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=tensor.shape)
        proto.raw_data = tensor.view(torch.int16).numpy().tobytes()
        return proto
    return numpy_helper.from_array(tensor.numpy(), name)


def named_files(model: ModelProto, folder: Path) -> frozenset[Path]:
    """The data files that a model names, unchecked: there may be none, or it outside the folder."""
    return frozenset(
        folder / entry.value
        for tensor in tensors_of(model)
        if is_external(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    )


def external_files(model: ModelProto, folder: Path) -> tuple[Path, ...]:
    """The data files of a model, sorted; each tensor in them is checked to be there.

    Raises:
        LoadError: see `external`.
    """
    found = {external(t, folder).path for t in tensors_of(model) if is_external(t)}
    return tuple(sorted(found))
