"""The state of a distillation on disk: safetensors with JSON in the metadata, never a pickle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mpocompress.tuning.state_file import StateFacts, StateFormat, check_same_run


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


class _Facts(StateFacts):
    arguments: dict[str, Any]
    phase: int
    step: int
    learning_rate: float | None
    learning_rates: dict[str, float]
    stale: int
    best_loss: float
    best_record: int
    history: list[DistillRecord]


_FORMAT = StateFormat(
    what="checkpoint of a distillation",
    anew="start anew",
    key="mpocompress.distillation",
    version=3,  # 1 had Adam's moments of cores, 2 nothing of the data
    facts=_Facts,
)


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
    _FORMAT.write(path, _Facts.of(state, arguments=dict(arguments)), tensors)


def read_state(path: Path, arguments: Mapping[str, Any]) -> DistillState | None:
    """Read what `write_state` wrote; None if there is no such file.

    Raises:
        LoadError: a truncated or foreign file.
        DataError: a state of another model, or of a run with other arguments, by name.
    """
    if not path.exists():
        return None

    def build(facts: _Facts, tensors: Mapping[str, Tensor]) -> DistillState:
        check_same_run(path, facts.arguments, arguments)
        count = sum(name.startswith("best.") for name in tensors)
        moments: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for name, value in tensors.items():
            if name.startswith("moments."):
                _, index, key = name.split(".")
                moments[int(index)][key] = value
        return DistillState(
            **facts.named(without=["arguments"]),
            current=[tensors[f"current.{index}"] for index in range(count)],
            best=[tensors[f"best.{index}"] for index in range(count)],
            moments=moments,
        )

    return _FORMAT.read(path, build)
