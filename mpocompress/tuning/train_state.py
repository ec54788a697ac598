"""The state of a training on disk: safetensors with JSON in the metadata, never a pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mpocompress.errors import LoadError
from mpocompress.tuning.state_file import check_same_run, read_tensors, write_tensors
from mpocompress.tuning.train_options import TrainRecord

_KEY = "mpocompress.training"
_VERSION = 3
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


def write_state(path: Path, state: TrainState, arguments: Mapping[str, Any]) -> None:
    """Write a state aside and rename, so that a killed run leaves the old file or the new.

    Raises:
        SaveError: it cannot be written.
    """
    facts = {
        "version": _VERSION,
        "arguments": dict(arguments),
        "done": state.done,
        "step": state.step,
        "stale": state.stale,
        "best_loss": state.best_loss,
        "best_record": state.best_record,
        "history": [asdict(record) for record in state.history],
    }
    tensors = {
        f"{group}.{name}": tensor
        for group in _GROUPS
        for name, tensor in getattr(state, group).items()
    }
    write_tensors(path, tensors, key=_KEY, text=json.dumps(facts))


def read_state(path: Path, arguments: Mapping[str, Any]) -> TrainState | None:
    """Read what `write_state` wrote; None if there is no such file.

    Raises:
        LoadError: a truncated or foreign file.
        DataError: a state of another model, or of a run with other arguments, by name.
    """
    if not path.exists():
        return None
    try:
        text, tensors = read_tensors(path, key=_KEY)
        facts = json.loads(text or "null")
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(
            f"the checkpoint {str(path)!r} is truncated or foreign: {error}. Remove it to start "
            "anew."
        ) from None
    if not isinstance(facts, dict) or facts.get("version") != _VERSION:
        raise LoadError(
            f"{str(path)!r} is no checkpoint of a training that this release can read. Remove it, "
            "or give another path."
        )
    check_same_run(path, facts["arguments"], json.loads(json.dumps(dict(arguments))))
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    return TrainState(
        done=facts["done"],
        step=facts["step"],
        stale=facts["stale"],
        best_loss=facts["best_loss"],
        best_record=facts["best_record"],
        history=[_record(record) for record in facts["history"]],
        **groups,
    )


def _record(facts: dict[str, Any]) -> TrainRecord:
    """JSON knows no tuples."""
    for name in ("bond_dims", "entropies_nats"):
        facts[name] = {layer: tuple(values) for layer, values in facts[name].items()}
    return TrainRecord(**facts)
