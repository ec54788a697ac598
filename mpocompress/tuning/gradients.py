"""What errors at a layer do to the model's output, read from gradients of the dense model.

An error E x at a layer's output changes the model's output f by J E x to first order, with J the
Jacobian from here to the end. Averaged over random directions v ~ N(0, 1) at the output,
|v . J E x|^2 is |J E x|^2; so with g the gradient of v . f at the layer's output, G = E[g g^T] is
the metric in which errors at this layer hurt the model (the Gauss-Newton metric of the change of
f). A distillation loss would not do: its gradient at the dense model is zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.opened import layers_called
from mpocompress.tuning.layer_rows import adapter_of, row_pieces
from mpocompress.tuning.lockstep import Call, floating_outputs
from mpocompress.tuning.moments import (
    CrossMoment,
    RowCounts,
    keep_mask,
    real_indices,
    real_rows,
)
from mpocompress.tuning.table_fit import HeadUse

# Rows for each feature of the widest layer after which more data would change little: the moments
# choose bond dimensions and weigh outputs; the fit itself sees all data.
_ROWS_PER_FEATURE = 8
# A moment of so many outputs takes half a GB; larger ones (a vocabulary) are not collected.
_MAX_OUTPUTS = 8192


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """What the dense model shows of a layer on data: x x^T and g g^T, summed over the same rows.

    Attributes:
        inputs: of the layer's inputs x.
        gradients: of the gradients g at its outputs.
        counts: of the rows that were looked up, for a table; it has no other inputs.
    """

    inputs: CrossMoment = field(default_factory=CrossMoment)
    gradients: CrossMoment = field(default_factory=CrossMoment)
    counts: RowCounts = field(default_factory=RowCounts)

    @property
    def output_metric(self) -> Tensor | None:
        """G = E[g g^T] (out, out), float64; None for more than 8192 outputs."""
        return self.gradients.mean(centered=False)[0] if self.gradients.rows else None

    def head_use(self) -> HeadUse | None:
        """As an output layer that is tied to a table; None if the data does not reach it."""
        if not self.inputs.rows:
            return None
        metric_OO = self.output_metric
        return HeadUse(
            self.inputs.mean(centered=False)[0],
            None if metric_OO is None else metric_OO.diagonal().clone(),
        )


def layer_moments(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calls: Sequence[Call],
    *,
    seed: int = 0,
    all_data: bool = False,
) -> dict[nn.Module, LayerMoments]:
    """Second moments of inputs and of gradients at the outputs, for every layer that data reaches.

    One forward and one backward pass of the dense model per batch; no gradient of any weight is
    formed. Padding counts neither in the output nor in the layers. Batches come in random order,
    until every layer has seen eight rows for each of its features.

    Args:
        model: dense; its `requires_grad` flags and mode are restored.
        layers: modules that are called with one tensor and whose output is a single tensor.
        calls: batches.
        seed: of the random directions and of the order of the batches.
        all_data: go on to the last batch.

    Raises:
        DataError: the model has no floating output, or its gradients are not finite.
    """
    moments = {layer: LayerMoments() for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    keep: list[Tensor | None] = [None]
    latest: list[tuple[Tensor, CrossMoment]] = []

    def moment_of(layer: nn.Module, value: Tensor) -> CrossMoment:
        """Of one batch of inputs; formed once for layers that are called with the same tensor."""
        plain = adapter_of(layer).takes_rows
        if plain and latest and latest[0][0] is value:
            return latest[0][1]
        moment = moments[layer].inputs.empty_like()
        for (rows,) in row_pieces(layer, (value.detach(),), keep[0]):
            moment.add(rows, rows)
        if plain:
            latest[:] = [(value, moment)]
        return moment

    def watch(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        values = (*args, *kwargs.values())
        adapter = adapter_of(layer)
        if len(values) == 1 and isinstance(values[0], Tensor):
            if adapter.looks_up:
                indices = real_indices(values[0], keep[0])
                moments[layer].counts.add(indices, adapter.matrix(layer).shape[0])
            else:
                moments[layer].inputs.merge(moment_of(layer, values[0]))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        watched = values[0] if adapter.watches_input else output
        outputs = adapter.output_rows(layer, watched.detach())
        if outputs is None or outputs.shape[-1] > _MAX_OUTPUTS:
            return output

        def collect(gradient: Tensor) -> None:
            at_matrix = adapter.output_rows(layer, gradient.detach())
            if at_matrix is not None:
                rows = real_rows(at_matrix, keep[0])
                moments[layer].gradients.add(rows, rows)

        if watched.requires_grad:
            watched.register_hook(collect)
        return output

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
    try:
        with _frozen(model), layers_called(model), torch.enable_grad():
            order = torch.randperm(len(calls), generator=generator).tolist()
            for call in (calls[index] for index in order):
                if not all_data and _enough(moments):
                    break
                keep[0] = keep_mask(call.kwargs)
                outputs = model(*call.args, **call.kwargs)
                loss = _random_projection(outputs, keep[0], generator)
                if not loss.requires_grad:
                    continue  # no layer of ours was reached
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        latest.clear()
    return {
        layer: moment
        for layer, moment in moments.items()
        if moment.inputs.rows or moment.counts.rows
    }


def _enough(moments: Mapping[nn.Module, LayerMoments]) -> bool:
    """Whether every layer that was reached has seen rows enough for its moments.

    Tables never have: how often a rare row is looked up is in all of the data only.
    """
    if any(moment.counts.rows for moment in moments.values()):
        return False
    reached = [moment.inputs for moment in moments.values() if moment.inputs.rows]
    reached += [moment.gradients for moment in moments.values() if moment.gradients.rows]
    return bool(reached) and all(
        moment.rows >= _ROWS_PER_FEATURE * moment.features for moment in reached
    )


def _random_projection(outputs: Any, keep: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sum of v * f over all floating outputs, v standard normal."""
    total: Tensor | None = None
    for output in floating_outputs(outputs):
        rows = real_rows(output, keep) if output.ndim >= 2 else output.reshape(-1, 1)
        directions = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
        term = (rows * directions.to(rows)).sum()
        total = term if total is None else total + term
    if total is None:
        raise DataError("the model has no floating output to take gradients of.")
    return total


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of parameters; both restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluation_mode(model):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
