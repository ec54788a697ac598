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

_WEIGHTS_AND_OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)


def _operator(kernel: Any, states: str, outputs: int) -> Any:
    """An operator that does what a kernel does, with its arguments in their order."""
    operator = torch.library.custom_op(
        f"mpocompress::{kernel.__name__}",
        lambda *args: kernel(*args),
        mutates_args=(),
        schema=f"(Tensor input, {states} hx, {_WEIGHTS_AND_OPTIONS}) "
        f"-> ({', '.join(['Tensor'] * outputs)})",
    )

    @operator.register_fake
    def _(input: Tensor, hx: Tensor | list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        last = [hx] if isinstance(hx, Tensor) else hx
        directions = 2 if rest[5] else 1
        output = input.new_empty(*input.shape[:2], last[0].shape[2] * directions)
        return output, *(torch.empty_like(state) for state in last)

    return operator


_OPERATORS: Mapping[Any, Any] = {
    torch.lstm: _operator(torch.lstm, "Tensor[]", 3),
    torch.gru: _operator(torch.gru, "Tensor", 2),
    torch.rnn_tanh: _operator(torch.rnn_tanh, "Tensor", 2),
    torch.rnn_relu: _operator(torch.rnn_relu, "Tensor", 2),
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
        if func in _OPERATORS and not kwargs and _is_plain(args):
            return _OPERATORS[func](*args)
        return func(*args, **(kwargs or {}))


def _is_plain(args: Sequence[Any]) -> bool:
    if len(args) != 9 or not isinstance(args[3], bool):  # packed: the weights stand there
        return False
    directions = args[4] * (2 if args[7] else 1)
    return len(args[2]) == directions * (4 if args[3] else 2)


def translations() -> dict[Any, Callable[..., Any]]:
    """How the operators are spelled in ONNX, for `torch.onnx.export`."""
    from onnxscript.function_libs.torch_lib.ops import core

    from mpocompress.export.rnn_operator import relu_rnn, tanh_rnn

    operators = torch.ops.mpocompress
    return {
        operators.lstm.default: core.aten_lstm,
        operators.gru.default: core.aten_gru,
        operators.rnn_tanh.default: tanh_rnn,
        operators.rnn_relu.default: relu_rnn,
    }
