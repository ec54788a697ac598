"""The recurrent weight of one layer and direction of an opened `nn.LSTM`, `nn.GRU` or `nn.RNN`."""

import torch
from torch import Tensor, nn

from mpocompress.layers.recurrent import STATES, MPORecurrentWeight, Recurrence, RecurrentWeight
from mpocompress.mpo.weight import Weight
from mpocompress.surgery.adapter import OneWeight, register
from mpocompress.surgery.refusals import why_dense


class RecurrentAdapter(OneWeight):
    """Reads the weight (gates, recurrent features), builds `MPORecurrentWeight`.

    It is multiplied with the hidden states, which are found by running through the sequence with
    the dense weight. What it gives is added to the gates that come in, so a gradient there is one
    at its outputs.
    """

    kind = "recurrent"
    takes_rows = False
    watches_input = True

    def matches(self, module: nn.Module) -> bool:
        """Whether this is such a weight."""
        return isinstance(module, RecurrentWeight)

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module must stay dense, or None. See `WeightAdapter.refusal`."""
        return why_dense(module, RecurrentWeight)

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight, detached."""
        return self.weight(module)

    @torch.no_grad()
    def input_rows(self, module: nn.Module, value: Tensor) -> Tensor:
        """Hidden states (batch, time, recurrent features)."""
        if not isinstance(module, Recurrence):
            raise TypeError(f"a {type(module).__name__} is no recurrent weight.")
        return module.run(value)[1].transpose(0, 1)

    def output_rows(self, module: nn.Module, value: Tensor) -> Tensor | None:
        """A gradient at the gates that come in: (batch, time, gates)."""
        return value[STATES:].transpose(0, 1)

    def has_offset(self, module: nn.Module) -> bool:
        """Whether there is a bias."""
        return module._parameters.get("bias") is not None

    def build(self, module: nn.Module, mpo: Weight) -> nn.Module:
        """An `MPORecurrentWeight` like the module. See `WeightAdapter.build`."""
        layer = MPORecurrentWeight.from_mpo(
            self.own_copy(module, mpo), self.own_bias(module), module
        )
        return self.finished(module, layer)


register(RecurrentAdapter())
