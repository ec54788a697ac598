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

from mpocompress.tuning.padding import real_indices, real_rows
from mpocompress.tuning.statistics.layer_rows import adapter_of, row_pieces
from mpocompress.tuning.statistics.moments import CrossMoment, RowCounts, joined_rows, widened


@dataclass(frozen=True, slots=True)
class Place:
    """One batch at one layer, in both models.

    Attributes:
        dense: input of the layer in the dense model.
        ours: input of the layer after the compressed prefix.
        streams: residual stream that the layer feeds, dense and ours, if there is one.
        weight: a / b where the stream h and the output y of the layer make a h + b y.
    """

    dense: Tensor
    ours: Tensor
    streams: tuple[Tensor, Tensor] | None
    weight: float = 1.0


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

    def count(self, layer: nn.Module, places: Sequence[Place | None]) -> RowCounts:
        """How often each row of a table was looked up; None for a batch that does not call it."""
        counts = RowCounts()
        table_rows = adapter_of(layer).matrix(layer).shape[0]
        for place, mask in self._here(places):
            counts.add(real_indices(place.ours, mask), table_rows)
        return counts

    def collect(self, layer: nn.Module, places: Sequence[Place | None]) -> list[Moments]:
        """One entry for the even and one for the odd batches, or entries of a single batch.

        A single one for a batch of one; none for no batch, None for one that does not call it.
        """
        batches = self._here(places)
        if not batches:
            return []
        seen = [value for place, _ in batches for value in (place.dense, place.ours)]
        adapter = adapter_of(layer)
        plain = adapter.takes_rows
        same = (
            plain
            and len(seen) == len(self._seen)
            and all(a is b for a, b in zip(seen, self._seen, strict=True))
        )
        folds = _two_folds(batches) if plain or len(batches) > 1 else [batches]
        weight_OI = adapter.matrix(layer)
        # With few outputs, W (x - x^) with x^ costs less than x with x^.
        direct = plain and 2 * weight_OI.shape[0] <= weight_OI.shape[1]
        crossed, fresh = False, not same or (self._cross is None and not direct)
        if fresh:
            # Rows that were sent elsewhere than in the dense model have no counterpart there.
            unchanged = any(place.dense.shape != place.ours.shape for place, _ in batches) or all(
                torch.equal(place.dense, place.ours) for place, _ in batches
            )
            crossed = not (unchanged or direct)
            self._seen = seen if plain else []
            self._inputs = [CrossMoment() for _ in folds]
            self._cross = self._inputs if unchanged else None
            if crossed:
                self._cross = [CrossMoment() for _ in folds]
        unseen_OI = weight_OI if self._cross is None else None
        has_stream = plain and all(
            place.streams is not None and place.streams[0].shape[:-1] == place.ours.shape[:-1]
            for place, _ in batches
        )
        crosses: Sequence[CrossMoment | None] = self._cross or [None] * len(folds)
        found = [
            Moments(
                inputs=inputs,
                cross=cross,
                residual=CrossMoment() if has_stream or unseen_OI is not None else None,
            )
            for inputs, cross in zip(self._inputs, crosses, strict=True)
        ]
        for fold, moments in zip(folds, found, strict=True):
            pieces = _pieces(layer, fold, unseen_OI, crossed=crossed, has_stream=has_stream)
            if fresh or moments.residual is not None:
                for ours_NI, *others in joined_rows(pieces):
                    if fresh:
                        moments.inputs.add(ours_NI, ours_NI)
                    if crossed and moments.cross is not None:
                        moments.cross.add(others[0], ours_NI)
                    if moments.residual is not None:
                        moments.residual.add(others[-1], ours_NI)
        return found

    def _here(self, places: Sequence[Place | None]) -> "_Fold":
        return [
            (place, mask)
            for place, mask in zip(places, self._masks, strict=True)
            if place is not None
        ]


_Fold = Sequence[tuple[Place, Tensor | None]]


def _two_folds(batches: _Fold) -> list[_Fold]:
    """The even and the odd batches; of a single one its even and its odd entries, if it has two.

    For layers that take rows.
    """
    if len(batches) > 1:
        return [batches[0::2], batches[1::2]]
    place, mask = batches[0]
    sides = [place.dense, place.ours, *(place.streams or ())]
    entries = {side.shape[0] if side.ndim >= 2 else 1 for side in sides}
    if len(entries) > 1 or min(entries) < 2:
        return [batches]
    if mask is not None and place.dense.shape[:2] != mask.shape:
        mask = None  # of other rows, which its halves might fit by chance
    return [
        [
            (
                Place(
                    place.dense[fold::2],
                    place.ours[fold::2],
                    place.streams and (place.streams[0][fold::2], place.streams[1][fold::2]),
                    place.weight,
                ),
                None if mask is None else mask[fold::2],
            )
        ]
        for fold in range(2)
    ]


def _pieces(
    layer: nn.Module,
    fold: _Fold,
    unseen_OI: Tensor | None,
    *,
    crossed: bool,
    has_stream: bool,
) -> Iterator[tuple[Tensor, ...]]:
    """Rows of x^, of x if it is crossed, and of what is lost if that is asked for.

    That is h - h^ where there is a stream, and with a weight of W (x - x^) as well.
    """
    for place, mask in fold:
        with_dense = crossed or unseen_OI is not None
        activations = (place.ours, place.dense) if with_dense else (place.ours,)
        for ours_NI, *dense_NI in row_pieces(layer, activations, mask):
            lost: list[Tensor] = []
            if unseen_OI is not None:
                difference_NI = widened(dense_NI[0]) - widened(ours_NI)
                lost.append(difference_NI @ widened(unseen_OI.detach()).mT)
            if has_stream and place.streams is not None:
                dense_h, our_h = (real_rows(stream, mask) for stream in place.streams)
                # a h + b y = b (a / b h + y): to the layer, so much is lost of h.
                lost.append(place.weight * (widened(dense_h) - widened(our_h)))
            yield (
                ours_NI,
                *(dense_NI if crossed else ()),
                *([sum(lost[1:], lost[0])] if lost else ()),
            )


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
