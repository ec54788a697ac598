"""The state of sweeps on the loss between two layers: one safetensors file, never a pickle.

It holds the tensors that the sweeps change and, as JSON in the metadata, where they are, the
history, and the settings; every sweep along a layer begins with a fresh optimizer and with random
numbers that follow from the seed and its place, so nothing else is needed to go on bit for bit.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mpocompress.errors import LoadError
from mpocompress.tuning.state_file import read_tensors, write_tensors
from mpocompress.tuning.sweep_options import LossSweepRecord

_KEY = "mpocompress.loss_sweeps"
_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepState:
    """What is written after each sweep along a layer.

    Attributes:
        settings: options and data that a continuation must share; JSON values only.
        caps: largest bond dimension of each layer, null for none.
        step_scales: of each layer, see `loss_sweeps`.
        history: so far.
        tensors: cores as `<layer>/<site>`, dense parameters under their names.
    """

    settings: Mapping[str, Any]
    caps: Mapping[str, int | None]
    step_scales: Mapping[str, float]
    history: tuple[LossSweepRecord, ...]
    tensors: Mapping[str, Tensor]


def write_state(state: SweepState, path: Path) -> None:
    """Write the state aside and rename, so that a killed run leaves the old state or the new.

    Raises:
        SaveError: it cannot be written.
    """
    facts = {
        "version": _VERSION,
        "settings": state.settings,
        "caps": state.caps,
        "step_scales": state.step_scales,
        "history": [asdict(record) for record in state.history],
    }
    write_tensors(path, state.tensors, key=_KEY, text=json.dumps(facts))


def read_state(path: Path) -> SweepState:
    """Read a state.

    Raises:
        LoadError: truncated, foreign or of another version.
    """
    try:
        text, tensors = read_tensors(path, key=_KEY)
        facts = json.loads(text or "null")
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(
            f"{str(path)!r} is truncated or not a state of sweeps: {error}. Remove it to begin "
            "anew."
        ) from None
    if not isinstance(facts, dict) or facts.get("version") != _VERSION:
        raise LoadError(
            f"{str(path)!r} is not a state of sweeps that this release can read. Remove it, or "
            "give another path."
        )
    history = tuple(
        LossSweepRecord(
            **{
                **record,
                "bond_dims": tuple(record["bond_dims"]),
                "entropies_nats": tuple(record["entropies_nats"]),
            }
        )
        for record in facts["history"]
    )
    return SweepState(
        settings=facts["settings"],
        caps=facts["caps"],
        step_scales=facts["step_scales"],
        history=history,
        tensors=tensors,
    )
