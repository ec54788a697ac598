"""The state of a training on disk: safetensors with JSON in the metadata, never a pickle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mpocompress.tuning.state_file import StateFacts, StateFormat, check_same_run
from mpocompress.tuning.training.options import TrainRecord

_GROUPS = ("current", "best", "method")


@dataclass(kw_only=True)
class TrainState:
    """All that a training needs to go on: nothing else may influence what follows.

    Attributes:
        done: segments (epochs, or rounds of sweeps) that are done.
        step: optimizer steps that are done.
        stale: evaluations since the best one.
        best_loss: validation loss of the best weights.
        best_record: its place in the history.
        history: all evaluations.
        current: the model's state, where it is needed: on disk.
        best: the model's state at the best evaluation.
        method: moments of the optimizer that lives from segment to segment.
    """

    done: int = 0
    step: int = 0
    stale: int = 0
    best_loss: float = float("inf")
    best_record: int = 0
    history: list[TrainRecord] = field(default_factory=list)
    current: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    method: dict[str, Tensor] = field(default_factory=dict)


class _Facts(StateFacts):
    arguments: dict[str, Any]
    done: int
    step: int
    stale: int
    best_loss: float
    best_record: int
    history: list[TrainRecord]


_FORMAT = StateFormat(
    what="checkpoint of a training",
    anew="start anew",
    key="mpocompress.training",
    version=3,
    facts=_Facts,
)


def write_state(path: Path, state: TrainState, arguments: Mapping[str, Any]) -> None:
    """Write a state aside and rename, so that a killed run leaves the old file or the new.

    Raises:
        SaveError: it cannot be written.
    """
    facts = _Facts.of(state, arguments=dict(arguments))
    tensors = {
        f"{group}.{name}": tensor
        for group in _GROUPS
        for name, tensor in getattr(state, group).items()
    }
    _FORMAT.write(path, facts, tensors)


def read_state(path: Path, arguments: Mapping[str, Any]) -> TrainState | None:
    """Read what `write_state` wrote; None if there is no such file.

    Raises:
        LoadError: a truncated or foreign file.
        DataError: a state of another model, or of a run with other arguments, by name.
    """
    if not path.exists():
        return None

    def build(facts: _Facts, tensors: Mapping[str, Tensor]) -> TrainState:
        check_same_run(path, facts.arguments, arguments)
        groups: dict[str, Any] = {group: {} for group in _GROUPS}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        return TrainState(**facts.named(without=["arguments"]), **groups)

    return _FORMAT.read(path, build)
