"""Healing: train a compressed model against the dense one, on batches without labels.

Block by block first, if asked for (each block on the dense block's input, gradients cut between
blocks), then as a whole. The held-out part of the data decides about the learning rate, and which
weights are kept.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.balance import balance_cores_
from mpocompress.layers.gauges import plain_gauge
from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.rounded_scales import trainable_scales
from mpocompress.scalars import as_count
from mpocompress.tuning.healing.blocks import can_replay, find_blocks, record_calls
from mpocompress.tuning.healing.learning_rates import LEARNING_RATES, peak_from_trials, trial_steps
from mpocompress.tuning.healing.loss import Distance, normalized_error
from mpocompress.tuning.healing.optimizer import HealingOptimizer
from mpocompress.tuning.healing.options import DistillOptions
from mpocompress.tuning.healing.state import (
    DistillRecord,
    DistillState,
    read_state,
    write_state,
)
from mpocompress.tuning.lockstep import Call, main_output
from mpocompress.tuning.minibatches import TrainingData
from mpocompress.tuning.objectives import in_full, is_of_changes_in_place
from mpocompress.tuning.padding import keep_mask
from mpocompress.tuning.schedule import warm_cosine
from mpocompress.tuning.state_file import identity

_EVALUATIONS = 25
# A tenth of 60 rows chose weights that were worse on others (KL .020 to .021); a third did not.
_LEAST_HELD = 64

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


def distill_(
    model: nn.Module,
    reference: nn.Module,
    calls: Sequence[Call],
    *,
    steps: int = 500,
    options: DistillOptions | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DistillResult:
    """Train the floating parameters of `model` that require gradients, in place.

    Both models run in evaluation mode (no dropout, fixed batch statistics), which is undone at the
    end; `requires_grad` stays as it is, gradients are gone. The cores are first brought into the
    symmetric gauge, out of the identity gauge if they are stored in it and back into it at the end,
    which changes no function. Of layers that are rounded for a file the scales are trained, and the
    integers stay. If anything is raised, the model has its old weights.

    Args:
        model: compressed, in float32 or float64; half types are refused, because steps of training
            are smaller than their resolution.
        reference: dense; it is only read.
        calls: batches of forward arguments on the models' device; all are held in memory.
        steps: of the optimizer on the whole model.
        options: see `DistillOptions`.
        checkpoint: a file that is written at every evaluation; a run with the same arguments goes
            on from there, and ends bit-identical to one that was not interrupted. It stays when
            the run is done.
        progress: called as `progress(what, done, total)`.

    Raises:
        DataError: no data, nothing to train, half-precision parameters, models that do not belong
            together, impossible options, outputs that are not finite, or a foreign checkpoint.
        LoadError: a truncated checkpoint.
        SaveError: the checkpoint cannot be written.
    """
    steps = as_count("steps", steps, 0, DataError)
    options = options or DistillOptions()
    # Layers in the identity gauge are trained with all entries of their cores: steps then are those
    # of balanced factors, not of the gauge's, and no core is rebuilt at every step.
    with (
        plain_gauge(model),
        trainable_scales(model),
        evaluation_mode(model),
        evaluation_mode(reference),
        torch.enable_grad(),
    ):
        parameters = _trainable(model, reference)
        data = TrainingData(
            calls,
            batch_size=options.batch_size,
            held_out=options.held_out,
            least_held=_LEAST_HELD,
            seed=options.seed,
        )
        blocks = find_blocks(model)
        _check_blocks(reference, blocks)
        start = [parameter.detach().clone() for parameter in parameters]
        arguments = {**asdict(options), "steps": steps, "rows of data": data.rows}
        if checkpoint is not None:
            arguments |= identity(start, calls, reference)
        try:
            balance_cores_(model)
            whole = Distance(model, reference, blocks, options.output_loss, options.hidden_weight)
            phases = [_Phase("model", steps, whole)]
            if options.blockwise_steps and blocks and can_replay(reference, blocks, calls[0]):
                blockwise = _BlockDistance(model, reference, blocks)
                phases.insert(0, _Phase("blocks", options.blockwise_steps, blockwise))
            path = None if checkpoint is None else Path(checkpoint)
            trainer = _Trainer(model, parameters, data, whole, options, path, arguments, progress)
            return trainer.run(phases, blocks)
        except BaseException:
            _assign(parameters, start)
            raise
        finally:
            for parameter in parameters:
                parameter.grad = None


@dataclass(frozen=True, slots=True)
class _Phase:
    name: str
    steps: int
    loss: Loss


class _BlockDistance:
    """Mean normalized error of the blocks, each given the dense block's input."""

    def __init__(self, model: nn.Module, reference: nn.Module, blocks: Sequence[str]) -> None:
        self._model, self._reference, self._blocks = model, reference, blocks

    def __call__(self, call: Call) -> Tensor:
        keep = keep_mask(call.kwargs)
        terms = []
        for name, recorded in record_calls(self._reference, self._blocks, call).items():
            for entry in recorded:
                ours = main_output(self._model.get_submodule(name)(*entry.args, **entry.kwargs))
                if ours is not None:
                    terms.append(normalized_error(ours, entry.output, keep))
        return torch.stack(terms).mean()


class _Trainer:
    """Runs phases; keeps the best weights, and the state from which it can go on."""

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

    def run(self, phases: Sequence[_Phase], blocks: tuple[str, ...]) -> DistillResult:
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
            _assign(self._parameters, state.best)
        return _result(state, phases, blocks)

    def _run_phase(self, phase: _Phase, state: DistillState) -> None:
        if phase.steps == 0:
            return
        if state.learning_rate is None:
            state.learning_rate = self._choose_rate(phase, state.best_loss)
        state.learning_rates[phase.name] = state.learning_rate
        optimizer = HealingOptimizer(self._model, self._parameters)
        if state.current:
            _assign(self._parameters, state.current)
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

    def _step(self, phase: _Phase, optimizer: HealingOptimizer, step: int, rate: float) -> float:
        for parameter in self._parameters:
            parameter.grad = None
        many = self._options.accumulate
        batches = [self._data.minibatch(many * step + place) for place in range(many)]
        rows = sum(batch.rows for batch in batches)
        total = 0.0
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

    def _choose_rate(self, phase: _Phase, start_loss: float) -> float:
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
            _assign(self._parameters, start)
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
    phases: Sequence[_Phase],
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
def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def check_trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that can be trained.

    Raises:
        DataError: there are none.
    """
    found = [p for p in parameters if p.requires_grad and p.is_floating_point()]
    if not found:
        raise DataError(
            "the model has no floating parameter that requires gradients, so there is nothing to "
            "train. Call model.requires_grad_(True) first."
        )
    return found


def _trainable(model: nn.Module, reference: nn.Module) -> list[nn.Parameter]:
    parameters = check_trainable(model.parameters())
    check_apart(model, reference)
    for name, parameter in (*model.named_parameters(), *reference.named_parameters()):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise DataError(
                f"parameter {name!r} is {parameter.dtype}, in which small steps of training are "
                "lost. Convert both models with .float(), distill, and convert back."
            )
        if parameter.device != parameters[0].device:
            raise DataError(
                f"parameter {name!r} is on {parameter.device}, and others are on "
                f"{parameters[0].device}. Move both models to one device."
            )
    return parameters


def check_apart(model: nn.Module, reference: nn.Module) -> None:
    """Refuse a model that would change the reference when it is trained.

    Raises:
        DataError: they share a parameter that requires gradients.
    """
    ours = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if any(id(parameter) in ours for parameter in reference.parameters()):
        raise DataError(
            "the model shares parameters with the reference, which would change with it. Give the "
            "dense model from before the compression."
        )


def _check_blocks(reference: nn.Module, blocks: Sequence[str]) -> None:
    names = {name for name, _ in reference.named_modules()}
    missing = next((name for name in blocks if name not in names), None)
    if missing is not None:
        raise DataError(
            f"the reference has no module {missing!r}, which the compressed model has. Give the "
            "dense model that was compressed."
        )
