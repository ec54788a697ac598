"""What reaches a layer in the dense model and behind the compressed prefix, as moments.

The layer at hand sees x^ where the dense model sees x; where its output is added to a residual
stream h, that is h^ by now. What a fit needs of it are the moments of x^, and those with x^ of what
is lost: e = W (x - x^) + (h - h^).
"""

# Shape suffixes: O out features, I in features, N rows.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpocompress.tuning.layer_rows import adapter_of, row_pieces
from mpocompress.tuning.moments import (
    CrossMoment,
    RowCounts,
    joined_rows,
    real_indices,
    real_rows,
    widened,
)


@dataclass(frozen=True, slots=True)
class Place:
    """One batch at one layer, in both models.

    Attributes:
        dense: input of the layer in the dense model.
        ours: input of the layer after the compressed prefix.
        streams: residual stream that the layer feeds, dense and ours, if there is one.
    """

    dense: Tensor
    ours: Tensor
    streams: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """What the fit of one layer needs, from a part of the batches.

    Attributes:
        inputs: of x^ with itself.
        cross: of x with x^; None if W (x - x^) is in `residual`.
        residual: of h - h^ with x^, where the layer feeds a stream; None if it is nothing.
    """

    inputs: CrossMoment
    cross: CrossMoment | None
    residual: CrossMoment | None


class Collector:
    """Moments of all batches at a layer, in two folds; layers with the same inputs share them.

    They do if they take their inputs as rows; others make rows of their own out of them.
    """

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        self._masks = masks
        self._seen: list[Tensor] = []  # kept alive, so that identity means identity
        self._inputs: list[CrossMoment] = []
        self._cross: list[CrossMoment] | None = None

    def count(self, layer: nn.Module, places: Sequence[Place]) -> RowCounts:
        """How often each row of a table was looked up."""
        counts = RowCounts()
        table_rows = adapter_of(layer).matrix(layer).shape[0]
        for place, mask in zip(places, self._masks, strict=True):
            counts.add(real_indices(place.ours, mask), table_rows)
        return counts

    def collect(self, layer: nn.Module, places: Sequence[Place]) -> list[Moments]:
        """One entry for the even and one for the odd batches; a single entry for one batch."""
        seen = [value for place in places for value in (place.dense, place.ours)]
        adapter = adapter_of(layer)
        plain = adapter.takes_rows
        same = (
            plain
            and len(seen) == len(self._seen)
            and all(a is b for a, b in zip(seen, self._seen, strict=True))
        )
        folds = [
            list(zip(places[fold::2], self._masks[fold::2], strict=True))
            for fold in range(min(2, len(places)))
        ]
        weight_OI = adapter.matrix(layer)
        # With few outputs, W (x - x^) with x^ costs less than x with x^.
        direct = plain and 2 * weight_OI.shape[0] <= weight_OI.shape[1]
        if not same or (self._cross is None and not direct):
            # Rows that were sent elsewhere than in the dense model have no counterpart there.
            unchanged = any(place.dense.shape != place.ours.shape for place in places) or all(
                torch.equal(place.dense, place.ours) for place in places
            )
            crossed = not (unchanged or direct)
            found = [_input_moments(layer, fold, crossed=crossed) for fold in folds]
            self._inputs = [inputs for inputs, _ in found]
            self._cross = None
            if unchanged or crossed:
                self._cross = [inputs if cross is None else cross for inputs, cross in found]
            self._seen = seen if plain else []
        crosses: Sequence[CrossMoment | None] = self._cross or [None] * len(folds)
        unseen_OI = weight_OI if self._cross is None else None
        has_stream = plain and all(
            place.streams is not None and place.streams[0].shape[:-1] == place.ours.shape[:-1]
            for place in places
        )
        return [
            Moments(
                inputs=inputs,
                cross=cross,
                residual=_residual_moments(fold, unseen_OI, has_stream=has_stream),
            )
            for fold, inputs, cross in zip(folds, self._inputs, crosses, strict=True)
        ]


_Fold = Sequence[tuple[Place, Tensor | None]]


def _input_moments(
    layer: nn.Module, fold: _Fold, *, crossed: bool
) -> tuple[CrossMoment, CrossMoment | None]:
    """Of x^ with itself and, if asked for, of x with x^; rows are made once."""
    pieces = (
        piece
        for place, mask in fold
        for piece in row_pieces(
            layer, (place.ours, place.dense) if crossed else (place.ours,), mask
        )
    )
    inputs, cross = CrossMoment(), CrossMoment() if crossed else None
    for ours_NI, *dense_NI in joined_rows(pieces):
        inputs.add(ours_NI, ours_NI)
        if cross is not None:
            cross.add(dense_NI[0], ours_NI)
    return inputs, cross


def _residual_moments(
    fold: _Fold, weight_OI: Tensor | None, *, has_stream: bool
) -> CrossMoment | None:
    """Of h - h^ with x^, and with a weight of W (x - x^) + h - h^; None if that is nothing.

    For layers that take rows. The stream counts if every batch has one whose rows are those of the
    input.
    """
    if not has_stream and weight_OI is None:
        return None

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for place, mask in fold:
            ours_NI = real_rows(place.ours, mask)
            lost: list[Tensor] = []
            if weight_OI is not None:
                dense_NI = real_rows(place.dense, mask)
                lost.append((widened(dense_NI) - widened(ours_NI)) @ widened(weight_OI.detach()).mT)
            if has_stream and place.streams is not None:
                dense_h, our_h = (real_rows(stream, mask) for stream in place.streams)
                lost.append(widened(dense_h) - widened(our_h))
            yield sum(lost[1:], lost[0]), ours_NI

    moment = CrossMoment()
    for residual_NO, ours_NI in joined_rows(pieces()):
        moment.add(residual_NO, ours_NI)
    return moment


def merged(folds: Sequence[Moments]) -> Moments:
    """Of all batches; every fold has the same kinds of moments."""
    inputs = CrossMoment.sum_of([fold.inputs for fold in folds])
    crosses = [fold.cross for fold in folds if fold.cross is not None]
    residuals = [fold.residual for fold in folds if fold.residual is not None]
    unchanged = all(fold.cross is fold.inputs for fold in folds)
    return Moments(
        inputs=inputs,
        cross=inputs if unchanged else CrossMoment.sum_of(crosses) if crosses else None,
        residual=CrossMoment.sum_of(residuals) if residuals else None,
    )
