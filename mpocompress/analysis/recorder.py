"""Entanglement over training time."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mpocompress.analysis.entanglement import Entanglement, entanglement
from mpocompress.errors import DataError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The entanglement of a model after so many steps."""

    step: int
    entanglement: Entanglement


class EntanglementRecorder:
    """Takes a snapshot of a model's entanglement every so many calls: a callback for any loop.

        recorder = EntanglementRecorder(model, every=10)
        for batch in batches:
            train(model, batch)
            recorder()

    Args:
        model: looked at when called; a first snapshot is taken at once, as step 0.
        every: steps between snapshots.
        measure: how; default `entanglement`. For options, give
            `lambda model: entanglement(model, include=["0"])`.

    Raises:
        DataError: `every` below 1.

    Attributes:
        snapshots: so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        measure: Callable[[nn.Module], Entanglement] = entanglement,
    ) -> None:
        if isinstance(every, bool) or every < 1:
            raise DataError(f"every {every!r}: a snapshot is taken every 1 step at most. Try 10.")
        self._model, self._every, self._measure = model, every, measure
        self._steps = 0
        self.snapshots = [Snapshot(0, measure(model))]

    def __call__(self, *_: object) -> None:
        """Count a step, and take a snapshot if it is time; arguments of a callback are ignored."""
        self._steps += 1
        if self._steps % self._every == 0:
            self.snapshots.append(Snapshot(self._steps, self._measure(self._model)))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the snapshots."""
        return tuple(snapshot.step for snapshot in self.snapshots)

    @property
    def names(self) -> tuple[str, ...]:
        """Layers, in model order."""
        return tuple(layer.name for layer in self.snapshots[0].entanglement.layers)

    def entropies_nats(self, name: str) -> tuple[tuple[float, ...], ...]:
        """For each snapshot the entropies at all bonds of one layer.

        Raises:
            KeyError: no such layer.
        """
        return tuple(shot.entanglement.layer(name).entropies_nats for shot in self.snapshots)
