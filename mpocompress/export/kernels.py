"""Kernels that no operator of ONNX stands for, spelled by layers."""

from torch import nn

from mpocompress.surgery.opening import is_fused_experts, open_modules


def without_foreign_kernels(model: nn.Module) -> nn.Module:
    """The model with what ONNX has no operator for computed by layers of its own.

    That is LSTMs with a projection, whose operator has none, and fused experts, whose kernel counts
    the tokens of each. Where weights of them were compressed, they are computed that way already.

    Args:
        model: not changed; parameters and buffers are shared with what is returned.
    """
    names = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.LSTM) and module.proj_size) or is_fused_experts(module)
    ]
    return open_modules(model, only=names) if names else model
