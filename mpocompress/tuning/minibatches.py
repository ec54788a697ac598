"""Training data: a held-out part, and minibatches whose order is a function of seed and epoch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from mpocompress.errors import DataError
from mpocompress.layers.modes import seed_of_part
from mpocompress.scalars import as_integer, as_number
from mpocompress.tuning.lockstep import Call, rows_of

# Without a batch size, batches of more rows than this are cut, into minibatches of the size below.
LARGE_BATCH = 128
MINIBATCH = 64


def check_batch_size(batch_size: int | None) -> int | None:
    """Rows of a minibatch, as a plain integer; None as it is.

    Raises:
        DataError: below 1, or no integer.
    """
    if batch_size is None:
        return None
    rows = as_integer(batch_size)
    if rows is None or rows < 1:
        raise DataError(f"batch_size {batch_size!r}: a batch has at least 1 row. Try 64.")
    return rows


def check_held_out(held_out: float) -> float:
    """A share of the data, as a plain number.

    Raises:
        DataError: outside [0, 1), or no number.
    """
    share = as_number(held_out)
    if not 0 <= share < 1:
        raise DataError(
            f"held_out {held_out!r}: the share of the data to hold out is at least 0 and "
            "below 1. Try 0.1."
        )
    return share


@dataclass(frozen=True, eq=False)
class Minibatch:
    """Arguments of one forward call.

    Attributes:
        args: positional forward arguments.
        kwargs: forward arguments by name.
        labels: targets, one entry a row, where there are any.
        divisible: whether rows may be taken out of it, as examples of their own.
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    divisible: bool = True

    @property
    def rows(self) -> int:
        """Size of the first dimension of the first argument that has one."""
        return rows_of(self)

    def take(self, rows: Tensor) -> "Minibatch":
        """Some of the rows, by their numbers; the batch must be divisible."""
        return Minibatch(
            tuple(t[rows.to(t.device)] for t in self.args),
            {name: t[rows.to(t.device)] for name, t in self.kwargs.items()},
            None if self.labels is None else self.labels[rows.to(self.labels.device)],
        )


class TrainingData:
    """Batches, a part of them held out, and an endless and repeatable sequence of minibatches.

    Args:
        calls: batches of forward arguments.
        batch_size: rows of a minibatch: batches whose arguments have equal shapes but for the
            first dimension are pooled, and their rows are shuffled anew in every epoch; those that
            are not divisible are taken as they are. None takes
            batches of up to 128 rows as they are, in shuffled order, and cuts larger ones, or a
            single one, into minibatches of 64.
        held_out: share of the rows (of batches that are not cut: of the batches) that is never
            trained on, at least one; 0 for none.
        least_held: so many rows of those that are cut, and of those that are not, are held out at
            least, up to a third of them, if any are: what a share of few rows says is noise.
        seed: of the order and of what is held out.
        labelled: whether the batches' labels go along.

    Raises:
        DataError: no batches, a batch size below 1, or a share outside [0, 1).
    """

    def __init__(
        self,
        calls: Sequence[Call],
        *,
        batch_size: int | None,
        held_out: float,
        least_held: int = 1,
        seed: int,
        labelled: bool = False,
    ) -> None:
        if not calls:
            raise DataError("there are no batches to train on.")
        batch_size, held_out = check_batch_size(batch_size), check_held_out(held_out)
        self._seed = seed
        self._size = batch_size or MINIBATCH
        given = [
            Minibatch(
                tuple(call.args),
                dict(call.kwargs),
                getattr(call, "labels", None) if labelled else None,
                getattr(call, "divisible", True),
            )
            for call in calls
        ]
        whole, parts = _sorted_out(given, batch_size)
        self._whole = whole
        self._pools = _pooled(parts)
        self.rows = sum(batch.rows for batch in given)
        generator = self._generator(-1)
        sizes = torch.tensor([b.rows for b in whole], dtype=torch.int64, device="cpu")
        self._train_whole, self._held_whole = _split(sizes, held_out, generator, least_held)
        self._rows = [
            _split(
                torch.ones(pool.rows, dtype=torch.int64, device="cpu"),
                held_out,
                generator,
                least_held,
            )
            for pool in self._pools
        ]
        self._order: tuple[int, list[tuple[Minibatch, Tensor | None]]] | None = None
        if self.minibatches_per_epoch == 0:
            raise DataError(
                f"held_out {held_out!r} leaves nothing of {self.rows} rows to train on."
            )

    @property
    def whole(self) -> list[Minibatch]:
        """The batches that are trained on as they are, the same objects in every epoch."""
        return [self._whole[int(index)] for index in self._train_whole]

    @property
    def minibatches_per_epoch(self) -> int:
        """Optimizer steps in which every training row is seen once."""
        return len(self._train_whole) + sum(
            ceil(len(train) / self._size) for train, _ in self._rows
        )

    def minibatch(self, step: int) -> Minibatch:
        """The minibatch of a step, counted from 0: a function of the seed and the step alone."""
        epoch, place = divmod(step, self.minibatches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch(epoch))
        batch, rows = self._order[1][place]
        return batch if rows is None else batch.take(rows)

    def held_out(self) -> Iterator[Minibatch]:
        """The held-out part; all of the data where nothing is (a single row, or a share of 0)."""
        nothing = not len(self._held_whole) and not any(len(held) for _, held in self._rows)
        for index in self._train_whole if nothing else self._held_whole:
            yield self._whole[int(index)]
        for pool, (train, held) in zip(self._pools, self._rows, strict=True):
            for rows in (train if nothing else held).split(self._size):
                if len(rows):
                    yield pool.take(rows)

    def _epoch(self, epoch: int) -> list[tuple[Minibatch, Tensor | None]]:
        generator = self._generator(epoch)
        found: list[tuple[Minibatch, Tensor | None]] = [
            (self._whole[int(index)], None) for index in self._train_whole
        ]
        for pool, (train, _) in zip(self._pools, self._rows, strict=True):
            shuffled = train[torch.randperm(len(train), generator=generator, device="cpu")]
            # Parts of equal size: a last minibatch of one row would be a step of pure noise.
            count = ceil(len(train) / self._size)
            found += [(pool, rows) for rows in shuffled.tensor_split(count)] if count else []
        return [
            found[int(place)]
            for place in torch.randperm(len(found), generator=generator, device="cpu")
        ]

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of_part(self._seed, epoch + 1))


def _sorted_out(
    given: Sequence[Minibatch], batch_size: int | None
) -> tuple[list[Minibatch], list[Minibatch]]:
    """Which batches are taken as they are, and which are cut by rows."""
    whole: list[Minibatch] = []
    parts: list[Minibatch] = []
    for batch in given:
        tensors = (*batch.args, *batch.kwargs.values(), *_labels(batch))
        divisible = batch.divisible and all(t.ndim and t.shape[0] == batch.rows for t in tensors)
        wanted = batch_size is not None or batch.rows > LARGE_BATCH or len(given) == 1
        (parts if divisible and wanted else whole).append(batch)
    return whole, parts


def _pooled(parts: Sequence[Minibatch]) -> list[Minibatch]:
    """Batches whose arguments differ in the first dimension only, as one."""
    groups: dict[tuple[object, ...], list[Minibatch]] = {}
    for batch in parts:
        named = (
            *enumerate(batch.args),
            *sorted(batch.kwargs.items()),
            *enumerate(_labels(batch), -1),
        )
        key = tuple((name, t.shape[1:], t.dtype) for name, t in named)
        groups.setdefault(key, []).append(batch)
    return [
        group[0]
        if len(group) == 1
        else Minibatch(
            tuple(torch.cat(tensors) for tensors in zip(*(b.args for b in group), strict=True)),
            {name: torch.cat([b.kwargs[name] for b in group]) for name in group[0].kwargs},
            torch.cat([label for b in group for label in _labels(b)])
            if _labels(group[0])
            else None,
        )
        for group in groups.values()
    ]


def _labels(batch: Minibatch) -> tuple[Tensor, ...]:
    return () if batch.labels is None else (batch.labels,)


def _split(
    rows: Tensor, share: float, generator: torch.Generator, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Numbers to train on, and held out; at least one each if there are two.

    Args:
        rows: of each number, int64.
        share: of the numbers that is held out.
        generator: of which these are.
        least: so many rows at least, up to a third of all.
    """
    count = len(rows)
    order = torch.randperm(count, generator=generator, device="cpu")
    held = 0
    if share > 0 and count > 1:
        wanted = min(least, int(rows.sum()) // 3)
        enough = 1 + int((rows[order].cumsum(0) < wanted).sum())
        held = min(max(round(share * count), enough), count - 1)
    return order[held:].sort().values, order[:held].sort().values
