"""How far a compressed model's outputs are from the dense one's: of every layer, and of the model.

A layer's error is that of its outputs where it stands: it contains what the layers before it did.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, OutputsDifferError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.tuning.lockstep import Call, floating_outputs, rows_of, seeded_call
from mpocompress.tuning.padding import keep_mask, real_rows
from mpocompress.tuning.ruled_out import both_without_infinite


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputErrors:
    """Relative errors, norm of the difference over norm of the dense outputs; padding not counted.

    Attributes:
        layers: by name; those that the data reaches, and whose calls correspond in both models. A
            router that sends rows to experts may choose others once it is compressed, too.
        model: of all floating outputs of the model.
        rows: of the batches.
    """

    layers: Mapping[str, float]
    model: float
    rows: int

    @property
    def largest(self) -> float:
        """Of the layers and the model."""
        return max([self.model, *self.layers.values()])


def output_errors(
    dense: nn.Module, compressed: nn.Module, layers: Sequence[str], calls: Iterable[Call]
) -> OutputErrors:
    """Run both models on the same batches and compare.

    Args:
        dense: the reference; its mode is restored, as is the other's.
        compressed: with the same qualified names.
        layers: names of modules whose output is a single tensor.
        calls: batches.

    Raises:
        DataError: no batches.
        OutputsDifferError: outputs of the models of other shapes, or with other infinite entries.
    """
    sums = {name: OutputChange() for name in layers}
    whole = OutputChange()
    rows = 0
    with evaluation_mode(dense), evaluation_mode(compressed), torch.no_grad():
        for number, call in enumerate(calls):
            keep = keep_mask(call.kwargs)
            with _outputs_of(dense, layers) as ours:
                expected = floating_outputs(seeded_call(dense, call, number))
            with _outputs_of(compressed, layers) as theirs:
                found = floating_outputs(seeded_call(compressed, call, number))
            for name in list(sums):
                if [t.shape for t in ours[name]] != [t.shape for t in theirs[name]]:
                    del sums[name]
                    continue
                for left, right in zip(ours[name], theirs[name], strict=True):
                    sums[name].add(left, right, keep)
            whole.add_all(expected, found, keep)
            rows += rows_of(call)
    if not rows:
        raise DataError("there are no batches to compare outputs on.")
    return OutputErrors(
        layers={name: total.relative for name, total in sums.items() if total.seen},
        model=whole.relative,
        rows=rows,
    )


class OutputChange:
    """Squares of outputs and of their differences, summed in float64.

    Attributes:
        energy: of the outputs.
        difference: of the differences.
        seen: whether any were added.
    """

    def __init__(self) -> None:
        self.energy = 0.0
        self.difference = 0.0
        self.seen = False

    def add_all(
        self, expected: Sequence[Tensor], found: Sequence[Tensor], keep: Tensor | None
    ) -> None:
        """Add all outputs of both models, without padding.

        Raises:
            OutputsDifferError: of other shapes, or not as many, as a detector has whose threshold
                decides what it gives; or see `add`.
        """
        ours, theirs = ([tuple(output.shape) for output in side] for side in (expected, found))
        if ours != theirs:
            raise OutputsDifferError(
                f"the outputs of the dense model, of shapes {_some(ours)}, cannot be compared with "
                f"those of the compressed one, of shapes {_some(theirs)}: how many there are "
                "depends on their values. Let the model return what it decides by."
            )
        for left, right in zip(expected, found, strict=True):
            self.add(left, right, keep)

    def add(self, expected: Tensor, found: Tensor, keep: Tensor | None) -> None:
        """Add an output of both models, of equal shapes, without padding.

        Raises:
            OutputsDifferError: other answers are ruled out, by -Inf.
        """
        if expected.ndim >= 2:
            expected, found = real_rows(expected, keep), real_rows(found, keep)
        found, expected = both_without_infinite(found.double(), expected.double())
        self.energy += float(expected.square().sum())
        self.difference += float((expected - found).square().sum())
        self.seen = True

    @property
    def relative(self) -> float:
        """Norm of the difference over norm of the outputs; NaN if some output is."""
        if self.energy == 0:
            return 0.0 if self.difference == 0 else inf
        return sqrt(self.difference / self.energy)


def _some(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes[:3])) + (", ..." if len(shapes) > 3 else "")


@contextmanager
def _outputs_of(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What these layers give while the block runs, call by call."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keeper(name: str) -> Any:
        def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name].append(output.clone())  # a model may change it in place

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
