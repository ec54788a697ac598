"""Healing: train a compressed model against the dense one, on batches without labels.

Block by block first, if asked for (each block on the dense block's input, gradients cut between
blocks), then as a whole. The held-out part of the data decides about the learning rate, and which
weights are kept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.balance import balance_cores_
from mpocompress.layers.gauges import plain_gauge
from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.rounded_scales import trainable_scales
from mpocompress.scalars import as_count
from mpocompress.tuning.healing.blocks import can_replay, find_blocks, record_calls
from mpocompress.tuning.healing.loss import Distance, loss_for, normalized_error
from mpocompress.tuning.healing.options import DistillOptions
from mpocompress.tuning.healing.trainer import DistillResult, Phase, Trainer, assign
from mpocompress.tuning.lockstep import Call, main_output
from mpocompress.tuning.minibatches import TrainingData
from mpocompress.tuning.padding import keep_mask
from mpocompress.tuning.state_file import identity

# A tenth of 60 rows chose weights that were worse on others (KL .020 to .021); a third did not.
_LEAST_HELD = 64


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
    integers stay. Frozen cores keep their values, and their layers the gauge that they have. If
    anything is raised, the model has its old weights.

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
            kind = loss_for(options.output_loss, calls)
            whole = Distance(model, reference, blocks, kind, options.hidden_weight)
            phases = [Phase("model", steps, whole)]
            if options.blockwise_steps and blocks and can_replay(reference, blocks, calls[0]):
                blockwise = _BlockDistance(model, reference, blocks)
                phases.insert(0, Phase("blocks", options.blockwise_steps, blockwise))
            path = None if checkpoint is None else Path(checkpoint)
            trainer = Trainer(model, parameters, data, whole, options, path, arguments, progress)
            return trainer.run(phases, blocks)
        except BaseException:
            assign(parameters, start)
            raise
        finally:
            for parameter in parameters:
                parameter.grad = None


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
