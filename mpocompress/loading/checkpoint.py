"""From what a file held to a clean state dict: one flat table of plain tensors by name."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpocompress.errors import LoadError
from mpocompress.loading.safe_pickle import describe_foreign_file

# Under these names training scripts store the weights beside epoch, optimizer and so on.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module")

_MAX_NESTING = 3

# Put before every name by DistributedDataParallel and by torch.compile.
_WRAPPER_PREFIXES = {
    "module.": "DataParallel or DistributedDataParallel",
    "_orig_mod.": "torch.compile",
}

# A file may describe a tensor (by strides of zero) that is far larger than the numbers it holds.
_MAX_EXPANDED_BYTES = 1 << 28


def find_model(loaded: Any, path: Path) -> tuple[nn.Module | Mapping[Any, Any], tuple[str, ...]]:
    """Find the model in what `torch.load` returned.

    Args:
        loaded: a module, a state dict, or a dict that holds one of them under a usual name.
        path: where it came from, for messages.

    Returns:
        `(module or state dict, notes)`, neither of them checked yet; the notes say which entry was
        used and what was left aside.

    Raises:
        LoadError: it is something else.
    """
    notes: list[str] = []
    for _ in range(_MAX_NESTING):
        if not isinstance(loaded, Mapping):
            break
        key = next(
            (k for k in _NESTED_KEYS if isinstance(loaded.get(k), Mapping | nn.Module)), None
        )
        if key is None:
            break
        notes.append(f"the model is the file's entry {key!r}")
        others = sorted(str(name) for name in loaded if name != key)
        if others:
            notes.append(f"left aside: {_some(others)}")
        loaded = loaded[key]
    if not isinstance(loaded, Mapping | nn.Module):
        raise LoadError(
            f"{path} holds a {type(loaded).__name__}; needed is a module or a state dict (names to "
            "tensors), as torch.save(model.state_dict(), ...) writes it."
        )
    return loaded, tuple(notes)


def clean_state(loaded: Mapping[Any, Any], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Keep the tensors of a state dict, under the names that the model itself would give them.

    Args:
        loaded: names to values; entries that are not tensors are left aside.
        path: where it came from, for messages.

    Returns:
        `(state, notes)`. The tensors share their storage with `loaded` and carry no gradient.

    Raises:
        LoadError: no tensors, names that are not strings, or tensors that cannot be used.
    """
    # The unbound method, as a file may set attributes on its tensors; they are gone afterwards.
    tensors = {n: Tensor.detach(value) for n, value in loaded.items() if isinstance(value, Tensor)}
    others = sorted(str(name) for name in loaded if name not in tensors)
    if not tensors:
        raise LoadError(
            f"{path} holds no weights: {_some(others) or 'no entries at all'}. Needed is a state "
            f"dict (names to tensors), at the top or under one of {', '.join(_NESTED_KEYS)}."
        )
    unnamed = [name for name in tensors if not isinstance(name, str)]
    if unnamed:
        raise LoadError(
            f"{path}: tensors are filed under {unnamed[0]!r}, but names of a state dict are "
            "strings. Save model.state_dict()."
        )
    notes = [f"left aside, because they are not tensors: {_some(others)}"] if others else []
    for prefix, origin in _WRAPPER_PREFIXES.items():
        if all(name.startswith(prefix) and name != prefix for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
            notes.append(f"took the prefix {prefix!r} off all names ({origin} puts it there)")
    check_tensors(tensors, path)
    reparametrized = _reparametrized(tensors)
    if reparametrized:
        notes.append(
            f"{_some(reparametrized)} is stored in parts (weight_norm or another "
            "parametrization); only --model MODULE:FACTORY can put them together"
        )
    return tensors, tuple(notes)


def _reparametrized(names: Iterable[str]) -> list[str]:
    """Weights of which the state dict holds the ingredients, not the value."""
    known = set(names)
    new_style = {
        name.rpartition(".")[0].replace("parametrizations.", "")
        for name in known
        if "parametrizations." in name and ".original" in name
    }
    old_style = {n[:-2] for n in known if n.endswith("weight_g") and f"{n[:-2]}_v" in known}
    return sorted(new_style | old_style)


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not plain dense numbers.

    Raises:
        LoadError: a sparse, quantized, meta or otherwise special tensor, or one that claims far
            more numbers than the file holds; by name.
    """
    for name, tensor in tensors.items():
        reason = None
        if tensor.layout is not torch.strided:
            reason = f"is sparse ({tensor.layout}); call .to_dense() before saving"
        elif tensor.is_quantized:
            reason = f"is quantized ({tensor.dtype}); call .dequantize() before saving"
        elif tensor.is_meta:
            reason = "has no values (it was saved on the meta device)"
        elif type(tensor) not in (Tensor, nn.Parameter):
            reason = f"is a {type(tensor).__name__}; save plain tensors"
        else:
            claimed, held = tensor.nbytes, tensor.untyped_storage().nbytes()
            if claimed > held and claimed > _MAX_EXPANDED_BYTES:
                reason = (
                    f"claims shape {tuple(tensor.shape)} ({claimed} bytes), but the file holds "
                    f"{held} bytes of it; call .contiguous() before saving"
                )
        if reason is not None:
            raise LoadError(f"{path}: the tensor {name!r} {reason}.")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map all tensors of a `.safetensors` file.

    Raises:
        LoadError: the file is truncated, corrupt, or of another format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            reason = describe_foreign_file(path)
            raise LoadError(
                f"{path} ({size} bytes) is not a complete safetensors file: the first 8 bytes give "
                f"a header of {length} bytes, more than follow; {reason}."
                if len(head) == 8
                else f"{path} ({size} bytes) is too short for a safetensors file."
            )
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{path} ({size} bytes): the header of {length} bytes is not that of a safetensors "
            f"file ({type(error).__name__}: {error}). Copy or download it again."
        ) from error
    if expected != size:
        raise LoadError(
            f"{path} has {size} bytes, but its header describes {expected}: the file is "
            f"{'truncated' if expected > size else 'followed by something else'}. Copy or download "
            "it again."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise LoadError(
            f"{path} ({size} bytes) cannot be read as safetensors: {error}. Copy or download it "
            "again."
        ) from error


_METADATA = "__metadata__"


def _some(names: list[str], *, count: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
