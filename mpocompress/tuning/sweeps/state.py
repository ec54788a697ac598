"""The state of sweeps on the loss between two layers: one safetensors file, never a pickle.

It holds the tensors that the sweeps change and, as JSON in the metadata, where they are, the
history, and the settings; every sweep along a layer begins with a fresh optimizer and with random
numbers that follow from the seed and its place, so nothing else is needed to go on bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpocompress.tuning.state_file import StateFacts, StateFormat
from mpocompress.tuning.sweeps.options import LossSweepRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepState:
    """What is written after each sweep along a layer.

    Attributes:
        settings: options and data that a continuation must share; JSON values only.
        caps: largest bond dimension of each layer, null for none.
        step_scales: of each layer, see `on_loss`.
        history: so far.
        tensors: cores as `<layer>/<site>`, dense parameters under their names.
    """

    settings: Mapping[str, Any]
    caps: Mapping[str, int | None]
    step_scales: Mapping[str, float]
    history: tuple[LossSweepRecord, ...]
    tensors: Mapping[str, Tensor]


class _Facts(StateFacts):
    settings: dict[str, Any]
    caps: dict[str, int | None]
    step_scales: dict[str, float]
    history: tuple[LossSweepRecord, ...]


STATE_OF_SWEEPS = StateFormat(
    what="state of sweeps",
    anew="begin anew",
    key="mpocompress.loss_sweeps",
    version=2,
    facts=_Facts,
)


def write_state(path: Path, state: SweepState) -> None:
    """Write the state aside and rename, so that a killed run leaves the old state or the new.

    Raises:
        SaveError: it cannot be written.
    """
    STATE_OF_SWEEPS.write(path, _Facts.of(state), state.tensors)


def read_state(path: Path) -> SweepState:
    """Read a state.

    Raises:
        LoadError: truncated, foreign or of another version.
    """

    def build(facts: _Facts, tensors: Mapping[str, Tensor]) -> SweepState:
        return SweepState(**facts.named(), tensors=tensors)

    return STATE_OF_SWEEPS.read(path, build)
