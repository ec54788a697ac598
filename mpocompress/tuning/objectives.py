"""Losses that a compressed model is tuned on: distances to what a dense reference gives."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.tuning.lockstep import Call, floating_outputs, seeded_call
from mpocompress.tuning.padding import keep_mask, real_rows
from mpocompress.tuning.ruled_out import both_without_infinite

Loss = Callable[[nn.Module, Any], Tensor]
"""`loss(model, batch)`, a scalar to be minimized; the batch has `args`, `kwargs` and `labels`."""


def scalar_loss(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch, of shape ().

    Raises:
        DataError: it is no scalar tensor.
    """
    found: object = loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"the loss is {shape}, not a scalar tensor. Average it over the batch: loss.mean()."
        )
    return found.reshape(())


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss with all their entries; None where a batch does not reach a parameter."""
    if not loss.requires_grad:
        return [None] * len(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [None if gradient is None else in_full(gradient) for gradient in found]


def is_of_changes_in_place(error: RuntimeError) -> bool:
    """Whether gradients needed a tensor that the model has changed in place, as x += f(x) does."""
    return "modified by an inplace operation" in str(error)


def is_of_function_transforms(error: RuntimeError) -> bool:
    """Whether something was asked of a tensor that `torch.func` does not allow in a transform."""
    return "functorch transform" in str(error) or "etc) transform" in str(error)


def in_full(gradient: Tensor) -> Tensor:
    """The gradient itself or, of a table that gives the rows that were looked up, all of it."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def relative_square(found: Tensor, target: Tensor) -> Tensor:
    """|y - t|^2 / |t|^2, a scalar; |y - t|^2 where t is zero throughout, and 0 of nothing.

    Of outputs in any units: float32 does not hold squares of 1e-20, nor of 1e20.
    """
    if not target.numel():
        return (found - target).sum()
    size = target.detach().abs().max()
    size = torch.where(size > 0, size, 1.0)
    weight = (target / size).square().sum()
    return ((found - target) / size).square().sum() / torch.where(weight > 0, weight, 1.0)


class Distillation:
    """The distance of a model's outputs to those of a reference, padding left out.

    Args:
        reference: the dense model; run once a batch, in evaluation mode, and left as it was.
        calls: batches; what the reference gives on them is kept. Whatever it draws at random in
            one of them the model draws, too.
        kind: "outputs", the squared error of every floating output divided by its squared norm,
            averaged over the outputs; or "logits", the Kullback-Leibler divergence of the
            reference's class probabilities from the model's, in nats, averaged over the rows.

    Raises:
        DataError: another kind, or outputs that do not fit it.
    """

    def __init__(
        self,
        reference: nn.Module,
        calls: Sequence[Call],
        *,
        kind: Literal["outputs", "logits"] = "outputs",
    ) -> None:
        if kind not in ("outputs", "logits"):
            raise DataError(
                f'loss {kind!r}: distillation is on "outputs" (squared error) or "logits" '
                "(Kullback-Leibler). Or give a function loss(model, batch)."
            )
        self._kind = kind
        self._targets: dict[int, tuple[Call, int, list[Tensor]]] = {}
        with evaluation_mode(reference), torch.no_grad():
            for number, call in enumerate(calls):
                # A copy: the model may go on to write into what it returned.
                rows = [rows.clone() for rows in self._rows(reference, call, number)]
                self._targets[id(call)] = (call, number, rows)

    def __call__(self, model: nn.Module, call: Call) -> Tensor:
        """The loss on one of the batches, a scalar."""
        if id(call) not in self._targets:
            raise DataError("this batch is not one of those that the reference was run on.")
        _, number, targets = self._targets[id(call)]
        found = list(self._rows(model, call, number))
        shapes = [[tuple(rows.shape) for rows in side] for side in (found, targets)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"the model gives outputs of shapes {shapes[0]}, the reference {shapes[1]} (rows "
                "without padding). Give the model that was compressed as the reference."
            )
        terms = [self._term(rows, target) for rows, target in zip(found, targets, strict=True)]
        return torch.stack(terms).mean()

    def _rows(self, model: nn.Module, call: Call, number: int) -> Iterator[Tensor]:
        keep = keep_mask(call.kwargs)
        outputs = seeded_call(model, call, number)
        floating = floating_outputs(outputs)
        if self._kind == "logits":
            logits = getattr(outputs, "logits", None)
            floating = [logits] if isinstance(logits, Tensor) else floating
            if len(floating) != 1:
                raise DataError(
                    f"the model has {len(floating)} floating outputs, and none is called logits. "
                    'Use loss="outputs", or your own loss(model, batch).'
                )
        if not floating:
            raise DataError("the model has no floating output to compare with the reference's.")
        for output in floating:
            yield real_rows(output, keep) if output.ndim >= 2 else output.reshape(-1, 1)

    def _term(self, rows: Tensor, target: Tensor) -> Tensor:
        if self._kind == "logits":
            found, expected = both_without_infinite(rows.log_softmax(-1), target.log_softmax(-1))
            return (expected.exp() * (expected - found)).sum(-1).mean()
        return relative_square(*both_without_infinite(rows, target))
