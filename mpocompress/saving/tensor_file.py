"""The file `model.mpo.safetensors`: its tensors, and the manifest in its metadata."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpocompress._version import __version__
from mpocompress.errors import ContractionError, LayoutError, LoadError, SaveError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.identity_gauge import IdentityGauge
from mpocompress.mpo.weight import Weight
from mpocompress.saving.manifest import FORMAT_VERSION, LayerRecord, Manifest, prefix_of
from mpocompress.saving.staging import CORES_FILE

_METADATA_KEY = "mpocompress"
_ALIGNMENT = 64  # bytes: what torch's allocator gives


def save_tensors(tensors: Mapping[str, Tensor], manifest: Manifest, path: str | Path) -> None:
    """Write tensors and the manifest.

    Raises:
        SaveError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata={_METADATA_KEY: manifest.model_dump_json()})
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write {str(path)!r}: {error}.") from error


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of `model.mpo.safetensors`, or of the directory that holds it.

    Raises:
        LoadError: no such file, truncated or foreign, or of another format version.
    """
    path = cores_path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if _METADATA_KEY not in metadata:
        raise LoadError(
            f"{path.name!r} is a safetensors file without our manifest. Give the directory that "
            "`mpocompress compress` wrote, or compress this file first."
        )
    try:
        manifest = Manifest.model_validate_json(metadata[_METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LoadError(
            f"the manifest of {path.name!r} is malformed: {place}: {first['msg']}."
        ) from None
    if manifest.format_version != FORMAT_VERSION:
        raise LoadError(
            f"{path.name!r} has format version {manifest.format_version}; this release "
            f"({__version__}) reads version {FORMAT_VERSION}. Update mpocompress."
        )
    return manifest


def read_all_names(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The stored tensors under all of their names.

    Raises:
        LoadError: the file is truncated or foreign, or lacks a tensor.
    """
    tensors = read_tensors(path)
    try:
        return tensors | {alias: tensors[name] for alias, name in manifest.aliases.items()}
    except KeyError as error:
        raise LoadError(f"the saved result lacks {error.args[0]!r}; it is incomplete.") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The stored tensors, each under one name.

    Raises:
        LoadError: the file is truncated or foreign.
    """
    with _opened(path) as file:
        return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would put it in memory.

    In the file it lies anywhere, depending on the length of the manifest, and kernels for matrix
    products sum in another order at odd addresses: outputs would no longer be bit-identical.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"{path.name!r} ({path.stat().st_size} bytes) is truncated or not a safetensors file: "
            f"{error}. Compress the model again."
        ) from None


def cores_path(path: str | Path) -> Path:
    """The file, where it or its directory is given.

    Raises:
        LoadError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CORES_FILE
    if not path.is_file():
        raise LoadError(
            f"there is no file {str(path)!r}. Give the directory that `mpocompress compress` wrote."
        )
    return path


def weight_of(record: LayerRecord, tensors: Mapping[str, Tensor]) -> Weight:
    """The weight of a layer, in the gauge in which it is stored.

    Raises:
        LoadError: cores are missing or do not fit together.
    """
    prefix = f"{prefix_of(record.names[0])}cores."
    last = len(record.layout) - 1
    try:
        if record.gauge == "none":
            cores = [tensors[f"{prefix}{site}"] for site in range(last + 1)]
            return MPO(cores, shape=record.shape)
        return IdentityGauge(
            tuple(tensors[f"{prefix}{site}.free"] for site in range(last)),
            tuple(tensors[f"{prefix}{site}.pivots"] for site in range(last)),
            tensors[f"{prefix}{last}"],
            Layout.from_pairs(record.layout, pad=True),
            record.shape,
        )
    except KeyError as error:
        raise LoadError(f"the saved result lacks {error.args[0]!r}; it is incomplete.") from None
    except (ContractionError, LayoutError) as error:
        raise LoadError(f"layer {record.names[0]!r} of the saved result: {error}") from None
