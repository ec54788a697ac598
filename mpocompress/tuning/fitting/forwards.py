"""What computes a layer while layers are fitted: itself, or what it was fitted to."""

from collections.abc import Callable

from torch import Tensor, nn

from mpocompress.mpo.contract import apply_cores
from mpocompress.tuning.fitting.plan import FittedWeight
from mpocompress.tuning.statistics.layer_rows import adapter_of

Forward = Callable[[Tensor], Tensor]


def dense_forward(layer: nn.Module) -> Forward:
    """The layer's own forward, whatever has been put in front of it."""

    def forward(value: Tensor) -> Tensor:
        output: Tensor = type(layer).forward(layer, value)
        return output

    return forward


def fitted_forward(layer: nn.Module, fitted: FittedWeight) -> Forward:
    """That of its stand-in, with the fitted bias if there is one.

    Args:
        layer: the dense one, which is left as it is.
        fitted: its weight.
    """
    mpo = fitted.mpo
    adapter = adapter_of(layer)
    if not adapter.takes_rows:
        built = adapter.build(layer, mpo)
        if fitted.bias is not None and isinstance(built.bias, nn.Parameter):
            built.bias.data.copy_(fitted.bias)
        for name, attribute in vars(layer).items():  # as surgery does
            if name != "forward" and name not in vars(built) and not hasattr(type(built), name):
                setattr(built, name, attribute)
        return built
    bias = getattr(layer, "bias", None) if fitted.bias is None else fitted.bias

    def forward(value: Tensor) -> Tensor:
        output = apply_cores(mpo.cores, value, shape=mpo.shape)
        return output if bias is None else output + bias

    return forward
