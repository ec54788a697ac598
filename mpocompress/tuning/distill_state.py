"""The state of a distillation on disk: safetensors with JSON in the metadata, never a pickle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from mpocompress.errors import LoadError
from mpocompress.tuning.state_file import check_same_run, read_tensors, write_tensors

_FORMAT_VERSION = 3  # 1 had Adam's moments of cores, 2 nothing of the data
_METADATA_KEY = "mpocompress.distillation"


class DistillRecord(BaseModel):
    """One evaluation.

    Attributes:
        phase: "blocks" or "model".
        step: optimizer steps done in this phase.
        train_loss: mean over the minibatches since the last evaluation; None at step 0.
        held_out_loss: of the whole model on the held-out part, in both phases.
        learning_rate: of the last step; 0 at step 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: str
    step: int
    train_loss: float | None
    held_out_loss: float
    learning_rate: float


@dataclass(kw_only=True)
class DistillState:
    """All that a run needs to go on: nothing else may influence what follows.

    Attributes:
        phase: index of the phase.
        step: optimizer steps done in it.
        learning_rate: peak of the phase; None if it has not been chosen yet.
        learning_rates: those that have been chosen, by phase.
        stale: evaluations since the best one.
        best_loss: held-out loss of the best weights.
        best_record: index of the best evaluation in the history.
        history: all evaluations.
        current: values of the parameters, where they are needed: on disk.
        best: values of the parameters at the best evaluation.
        moments: of the optimizer, a dict for each parameter; empty where it had no gradient.
    """

    phase: int = 0
    step: int = 0
    learning_rate: float | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    best_loss: float = float("inf")
    best_record: int = 0
    history: list[DistillRecord] = field(default_factory=list)
    current: list[Tensor] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)
    moments: list[dict[str, Tensor]] = field(default_factory=list)


class _Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = _FORMAT_VERSION
    arguments: dict[str, Any]
    phase: int
    step: int
    learning_rate: float | None
    learning_rates: dict[str, float]
    stale: int
    best_loss: float
    best_record: int
    history: list[DistillRecord]


def write_state(path: Path, state: DistillState, arguments: Mapping[str, Any]) -> None:
    """Write a state atomically: a killed run leaves the old file or the new.

    Raises:
        SaveError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for index, (current, best) in enumerate(zip(state.current, state.best, strict=True)):
        tensors[f"current.{index}"] = current
        tensors[f"best.{index}"] = best
    for index, moments in enumerate(state.moments):
        tensors |= {f"moments.{index}.{name}": value for name, value in moments.items()}
    metadata = _Metadata(
        arguments=dict(arguments),
        phase=state.phase,
        step=state.step,
        learning_rate=state.learning_rate,
        learning_rates=state.learning_rates,
        stale=state.stale,
        best_loss=state.best_loss,
        best_record=state.best_record,
        history=state.history,
    )
    write_tensors(path, tensors, key=_METADATA_KEY, text=metadata.model_dump_json())


def read_state(path: Path, arguments: Mapping[str, Any]) -> DistillState | None:
    """Read what `write_state` wrote; None if there is no such file.

    Raises:
        LoadError: a truncated or foreign file.
        DataError: a state of another model, or of a run with other arguments, by name.
    """
    if not path.exists():
        return None
    try:
        text, tensors = read_tensors(path, key=_METADATA_KEY)
        if text is None:
            raise LoadError(
                f"{str(path)!r} is a safetensors file, but no checkpoint of a distillation. Give "
                "another path."
            )
        found = _Metadata.model_validate_json(text)
    except (OSError, SafetensorError, ValidationError) as error:
        raise LoadError(
            f"the checkpoint {str(path)!r} is truncated or foreign: {str(error).splitlines()[0]}. "
            "Remove it to start anew."
        ) from None
    if found.format_version != _FORMAT_VERSION:
        raise LoadError(
            f"the checkpoint {str(path)!r} was written by another version of mpocompress (format "
            f"{found.format_version}, this one writes {_FORMAT_VERSION}). Remove it to start anew."
        )
    check_same_run(path, found.arguments, arguments)
    count = sum(name.startswith("best.") for name in tensors)
    moments: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, value in tensors.items():
        if name.startswith("moments."):
            _, index, key = name.split(".")
            moments[int(index)][key] = value
    return DistillState(
        phase=found.phase,
        step=found.step,
        learning_rate=found.learning_rate,
        learning_rates=found.learning_rates,
        stale=found.stale,
        best_loss=found.best_loss,
        best_record=found.best_record,
        history=list(found.history),
        current=[tensors[f"current.{index}"] for index in range(count)],
        best=[tensors[f"best.{index}"] for index in range(count)],
        moments=moments,
    )
