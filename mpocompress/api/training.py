"""Train a tensor neural network from the start, on labels."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.api.calling import by_itself
from mpocompress.api.data import calls_of
from mpocompress.errors import DataError
from mpocompress.layers.gauges import plain_gauge
from mpocompress.loading import Batch, as_batch
from mpocompress.planning import Progress
from mpocompress.scalars import as_number
from mpocompress.tuning import (
    Loss,
    SupervisedLoss,
    TrainOptions,
    TrainResult,
    supervised_loss,
    train_,
)
from mpocompress.tuning.sweeps.options import GradientPath
from mpocompress.tuning.training.options import Method, Sites

_BAR = 30


@by_itself
def train(
    model: nn.Module,
    data: Any,
    *,
    loss: SupervisedLoss | Literal["auto"] | Loss = "auto",
    method: Method = "dmrg",
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float | None = None,
    dense_learning_rate: float | None = None,
    sites: Sites = 1,
    local_steps: int = 8,
    bond_dim: int | None = None,
    cutoff: float = 0.0,
    gradient: GradientPath = "autograd",
    train_dense: bool = True,
    validation: Any = 0.1,
    patience: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | bool = False,
) -> TrainResult:
    """Train a network with MPO layers in place: by DMRG-like sweeps, or by Adam on all cores.

    `method="dmrg"` goes along the cores of all layers at once, there and back. The orthogonality
    center of each moves along (by QR, so the function stays), and where it stands one core, or two
    merged ones, takes gradient steps on minibatches. With two sites bonds grow: start with layers
    of bond_dim=1, give sites="grow" and a `bond_dim` or a `cutoff`.

    Args:
        model: with MPO layers (`MPOLinear`, `tensorize`) and any others; all are trained. Frozen
            parameters (`requires_grad` off) keep their values; where some cores of a layer are
            frozen, sweeps leave its gauge as it is, and steps are relative to each core's own size.
        data: (inputs, labels), two tensors or arrays of equal length; or batches, each a pair
            (inputs, labels), a tuple whose last entry is the labels, or a dict with "labels".
        loss: "cross_entropy" (logits against class numbers, those below 0 left out), "mse", or
            `loss(model, batch)`, where `batch` has `args`, `kwargs` and `labels`, that gives a
            scalar. "auto": cross-entropy for integer labels, mse for floating ones.
        method: "dmrg" or "adam".
        epochs: passes over the training rows; sweeps see as many, but are two at least.
        batch_size: rows of a minibatch.
        learning_rate: peak for the cores; "dmrg": relative to the size that the open core had at
            the start, 0.05 by default; "adam": 0.01. It falls along a cosine.
        dense_learning_rate: peak for everything else, 0.003 by default; "adam": 0.002.
        sites: for "dmrg", 1, 2, or "grow": two-site in the first half, one-site after it.
        local_steps: for "dmrg", gradient steps at each position.
        bond_dim: for two sites, the largest bond dimension, reached by doubling from sweep to
            sweep; None: the largest one at the start, or no limit with a cutoff.
        cutoff: for two sites, the largest truncation error of a split.
        gradient: for "dmrg", of the open core: "autograd", or "manual", contracted by hand.
        train_dense: whether parameters that are not cores are trained along.
        validation: share of the rows to hold out, or data like `data`. The weights with the least
            validation loss are kept; with 0 there is no validation, and the last ones are.
        patience: stop after so many evaluations without a better one; None: never.
        include: patterns of names of MPO layers whose cores are trained; default: all.
        exclude: likewise; they win.
        seed: of everything random here; the start of the weights is the model's own.
        checkpoint: file that is written after each evaluation; a run with the same arguments
            goes on from there and ends as if it had not been interrupted.
        progress: True draws a bar on a terminal's stderr; or a function
            `progress(what, done, total)`.

    Returns:
        The history: losses, score (accuracy or R^2), bond dimensions and entanglement entropies,
        the start first; and which entry was kept.

    Raises:
        NoLayerMatched: sweeps without MPO layers, or patterns that match nothing.
        DataError: no data, labels or shapes that do not fit, NaN, or an impossible option.
        MPOCompressError: see `tuning.train_`.

    Source: Jahromi, Orús, "Variational Tensor Neural Networks for Deep Learning", arXiv 2211.14657.
    """
    share = not isnan(as_number(validation))
    options = TrainOptions(
        method=method,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dense_learning_rate=dense_learning_rate,
        sites=sites,
        local_steps=local_steps,
        bond_dim=bond_dim,
        cutoff=cutoff,
        gradient=gradient,
        train_dense=train_dense,
        held_out=as_number(validation) if share else 0.0,
        patience=patience,
        seed=seed,
    )
    calls = _labelled_calls(data, model, "data")
    with plain_gauge(model):
        return train_(
            model,
            supervised_loss(loss, calls[0]),
            calls,
            validation=() if share else _labelled_calls(validation, model, "validation"),
            options=options,
            include=include,
            exclude=exclude,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=_bar if progress is True else (progress or None),
        )


def _labelled_calls(data: Any, model: nn.Module, place: str) -> list[Batch]:
    """The user's batches with their labels, on the model's device."""
    if isinstance(data, tuple) and len(data) == 2 and all(map(_is_array, data)):
        data = [data]
    if _is_array(data) or isinstance(data, Mapping | str) or not isinstance(data, Iterable):
        raise DataError(
            f"{place} is a {type(data).__name__}. Give (inputs, labels), or an iterable of such "
            "pairs, or of dicts with an entry 'labels'."
        )
    calls = calls_of([_read(value, f"{place}, batch {k}") for k, value in enumerate(data)], model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return [
        call if call.labels is None else replace(call, labels=call.labels.to(device))
        for call in calls
    ]


def _read(value: Any, place: str) -> Batch:
    if not isinstance(value, tuple | list) or len(value) < 2:
        batch = as_batch(value, place=place)
    else:
        batch = as_batch({"labels": value[-1]} | _named(value[:-1]), place=place)
    labels = batch.labels
    if labels is not None and not bool(torch.isfinite(labels).all()):
        raise DataError(f"{place}: labels with NaN or Inf. Clean the data first.")
    return batch


def _named(args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments under the names that files have for them."""
    return {f"arr_{position}": value for position, value in enumerate(args)}


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _bar(what: str, done: int, total: int) -> None:
    """A line that is drawn over and over, on a terminal only."""
    if not sys.stderr.isatty():
        return
    filled = _BAR * (done + 1) // total
    end = "\n" if done + 1 == total else ""
    bar = "#" * filled + "." * (_BAR - filled)
    sys.stderr.write(f"\r{what} [{bar}] {done + 1}/{total}{end}")
    sys.stderr.flush()
