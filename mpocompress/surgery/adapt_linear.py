"""`nn.Linear`, its subclasses that are nothing but an `nn.Linear`, and GPT-2's `Conv1D`."""

from torch import Tensor, nn

from mpocompress.layers import MPOLinear
from mpocompress.mpo.weight import Weight
from mpocompress.surgery.adapter import OneWeight, register
from mpocompress.surgery.refusals import why_dense

_CONV1D = ("transformers.pytorch_utils", "Conv1D")


class LinearAdapter(OneWeight):
    """Reads `nn.Linear.weight` and builds `MPOLinear`."""

    kind = "linear"

    def matches(self, module: nn.Module) -> bool:
        """Whether this is an `nn.Linear` or a subclass."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module must stay dense, or None. See `WeightAdapter.refusal`."""
        return why_dense(module, nn.Linear)

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight (out, in), detached."""
        return self.weight(module)

    def has_offset(self, module: nn.Module) -> bool:
        """Whether there is a bias."""
        return module._parameters.get("bias") is not None

    def build(self, module: nn.Module, mpo: Weight) -> nn.Module:
        """An `MPOLinear` in the module's dtype, device and mode. See `WeightAdapter.build`."""
        layer = MPOLinear.from_mpo(self.own_copy(module, mpo), self.own_bias(module))
        return self.finished(module, layer)


class Conv1DAdapter(LinearAdapter):
    """Reads the weight (in, out) of transformers' `Conv1D`, a linear layer, and builds `MPOLinear`.

    The class is recognized by its name and home, so transformers need not be installed.
    """

    transposed = True

    def matches(self, module: nn.Module) -> bool:
        """Whether this is a `Conv1D` or a subclass."""
        return _conv1d(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module must stay dense, or None. See `WeightAdapter.refusal`."""
        return why_dense(module, _conv1d(module) or type(module))

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight as (out, in), detached."""
        return self.weight(module).mT


def _conv1d(module: nn.Module) -> type[nn.Module] | None:
    classes = (cls for cls in type(module).__mro__ if issubclass(cls, nn.Module))
    return next((cls for cls in classes if (cls.__module__, cls.__name__) == _CONV1D), None)


register(LinearAdapter())
register(Conv1DAdapter())
