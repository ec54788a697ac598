"""`load_source`: any supported model file or folder to one `Source`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mpocompress.errors import LoadError
from mpocompress.loading.checkpoint import (
    check_tensors,
    clean_state,
    find_model,
    read_safetensors,
)
from mpocompress.loading.exported_program import PT2_SUFFIX, read_program
from mpocompress.loading.factory import build_module, fill_module
from mpocompress.loading.hashes import file_sha256, listing_sha256
from mpocompress.loading.huggingface import find_folder, load_folder, read_folder_weights
from mpocompress.loading.safe_pickle import check_layers, read_pickle

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
ONNX_SUFFIX = ".onnx"
_SUPPORTED = (
    ".pt, .pth, .ckpt or .bin (torch.save), .pt2 (torch.export), .safetensors, or a Hugging Face "
    "folder with config.json"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A loaded model, and where it came from.

    Exactly one of `module` and `state_dict` is set, as `kind` says. Their tensors may be mapped
    from the file: writing to them is safe (the file stays as it is), but it must not shrink.

    Attributes:
        kind: "module" can be called; a bare "state_dict" only has its matrices.
        module: the model, in evaluation mode, on the CPU.
        state_dict: tensors by name, without gradients.
        name: the file's or folder's name, without directories.
        sha256: of the file. Of a folder: of the listing that `sha256sum` prints for its config.json
            and weight files in sorted order.
        format: "torch module", "torch state_dict", "torch exported program", "safetensors" or
            "hugging face folder".
        notes: what a user should know about how it was read, one sentence each.
        tokenizer_folder: where a Hugging Face tokenizer may lie, for example inputs.
    """

    kind: Literal["module", "state_dict"]
    name: str
    sha256: str
    format: str
    module: nn.Module | None = None
    state_dict: dict[str, Tensor] | None = None
    notes: tuple[str, ...] = ()
    tokenizer_folder: Path | None = None


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a path is named like an ONNX file, a graph and no module: see `load_onnx`."""
    return Path(path).suffix.lower() == ONNX_SUFFIX


def load_source(
    path: str | os.PathLike[str], *, factory: str | None = None, trust_pickle: bool = False
) -> Source:
    """Load a trained model. No code from the file runs, unless `trust_pickle` says so.

    Args:
        path: `.pt`, `.pth`, `.ckpt` or `.bin` of `torch.save` (a state dict, a module made of
            `torch.nn` layers, or a training checkpoint that holds one), `.pt2` of `torch.export`,
            `.safetensors`, or a Hugging Face model folder.
        factory: `MODULE:FACTORY`, code that builds the module; it is then filled with the
            checkpoint's tensors, strictly.
        trust_pickle: unpickle whatever the file holds, running any code that it names.

    Raises:
        UnsafeCheckpointError: the file would need code that is not part of torch.nn.
        LoadError: missing, truncated, foreign or empty file, or one that does not fit the factory.
        MissingExtraError: a Hugging Face folder, and transformers is not installed.
    """
    place = Path(path)
    name = Path(os.path.abspath(place)).name
    if place.is_dir():
        return _load_folder(place, name, factory=factory, trust_pickle=trust_pickle)
    if not place.exists():
        raise LoadError(f"{place} does not exist. Needed is a model: {_SUPPORTED}.")
    if not place.is_file():
        raise LoadError(f"{place} is neither a file nor a folder.")
    suffix = place.suffix.lower()
    if is_onnx(place):
        raise LoadError(
            f"{place} is an ONNX file: a graph, which PyTorch does not run. Compress it with the "
            "command line, or load the PyTorch model that it was made of."
        )
    if suffix not in (*_PICKLE_SUFFIXES, PT2_SUFFIX, ".safetensors"):
        raise LoadError(f"{place}: unknown kind of file {suffix!r}. Supported are {_SUPPORTED}.")
    if not os.access(place, os.R_OK):
        raise LoadError(f"{place} cannot be read: permission denied.")
    if place.stat().st_size == 0:
        raise LoadError(f"{place} is empty (0 bytes).")

    notes: tuple[str, ...] = ()
    model: nn.Module | dict[str, Tensor]
    if suffix == PT2_SUFFIX:
        model, notes = read_program(place, trust_pickle=trust_pickle)
        kind_of_file = "torch exported program"
    elif suffix == ".safetensors":
        model, notes = clean_state(read_safetensors(place), place)
        kind_of_file = "safetensors"
    else:
        model, notes = read_torch_file(place, trust_pickle=trust_pickle)
        kind_of_file = "torch module" if isinstance(model, nn.Module) else "torch state_dict"
    if factory is not None:
        state = model.state_dict() if isinstance(model, nn.Module) else model
        model, fill_notes = _build(factory, state, place)
        notes += fill_notes
    return _source(model, name=name, sha256=file_sha256(place), format=kind_of_file, notes=notes)


def read_torch_file(
    path: Path, *, trust_pickle: bool
) -> tuple[nn.Module | dict[str, Tensor], tuple[str, ...]]:
    """Read a file of `torch.save` down to a checked module or a clean state dict, and notes."""
    found, notes = find_model(read_pickle(path, trust=trust_pickle), path)
    if not isinstance(found, nn.Module):
        state, clean_notes = clean_state(found, path)
        return state, notes + clean_notes
    if not trust_pickle:
        check_layers(found, path)
    check_tensors({**dict(found.named_parameters()), **dict(found.named_buffers())}, path)
    return found, notes


def _load_folder(place: Path, name: str, *, factory: str | None, trust_pickle: bool) -> Source:
    folder = find_folder(place)

    def read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        if path.suffix == ".safetensors":
            return clean_state(read_safetensors(path), path)
        model, notes = read_torch_file(path, trust_pickle=trust_pickle)
        return (model.state_dict() if isinstance(model, nn.Module) else model), notes

    state, notes = read_folder_weights(folder, read)
    if factory is not None:
        module, more = _build(factory, state, place)
    else:
        module, more = load_folder(folder, state)
    return _source(
        module,
        name=name,
        sha256=listing_sha256([folder.config, *folder.weights]),
        format="hugging face folder",
        notes=notes + more,
        tokenizer_folder=folder.path,
    )


def _build(
    factory: str, state: dict[str, Tensor], place: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    module = build_module(factory)
    return module, fill_module(module, state, spec=factory, place=str(place))


def _source(
    model: nn.Module | dict[str, Tensor],
    *,
    name: str,
    sha256: str,
    format: str,
    notes: tuple[str, ...],
    tokenizer_folder: Path | None = None,
) -> Source:
    is_module = isinstance(model, nn.Module)
    return Source(
        kind="module" if is_module else "state_dict",
        # Dropout and batch statistics must not depend on the mode in which the file was saved.
        module=model.eval() if isinstance(model, nn.Module) else None,
        state_dict=None if isinstance(model, nn.Module) else model,
        name=name,
        sha256=sha256,
        format=format,
        notes=notes,
        tokenizer_folder=tokenizer_folder,
    )
