"""Reading ONNX files that somebody else wrote, and refusing what is damaged, by name."""

import os
from dataclasses import dataclass
from pathlib import Path

import onnx

from mpocompress.errors import LoadError
from mpocompress.export.graphs import OnnxModel, external_files, flaw, tensors_of
from mpocompress.loading.hashes import file_sha256, listing_sha256
from mpocompress.loading.safe_pickle import describe_foreign_file

OLDEST_OPSET = 11


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxSource:
    """An ONNX model, and where it came from.

    Attributes:
        model: the graph; data outside of its file is checked to be there, and not loaded.
        name: of the file, without directories.
        sha256: of the file; with external data, of the listing that `sha256sum` prints for the file
            and its data files in sorted order.
        notes: what a user should know about how it was read.
    """

    model: OnnxModel
    name: str
    sha256: str
    notes: tuple[str, ...] = ()


def load_onnx(path: str | os.PathLike[str]) -> OnnxSource:
    """Read an ONNX file. Nothing in it is run, and no file outside of its folder is read.

    Raises:
        LoadError: a missing, empty, damaged or foreign file, missing or truncated external data,
            paths of external data that leave the folder, an opset before 11, or parts that would
            get lost (sparse tensors, training graphs).
    """
    place = Path(path)
    if not place.is_file():
        what = "is no file" if place.exists() else "does not exist"
        raise LoadError(f"{place} {what}. Needed is an ONNX file.")
    size = place.stat().st_size
    if size == 0:
        raise LoadError(f"{place} is empty (0 bytes).")
    try:
        proto = onnx.load(place, load_external_data=False)
    except Exception as error:  # protobuf's own types of errors are no part of its interface
        raise LoadError(
            f"{place} ({size} bytes) is no complete ONNX file: {describe_foreign_file(place)}. "
            "Copy or export it again."
        ) from error
    notes = _open_sizes(proto, place.name)
    model = OnnxModel(proto, place.parent, place.name)
    _check(model, size)
    files = external_files(proto, place.parent)
    return OnnxSource(
        model=model,
        name=place.name,
        sha256=file_sha256(place) if not files else listing_sha256([place, *files]),
        notes=notes,
    )


def _open_sizes(proto: onnx.ModelProto, name: str) -> tuple[str, ...]:
    """Open the sizes of inputs and outputs that are below 1: ONNX Runtime takes a 0 literally."""
    found = []
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in stored]
    for value in (*inputs, *proto.graph.output):
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_value") and size.dim_value < 1:
                found.append(f"{value.name!r} (dimension {axis}: {size.dim_value})")
                size.ClearField("dim_value")
    if not found:
        return ()
    return (f"{name}: sizes below 1 are read as open: {', '.join(found)}.",)


def _check(model: OnnxModel, size: int) -> None:
    graph = model.proto.graph
    if not graph.node or not graph.output:
        raise LoadError(
            f"{model.name} ({size} bytes) holds no graph: {len(graph.node)} nodes and "
            f"{len(graph.output)} outputs. It is damaged, or no ONNX file; export it again."
        )
    if not model.opset:
        raise LoadError(
            f"{model.name} does not say which version of the operators it uses. Export it again."
        )
    if model.opset < OLDEST_OPSET:
        raise LoadError(
            f"{model.name} uses opset {model.opset}; {OLDEST_OPSET} and later are read. Convert it "
            f"with onnx.version_converter.convert_version(model, {OLDEST_OPSET})."
        )
    if graph.sparse_initializer or model.proto.training_info:
        what = "sparse tensors" if graph.sparse_initializer else "a training graph"
        raise LoadError(f"{model.name} holds {what}, which is not converted. Export it without.")
    for tensor in tensors_of(model.proto):
        if reason := flaw(tensor):
            raise LoadError(
                f"{model.name}: tensor {tensor.name!r} {reason}. The file is damaged; copy or "
                "export it again."
            )
    names = [output for node in graph.node for output in node.output if output]
    names += [tensor.name for tensor in graph.initializer]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise LoadError(
            f"{model.name} is no valid graph: the value {double!r} has two sources. Export it "
            "again."
        )
