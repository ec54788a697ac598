"""`nn.RNN` as the RNN operator of ONNX; torch's exporter has LSTM and GRU only."""

from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat


def _rnn(activation: str) -> Callable[..., Any]:
    """The translation of an operator of `recurrence`; the exporter reads its types.

    One operator a layer; weights (direction, hidden, ...), biases (direction, 2 * hidden), states
    (direction, batch, hidden), sequences (time, direction, batch, hidden).
    """

    def translate(
        input: TFloat,
        hx: TFloat,
        params: Sequence[TFloat],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[TFloat, TFloat]:
        directions = 2 if bidirectional else 1
        each = 4 if has_biases else 2
        if batch_first:
            input = op.Transpose(input, perm=[1, 0, 2])
        states = []
        for layer in range(num_layers):
            weights, recurrences, biases = [], [], []
            for direction in range(directions):
                first = (layer * directions + direction) * each
                weights.append(op.Unsqueeze(params[first], [0]))
                recurrences.append(op.Unsqueeze(params[first + 1], [0]))
                if has_biases:
                    both = op.Concat(params[first + 2], params[first + 3], axis=0)
                    biases.append(op.Unsqueeze(both, [0]))
            sequence, state = op.RNN(
                input,
                op.Concat(*weights, axis=0),
                op.Concat(*recurrences, axis=0),
                op.Concat(*biases, axis=0) if has_biases else None,
                None,
                op.Slice(hx, [layer * directions], [(layer + 1) * directions], axes=[0]),
                activations=[activation] * directions,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=params[1].shape[1],
            )
            states.append(state)
            # (time, direction, batch, hidden) to (time, batch, direction * hidden)
            input = op.Reshape(op.Transpose(sequence, perm=[0, 2, 1, 3]), [0, 0, -1])
        if batch_first:
            input = op.Transpose(input, perm=[1, 0, 2])
        return input, op.Concat(*states, axis=0)

    return translate


tanh_rnn, relu_rnn = _rnn("Tanh"), _rnn("Relu")
