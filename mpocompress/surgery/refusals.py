"""Why a module must stay dense although its kind is known: what would be lost by replacing it."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What a subclass may define and still be exchanged for an MPO layer: how it is made and printed,
# and what Python itself puts into a class body. Anything else is behaviour that would get lost.
_HARMLESS = frozenset(
    {
        "__init__",
        "reset_parameters",
        "extra_repr",
        "_get_name",
        "__repr__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__constants__",
        "__dict__",
        "__firstlineno__",
        "__static_attributes__",
        "__orig_bases__",
        "__parameters__",
        "__weakref__",
    }
)

_COUNT = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

# Hooks that take part in a call. Hooks on saving and loading speak of "weight" and are dropped.
_CALL_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def why_dense(
    module: nn.Module, base: type[nn.Module], *, dims: int = 2, computed: str | None = None
) -> str | None:
    """Why a module must stay dense (one clause), or None if it need not.

    Args:
        module: of the class `base`, or a subclass.
        base: the class whose behaviour the new layer has.
        dims: dimensions of its weight.
        computed: why other options of this module rule it out, if they do; said last.
    """
    return (
        _wrapped_weight(module)
        or _foreign_class(module, base)
        or _foreign_state(module)
        or _foreign_weight(module, dims)
        or called_hooks(module)
        or computed
    )


def why_closed(module: nn.Module, base: type[nn.Module], expected: Collection[str]) -> str | None:
    """Why a module that reads several weights must not be exchanged for an equal one, or None.

    Args:
        module: of the class `base`, or a subclass.
        base: the class whose behaviour the other one has.
        expected: names of its parameters; others say that some code computes them.
    """
    if parametrize.is_parametrized(module):
        names = ", ".join(sorted(getattr(module, "parametrizations", {})))
        return f"{names} is parametrized; make it plain with remove_parametrizations"
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if own != set(expected) or module._buffers:
        found = sorted(own.symmetric_difference(expected) | set(module._buffers))
        return f"its parameters are not the usual ones: {', '.join(found[:3])}"
    for name, parameter in module._parameters.items():
        if parameter is not None and (
            type(parameter.data) is not Tensor or parameter.dtype not in _DTYPES
        ):
            return f"its {name} is no plain tensor of floating-point numbers"
    return _foreign_class(module, base) or _replaced_call(module) or called_hooks(module)


def _replaced_call(module: nn.Module) -> str | None:
    replaced = sorted(
        {"forward", "__call__", "_call_impl", "_wrapped_call_impl"} & set(vars(module))
    )
    return f"its {replaced[0]} was replaced on the instance" if replaced else None


def _wrapped_weight(module: nn.Module) -> str | None:
    """The weight is not a parameter of its own, but computed from others."""
    if parametrize.is_parametrized(module):
        names = ", ".join(sorted(getattr(module, "parametrizations", {})))
        return (
            f"{names} is parametrized; make it a plain parameter with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if module._parameters.get("weight") is not None:
        return None
    state = {*module._parameters, *module._buffers}
    if "weight_g" in state:
        return (
            "its weight is computed by weight_norm; undo it with torch.nn.utils.remove_weight_norm"
        )
    if "weight_mask" in state:
        return "its weight is pruned by a mask; make it permanent with torch.nn.utils.prune.remove"
    if "weight_u" in state:
        return (
            "its weight is computed by spectral_norm; undo it with "
            "torch.nn.utils.remove_spectral_norm"
        )
    return "its weight is not a parameter, but set by other code"


def _foreign_class(module: nn.Module, base_class: type[nn.Module]) -> str | None:
    """The class is more than its base with another name."""
    cls = type(module)
    if cls is base_class:
        return None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner reads the weight without calling the layer"
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return "it is lazy and not yet initialized; run one batch through the model first"
    for base in cls.__mro__:
        if base in base_class.__mro__:
            continue
        added = sorted(set(vars(base)) - _HARMLESS)
        if added:
            what = "forward" if "forward" in added else ", ".join(added[:3])
            return f"its class {cls.__module__}.{cls.__qualname__} has its own {what}"
    return None


def _foreign_state(module: nn.Module) -> str | None:
    """This very module carries more than `weight` and `bias`, or calls something else."""
    if (replaced := _replaced_call(module)) is not None:
        return replaced
    extra = [
        *(name for name in module._parameters if name not in ("weight", "bias")),
        *module._buffers,
        *module._modules,
    ]
    if extra:
        return f"it has state beside weight and bias: {', '.join(extra[:3])}"
    return None


def _foreign_weight(module: nn.Module, dims: int) -> str | None:
    """The weight is no plain tensor of floating-point numbers in memory."""
    weight = module._parameters["weight"]
    if weight is None:
        return None
    # Quantized, distributed and fake tensors are subclasses that `.data` does not strip; a mere
    # subclass of Parameter is only a label.
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.layout != torch.strided:
        return f"its weight has the layout {weight.layout}, not torch.strided"
    if weight.ndim != dims:
        return f"its weight has shape {tuple(weight.shape)}, not {_COUNT[dims]} dimensions"
    if weight.numel() == 0:
        return f"its weight is empty, {'x'.join(map(str, weight.shape))}"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; float16, bfloat16, float32 and float64 are converted"
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load them first"
    return None


def called_hooks(module: nn.Module) -> str | None:
    """Somebody listens to, or changes, what goes in and out."""
    for attribute, what in _CALL_HOOKS.items():
        if getattr(module, attribute):
            return f"it has a {what}, which would be lost; remove it before converting"
    return None
