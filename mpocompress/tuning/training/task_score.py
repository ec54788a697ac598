"""How well a model does its job, from labels: accuracy for classes, R² for numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.tuning.lockstep import Call, floating_outputs
from mpocompress.tuning.training.label_scores import Accuracy, RSquared


class LabelledCall(Call, Protocol):
    """Arguments of one forward call, and what should come out."""

    @property
    def labels(self) -> Tensor | None:
        """One entry a row."""
        ...


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A metric, the higher the better.

    Attributes:
        name: "accuracy" (share of rows, or of tokens, whose largest output is the label) or "R²"
            (1 less the squared error over that of the labels' mean).
        value: its value.
        rows: labels that were judged.
    """

    name: str
    value: float
    rows: int


def task_score(model: nn.Module, calls: Iterable[LabelledCall]) -> TaskScore:
    """Judge the first floating output of a model by the labels.

    Args:
        model: its mode is restored.
        calls: batches with labels: whole numbers are classes of the output's last dimension (those
            below 0 are skipped), floating ones are targets of the output's size.

    Raises:
        DataError: no labels; labels that do not fit the outputs, by their shape, or classes
            that the output has no column for; or floating ones that are not finite, or all equal.
    """
    classes, numbers = Accuracy(), RSquared()
    scores: set[str] = set()
    with evaluation_mode(model), torch.no_grad():
        for call in calls:
            labels = call.labels
            if labels is None:
                raise DataError(
                    'the data has no labels, and a drop is measured with them. Add "labels" to the '
                    "batches, or give eval_fn in Python."
                )
            output = floating_outputs(model(*call.args, **call.kwargs))[0]
            if labels.is_floating_point():
                scores.add(numbers.name)
                if not bool(labels.isfinite().all()):
                    raise DataError("labels with NaN or Inf. Clean the data first.")
                numbers.add(_like(output, labels), labels)
                continue
            scores.add(classes.name)
            if output.shape[:-1] != labels.shape:
                raise DataError(
                    f"labels of shape {tuple(labels.shape)} for outputs of shape "
                    f"{tuple(output.shape)}: class labels have the shape of the output without its "
                    "last dimension."
                )
            _check_classes(labels, output.shape[-1])
            classes.add(output, labels)
    if len(scores) > 1:
        raise DataError("some batches have whole numbers as labels, others floating ones.")
    score = numbers if numbers.count else classes
    if not score.count:
        raise DataError("there are no labelled rows to measure a drop on.")
    if score is numbers and not numbers.spread:
        raise DataError(
            f"the {numbers.count} labels that a drop is measured on are all equal, so that R² is "
            "not defined: it is about what of their spread a model explains. Give data whose "
            "labels differ, or eval_fn in Python."
        )
    return TaskScore(score.name, score.value, score.count)


def _check_classes(labels: Tensor, columns: int) -> None:
    if columns < 2:
        raise DataError(
            "the labels are whole numbers, which are classes, but the output has one column and no "
            "largest one. Give floating labels if it is a number to be predicted; for a single "
            "logit give eval_fn in Python."
        )
    largest = int(labels.max()) if labels.numel() else 0
    if largest >= columns:
        raise DataError(
            f"label {largest} is none of the classes 0 to {columns - 1} that the output has "
            "columns for. Count classes from 0; labels below 0 are left out."
        )


def _like(output: Tensor, labels: Tensor) -> Tensor:
    if output.numel() != labels.numel():
        raise DataError(
            f"labels of shape {tuple(labels.shape)} for outputs of shape {tuple(output.shape)}: "
            "floating labels have the shape of the output."
        )
    return output.reshape(labels.shape)
