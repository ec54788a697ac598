"""The training loop of healing: phases, learning rates, the best weights, checkpoints."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import seed_of_part, seeded
from mpocompress.tuning.healing.learning_rates import LEARNING_RATES, peak_from_trials, trial_steps
from mpocompress.tuning.healing.loss import Distance
from mpocompress.tuning.healing.optimizer import HealingOptimizer
from mpocompress.tuning.healing.options import DistillOptions
from mpocompress.tuning.healing.state import (
    DistillRecord,
    DistillState,
    read_state,
    write_state,
)
from mpocompress.tuning.lockstep import Call
from mpocompress.tuning.minibatches import TrainingData
from mpocompress.tuning.objectives import in_full, is_of_changes_in_place
from mpocompress.tuning.schedule import warm_cosine

_EVALUATIONS = 25

Loss = Callable[[Call], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillResult:
    """What a distillation did.

    Attributes:
        history: all evaluations, the start first.
        best_step: steps done, in both phases, when the weights that were kept were reached.
        start_loss: held-out loss before.
        end_loss: held-out loss of the weights that were kept; never above `start_loss`.
        learning_rates: peak learning rate of each phase that ran, by its name.
        blocks: names of the blocks whose hidden states were compared.
    """

    history: tuple[DistillRecord, ...]
    best_step: int
    start_loss: float
    end_loss: float
    learning_rates: dict[str, float]
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    """So many optimizer steps on one loss."""

    name: str
    steps: int
    loss: Loss


class Trainer:
    """Runs phases; keeps the best weights, and the state from which it can go on.

    Args:
        model: in which the parameters are.
        parameters: to train.
        data: minibatches and the held-out rest.
        held_out_loss: decides which weights are the best.
        options: of the healing.
        checkpoint: of the state; None keeps none.
        arguments: that a run must have to go on from the state.
        progress: called as `progress(what, done, total)`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        data: TrainingData,
        held_out_loss: Distance,
        options: DistillOptions,
        checkpoint: Path | None,
        arguments: dict[str, Any],
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._data = data
        self._loss = held_out_loss
        self._held_out = list(data.held_out())
        held_out_loss.keep([*self._held_out, *data.whole])
        self._options = options
        self._checkpoint = checkpoint
        self._arguments = arguments
        self._progress = progress

    def run(self, phases: Sequence[Phase], blocks: tuple[str, ...]) -> DistillResult:
        """Run all phases, from the checkpoint if there is one, and leave the best weights.

        Args:
            phases: one after the other, each from the best weights so far.
            blocks: for the result.

        Raises:
            DataError: outputs that are not finite, or no gradients.
            LoadError: a truncated checkpoint.
            SaveError: it cannot be written.
        """
        state = None
        if self._checkpoint is not None:
            state = read_state(self._checkpoint, self._arguments)
        if state is None:
            state = DistillState(best=_values(self._parameters))
            state.best_loss = self._evaluate()
            if not math.isfinite(state.best_loss):
                raise DataError(
                    f"the loss of the model before training is {state.best_loss}; check the data, "
                    "and the outputs of both models on it."
                )
            state.history = [_record(phases[0].name, 0, None, state.best_loss, 0.0)]
        for index in range(state.phase, len(phases)):
            if state.phase < index:
                # The next phase starts from the best weights, with a fresh optimizer.
                state.phase, state.step, state.stale = index, 0, 0
                state.learning_rate, state.current, state.moments = None, [], []
            self._run_phase(phases[index], state)
            assign(self._parameters, state.best)
        return _result(state, phases, blocks)

    def _run_phase(self, phase: Phase, state: DistillState) -> None:
        if phase.steps == 0:
            return
        if state.learning_rate is None:
            state.learning_rate = self._choose_rate(phase, state.best_loss)
        state.learning_rates[phase.name] = state.learning_rate
        optimizer = HealingOptimizer(self._model, self._parameters)
        if state.current:
            assign(self._parameters, state.current)
            optimizer.restore(state.moments)
        every = self._options.evaluate_every or max(1, phase.steps // _EVALUATIONS)
        losses: list[float] = []
        patience = self._options.patience or math.inf
        while state.step < phase.steps and state.stale < patience:
            rate = warm_cosine(state.step, phase.steps, state.learning_rate)
            losses.append(self._step(phase, optimizer, state.step, rate))
            state.step += 1
            self._report(f"distillation ({phase.name})", state.step, phase.steps)
            if state.step % every and state.step < phase.steps:
                continue
            found = self._evaluate()
            if not math.isfinite(found):
                return  # diverged: nothing brings such weights back
            train_loss = sum(losses) / len(losses)
            losses = []
            state.history.append(_record(phase.name, state.step, train_loss, found, rate))
            state.stale += 1
            if found < state.best_loss:
                state.best_loss, state.best_record = found, len(state.history) - 1
                state.best, state.stale = _values(self._parameters), 0
            if self._checkpoint is not None:
                state.current = _values(self._parameters)
                state.moments = optimizer.moments()
                write_state(self._checkpoint, state, self._arguments)

    def _step(self, phase: Phase, optimizer: HealingOptimizer, step: int, rate: float) -> float:
        for parameter in self._parameters:
            parameter.grad = None
        many = self._options.accumulate
        batches = [self._data.minibatch(many * step + place) for place in range(many)]
        rows = sum(batch.rows for batch in batches)
        total = 0.0
        with seeded(self._model, seed_of_part(self._options.seed, step)):
            for batch in batches:
                loss = phase.loss(batch) * (batch.rows / rows)
                if loss.requires_grad:
                    _backward(loss)
                total += float(loss.detach())
        if all(parameter.grad is None for parameter in self._parameters):
            raise DataError(
                "no gradient reaches the parameters of the model: its forward may run under "
                "torch.no_grad() or inference_mode(). Take that off for the healing."
            )
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad = in_full(parameter.grad)
        nn.utils.clip_grad_norm_(self._parameters, self._options.clip_norm)
        optimizer.step(rate)
        return total

    @torch.no_grad()
    def _evaluate(self) -> float:
        total, rows = 0.0, 0
        for batch in self._held_out:
            total += batch.rows * float(self._loss(batch))
            rows += batch.rows
        return total / rows

    def _choose_rate(self, phase: Phase, start_loss: float) -> float:
        if self._options.learning_rate != "auto":
            return float(self._options.learning_rate)
        steps = trial_steps(phase.steps)
        start = _values(self._parameters)
        losses: dict[float, float] = {}
        for done, peak in enumerate(LEARNING_RATES):
            self._report("trying learning rates", done, len(LEARNING_RATES))
            optimizer = HealingOptimizer(self._model, self._parameters)
            for step in range(steps):
                self._step(phase, optimizer, step, warm_cosine(step, steps, peak))
            loss = self._evaluate()
            losses[peak] = loss if math.isfinite(loss) else math.inf
            assign(self._parameters, start)
            if losses[peak] > min(losses.values()):
                break  # higher ones are worse still
        return peak_from_trials(losses, start_loss, phase.steps)

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        if not is_of_changes_in_place(error):
            raise
        raise DataError(
            "the model changes tensors in place that its gradients need, as x += layer(x) does, so "
            "that it cannot be trained. Write x = x + layer(x), or leave the healing out."
        ) from error


def _record(
    phase: str, step: int, train_loss: float | None, held_out_loss: float, rate: float
) -> DistillRecord:
    if train_loss is not None and not math.isfinite(train_loss):
        train_loss = None
    return DistillRecord(
        phase=phase,
        step=step,
        train_loss=train_loss,
        held_out_loss=held_out_loss,
        learning_rate=rate,
    )


def _result(
    state: DistillState,
    phases: Sequence[Phase],
    blocks: tuple[str, ...],
) -> DistillResult:
    best = state.history[state.best_record]
    before = 0
    for phase in phases:
        if phase.name == best.phase:
            break
        before += max((r.step for r in state.history if r.phase == phase.name), default=0)
    return DistillResult(
        history=tuple(state.history),
        best_step=before + best.step,
        start_loss=state.history[0].held_out_loss,
        end_loss=state.best_loss,
        learning_rates=dict(state.learning_rates),
        blocks=blocks,
    )


def _values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give parameters their values, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
