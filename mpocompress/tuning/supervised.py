"""Losses against labels, and the score that a person reads beside them."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.tuning.lockstep import floating_outputs
from mpocompress.tuning.minibatches import Minibatch
from mpocompress.tuning.objectives import Loss

SupervisedLoss = Literal["cross_entropy", "mse"]


class Supervised:
    """A loss of a model's output against labels.

    Args:
        kind: "cross_entropy": logits (..., classes) against class numbers (...), in nats, mean over
            all positions. "mse": output against numbers of the same shape, where (..., 1) stands
            for (...); mean over all entries.

    Raises:
        DataError: another kind.
    """

    def __init__(self, kind: SupervisedLoss) -> None:
        if kind not in ("cross_entropy", "mse"):
            raise DataError(
                f'loss {kind!r}: there are "cross_entropy", "mse", and a function '
                "loss(model, batch) of yours."
            )
        self.kind = kind

    def __call__(self, model: nn.Module, batch: Minibatch) -> Tensor:
        """The loss on a batch, a scalar."""
        output, labels = self._compared(model, batch)
        if self.kind == "mse":
            return mse_loss(output, labels)
        return cross_entropy(output, labels)

    @property
    def score_name(self) -> str:
        """What `score` measures."""
        return "accuracy" if self.kind == "cross_entropy" else "R2"

    def _compared(self, model: nn.Module, batch: Minibatch) -> tuple[Tensor, Tensor]:
        if batch.labels is None:
            raise DataError(
                f"a batch has no labels, which {self.kind!r} needs. Give (inputs, labels) pairs, "
                "or a loss(model, batch) of your own."
            )
        outputs = model(*batch.args, **batch.kwargs)
        floating = floating_outputs(outputs)
        output = getattr(outputs, "logits", floating[0] if floating else None)
        if not isinstance(output, Tensor):
            raise DataError("the model has no floating output to compare with the labels.")
        labels = batch.labels.to(output.device)
        if self.kind == "mse":
            if output.shape == (*labels.shape, 1):
                output = output.squeeze(-1)
            if output.shape != labels.shape:
                raise DataError(
                    f"the model gives outputs of shape {tuple(output.shape)}, the labels have "
                    f"{tuple(labels.shape)}. For mse they must be equal."
                )
            return output, labels.to(output.dtype)
        if output.shape[:-1] != labels.shape or labels.is_floating_point():
            raise DataError(
                f"the model gives logits of shape {tuple(output.shape)}, the labels are "
                f"{labels.dtype} of shape {tuple(labels.shape)}. Cross-entropy needs integer class "
                f"numbers of shape {tuple(output.shape[:-1])}."
            )
        return output.reshape(-1, output.shape[-1]), labels.reshape(-1).long()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Minibatch]) -> tuple[float, float]:
        """Loss and score over batches: accuracy in [0, 1], or R^2 over all entries (at most 1)."""
        loss = right = squares = deviation = 0.0
        entries = 0
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            output, labels = self._compared(model, batch)
            count = labels.numel()
            entries += count
            if self.kind == "mse":
                squares += float(((output - labels) ** 2).sum(dtype=torch.float64))
                wide = labels.detach().double().cpu()
                sums += torch.stack([wide.sum(), wide.square().sum()])
            else:
                loss += count * float(cross_entropy(output, labels))
                right += float((output.argmax(-1) == labels).sum())
        if self.kind == "cross_entropy":
            return loss / entries, right / entries
        deviation = float(sums[1] - sums[0] ** 2 / entries)
        return squares / entries, 1 - squares / deviation if deviation > 0 else float("nan")

    def check_labels(self, model: nn.Module, batches: Iterable[Minibatch]) -> None:
        """Refuse class numbers that the model has no output for; the first batch goes through it.

        Raises:
            DataError: also for shapes of outputs and labels that do not fit each other.
        """
        classes = None
        for batch in batches:
            if classes is None:
                with evaluation_mode(model), torch.no_grad():
                    output, _ = self._compared(model, batch)
                classes = output.shape[-1]
            if self.kind == "mse" or batch.labels is None:
                return
            least, most = int(batch.labels.min()), int(batch.labels.max())
            if least < 0 or most >= classes:
                raise DataError(
                    f"labels from {least} to {most}, but the model has {classes} classes, 0 to "
                    f"{classes - 1}. Number the classes from 0, or widen the last layer."
                )


def supervised_loss(loss: SupervisedLoss | Literal["auto"] | Loss, batch: Any) -> Supervised | Loss:
    """The loss that is meant; "auto" goes by the labels of a batch: class numbers, or numbers.

    Raises:
        DataError: an unknown name, or "auto" without labels.
    """
    if callable(loss):
        return loss
    if loss != "auto":
        return Supervised(loss)
    labels = getattr(batch, "labels", None)
    if labels is None:
        raise DataError(
            "the data has no labels to choose a loss by. Give (inputs, labels) pairs, or a "
            "loss(model, batch) of your own."
        )
    return Supervised("mse" if labels.is_floating_point() else "cross_entropy")
