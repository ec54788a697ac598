"""Batches as a user writes them, as calls of the model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode

_LABELS = ("labels", "y")


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """Arguments of one forward call."""

    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)


def forward_calls(data: Any, model: nn.Module) -> Iterator[ForwardCall]:
    """Calls of the model, in its dtype and on its device.

    Args:
        data: a tensor, a tuple of arguments, a mapping of arguments by name, or an iterable of
            those (labels by name are left out), or of objects with `args` and `kwargs`. Arrays of
            NumPy stand for tensors.
        model: what will be called.

    Raises:
        DataError: a batch that is none of these, or no batch at all; or the model does not take
            the first one.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)

    def placed(tensor: Any) -> Tensor:
        if isinstance(tensor, np.ndarray):
            tensor = torch.as_tensor(tensor)
        if not isinstance(tensor, Tensor):
            raise DataError(
                f"a batch with a {type(tensor).__name__} in it. Batches are tensors, tuples of "
                "tensors, or dicts of tensors by argument name."
            )
        if parameter is None:
            return tensor
        dtype = parameter.dtype if tensor.is_floating_point() else None
        return tensor.to(device=parameter.device, dtype=dtype)

    single = isinstance(data, Tensor | np.ndarray | tuple | Mapping) or hasattr(data, "args")
    if not single and not isinstance(data, Iterable):
        raise DataError(f"data {data!r}: give batches of forward arguments, as tensors.")
    first = True
    for batch in [data] if single else data:
        if hasattr(batch, "args") and hasattr(batch, "kwargs"):
            args, kwargs = batch.args, batch.kwargs
        elif isinstance(batch, Mapping):
            args = ()
            kwargs = {name: value for name, value in batch.items() if name not in _LABELS}
        else:
            args, kwargs = batch if isinstance(batch, tuple | list) else (batch,), {}
        call = ForwardCall(
            tuple(map(placed, args)), {name: placed(value) for name, value in kwargs.items()}
        )
        if first:
            _try(model, call)
        first = False
        yield call
    if first:
        raise DataError("data: there are no batches in it.")


def _try(model: nn.Module, call: ForwardCall) -> None:
    """Refuse what forward does not take, before it is an error somewhere in the middle."""
    try:
        with evaluation_mode(model), torch.no_grad():
            model(*call.args, **call.kwargs)
    except Exception as error:
        named = [f"argument {place}" for place in range(len(call.args))] + list(call.kwargs)
        shapes = [tuple(value.shape) for value in (*call.args, *call.kwargs.values())]
        given = ", ".join(f"{name} of shape {s}" for name, s in zip(named, shapes, strict=True))
        raise DataError(
            f"forward of {type(model).__name__} does not take the first batch ({given}): {error}. "
            "A batch has the arguments of forward, in order or by name, without labels."
        ) from error
