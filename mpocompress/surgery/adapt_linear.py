"""`nn.Linear` and those of its subclasses that are nothing but an `nn.Linear`."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from mpocompress.layers import MPOLinear
from mpocompress.layers.gauged_cores import GaugedCores
from mpocompress.mpo import MPO
from mpocompress.mpo.identity_gauge import IdentityGauge
from mpocompress.surgery.adapter import register

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What a subclass may define and still be exchanged for an MPOLinear: how it is made and printed,
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

# Hooks that take part in a call. Hooks on saving and loading speak of "weight" and are dropped.
_CALL_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


class LinearAdapter:
    """Reads `nn.Linear.weight` and builds `MPOLinear`."""

    kind = "linear"

    def matches(self, module: nn.Module) -> bool:
        """Whether this is an `nn.Linear` or a subclass."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module must stay dense, or None. See `WeightAdapter.refusal`."""
        checks = (_wrapped_weight, _foreign_class, _foreign_state, _foreign_weight, _called_hooks)
        return next((reason for check in checks if (reason := check(module))), None)

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        """The weight, unless something else (a parametrization, old weight_norm) computes it."""
        return module._parameters.get("weight")

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight (out, in), detached."""
        weight = self.parameter(module)
        if weight is None:
            raise TypeError(f"{type(module).__name__} has no parameter 'weight'.")
        return weight.detach()

    def build(self, module: nn.Module, mpo: MPO | IdentityGauge) -> nn.Module:
        """An `MPOLinear` in the module's dtype, device and mode. See `WeightAdapter.build`."""
        weight_OI = self.matrix(module)

        # A copy of the cores, always: a single core may be the weight itself, reshaped, and one
        # MPO may go into several models that are trained apart.
        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to(weight_OI.device, weight_OI.dtype, copy=True)

        weight: MPO | IdentityGauge
        if isinstance(mpo, IdentityGauge):
            weight = IdentityGauge(
                tuple(map(copied, mpo.free)),
                tuple(rows.to(weight_OI.device, copy=True) for rows in mpo.pivots),
                copied(mpo.last),
                mpo.layout,
                mpo.shape,
            )
        else:
            weight = MPO(map(copied, mpo.cores), shape=mpo.shape)
        bias = module._parameters.get("bias")
        layer = MPOLinear.from_mpo(weight, None if bias is None else bias.detach().clone())
        old = self.parameter(module)
        layer.cores.requires_grad_(old is not None and old.requires_grad)
        if layer.bias is not None and bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(module.training)

    def tie(self, layer: nn.Module, leader: nn.Module) -> None:
        """Give `layer` the core parameters of `leader`; each keeps its own bias."""
        if not isinstance(layer, MPOLinear) or not isinstance(leader, MPOLinear):
            raise TypeError(
                f"only MPOLinear layers share cores, not {type(layer).__name__} and "
                f"{type(leader).__name__}."
            )
        if isinstance(leader.cores, GaugedCores):
            layer.cores = leader.cores
            return
        layer.free_gauge_()
        for position, core in enumerate(leader.cores):
            layer.cores.register_parameter(str(position), core)


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


def _foreign_class(module: nn.Module) -> str | None:
    """The class is more than an `nn.Linear` with another name."""
    cls = type(module)
    if cls is nn.Linear:
        return None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner reads the weight without calling the layer"
    if isinstance(module.weight, UninitializedParameter):
        return "it is lazy and not yet initialized; run one batch through the model first"
    for base in cls.__mro__:
        if base in nn.Linear.__mro__:
            continue
        added = sorted(set(vars(base)) - _HARMLESS)
        if added:
            what = "forward" if "forward" in added else ", ".join(added[:3])
            return f"its class {cls.__module__}.{cls.__qualname__} has its own {what}"
    return None


def _foreign_state(module: nn.Module) -> str | None:
    """This very module carries more than `weight` and `bias`, or calls something else."""
    replaced = sorted(
        {"forward", "__call__", "_call_impl", "_wrapped_call_impl"} & set(vars(module))
    )
    if replaced:
        return f"its {replaced[0]} was replaced on the instance"
    extra = [
        *(name for name in module._parameters if name not in ("weight", "bias")),
        *module._buffers,
        *module._modules,
    ]
    if extra:
        return f"it has state beside weight and bias: {', '.join(extra[:3])}"
    return None


def _foreign_weight(module: nn.Module) -> str | None:
    """The weight is no plain matrix of floating-point numbers in memory."""
    weight = module._parameters["weight"]
    if weight is None:
        return None
    # Quantized, distributed and fake tensors are subclasses that `.data` does not strip; a mere
    # subclass of Parameter is only a label.
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.layout != torch.strided:
        return f"its weight has the layout {weight.layout}, not torch.strided"
    if weight.ndim != 2:
        return f"its weight has shape {tuple(weight.shape)}, not two dimensions"
    if weight.numel() == 0:
        return f"its weight is empty, {weight.shape[0]}x{weight.shape[1]}"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; float16, bfloat16, float32 and float64 are converted"
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load them first"
    return None


def _called_hooks(module: nn.Module) -> str | None:
    """Somebody listens to, or changes, what goes in and out."""
    for attribute, what in _CALL_HOOKS.items():
        if getattr(module, attribute):
            return f"it has a {what}, which would be lost; remove it before converting"
    return None


register(LinearAdapter())
