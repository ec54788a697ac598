"""The file that a run's state is kept in: safetensors with text in the metadata, never a pickle."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpocompress.errors import DataError, LoadError, MPOCompressError
from mpocompress.files import replacing
from mpocompress.tuning.lockstep import Call


class StateFacts(BaseModel):
    """All of a state that is no tensor; each kind of state has its own."""

    # A loss without a held-out part is infinite.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    @classmethod
    def of(cls, state: object, **others: Any) -> Self:
        """The facts of a state that has them under the same names, and others beside."""
        names = cls.model_fields.keys() - others.keys()
        return cls(**others, **{name: getattr(state, name) for name in names})

    def named(self, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """The facts by name, for the state that is made of them."""
        names = type(self).model_fields
        return {name: getattr(self, name) for name in names if name not in without}


Facts = TypeVar("Facts", bound=StateFacts)
State = TypeVar("State")


@dataclass(frozen=True, kw_only=True, slots=True)
class StateFormat(Generic[Facts]):
    """How states of one kind are kept.

    Attributes:
        what: it is, as in "is no checkpoint of a training".
        anew: what one does without it, as in "to start anew".
        key: what the facts are filed under in the metadata.
        version: of the format.
        facts: their model.
    """

    what: str
    anew: str
    key: str
    version: int
    facts: type[Facts]

    def write(self, path: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
        """Write a state aside and rename: a killed run leaves the old file or the new.

        Args:
            path: of the file.
            facts: all that is no tensor.
            tensors: by name, of any device; they may share memory.

        Raises:
            SaveError: it cannot be written.
        """
        found = {"format_version": self.version, **json.loads(facts.model_dump_json())}
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with replacing(path) as aside:
            save_file(plain, aside, metadata={self.key: json.dumps(found)})

    def read(self, path: Path, build: Callable[[Facts, dict[str, Tensor]], State]) -> State:
        """Read what `write` wrote.

        Args:
            path: of the file.
            build: makes the state of the facts and of the tensors, which are on the CPU.

        Raises:
            LoadError: a truncated or foreign file, one of another version, or one that lacks what
                `build` looks for.
        """
        with self.refusing(path):
            with safe_open(path, framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get(self.key)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if text is None:
                raise LoadError(
                    f"{str(path)!r} is a safetensors file, but no {self.what}. Give another path, "
                    f"or remove it to {self.anew}."
                )
            found = dict(json.loads(text))
            # Trainings and sweeps once wrote it as "version".
            version = found.pop("format_version", found.pop("version", None))
            if version != self.version:
                raise LoadError(
                    f"the {self.what} {str(path)!r} was written by another version of mpocompress "
                    f"(format {version}, this one writes {self.version}). Remove it to "
                    f"{self.anew}."
                )
            return build(self.facts.model_validate(found), tensors)

    @contextmanager
    def refusing(self, path: Path) -> Iterator[None]:
        """Within the block, whatever the content of the file does not fit is a LoadError."""
        try:
            yield
        except MPOCompressError:
            raise
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise LoadError(
                f"the {self.what} {str(path)!r} is truncated or foreign: {_why(error)}. Remove it "
                f"to {self.anew}."
            ) from None


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    lines = str(error).splitlines() or [type(error).__name__]
    return f"there is no {lines[0]}" if isinstance(error, KeyError) else lines[0]


def moment_on(where: torch.device | Tensor, name: str, value: Tensor) -> Tensor:
    """A copy of an optimizer's moment from a file, where its parameter is.

    Args:
        where: the parameter, or its device.
        name: of the moment; Adam counts its "step" on the CPU.
        value: as read.
    """
    return value.clone() if name == "step" else value.to(where, copy=True)


def check_same_run(path: Path, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse the state of a run with other arguments.

    Raises:
        DataError: it names the first argument that differs.
    """
    for name, value in json.loads(json.dumps(dict(given))).items():  # which knows no tuples
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
    # The first that differs is named: causes come before what follows from them.
    found = {"the SHA-256 of the data": fingerprint(data)}
    if reference is not None:
        theirs = [*reference.parameters(), *reference.buffers()]
        found["the SHA-256 of the reference"] = fingerprint(theirs)
    found[f"the SHA-256 of {of}"] = fingerprint(start)
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
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
