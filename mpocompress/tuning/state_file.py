"""The file that a run's state is kept in: safetensors with text in the metadata, never a pickle."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.files import replacing
from mpocompress.tuning.lockstep import Call


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, text: str) -> None:
    """Write tensors and a text aside and rename: a killed run leaves the old file or the new.

    Args:
        path: of the file.
        tensors: by name, of any device; they may share memory.
        key: what the text is filed under.
        text: all that is no tensor.

    Raises:
        SaveError: it cannot be written.
    """
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with replacing(path) as aside:
        save_file(plain, aside, metadata={key: text})


def moment_on(where: torch.device | Tensor, name: str, value: Tensor) -> Tensor:
    """A copy of an optimizer's moment from a file, where its parameter is.

    Args:
        where: the parameter, or its device.
        name: of the moment; Adam counts its "step" on the CPU.
        value: as read.
    """
    return value.clone() if name == "step" else value.to(where, copy=True)


def read_tensors(path: Path, *, key: str) -> tuple[str | None, dict[str, Tensor]]:
    """The text filed under a key, None if there is none, and the tensors, on the CPU.

    Raises:
        OSError, SafetensorError: the file cannot be read; what that means is for those who call.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        text = (file.metadata() or {}).get(key)
        return text, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_same_run(path: Path, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse the state of a run with other arguments.

    Raises:
        DataError: it names the first argument that differs.
    """
    for name, value in given.items():
        if recorded.get(name) != value:
            raise DataError(
                f"the checkpoint {str(path)!r} belongs to a run with {name} = "
                f"{recorded.get(name)!r}, and this one has {value!r}. Give the same "
                "arguments, another path, or remove it to start anew."
            )


def identity(
    start: Iterable[Tensor],
    calls: Iterable[Call],
    reference: nn.Module | None = None,
    *,
    of: str = "the weights at the start",
) -> dict[str, str]:
    """What tells two runs with equal options apart, by what to call it.

    Args:
        start: weights before the run.
        calls: all data, with its labels if it has any.
        reference: the model whose outputs are the target.
        of: what `start` is.
    """
    calls = list(calls)
    labels = [getattr(call, "labels", None) for call in calls]
    data = [*tensors_of(calls), *(label for label in labels if isinstance(label, Tensor))]
    found = {
        f"the SHA-256 of {of}": fingerprint(start),
        "the SHA-256 of the data": fingerprint(data),
    }
    if reference is not None:
        theirs = [*reference.parameters(), *reference.buffers()]
        found["the SHA-256 of the reference"] = fingerprint(theirs)
    return found


def tensors_of(calls: Iterable[Call]) -> Iterator[Tensor]:
    """All arguments of batches that are tensors, in a fixed order."""
    for call in calls:
        for value in (*call.args, *(call.kwargs[name] for name in sorted(call.kwargs))):
            if isinstance(value, Tensor):
                yield value


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256, in hex, of shapes, dtypes and values: whether two runs start at the same weights."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
