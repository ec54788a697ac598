"""Train a compressed model further: healing, and sweeps on the loss."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpocompress.api.calling import by_itself, uncompiled, with_whole_batches
from mpocompress.api.data import calls_of, few_rows
from mpocompress.api.error_budget import output_change
from mpocompress.api.result import Clock, CompressionResult
from mpocompress.errors import DataError
from mpocompress.layers import MPOLayer
from mpocompress.layers.gauges import plain_gauge
from mpocompress.loading import Batch
from mpocompress.planning import Progress
from mpocompress.report import CompressionReport
from mpocompress.report.collect import remeasure
from mpocompress.report.schema import Comparison
from mpocompress.scalars import as_count
from mpocompress.surgery import (
    Inventory,
    find_weights,
    open_modules,
)
from mpocompress.tuning import (
    Distillation,
    DistillOptions,
    DistillResult,
    LocalOptions,
    Loss,
    LossSweepOptions,
    LossSweepRecord,
    check_apart,
    distill_,
    sweep_on_loss,
)
from mpocompress.tuning.healing.loss import OutputLoss
from mpocompress.tuning.sweeps.options import GradientPath, Optimizer


@by_itself
def distill(
    result: CompressionResult | nn.Module,
    *,
    reference: nn.Module,
    data: Any,
    steps: int = 500,
    blockwise_steps: int = 0,
    output_loss: OutputLoss = "auto",
    hidden_weight: float = 1.0,
    learning_rate: float | Literal["auto"] = "auto",
    batch_size: int | None = None,
    accumulate: int = 1,
    held_out: float = 0.1,
    evaluate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> DistillResult:
    """Heal a compressed model: train it, in place, to do what the dense model does.

    All floating parameters that require gradients are trained, in evaluation mode, in float32 or
    float64 (half types in float32, and rounded at the end, which no loss here has seen), with Muon
    for cores and Adam for all else, warm-up, a cosine and clipped gradients; layers in the identity
    gauge as plain cores, which are brought back into it at the end. The best weights on the
    held-out part of the data are kept: there the model is never worse than before. A result's
    report is brought up to date, so that what `save` writes is what is true of the healed weights.

    Args:
        result: from `compress`, or its model.
        reference: the dense model; it is only read.
        data: batches of forward arguments; labels are not needed, and those that are there only
            say what outputs may be, see `output_loss`; held in memory.
        steps: of the optimizer.
        blockwise_steps: before these, steps in which each repeated block is trained by itself on
            the inputs of the dense block; skipped where a model has no such blocks.
        output_loss: "kl" (temperature 2), "mse" (relative) or "cosine", for embeddings; "auto" is
            "mse", plus "kl" where the output may be logits, of classes or of the words of a table,
            unless labels in the data are quantities: floating, and neither numbers of classes nor
            distributions over them. Of a regression with several columns in a single output,
            without labels, say "mse": it looks like logits.
        hidden_weight: weight of the relative errors of the repeated blocks' outputs.
        learning_rate: peak of the schedule; "auto" tries some in short runs of their own.
        batch_size: rows of a minibatch; None takes batches of up to 128 rows as they come, and
            cuts larger ones, or a single one, into 64.
        accumulate: minibatches in a step, which takes their mean gradient: small batches of many
            lengths are better than a large one of one length, at the same cost.
        held_out: share of the data that is never trained on; of batches that are cut into rows, 64
            rows at least, or a third of fewer than 192.
        evaluate_every: steps between evaluations; None for 25 in all.
        patience: stop after so many evaluations that were not better; None: never, since the loss
            may rise at first and fall below its start when the rate decays.
        seed: of the order, of the held-out part, and of what the model draws at random.
        checkpoint: file to go on from if a run with the same arguments was interrupted.
        progress: called as `progress(what, done, total)`.

    Returns:
        All evaluations, the losses before and after, and the learning rates.

    Raises:
        DataError: see `tuning.distill_`.
        LoadError: a truncated checkpoint.
        SaveError: the checkpoint cannot be written.
    """
    reference = uncompiled(reference)
    steps = as_count("steps", steps, 0, DataError)
    options = DistillOptions(
        blockwise_steps=blockwise_steps,
        output_loss=output_loss,
        hidden_weight=hidden_weight,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        held_out=held_out,
        evaluate_every=evaluate_every,
        patience=patience,
        seed=seed,
    )
    calls = calls_of(data, reference)
    if isinstance(result, CompressionResult):
        return heal(result, reference, calls, steps, options, checkpoint, progress, None)
    return _distill(result, reference, calls, steps, options, checkpoint, progress)


def _distill(
    model: nn.Module,
    reference: nn.Module,
    calls: Sequence[Batch],
    steps: int,
    options: DistillOptions,
    checkpoint: str | Path | None,
    progress: Progress | None,
) -> DistillResult:
    """`tuning.distill_`; of half-precision parameters in float32, rounded to theirs at the end."""
    calls = with_whole_batches(reference, calls)
    both = (*model.parameters(), *reference.parameters())
    halves = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in both)
    if halves:  # copies no longer show it
        check_apart(model, reference)
    ours, theirs = model, reference
    if halves:
        ours, theirs, calls = in_float32(model, reference, calls)
    found = distill_(
        ours,
        theirs,
        calls,
        steps=steps,
        options=options,
        checkpoint=checkpoint,
        progress=progress,
    )
    if halves and found.best_step:
        model.load_state_dict(ours.state_dict())
        for mine, healed in zip(model.modules(), ours.modules(), strict=True):
            if isinstance(mine, MPOLayer) and isinstance(healed, MPOLayer):
                mine.stored = healed.stored
    return found


def in_float32(
    model: nn.Module, reference: nn.Module, calls: Sequence[Batch]
) -> tuple[nn.Module, nn.Module, list[Batch]]:
    """Copies of two models, and batches, in which both give comparable outputs."""
    return (
        copy.deepcopy(model).float(),
        copy.deepcopy(reference).float(),
        [call.cast(torch.float32) for call in calls],
    )


def heal(
    result: CompressionResult,
    reference: nn.Module,
    calls: Sequence[Batch],
    steps: int,
    options: DistillOptions,
    checkpoint: str | Path | None,
    progress: Progress | None,
    inventory: Inventory | None,
) -> DistillResult:
    """Distill a result's model and bring its report up to date."""
    clock = Clock()
    clock.add(result.report.seconds)
    before = _state(result.model)
    with clock("distillation"):
        found = _distill(result.model, reference, calls, steps, options, checkpoint, progress)
    dense = inventory or find_weights(open_modules(reference))
    report = remeasure(result.report, before, dense, result.model, trained="healed")
    healing = {
        "steps": steps,
        "blockwise_steps": options.blockwise_steps,
        "best_step": found.best_step,
        "learning_rates": found.learning_rates,
        "output_loss": options.output_loss,
        "held_out_loss": {"before": found.start_loss, "after": found.end_loss},
        "seed": options.seed,
    }
    predictions = _of_trained(report, reference, result.model, calls, "healed")
    _replace_report(result, report, predictions, {"distill": healing}, clock)
    return found


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def _replace_report(
    result: CompressionResult,
    report: CompressionReport,
    predictions: Sequence[Comparison],
    settings: Mapping[str, Any],
    clock: Clock,
) -> None:
    """Give a result, whose model was trained in place, the report of what it is now."""
    update = {
        "settings": {**report.settings, **settings},
        "predictions": list(predictions),
        "seconds": clock.total(),
    }
    result.report = report.model_copy(update=update)


def _of_trained(
    report: CompressionReport,
    reference: nn.Module | None,
    model: nn.Module,
    calls: Sequence[Batch],
    trained: str,
) -> list[Comparison]:
    """The report's predictions with the change of the outputs measured again, if it was."""

    def anew(found: Comparison) -> Comparison:
        if found.figure != "output_change" or found.measured is None:
            return found
        if reference is None:
            note = f"not measured since the model was {trained} without the dense one"
            return found.model_copy(update={"measured": None, "note": note})
        calls_seen: Sequence[Batch] = few_rows(calls)
        ours, theirs = model, reference
        if {p.dtype for p in model.parameters()} != {p.dtype for p in reference.parameters()}:
            ours, theirs, calls_seen = in_float32(model, reference, calls_seen)
        change, why_not = output_change(theirs, ours, calls_seen)
        note = f"measured on rows that were {trained} on"
        if change is None:
            note = f"not measured since the model was {trained}: {why_not}"
        return found.model_copy(update={"measured": change, "note": note})

    return [anew(found) for found in report.predictions]


@by_itself
def sweep(
    model: nn.Module | CompressionResult,
    *,
    reference: nn.Module | None = None,
    data: Any,
    loss: Loss | Literal["outputs", "logits"] = "outputs",
    sweeps: int = 4,
    sites: int = 1,
    local_steps: int = 8,
    optimizer: Optimizer = "adam",
    learning_rate: float | None = None,
    gradient: GradientPath = "manual",
    bond_dim: int | None = None,
    cutoff: float = 0.0,
    eval_batches: int | None = 4,
    train_dense: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[LossSweepRecord, ...]:
    """Tune a compressed model by sweeps on the loss, in place: one core at a time, all else frozen.

    Args:
        model: with MPO layers, or the result of `compress`, whose model is changed and whose report
            is brought up to date, so that what `save` writes is true of the model as it is then.
            Frozen cores (`requires_grad` off) keep their values; the gauge of their layer then
            stays as it is, and in the identity gauge the layer is left out.
        reference: the dense model whose outputs are the target; not needed with a `loss` of yours,
            but a report then has no errors of weights any more.
        data: batches of forward arguments; a gradient step takes one.
        loss: "outputs" (normalized squared error of all outputs), "logits" (Kullback-Leibler
            divergence of class probabilities), or a function `loss(model, batch)` that gives a
            scalar, where `batch` has `args`, `kwargs` and `labels`.
        sweeps: passes over the sites of every layer, to the right and to the left in turn.
        sites: 1, or 2 for merged neighbours that are split again, so that bond dimensions change.
        local_steps: gradient steps at each position.
        optimizer: "adam", "sgd" or "lbfgs", of each open core anew.
        learning_rate: relative to the size of the open core, see `tuning.LocalOptions`.
        gradient: "manual", contracted by hand, or "autograd"; the results agree.
        bond_dim: for two sites, the largest bond dimension; default: the layer's largest now, or no
            limit with a cutoff.
        cutoff: for two sites, the largest truncation error of a split.
        eval_batches: so many batches, chosen by the seed, judge every update; None for all. On them
            the loss does not rise: an update that would raise it is rolled back.
        train_dense: train all other parameters along.
        include: patterns of layer names; default: all MPO layers.
        exclude: likewise; they win.
        seed: of the order of the batches.
        state: file to write after each layer and to go on from if it exists.
        progress: called as `progress(layer, done, total)`.

    Returns:
        One record for each sweep along a layer.

    Raises:
        NoLayerMatched: no MPO layer, or patterns that match none.
        DataError: no data, no reference, or an impossible option.
        MPOCompressError: see `tuning.sweep_on_loss`.
    """
    reference = None if reference is None else uncompiled(reference)
    target = model.model if isinstance(model, CompressionResult) else model
    options = LossSweepOptions(
        sweeps=sweeps,
        sites=sites,
        local=LocalOptions(
            steps=local_steps, optimizer=optimizer, learning_rate=learning_rate, gradient=gradient
        ),
        bond_dim=bond_dim,
        cutoff=cutoff,
        eval_batches=eval_batches,
        train_dense=train_dense,
        seed=seed,
    )
    calls = calls_of(data, target)
    if not callable(loss):
        if reference is None:
            raise DataError(
                f"loss {loss!r} is a distance to a dense model. Give it as reference=..., or a "
                "function loss(model, batch)."
            )
        loss = Distillation(reference, calls, kind=loss)
    clock = Clock()
    before = _state(target) if isinstance(model, CompressionResult) else {}
    with plain_gauge(target), clock("sweeps on the loss"):
        found = sweep_on_loss(
            target,
            loss,
            calls,
            options=options,
            include=include,
            exclude=exclude,
            state=None if state is None else Path(state),
            progress=progress,
        )
    if isinstance(model, CompressionResult):
        clock.add(model.report.seconds)
        dense = None if reference is None else find_weights(open_modules(reference))
        report = remeasure(model.report, before, dense, target, trained="swept")
        bonds = [[layer.bond_dims for layer in r.layers] for r in (model.report, report)]
        predictions = _of_trained(report, reference, target, calls, "swept")
        if bonds[0] != bonds[1]:  # what the plan predicted is not of other bond dimensions
            predictions = [
                found.model_copy(update={"predicted": None})
                for found in predictions
                if found.figure == "output_change" and found.measured is not None
            ]
        sweeping = {"sweeps": options.sweeps, "sites": options.sites, "seed": options.seed}
        _replace_report(model, report, predictions, {"sweeps_on_loss": sweeping}, clock)
    return found
