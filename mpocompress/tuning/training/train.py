"""Train a network with MPO layers from the start, on labels: the variational method, or Adam.

Both are run segment by segment (sweeps over all layers, or an epoch). After each the validation
loss decides which weights are kept, and a checkpoint makes it possible to go on.

Source of the sweeps: Jahromi, Orús, "Variational Tensor Neural Networks for Deep Learning", arXiv
2211.14657.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, DecompositionError
from mpocompress.layers.modes import evaluation_mode, seed_of_part, seeded
from mpocompress.tuning.lockstep import Call
from mpocompress.tuning.minibatches import Minibatch, TrainingData
from mpocompress.tuning.objectives import Loss, scalar_loss
from mpocompress.tuning.state_file import identity
from mpocompress.tuning.sweeps.chains import Chain, find_chains, trainable_chains
from mpocompress.tuning.sweeps.local_problem import dense_parameters, only_gradients_of
from mpocompress.tuning.sweeps.options import Progress
from mpocompress.tuning.training.methods import AdamMethod, SweepMethod, TrainMethod
from mpocompress.tuning.training.options import TrainOptions, TrainRecord, TrainResult
from mpocompress.tuning.training.state import TrainState, read_state, write_state
from mpocompress.tuning.training.supervised import Supervised


def train_(
    model: nn.Module,
    loss: Supervised | Loss,
    calls: Sequence[Call],
    *,
    validation: Sequence[Call] = (),
    options: TrainOptions | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model in place.

    Steps are taken in training mode (dropout, batch statistics), evaluations in evaluation mode;
    every module's own mode and all `requires_grad` are restored. If anything is raised, the model
    has its old weights. Cores whose shape changed (two sites) are new parameters.

    Args:
        model: with MPO layers, in float32 or float64; "adam" trains models without any, too.
        loss: a scalar for a batch with `args`, `kwargs` and `labels`.
        calls: batches with labels, on the model's device; all are held in memory.
        validation: likewise, instead of a share of `calls`.
        options: see `TrainOptions`.
        include: patterns of names of MPO layers to train; default: all.
        exclude: likewise; they win.
        checkpoint: file that is written at each evaluation; a run with the same arguments goes on
            from there, and ends as if it had not been interrupted.
        progress: called as `progress(what, done, total)`.

    Raises:
        NoLayerMatched: sweeps without MPO layers that may change; patterns that match nothing.
        ConversionError: half types, or layers that share some cores and not others.
        DataError: no data, nothing to train, labels that do not fit, a loss that is not a finite
            scalar at the start, or a foreign checkpoint.
        LoadError: a truncated checkpoint.
        SaveError: the checkpoint cannot be written.
    """
    options = options or TrainOptions()
    chains = _chains(model, options, include, exclude)
    data = TrainingData(
        calls,
        batch_size=options.batch_size,
        held_out=0.0 if validation else options.held_out,
        seed=options.seed,
        labelled=True,
    )
    held_out = _validation(data, validation, options)
    start = _values(model)
    try:
        arguments = {}
        if checkpoint is not None:
            arguments = {
                **asdict(options),
                "rows of data": data.rows,
                **identity(start.values(), [*calls, *validation]),
            }
        trainer = _Trainer(
            model, chains, loss, data, held_out, options, checkpoint, arguments, progress
        )
        return trainer.run()
    except BaseException:
        _restore(model, start)
        raise


def _chains(
    model: nn.Module, options: TrainOptions, include: Sequence[str], exclude: Sequence[str]
) -> list[Chain]:
    """The MPO layers to train, in the order of the model."""
    return trainable_chains(model, include, exclude, may_be_none=options.method == "adam")


def _validation(
    data: TrainingData, validation: Sequence[Call], options: TrainOptions
) -> list[Minibatch]:
    if validation:
        given = TrainingData(
            validation, batch_size=options.batch_size, held_out=0.0, seed=0, labelled=True
        )
        return list(given.held_out())
    return list(data.held_out()) if options.held_out > 0 else []


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, apart from what it is not made of tensors."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def _restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, chain in find_chains(model, may_be_none=True).items():
        prefix = f"{name}." if name else ""
        sites = range(len(chain.cores))
        device = chain.cores[0].device
        chain.put([values[f"{prefix}cores.{site}"].to(device) for site in sites])
    for name, value in model.state_dict().items():
        if name in values:
            value.copy_(values[name])


class _Trainer:
    """Segments, evaluations, the best weights, checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        chains: Sequence[Chain],
        loss: Supervised | Loss,
        data: TrainingData,
        held_out: Sequence[Minibatch],
        options: TrainOptions,
        checkpoint: Path | None,
        arguments: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self._model, self._chains, self._loss = model, chains, loss
        self._data, self._held_out, self._options = data, held_out, options
        self._checkpoint, self._progress = checkpoint, progress
        self._arguments = arguments

    def run(self) -> TrainResult:
        dense = self._dense()
        state = None
        if self._checkpoint is not None:
            state = read_state(self._checkpoint, self._arguments)
        if state is None:
            state = self._first_state()
        elif state.current:
            _restore(self._model, state.current)
            for chain in self._chains:
                chain.read()
        sweeping = self._options.method == "dmrg"
        with self._gradients(dense if sweeping else None):
            method = self._method(dense)
            method.take_up(state.method)
            self._run(method, state)
        _restore(self._model, state.best)
        name = self._loss.score_name if isinstance(self._loss, Supervised) else None
        return TrainResult(history=tuple(state.history), best=state.best_record, score_name=name)

    def _dense(self) -> list[nn.Parameter]:
        if not self._options.train_dense:
            return []
        if self._chains:
            return list(dense_parameters(self._model).values())
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    @contextmanager
    def _gradients(self, only: list[nn.Parameter] | None) -> Iterator[None]:
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            self._model.train()
            if only is None:
                yield
            else:
                with only_gradients_of(self._model, self._chains, only):
                    yield
        finally:
            for module, mode in modes:
                module.training = mode

    def _method(self, dense: Sequence[nn.Parameter]) -> TrainMethod:
        if self._options.method == "dmrg":
            return SweepMethod(self._chains, dense, self._data, self._scalar_loss, self._options)
        cores = [
            core
            for chain in self._chains
            for core in chain.layers[0].cores.parameters()
            if core.requires_grad
        ]
        if not cores and not dense:
            raise DataError("no parameter requires a gradient. Switch requires_grad on.")
        return AdamMethod(cores, dense, self._data, self._scalar_loss, self._options)

    def _run(self, method: TrainMethod, state: TrainState) -> None:
        what = "rounds of sweeps" if self._options.method == "dmrg" else "epochs"
        while state.done < method.segments:
            if self._options.patience is not None and state.stale >= self._options.patience:
                return
            if self._progress is not None:
                self._progress(what, state.done, method.segments)
            # Dropout takes torch's global generators.
            with seeded(self._model, seed_of_part(self._options.seed, state.done)):
                state.step, train_loss = method.run(state.done, state.step)
            if not isfinite(train_loss):
                return  # diverged: nothing brings such weights back
            state.done += 1
            try:
                record = self._record(state.step / self._data.minibatches_per_epoch, train_loss)
            except DecompositionError:
                return  # cores near the largest float have no spectrum either
            if not isfinite(record.validation_loss or 0.0):
                return
            state.history.append(record)
            found = record.validation_loss
            state.stale += 1
            if found is None or found < state.best_loss:
                state.best_loss = state.best_loss if found is None else found
                state.best_record, state.stale = len(state.history) - 1, 0
                state.best = _values(self._model)
            if self._checkpoint is not None:
                state.current, state.method = _values(self._model), method.state()
                write_state(self._checkpoint, state, self._arguments)

    def _first_state(self) -> TrainState:
        if isinstance(self._loss, Supervised):
            # Now, for all rows, and not as an index out of range in the middle of a run.
            every = range(self._data.minibatches_per_epoch)
            batches = [self._data.minibatch(number) for number in every]
            self._loss.check_labels(self._model, batches, self._held_out)
        record = self._record(0.0, None)
        with evaluation_mode(self._model), torch.no_grad():
            first = float(self._scalar_loss(self._data.minibatch(0)))
        if not isfinite(first) or not isfinite(record.validation_loss or 0.0):
            raise DataError(
                f"the loss is {first} before the first step. Check the model, the data and the "
                "loss function for NaN and Inf."
            )
        best_loss = float("inf") if record.validation_loss is None else record.validation_loss
        return TrainState(best_loss=best_loss, history=[record], best=_values(self._model))

    def _scalar_loss(self, batch: Minibatch) -> Tensor:
        return scalar_loss(self._loss, self._model, batch)

    def _record(self, epoch: float, train_loss: float | None) -> TrainRecord:
        validation_loss = score = None
        if self._held_out:
            with evaluation_mode(self._model), torch.no_grad():
                if isinstance(self._loss, Supervised):
                    validation_loss, score = self._loss.evaluate(self._model, self._held_out)
                else:
                    rows = sum(batch.rows for batch in self._held_out)
                    losses = [b.rows * float(self._scalar_loss(b)) for b in self._held_out]
                    validation_loss = sum(losses) / rows
        for chain in self._chains:
            chain.read()
        return TrainRecord(
            epoch=epoch,
            train_loss=train_loss,
            validation_loss=validation_loss,
            score=score,
            bond_dims={chain.name: chain.bond_dims for chain in self._chains},
            entropies_nats={chain.name: chain.entropies_nats() for chain in self._chains},
        )
