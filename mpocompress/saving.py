"""Results on disk: cores, untouched parameters and buffers, and a manifest; never a pickle.

`model.mpo.safetensors` holds the state of the compressed model under its own names (cores as
`<layer>.cores.<site>`; in the identity gauge `.free` rows and `.pivots` of all but the last), each
tensor once. Its metadata holds a JSON manifest: layouts, bond
dimensions, and which names share a tensor. What a state cannot tell, the architecture, comes from a
skeleton when the result is loaded.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpocompress._version import __version__
from mpocompress.errors import ContractionError, LoadError, OutputExistsError, SaveError
from mpocompress.layers import MPOLayer
from mpocompress.layers.opened import Opened
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge
from mpocompress.surgery import adapter_for, copy_with_replacements, open_modules, opened_names

FORMAT_VERSION = 1
CORES_FILE = "model.mpo.safetensors"
ONNX_FILE = "model.onnx"
ONNX_DATA_FILE = "model.onnx.data"
REPORT_FILES = ("report.json", "report.md", "report.html")
_DENSE = {
    "linear": "an nn.Linear",
    "embedding": "an nn.Embedding",
    "conv": "a convolution",
}  # what a kind is called where it is missing
_METADATA_KEY = "mpocompress"
_ALIGNMENT = 64  # bytes: what torch's allocator gives
# All that a run may write; nothing else in an output directory is ever touched. The report comes
# last: where it stands, the files that it describes do, too.
_OUR_FILES = (CORES_FILE, ONNX_DATA_FILE, ONNX_FILE, *reversed(REPORT_FILES))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRecord(_Record):
    """One compressed layer: all of its names, the matrix's shape, its sites, how it is stored.

    Attributes:
        names: all qualified names of the module.
        kind: of the weight, such as "linear".
        shape: (out, in) of the matrix.
        layout: (out, in) of each site.
        bond_dims: of the inner bonds.
        gauge: how the cores are stored.
        dense_shape: of the dense weight; None if it is the matrix itself.
        transposed: whether the dense weight, seen as (first dimension, all others), is (in, out).
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int]
    layout: tuple[tuple[int, int], ...]
    bond_dims: tuple[int, ...]
    gauge: Gauge = "none"
    dense_shape: tuple[int, ...] | None = None
    transposed: bool = False

    def dense(self, matrix_OI: Tensor) -> Tensor:
        """The weight of the dense layer for this matrix."""
        if self.dense_shape is None:
            return matrix_OI  # the same object for all that are tied
        weight = matrix_OI.mT if self.transposed else matrix_OI
        return weight.reshape(self.dense_shape).contiguous()


class OriginRecord(_Record):
    """What a parameter of an opened module has become: entries below each other, and its shape."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]


class OpenedRecord(_Record):
    """One opened module: all of its names, and its parameters under their dense names."""

    names: tuple[str, ...]
    origins: dict[str, OriginRecord] = {}


class Manifest(_Record):
    """What the metadata of `model.mpo.safetensors` says.

    Attributes:
        format_version: of the file.
        tool_version: that wrote it.
        source: "module", "state_dict" if the architecture was never known, or "onnx", where names
            are those of the graph.
        layers: the compressed ones.
        aliases: name of a state entry to the name under which its tensor is stored.
        opened: modules that call layers where the dense ones read their weights.
    """

    format_version: int = FORMAT_VERSION
    tool_version: str = __version__
    source: Literal["module", "state_dict", "onnx"] = "module"
    layers: tuple[LayerRecord, ...] = ()
    aliases: dict[str, str] = {}
    opened: tuple[OpenedRecord, ...] = ()


def save_model(
    model: nn.Module, path: str | Path, *, source: Literal["module", "state_dict"] = "module"
) -> None:
    """Write a compressed model's state and manifest to one safetensors file.

    Raises:
        SaveError: a state entry is not a tensor, or the file cannot be written.
    """
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise SaveError(
                f"state entry {name!r} is a {type(tensor).__name__}, not a tensor; it cannot be "
                "saved without a pickle. Remove the module that keeps it, or convert it first."
            )
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        first_name[id(tensor)] = name
        detached = tensor.detach().cpu()
        storage = detached.untyped_storage().data_ptr()
        # The format knows no views: what overlaps another tensor is stored as a copy.
        whole = detached.is_contiguous() and storage not in storages
        storages.add(storage)
        tensors[name] = detached if whole else detached.clone(memory_format=torch.contiguous_format)
    manifest = Manifest(
        source=source,
        layers=tuple(_layer_records(model)),
        aliases=aliases,
        opened=tuple(_opened_records(model)),
    )
    _save_tensors(tensors, manifest, path)


def save_graph_weights(
    weights: Mapping[str, MPO], others: Mapping[str, Tensor], path: str | Path
) -> None:
    """Write the weights of an ONNX graph to one safetensors file.

    Args:
        weights: cores by the name of the weight.
        others: the other tensors of the graph, by name.
        path: of the file.

    Raises:
        SaveError: the file cannot be written.
    """
    records = tuple(
        LayerRecord(
            names=(name,),
            kind="linear",
            shape=mpo.shape,
            layout=mpo.layout.pairs,
            bond_dims=mpo.bond_dims,
        )
        for name, mpo in weights.items()
    )
    cores = {
        f"{_prefix(name)}cores.{site}": core.contiguous()
        for name, mpo in weights.items()
        for site, core in enumerate(mpo.cores)
    }
    _save_tensors({**others, **cores}, Manifest(source="onnx", layers=records), path)


def _save_tensors(tensors: Mapping[str, Tensor], manifest: Manifest, path: str | Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={_METADATA_KEY: manifest.model_dump_json()})
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write {str(path)!r}: {error}.") from error


def _layer_records(model: nn.Module) -> Iterator[LayerRecord]:
    names: dict[int, list[str]] = {}
    layers: dict[int, MPOLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MPOLayer):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    for key, layer in layers.items():
        yield LayerRecord(
            names=tuple(names[key]),
            kind=layer.kind,
            shape=(layer.out_features, layer.in_features),
            layout=layer.layout.pairs,
            bond_dims=layer.bond_dims,
            gauge=layer.gauge,
            dense_shape=layer.dense_shape,
            transposed=layer.dense_transposed,
        )


def _opened_records(model: nn.Module) -> Iterator[OpenedRecord]:
    names: dict[Opened, list[str]] = {}
    for name, module in opened_names(model).items():
        names.setdefault(module, []).append(name)
    for module, own in names.items():
        origins = {
            name: OriginRecord(parts=origin.parts, shape=origin.shape)
            for name, origin in module.origins().items()
        }
        yield OpenedRecord(names=tuple(own), origins=origins)


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of `model.mpo.safetensors`, or of the directory that holds it.

    Raises:
        LoadError: no such file, truncated or foreign, or of another format version.
    """
    path = _cores_path(path)
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


def load_model(path: str | Path, skeleton: nn.Module) -> nn.Module:
    """Load a saved result into a copy of the dense architecture; it stays compressed.

    Args:
        path: the directory, or `model.mpo.safetensors` itself.
        skeleton: a dense model of the same architecture, with any weights; it is not changed.

    Returns:
        A copy of the skeleton with MPO layers and the saved state: bit-identical outputs.

    Raises:
        LoadError: no or a foreign file, or a skeleton of another architecture, by name.
    """
    path = _cores_path(path)
    manifest = read_manifest(path)
    tensors = _read_all_names(path, manifest)
    wanted = {name for record in manifest.opened for name in record.names}
    skeleton = open_modules(skeleton, wanted) if wanted else skeleton
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    replacements: dict[nn.Module, nn.Module] = {}
    for record in manifest.layers:
        for name in record.names:
            _check_skeleton(record, name, modules.get(name))
        dense = modules[record.names[0]]
        adapter = adapter_for(dense)
        if adapter is not None:
            replacements[dense] = adapter.build(dense, _weight(record, tensors))
    model = copy_with_replacements(skeleton, replacements)
    _assign_state(model, tensors, manifest.aliases)
    return model


def _check_skeleton(record: LayerRecord, name: str, module: nn.Module | None) -> None:
    """The module of the skeleton is what was compressed."""
    adapter = None if module is None else adapter_for(module)
    if module is None or adapter is None or adapter.kind != record.kind:
        found = "nothing" if module is None else f"a {type(module).__name__}"
        wanted = _DENSE.get(record.kind, f"a layer of the kind {record.kind!r}")
        raise LoadError(
            f"layer {name!r} of the saved result is an MPO, but the model given has "
            f"{found} there instead of {wanted}. Give the architecture that was "
            "compressed, or use `mpocompress densify`."
        )
    shape = tuple(adapter.matrix(module).shape)
    if shape != record.shape:
        raise LoadError(
            f"layer {name!r} is {record.shape[0]}x{record.shape[1]} in the saved result, "
            f"but {shape[0]}x{shape[1]} in the model given."
        )


def _weight(record: LayerRecord, tensors: Mapping[str, Tensor]) -> MPO | IdentityGauge:
    prefix = f"{_prefix(record.names[0])}cores."
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
    except ContractionError as error:
        raise LoadError(f"layer {record.names[0]!r} of the saved result: {error}") from None


def _assign_state(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    """Put the saved tensors in place, one parameter for all names that share it.

    `load_state_dict(assign=True)` would make a parameter of its own for every name and so break
    ties; without `assign` the skeleton's dtype would win over the saved one.
    """
    expected = model.state_dict(keep_vars=True)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        raise LoadError(
            f"the model given does not match the saved result: it has {missing[:3] or 'nothing'} "
            f"more ({len(missing)}) and lacks {unexpected[:3] or 'nothing'} ({len(unexpected)}). "
            "Give the architecture that was compressed."
        )
    made: dict[str, Tensor] = {}
    for name, old in expected.items():
        new = tensors[name]
        if old.shape != new.shape:
            raise LoadError(
                f"{name!r} has shape {tuple(new.shape)} in the saved result, but "
                f"{tuple(old.shape)} in the model given."
            )
        stored = aliases.get(name, name)
        if stored not in made:
            is_parameter = isinstance(old, nn.Parameter)
            made[stored] = nn.Parameter(new, old.requires_grad) if is_parameter else new
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[stored])
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if left:
        raise LoadError(
            f"buffer {left[0]!r} is not part of the saved state and the model given is on the meta "
            "device. Build it on the CPU."
        )


def densify_state(path: str | Path) -> dict[str, Tensor]:
    """The state of the ordinary dense model that a saved result stands for.

    Compressed layers get their dense `weight` back; shared entries appear under all their names.

    Raises:
        LoadError: no or a foreign file.
    """
    path = _cores_path(path)
    manifest = read_manifest(path)
    tensors = _read_all_names(path, manifest)
    weights: dict[str, Tensor] = {}
    for record in manifest.layers:
        first = _prefix(record.names[0])
        # Tied layers stay tied: the matrix is built once for all that share the last core, which
        # has the same name in every gauge.
        last = f"{first}cores.{len(record.layout) - 1}"
        shared = manifest.aliases.get(last, last)
        if shared not in weights:
            weight = _weight(record, tensors)
            weights[shared] = weight.to_dense().contiguous()
        for name in record.names:
            tensors[f"{_prefix(name)}weight"] = record.dense(weights[shared])
    for record in manifest.layers:
        for name in record.names:
            prefix = f"{_prefix(name)}cores."
            for stored in [stored for stored in tensors if stored.startswith(prefix)]:
                del tensors[stored]
    for opened in manifest.opened:
        for name in opened.names:
            _close(_prefix(name), opened, tensors)
    return tensors


def _close(prefix: str, opened: OpenedRecord, tensors: dict[str, Tensor]) -> None:
    """Give the entries of an opened module the names and shapes that they had before."""
    for name, origin in opened.origins.items():
        parts = [tensors.pop(f"{prefix}{part}") for part in origin.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        # What is tied stays the same object: a view would be a second tensor in the same memory.
        same = whole.shape == origin.shape
        tensors[f"{prefix}{name}"] = whole if same else whole.reshape(origin.shape)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict atomically: `.safetensors`, `.pt` or `.pth`.

    Raises:
        SaveError: another suffix, or the file cannot be written.
    """
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise SaveError(
            f"output {str(path)!r}: a dense checkpoint ends in .safetensors, .pt or .pth."
        )
    with replacing(path) as scratch:
        if path.suffix == ".safetensors":
            # The format knows no shared tensors, and a plain checkpoint has all names.
            own = {name: tensor.clone() for name, tensor in _later_twins(state)}
            save_file({**state, **own}, scratch)
            scratch.chmod(0o666 & ~_umask())
        else:
            torch.save(dict(state), scratch)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place if the block succeeds.

    Raises:
        SaveError: the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SaveError(f"cannot write {str(path)!r}: {error}.") from error
    finally:
        scratch.unlink(missing_ok=True)


def _later_twins(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) in seen:
            yield name, tensor
        seen.add(id(tensor))


def _cores_path(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / CORES_FILE
    if not path.is_file():
        raise LoadError(
            f"there is no {path.name!r} in {str(path.parent)!r}. Give the directory that "
            "`mpocompress compress` wrote."
        )
    return path


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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would put it in memory.

    In the file it lies anywhere, depending on the length of the manifest, and kernels for matrix
    products sum in another order at odd addresses: outputs would no longer be bit-identical.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _read_all_names(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The stored tensors under all of their names."""
    tensors = _read_tensors(path)
    try:
        return tensors | {alias: tensors[name] for alias, name in manifest.aliases.items()}
    except KeyError as error:
        raise LoadError(f"the saved result lacks {error.args[0]!r}; it is incomplete.") from None


@contextmanager
def staged_output(directory: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A scratch directory whose files appear in `directory` only if the block succeeds.

    The scratch directory stands beside the target, so that every file moves by a rename: a killed
    run leaves each file either old or new. In an existing directory only files that we write are
    replaced or, if stale, removed; a failed run leaves it as it was.

    Raises:
        OutputExistsError: the directory exists, and is not empty, without `force`.
        SaveError: the target cannot be written.
    """
    target = Path(directory)
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputExistsError(
            f"the output directory {str(target)!r} exists. Use --force (force=True) to replace the "
            "files in it that mpocompress writes, or choose another with -o."
        )
    if target.exists() and not target.is_dir():
        raise SaveError(f"the output {str(target)!r} is a file; give a directory with -o.")
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SaveError(
            f"cannot write to {str(target.parent)!r}: {error.strerror}. Choose another directory "
            "with -o."
        ) from None
    try:
        yield scratch
        _publish(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:  # innermost first; what others have filled meanwhile stays
            with suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, target: Path) -> None:
    try:
        # mkdtemp makes private directories, safetensors private files; a result is neither.
        mask = _umask()
        scratch.chmod(0o777 & ~mask)
        for file in scratch.iterdir():
            file.chmod(0o666 & ~mask)
        if not target.exists():
            scratch.rename(target)
            return
        for name in _OUR_FILES:
            if (scratch / name).exists():
                os.replace(scratch / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"cannot write to {str(target)!r}: {error.strerror}.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
