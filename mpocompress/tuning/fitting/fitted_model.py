"""The model that fits make: weights in place, biases that took up the mean of their errors."""

from collections.abc import Mapping

from torch import nn

from mpocompress.mpo.weight import Weight
from mpocompress.surgery import WeightSite, copy_with_replacements
from mpocompress.tuning.fitting.plan import FittedWeight


def with_fitted(
    model: nn.Module,
    weights: Mapping[WeightSite, Weight],
    fitted: Mapping[WeightSite, FittedWeight],
) -> nn.Module:
    """A copy of the model with these weights, and biases that took up the mean of their errors.

    What was fitted and is not among the weights stays dense, and gets the values of its fit.
    """
    compressed = copy_with_replacements(model, weights)
    for site, weight in fitted.items():
        layer = compressed.get_submodule(site.name)
        if site not in weights:
            matrix_OI = weight.mpo.to_dense()
            stored = matrix_OI.mT if site.adapter.transposed else matrix_OI
            layer.get_parameter("weight").data.copy_(stored)
        if weight.bias is not None:
            layer.get_parameter("bias").data.copy_(weight.bias)
    return compressed
