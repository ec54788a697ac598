"""The dense checkpoint that a saved result stands for."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpocompress.errors import LoadError, SaveError
from mpocompress.files import replacing
from mpocompress.saving.manifest import Manifest, OpenedRecord, prefix_of
from mpocompress.saving.staging import umask
from mpocompress.saving.tensor_file import (
    cores_path,
    read_all_names,
    read_manifest,
    weight_of,
)


def densify_state(path: str | Path) -> dict[str, Tensor]:
    """The state of the ordinary dense model that a saved result stands for.

    Compressed layers get their dense `weight` back; shared entries appear under all their names.
    Weights of an ONNX graph have the graph's own names and shapes.

    Raises:
        LoadError: no or a foreign file, or one in which a weight has the name of another tensor.
    """
    path = cores_path(path)
    manifest = read_manifest(path)
    tensors = read_all_names(path, manifest)
    _check_names(manifest, tensors)
    weights: dict[str, Tensor] = {}
    for record in manifest.layers:
        # Tied layers stay tied: the matrix is built once for all that share the last core, which
        # has the same name in every gauge.
        last = record.core_names(record.names[0])[-1]
        shared = manifest.aliases.get(last, last)
        if shared not in weights:
            weight = weight_of(record, tensors)
            weights[shared] = weight.to_dense().contiguous()
        for name in record.dense_names():
            tensors[name] = record.dense(weights[shared])
    for record in manifest.layers:
        for name in record.names:
            for stored in record.core_names(name):
                tensors.pop(stored, None)
    for opened in manifest.opened:
        for name in opened.names:
            _close(prefix_of(name), opened, tensors)
    return tensors


def _check_names(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """No dense weight takes the place of another tensor."""
    taken = dict.fromkeys(tensors, "another tensor of the result")
    for record in manifest.layers:
        for name in set(record.dense_names()):
            if name in taken:
                raise LoadError(
                    f"layer {record.names[0]!r}: its dense weight would be called {name!r}, as "
                    f"{taken[name]} is. Compress the model again: results of this release say what "
                    "each weight was called."
                )
            taken[name] = f"the weight of layer {record.names[0]!r}"


def _close(prefix: str, opened: OpenedRecord, tensors: dict[str, Tensor]) -> None:
    """Give the entries of an opened module the names and shapes that they had before."""
    for name, origin in opened.origins.items():
        try:
            parts = [tensors.pop(f"{prefix}{part}") for part in origin.parts]
        except KeyError as error:
            raise LoadError(
                f"the saved result lacks {error.args[0]!r}; it is incomplete."
            ) from None
        numbers = sum(part.numel() for part in parts)
        if numbers != prod(origin.shape) or len({part.shape[1:] for part in parts}) > 1:
            raise LoadError(
                f"{prefix}{name} of the saved result has shape {origin.shape}, but its parts are "
                f"{', '.join(str(tuple(part.shape)) for part in parts)}. Compress the model again."
            )
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        # What is tied stays the same object: a view would be a second tensor in the same memory.
        same = whole.shape == origin.shape
        tensors[f"{prefix}{name}"] = whole if same else whole.reshape(origin.shape)


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
            scratch.chmod(0o666 & ~umask())
        else:
            torch.save(dict(state), scratch)


def _later_twins(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) in seen:
            yield name, tensor
        seen.add(id(tensor))
