"""The state of a training on disk: safetensors with JSON in the metadata, never a pickle."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpocompress.errors import DataError, LoadError, SaveError
from mpocompress.tuning.train_options import TrainRecord

_KEY = "mpocompress.training"
_VERSION = 1
_GROUPS = ("current", "best", "method")


@dataclass(kw_only=True)
class TrainState:
    """All that a training needs to go on: nothing else may influence what follows.

    Attributes:
        done: segments (epochs or sweeps) that are done.
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
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {
            f"{group}.{name}": tensor.detach().cpu().contiguous().clone()
            for group in _GROUPS
            for name, tensor in getattr(state, group).items()
        }
        save_file(tensors, aside, metadata={_KEY: json.dumps(facts)})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write the checkpoint {str(path)!r}: {error}.") from error
    finally:
        aside.unlink(missing_ok=True)


def read_state(path: Path, arguments: Mapping[str, Any]) -> TrainState | None:
    """Read what `write_state` wrote; None if there is no such file.

    Raises:
        LoadError: a truncated or foreign file.
        DataError: a state of another model, or of a run with other arguments, by name.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    for name, value in json.loads(json.dumps(dict(arguments))).items():
        if facts["arguments"].get(name) != value:
            raise DataError(
                f"the checkpoint {str(path)!r} belongs to a run with {name} = "
                f"{facts['arguments'].get(name)!r}, and this one has {value!r}. Give the same "
                "arguments, another path, or remove it to start anew."
            )
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
