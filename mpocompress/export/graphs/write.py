"""Write an ONNX model: one file while protobuf can hold it, with a data file beside it above."""

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto, StringStringEntryProto, TensorProto
from torch import Tensor

from mpocompress.errors import SaveError
from mpocompress.export.graphs.tensors import (
    embed,
    external,
    from_torch,
    inner_tensors_of,
    is_external,
    num_bytes,
    raw_bytes,
    tensors_of,
)
from mpocompress.export.onnx_file import SINGLE_FILE_BYTES

_ALIGNMENT = 4096  # bytes: pages, so that the runtime can map what it reads
_SMALL = 1024  # bytes: what is in the graph stays in the graph
_CHUNK = 1 << 24


def write_graph(
    proto: ModelProto,
    folder: Path,
    path: Path,
    *,
    computed: Mapping[str, Callable[[], Tensor]] | None = None,
    single_file_bytes: int = SINGLE_FILE_BYTES,
) -> dict[str, int]:
    """Write a model whose external data, if any, lies in `folder`.

    Args:
        proto: is changed: its tensors get their bytes, or a new place for them.
        folder: of the file that the model was read from.
        path: of the new file.
        computed: what gives the numbers of initializers that have a type and shape only; asked for
            one at a time.
        single_file_bytes: with more bytes of tensors than this they go to `<path>.data`.

    Returns:
        Bytes of each file, by name.

    Raises:
        SaveError: the files cannot be written.
        LoadError: external data that is not there any more.
    """
    data_path = path.with_name(f"{path.name}.data")
    try:
        moved: frozenset[str] = frozenset()
        if sum(map(num_bytes, tensors_of(proto))) > single_file_bytes:
            moved = _write_data(proto, folder, data_path, computed or {})
        for tensor in proto.graph.initializer:
            if tensor.name in moved:
                continue
            if tensor.name in (computed or {}):
                tensor.CopyFrom(from_torch((computed or {})[tensor.name](), tensor.name))
            embed(tensor, folder)
        for tensor in inner_tensors_of(proto):
            embed(tensor, folder)
        path.write_bytes(proto.SerializeToString(deterministic=True))
    except (OSError, ValueError) as error:  # protobuf: more than 2 GiB
        raise SaveError(
            f"{path.name} cannot be written: {error}. Check the free space and the permissions of "
            "its directory."
        ) from error
    written = [file for file in (path, data_path) if file.exists()]
    return {file.name: file.stat().st_size for file in written}


def _write_data(
    proto: ModelProto,
    folder: Path,
    data_path: Path,
    computed: Mapping[str, Callable[[], Tensor]],
) -> frozenset[str]:
    """Write the initializers that are not small; their names."""
    moved = set()
    with data_path.open("wb") as file:
        for tensor in proto.graph.initializer:
            size = num_bytes(tensor)
            if size <= _SMALL or tensor.data_type == TensorProto.STRING:
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            if tensor.name in computed:
                file.write(from_torch(computed[tensor.name](), tensor.name).raw_data)
            elif is_external(tensor):
                place = external(tensor, folder)
                with place.path.open("rb") as source:
                    source.seek(place.offset)
                    left = place.length
                    while left and (chunk := source.read(min(left, _CHUNK))):
                        file.write(chunk)
                        left -= len(chunk)
            else:
                file.write(raw_bytes(tensor))
            _point_to(tensor, data_path.name, offset, size)
            moved.add(tensor.name)
    return frozenset(moved)


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    bare = TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        bare.external_data.append(StringStringEntryProto(key=key, value=str(value)))
    tensor.CopyFrom(bare)
