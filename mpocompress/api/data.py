"""The user's batches as the model takes them, and parts of them."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.api.calling import check_calls
from mpocompress.errors import DataError
from mpocompress.loading import Batch, as_batches
from mpocompress.tuning.padding import MASK_NAMES

_FEW_ROWS = 256


def calls_of(data: Any, model: nn.Module) -> list[Batch]:
    """The batches of the user's data in the model's dtype and on its device.

    Raises:
        DataError: no batches, or the model cannot be called with one of them, see `check_calls`.
    """
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise DataError(
            f"parameter {lazy!r} of {type(model).__name__} has no shape yet. Call the model once "
            "with a batch, so that its lazy layers know their inputs."
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    batches = as_batches(data)
    if parameter is None:
        calls = list(batches)
    else:
        calls = [batch.to(parameter.device) for batch in batches.cast(parameter.dtype)]
    calls = [_with_named_mask(_of_autograd(call), model) for call in calls]
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise DataError(
            f"parameters of {type(model).__name__} were made under torch.inference_mode(), so that "
            "nothing can be learned of them by gradients. Build or load the model outside of it."
        )
    check_calls(model, calls)
    return calls


def _of_autograd(batch: Batch) -> Batch:
    """The batch without tensors of inference mode, which gradients cannot be taken through."""
    tensors = [tensor for _, tensor in batch.named_inputs()]
    tensors += [] if batch.labels is None else [batch.labels]
    if not any(tensor.is_inference() for tensor in tensors):
        return batch
    labels = None if batch.labels is None else batch.labels.clone()
    return replace(batch.map_inputs(torch.clone), labels=labels)


def _with_named_mask(batch: Batch, model: nn.Module) -> Batch:
    """The batch by names, if its positional arguments have a mask: it is known by its name."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*batch.args, **batch.kwargs)
    except (TypeError, ValueError):  # `check_calls` will tell
        return batch
    kinds = {signature.parameters[name].kind for name in bound.arguments}
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    positional = list(bound.arguments)[: len(batch.args)]
    if not (kinds <= by_name and MASK_NAMES.intersection(positional)):
        return batch
    return replace(batch, args=(), kwargs=dict(bound.arguments))


def forward_arguments(model: nn.Module, batch: Batch) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """A batch as a tuple or a dict of forward arguments; a mixed one goes by name.

    Raises:
        DataError: positional arguments that the forward has no names for.
    """
    if not batch.kwargs:
        return batch.args
    if not batch.args:
        return dict(batch.kwargs)
    try:
        bound = inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        raise DataError(
            f"the batch does not fit forward of {type(model).__name__}: {error}. Name all arrays."
        ) from None
    return dict(bound.arguments)


def split_calls(
    calls: Sequence[Batch], shares: Sequence[float], *, seed: int
) -> tuple[list[Batch], ...]:
    """Cut data into disjoint parts: the rows of every batch or, if those are few, whole batches.

    Of batches that are cut, one with too few rows for every part, as the last one often is, goes
    to the first part.

    Args:
        calls: batches.
        shares: of each part but the first, which gets the rest; 0 < sum < 1.
        seed: of what goes where.

    Returns:
        The parts, none of them empty.

    Raises:
        DataError: there is not enough data for so many parts.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Batch], ...] = tuple([] for _ in range(len(shares) + 1))
    cut = calls if all(call.divisible and call.rows_come_first for call in calls) else ()
    rows = sum(call.num_rows for call in cut)
    large = {call for call in cut if call.num_rows * min(shares) >= 1}
    if large and 2 * sum(call.num_rows for call in large) >= rows:
        for call in cut:
            if call not in large:
                parts[0].append(call)
                continue
            for part, chosen in zip(parts, _cut(call.num_rows, shares, generator), strict=True):
                part.append(call.take(chosen))
        return parts
    if len(calls) * min(shares) < 1:
        needed = int(1 / min(shares)) + 1
        if not cut:
            raise DataError(
                f"{len(calls)} batches are too few to hold out "
                f"{' and '.join(f'{share:.0%}' for share in shares)} of them, and what stands in "
                f"one batch cannot be taken apart. Give {needed} batches or more."
            )
        rows = sum(call.num_rows for call in calls)
        raise DataError(
            f"{len(calls)} batches with {rows} rows in all are too few to hold out "
            f"{' and '.join(f'{share:.0%}' for share in shares)} of them. Give more data, in "
            f"batches of {needed} rows or more."
        )
    for part, chosen in zip(parts, _cut(len(calls), shares, generator), strict=True):
        part += [calls[index] for index in chosen.tolist()]
    return parts


def few_rows(calls: Sequence[Batch]) -> list[Batch]:
    """The first batches that have 256 rows together."""
    found: list[Batch] = []
    seen = 0
    for call in calls:
        found.append(call)
        seen += call.num_rows
        if seen >= _FEW_ROWS:
            break
    return found


def _cut(count: int, shares: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(count, generator=generator, device="cpu")
    sizes = [int(share * count) for share in shares]
    cut = order.split([count - sum(sizes), *sizes])
    return [part.sort().values for part in cut]
