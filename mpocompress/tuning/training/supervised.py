"""Losses against labels, and the score that a person reads beside them."""

from collections.abc import Iterable, Sequence
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.tuning.lockstep import floating_outputs
from mpocompress.tuning.minibatches import Minibatch
from mpocompress.tuning.objectives import Loss
from mpocompress.tuning.training.label_scores import Accuracy, RSquared

SupervisedLoss = Literal["cross_entropy", "mse"]

_LEFT_OUT = -100


class Supervised:
    """A loss of a model's output against labels.

    Args:
        kind: "cross_entropy": logits (..., classes) against class numbers (...), in nats, mean over
            all positions but those with a label below 0, which are left out; 0 for a batch that
            has no others. "mse": output against numbers of the same shape, where (..., 1) stands
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
            return mse_loss(output, labels.to(output.dtype))
        total, count = _summed_cross_entropy(output, labels)
        return total / count.clamp(min=1)

    @property
    def score_name(self) -> str:
        """What `score` measures."""
        return "accuracy" if self.kind == "cross_entropy" else "R2"

    def _labels(self, batch: Minibatch) -> Tensor:
        if batch.labels is None:
            raise DataError(
                f"a batch has no labels, which {self.kind!r} needs. Give (inputs, labels) pairs, "
                "or a loss(model, batch) of your own."
            )
        return batch.labels

    def _compared(self, model: nn.Module, batch: Minibatch) -> tuple[Tensor, Tensor]:
        labels = self._labels(batch)
        outputs = model(*batch.args, **batch.kwargs)
        floating = floating_outputs(outputs)
        output = getattr(outputs, "logits", floating[0] if floating else None)
        if not isinstance(output, Tensor):
            raise DataError("the model has no floating output to compare with the labels.")
        labels = labels.to(output.device)
        if self.kind == "mse":
            if output.shape == (*labels.shape, 1):
                output = output.squeeze(-1)
            if output.shape != labels.shape:
                raise DataError(
                    f"the model gives outputs of shape {tuple(output.shape)}, the labels have "
                    f"{tuple(labels.shape)}. For mse they must be equal."
                )
            return output, labels
        if output.shape[:-1] != labels.shape or labels.is_floating_point():
            raise DataError(
                f"the model gives logits of shape {tuple(output.shape)}, the labels are "
                f"{labels.dtype} of shape {tuple(labels.shape)}. Cross-entropy needs integer class "
                f"numbers of shape {tuple(output.shape[:-1])}."
            )
        return output.reshape(-1, output.shape[-1]), labels.reshape(-1).long()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Minibatch]) -> tuple[float, float]:
        """Loss and score over batches.

        The score is the accuracy in [0, 1], or R^2 over all entries (at most 1; NaN where all
        labels are equal). Both are NaN where no label is judged.
        """
        numbers, classes = RSquared(), Accuracy()
        loss = 0.0
        for batch in batches:
            output, labels = self._compared(model, batch)
            if self.kind == "mse":
                numbers.add(output, labels)
                continue
            loss += float(_summed_cross_entropy(output, labels)[0])
            classes.add(output, labels)
        if self.kind == "mse":
            return numbers.mean_squared_error, numbers.value
        return loss / classes.count if classes.count else nan, classes.value

    def check_labels(
        self, model: nn.Module, batches: Sequence[Minibatch], held_out: Sequence[Minibatch] = ()
    ) -> None:
        """Refuse class numbers that nothing can be learned from; the first batch is run.

        Args:
            model: its mode is restored.
            batches: to train on.
            held_out: to validate on, if any.

        Raises:
            DataError: classes that the model has no output for, labels that are all below 0, or,
                to train on, a single class beside such; also for shapes of outputs and labels that
                do not fit each other.
        """
        with evaluation_mode(model), torch.no_grad():
            classes = self._compared(model, batches[0])[0].shape[-1]
        if self.kind == "mse":
            return
        for part, what in ((batches, "to train on"), (held_out, "to validate on")):
            if not part:
                continue
            labels = torch.cat([self._labels(batch).reshape(-1).cpu() for batch in part])
            judged = labels[labels >= 0]
            if not len(judged):
                raise DataError(
                    f"all {len(labels)} labels {what} are below 0, and those are left out. Number "
                    "the classes from 0, or give more rows that have a label."
                )
            least, most = int(judged.min()), int(judged.max())
            if most >= classes:
                raise DataError(
                    f"labels from {least} to {most}, but the model has {classes} classes, 0 to "
                    f"{classes - 1}. Number the classes from 0, or widen the last layer."
                )
            if part is batches and least == most and len(judged) < len(labels):
                raise DataError(
                    f"the labels are {least} or below 0, and those below 0 are left out, so that "
                    "there is only one class to learn. Number the classes from 0."
                )


def _summed_cross_entropy(output_NK: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum in nats over all labels but those below 0, and their number; both of shape ()."""
    judged_N = labels_N >= 0
    total = cross_entropy(
        output_NK,
        labels_N.where(judged_N, _LEFT_OUT),
        ignore_index=_LEFT_OUT,
        reduction="sum",
    )
    return total, judged_N.sum()


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
