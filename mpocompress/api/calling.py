"""How models are called: whether they take the batches, and whether rows can be taken apart."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, LoadError, MPOCompressError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.loading import Batch
from mpocompress.tuning.lockstep import floating_outputs, seeded_call

P = ParamSpec("P")
R = TypeVar("R")

# Two passes over the same rows differ by rounding that depends on how many there are.
_SAME = 1e-3
# Rows of a pass that is made only to see whether it can be made.
_FEW = 4


class _InputChangedError(DataError):
    """A forward writes to what it is given."""


def by_itself(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without the caller's inference mode and autocast.

    The one takes gradients away, the other rounds every product to half precision, those of moments
    and of decompositions, too. What a model's own forward switches on stays.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return called


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps, or the model: names and hooks are the module's.

    What is made of it is not compiled; compile it again.

    Raises:
        LoadError: it is no module.
    """
    if not isinstance(model, nn.Module):
        is_path = isinstance(model, str | Path)
        what = f"the path {str(model)!r}" if is_path else f"a {type(model).__name__}"
        raise LoadError(
            f"a model is an nn.Module, and this is {what}. Load it first, as with torch.load, or "
            "use the command line: mpocompress MODEL --bond-dim 16."
        )
    found = getattr(model, "_orig_mod", None)
    # The class is not imported for this: that would load the whole compiler.
    return found if type(model).__name__ == "OptimizedModule" and found is not None else model


def check_calls(model: nn.Module, calls: Sequence[Batch]) -> None:
    """Call the model with a few rows of those batches that are most unlike each other.

    Batches of the same arguments, dtypes and numbers of axes may differ in sizes, as sentences do
    in their lengths: of each axis but that of the rows the smallest and the largest size are
    tried.

    Args:
        model: that will be called with them.
        calls: one or more batches.

    Raises:
        DataError: it does not take one; the message has its number, counted from 0, the shapes of
            its inputs, and the model's error. Or it changes them in place.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for number, batch in enumerate(calls):
        named = [(name, t.dtype, t.ndim) for name, t in batch.named_inputs()]
        kinds.setdefault(tuple(named), []).append(number)
    tried = {0}
    for numbers in kinds.values():
        sizes = {n: [s for _, t in calls[n].named_inputs() for s in t.shape[1:]] for n in numbers}
        tried.add(numbers[0])
        for axis in range(len(sizes[numbers[0]])):
            by_size = {sizes[n][axis]: n for n in reversed(numbers)}
            if len(by_size) > 1:
                tried |= {by_size[min(by_size)], by_size[max(by_size)]}
    for number in sorted(tried):
        _check_call(model, calls[number], number)


def _check_call(model: nn.Module, batch: Batch, number: int) -> None:
    """Call the model with a few rows of a batch or, where those alone are not taken, with all."""
    if batch.rows_come_first and batch.num_rows > _FEW:
        try:
            _check_unchanged(model, batch.take(torch.arange(_FEW, device="cpu")))
            return
        except (_InputChangedError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever foreign code raises, or MPO layers in it
            pass  # all rows may belong together, as the nodes of a graph
    try:
        _check_unchanged(model, batch.map_inputs(torch.clone))
    except (MPOCompressError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        inputs = ", ".join(
            f"{name} of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in batch.named_inputs()
        )
        lines = str(error).splitlines() or [type(error).__name__]
        which = "the first batch" if number == 0 else f"batch {number}, counted from 0"
        raise DataError(
            f"forward of {type(model).__name__} does not take {which} ({inputs}): "
            f"{lines[0]}. A batch has the arguments of forward, in order or by name; labels go by "
            f"the name 'labels', as in {{{_first_argument(model)!r}: x, 'labels': y}}."
        ) from error


def _check_unchanged(model: nn.Module, copied: Batch) -> None:
    """Call the model and refuse one that writes to what it is given.

    Every pass over the data would see others, and so would the user.
    """
    before = [tensor._version for _, tensor in copied.named_inputs()]
    _call(model, copied)
    for (name, tensor), version in zip(copied.named_inputs(), before, strict=True):
        if tensor._version != version:
            raise _InputChangedError(
                f"forward of {type(model).__name__} changes its input {name!r} in place, so that "
                "every pass over the data would see others. Write x = x - mean for x.sub_(mean), "
                "or do it where the data is made."
            )


def _first_argument(model: nn.Module) -> str:
    try:
        return next(iter(inspect.signature(model.forward).parameters), "input")
    except (TypeError, ValueError):  # a forward that is not written in Python
        return "input"


def with_whole_batches(model: nn.Module, calls: Sequence[Batch]) -> list[Batch]:
    """The same batches, marked where their rows must stay together.

    They stay together where the last rows of the first batch alone give other outputs than among
    the others, or outputs that do not follow the number of rows: nodes of a graph, sequences whose
    time comes first. Where two passes of the same rows differ, too, as those of a model that draws
    at random, nothing is marked; nor where outputs show nothing, as a single number.

    Args:
        model: dense; it is called up to three times.
        calls: batches.
    """
    first = next((call for call in calls if call.rows_come_first and call.num_rows > 1), None)
    if first is None:
        return list(calls)
    count = first.num_rows
    last = torch.arange(count - count // 2, count, device="cpu")
    whole = _call(model, first)
    try:
        apart = _call(model, first.take(last))
    except torch.OutOfMemoryError:  # says nothing of the rows
        raise
    except Exception:  # whatever foreign code raises
        apart = []
    if _stand_alone(whole, apart, last, count):
        return list(calls)
    if not _equal_all(whole, _call(model, first, seed=1)):
        return list(calls)
    return [replace(call, divisible=False) for call in calls]


def _call(model: nn.Module, batch: Batch, *, seed: int = 0) -> list[Tensor]:
    with evaluation_mode(model), torch.no_grad():
        return floating_outputs(seeded_call(model, batch, seed))


def _stand_alone(whole: list[Tensor], apart: list[Tensor], rows: Tensor, count: int) -> bool:
    """Whether outputs of some rows are what they are among all rows, as far as outputs show it."""
    if len(whole) != len(apart):
        return False
    same = fixed = False
    for a, b in zip(whole, apart, strict=True):
        if a.ndim != b.ndim:
            continue
        differing = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
        if not differing:
            fixed |= a.ndim > 0
        if len(differing) != 1:
            continue  # two or more: as similarities of all pairs
        axis = differing[0]
        if a.shape[axis] % count or b.shape[axis] * count != a.shape[axis] * len(rows):
            continue
        # Of outputs that were flattened each row has several, one after the other.
        blocks = a.unflatten(axis, (count, -1)).index_select(axis, rows.to(a.device))
        if not _equal(blocks.flatten(axis, axis + 1), b):
            return False
        same = True
    return same or not fixed


def _equal_all(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(_equal, first, second))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, in what is finite."""
    finite = torch.isfinite(a)
    if a.shape != b.shape or not torch.equal(finite, torch.isfinite(b)):
        return False
    tolerance = max(_SAME, 8 * torch.finfo(a.dtype).eps)
    a, b = a[finite].float(), b[finite].float()
    return float((a - b).norm()) <= tolerance * float(a.norm())
