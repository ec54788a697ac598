"""The output metric of every layer: the covariance of the gradient at its outputs.

An error E x at a layer's output changes the model's output f by J E x to first order, with J the
Jacobian from here to the end. Averaged over random directions v ~ N(0, 1) at the output,
|v . J E x|^2 is |J E x|^2; so with g the gradient of v . f at the layer's output, G = E[g g^T] is
the metric in which errors at this layer hurt the model (the Gauss-Newton metric of the change of
f). A distillation loss would not do: its gradient at the dense model is zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpocompress.errors import DataError
from mpocompress.tuning.lockstep import Call
from mpocompress.tuning.moments import CrossMoment, keep_mask, real_rows


def output_metrics(
    model: nn.Module, layers: Sequence[nn.Module], calls: Iterable[Call], *, seed: int = 0
) -> dict[nn.Module, Tensor]:
    """G = E[g g^T] (out, out), float64, for every layer that the data reaches.

    One forward and one backward pass of the dense model per batch; no gradient of any weight is
    formed. Padding counts neither in the output nor in the layers.

    Args:
        model: dense; its `requires_grad` flags and mode are restored.
        layers: modules whose output is a single tensor.
        calls: batches.
        seed: of the random directions.

    Raises:
        DataError: the model has no floating output, or its gradients are not finite.
    """
    moments = {layer: CrossMoment() for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    keep: list[Tensor | None] = [None]

    def watch(layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def collect(gradient: Tensor) -> None:
            rows = real_rows(gradient.detach(), keep[0])
            moments[layer].add(rows, rows)

        output.register_hook(collect)
        return output

    handles = [layer.register_forward_hook(watch) for layer in layers]
    try:
        with _frozen(model), torch.enable_grad():
            for call in calls:
                keep[0] = keep_mask(call.kwargs)
                outputs = model(*call.args, **call.kwargs)
                loss = _random_projection(outputs, keep[0], generator)
                if not loss.requires_grad:
                    continue  # no layer of ours was reached
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: moment.mean(centered=False)[0] for layer, moment in moments.items() if moment.rows
    }


def _random_projection(outputs: Any, keep: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sum of v * f over all floating outputs, v standard normal."""
    total: Tensor | None = None
    for output in pytree.tree_leaves(outputs):
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            continue
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
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
