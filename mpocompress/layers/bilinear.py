"""`nn.Bilinear`, opened: see `opened`."""

from collections.abc import Mapping

from torch import Tensor, nn

from mpocompress.layers.attention import linear_around
from mpocompress.layers.opened import Opened, Origin


class OpenBilinear(Opened):
    """y_o = x1^T W_o x2 + b_o by one linear layer on x2, with out * in1 outputs.

    Args:
        bilinear: its weights are shared, not copied.
    """

    def __init__(self, bilinear: nn.Bilinear) -> None:
        super().__init__()
        self.in1_features, self.in2_features = bilinear.in1_features, bilinear.in2_features
        self.out_features = bilinear.out_features
        weight = bilinear.weight
        flat = weight.detach().reshape(-1, self.in2_features)
        self.inner = linear_around(nn.Parameter(flat, weight.requires_grad))
        self.register_parameter("bias", bilinear.bias)
        self.train(bilinear.training)

    def origins(self) -> Mapping[str, Origin]:
        """The weight (out, in1, in2)."""
        shape = (self.out_features, self.in1_features, self.in2_features)
        return {"weight": Origin(("inner.weight",), shape)}

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """As `nn.Bilinear.forward`: (..., in1) and (..., in2) to (..., out)."""
        mixed = self.inner(input2).unflatten(-1, (self.out_features, self.in1_features))
        output = (mixed @ input1[..., None])[..., 0]
        return output if self.bias is None else output + self.bias
