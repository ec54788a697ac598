"""Recurrent kernels in traced graphs, for sequences of any length.

torch infers the outputs of its recurrent kernels by running them step after step, which fixes a
traced graph to the length of the example. Here they are traced as operators of our own, that say
what their outputs look like, and are translated to the operators of ONNX that stand for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The arguments are those of torch's kernels, in their order.


@torch.library.custom_op("mpocompress::lstm", mutates_args=())
def _lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.lstm(
        input,
        list(hx),
        list(params),
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
    )


@torch.library.custom_op("mpocompress::gru", mutates_args=())
def _gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    return torch.gru(
        input,
        hx,
        list(params),
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
    )


@torch.library.custom_op("mpocompress::rnn", mutates_args=())
def _rnn(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    kernel = torch.rnn_relu if relu else torch.rnn_tanh
    return kernel(
        input,
        hx,
        list(params),
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
    )


def _outputs(input: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    return input.new_empty(*input.shape[:2], state.shape[2] * (2 if bidirectional else 1))


@_lstm.register_fake
def _(input: Tensor, hx: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = _outputs(input, hx[0], rest[5])
    return output, torch.empty_like(hx[0]), torch.empty_like(hx[1])


@_gru.register_fake
@_rnn.register_fake
def _(input: Tensor, hx: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(input, hx, rest[5]), torch.empty_like(hx)


_KERNELS: Mapping[Any, Callable[..., Any]] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: lambda *args: _rnn(*args, relu=False),
    torch.rnn_relu: lambda *args: _rnn(*args, relu=True),
}


class OpenLengths(TorchFunctionMode):
    """Within it, recurrent kernels are called as operators that leave the length open.

    Those with projections, which ONNX does not know, and packed sequences are left to torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _KERNELS and not kwargs and _is_plain(args):
            return _KERNELS[func](*args)
        return func(*args, **(kwargs or {}))


def _is_plain(args: Sequence[Any]) -> bool:
    if len(args) != 9 or not isinstance(args[3], bool):  # packed: the weights stand there
        return False
    directions = args[4] * (2 if args[7] else 1)
    return len(args[2]) == directions * (4 if args[3] else 2)


def translations() -> dict[Any, Callable[..., Any]]:
    """How the operators are spelled in ONNX, for `torch.onnx.export`."""
    from onnxscript.function_libs.torch_lib.ops import core

    from mpocompress.export.rnn_operator import onnx_rnn

    operators = torch.ops.mpocompress
    return {
        operators.lstm.default: core.aten_lstm,
        operators.gru.default: core.aten_gru,
        operators.rnn.default: onnx_rnn,
    }
