"""What stands in the way of `copy.deepcopy` of a model, and naming it."""

import copy
import weakref
from collections.abc import Collection, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from mpocompress.errors import ConversionError
from mpocompress.surgery.inventory import label
from mpocompress.surgery.references import held_values


def detach_results(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy tensors with a gradient history, which deepcopy refuses, as plain values.

    Weights of the old weight_norm and spectral_norm hooks are such results (computed anew before
    each call), and so are activations that a module remembers.
    """
    for module in model.modules():
        for _, value in held_values(module):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()


def check_references(model: nn.Module) -> None:
    """Refuse functions and weak references that deepcopy takes over as they are."""
    members = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        for path, value in held_values(module):
            for target in _captured(value):
                if id(target) in members:
                    raise ConversionError(
                        f"'{path}' of {type(module).__name__} {label(name)} is a "
                        f"{type(value).__name__} that refers to {label(members[id(target)])} of "
                        "this model: a copy of the model would go on using the original. Make it a "
                        "method or a module, or remove it (a hook) before converting."
                    )


def _captured(value: Any) -> Iterator[Any]:
    """What a function closes over, or a weak reference points to."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that is not assigned yet
                continue
    elif isinstance(value, weakref.ReferenceType):
        yield value()


def uncopyable(model: nn.Module, replaced: Collection[nn.Module], error: Exception) -> str:
    """Name the attribute that deepcopy failed on."""
    for name, module in model.named_modules():
        if module in replaced:
            continue
        for attribute, value in [*plain_attributes(module), *module._buffers.items()]:
            try:
                copy.deepcopy(value, anchored(model))
            except Exception as found:
                return (
                    f"attribute '{attribute}' ({type(value).__name__}) of {type(module).__name__} "
                    f"{label(name)}: {found}. Remove it, or give its class a __deepcopy__."
                )
        memo = anchored(model)
        del memo[id(module)]
        try:
            copy.deepcopy(module, memo)
        except Exception as found:
            return f"{type(module).__name__} {label(name)}: {found}."
    return f"{error}."


def plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes of a module that are no parameters, buffers or children."""
    registered = ("_parameters", "_buffers", "_modules")
    return [(name, value) for name, value in vars(module).items() if name not in registered]


def anchored(model: nn.Module) -> dict[int, Any]:
    """A memo by which modules and parameters are their own copies, so that a trial is cheap."""
    memo: dict[int, Any] = {id(module): module for module in model.modules()}
    memo.update((id(parameter), parameter) for parameter in model.parameters())
    return memo
