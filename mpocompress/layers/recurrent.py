"""`nn.RNN`, `nn.LSTM` and `nn.GRU`, opened: see `opened`."""

# Shape suffixes: T time, N batch, G all gates' rows, H hidden units, R recurrent features (the
# hidden units, or their projection).

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mpocompress.errors import DataError
from mpocompress.layers.attention import linear_around
from mpocompress.layers.base import MPOLayer
from mpocompress.layers.opened import Opened, Origin
from mpocompress.mpo.weight import Weight

# In front of the gates of a sequence travel its initial states, as two more times.
STATES = 2


class Recurrence:
    """What a recurrent weight does: from a sequence of gates to the sequence of hidden states.

    A mixin of layers with `weight` (G, R) and `bias` (G,) or None.
    """

    weight: Any
    bias: Any
    mode: str
    hidden_size: int
    backwards: bool
    projection: tuple[Any, ...]

    def run(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run through a sequence.

        Args:
            value: (2 + T, N, G): the initial recurrent state and cell state, padded with zeros,
                then what the input contributes to the gates.

        Returns:
            Hidden states before a projection (T, N, H); what the weight is multiplied with
            (T, N, R); the last cell state (N, H).
        """
        weight_GR = self.weight
        projection = getattr(self, "projection", ())
        project_RH = projection[0].weight if projection else None
        state_NR = value[0, :, : weight_GR.shape[1]]
        cell_NH = value[1, :, : self.hidden_size]
        gates_TNG = value[STATES:].flip(0) if self.backwards else value[STATES:]
        hidden, seen = [], []
        for gates_NG in gates_TNG:
            seen.append(state_NR)
            inner_NG = nn.functional.linear(state_NR, weight_GR, self.bias)
            hidden_NH, cell_NH = self._step(gates_NG, inner_NG, state_NR, cell_NH)
            hidden.append(hidden_NH)
            state_NR = hidden_NH if project_RH is None else hidden_NH @ project_RH.mT
        hidden_TNH, seen_TNR = torch.stack(hidden), torch.stack(seen)
        if self.backwards:
            hidden_TNH, seen_TNR = hidden_TNH.flip(0), seen_TNR.flip(0)
        return hidden_TNH, seen_TNR, cell_NH

    def _step(
        self, gates_NG: Tensor, inner_NG: Tensor, state_NR: Tensor, cell_NH: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.mode == "LSTM":
            i, f, g, o = (gates_NG + inner_NG).chunk(4, -1)
            cell_NH = f.sigmoid() * cell_NH + i.sigmoid() * g.tanh()
            return o.sigmoid() * cell_NH.tanh(), cell_NH
        if self.mode == "GRU":
            r, z, n = gates_NG.chunk(3, -1)
            r_inner, z_inner, n_inner = inner_NG.chunk(3, -1)
            z = (z + z_inner).sigmoid()
            n = (n + (r + r_inner).sigmoid() * n_inner).tanh()
            return n + z * (state_NR - n), cell_NH
        total_NG = gates_NG + inner_NG
        return total_NG.relu() if self.mode == "RNN_RELU" else total_NG.tanh(), cell_NH


class RecurrentWeight(Recurrence, nn.Module):
    """The dense recurrent weight (G, R) of one layer and direction.

    Args:
        weight: taken as it is.
        bias: likewise.
        rnn: that it belongs to.
        backwards: whether it reads the sequence from its end.
        projection: the layer that projects the hidden states, or none; not a child.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rnn: nn.RNNBase,
        backwards: bool,
        projection: tuple[Any, ...],
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.mode, self.hidden_size, self.backwards = rnn.mode, rnn.hidden_size, backwards
        self.projection = projection

    def forward(self, value: Tensor) -> Tensor:
        """Hidden states (T, N, H) from gates (2 + T, N, G), see `Recurrence.run`."""
        return self.run(value)[0]


class MPORecurrentWeight(Recurrence, MPOLayer):
    """The recurrent weight of one layer and direction as cores.

    The recurrence rebuilds it once for a sequence.
    """

    kind = "recurrent"

    @classmethod
    def from_mpo(cls, mpo: Weight, bias: Tensor | None, like: Any) -> "MPORecurrentWeight":
        """With these cores, treated as in `MPOLinear.from_mpo`, in the place of a dense one."""
        layer = cls.__new__(cls)
        layer._set_up(mpo, bias)
        layer.mode, layer.hidden_size, layer.backwards = like.mode, like.hidden_size, like.backwards
        # The projection is whatever stands in the copied model for the one of the dense model:
        # surgery carries over what is missing here.
        return layer

    def forward(self, value: Tensor) -> Tensor:
        """Hidden states (T, N, H) from gates (2 + T, N, G), see `Recurrence.run`."""
        return self.run(value)[0]


class OpenRecurrent(Opened):
    """Computes what an `nn.RNN`, `nn.LSTM` or `nn.GRU` does, with layers for its weights.

    In ONNX that is one LSTM, GRU or RNN operator for any length; projections are unrolled.

    The layers are `ih_l0`, `hh_l0`, `hr_l0` (a projection), `ih_l0_reverse`, ... for the parameters
    `weight_ih_l0`, ... An ordinary forward rebuilds dense weights and runs torch's own kernel, and
    so does an exported graph: compressed weights make the file small, not the recurrence faster.

    Args:
        rnn: its weights are shared, not copied.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.hidden_size, self.proj_size = rnn.mode, rnn.hidden_size, rnn.proj_size
        self.input_size, self.num_layers = rnn.input_size, rnn.num_layers
        self.bidirectional, self.batch_first = rnn.bidirectional, rnn.batch_first
        self.dropout, self.has_bias = rnn.dropout, rnn.bias
        for suffix in self._suffixes():
            bias_ih = getattr(rnn, f"bias_ih{suffix}", None)
            bias_hh = getattr(rnn, f"bias_hh{suffix}", None)
            projection: tuple[Any, ...] = ()
            if rnn.proj_size:
                projection = (linear_around(getattr(rnn, f"weight_hr{suffix}")),)
            inner = RecurrentWeight(
                getattr(rnn, f"weight_hh{suffix}"),
                bias_hh,
                rnn,
                suffix.endswith("_reverse"),
                projection,
            )
            self.add_module(
                f"ih{suffix}", linear_around(getattr(rnn, f"weight_ih{suffix}"), bias_ih)
            )
            self.add_module(f"hh{suffix}", inner)
            for layer in projection:
                self.add_module(f"hr{suffix}", layer)
        self.train(rnn.training)

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [
            f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions
        ]

    def flatten_parameters(self) -> None:
        """As `nn.RNNBase` has it, for models that call it; weights have no common memory here."""

    def origins(self) -> Mapping[str, Origin]:
        """Every parameter of the dense module has the name of its layer."""
        found = {}
        for suffix in self._suffixes():
            for leaf in ("ih", "hh", "hr"):
                layer = self._modules.get(f"{leaf}{suffix}")
                if layer is None:
                    continue
                found[f"weight_{leaf}{suffix}"] = Origin(
                    (f"{leaf}{suffix}.weight",), tuple(_weight_shape(layer))
                )
                if layer._parameters.get("bias") is not None:
                    found[f"bias_{leaf}{suffix}"] = Origin(
                        (f"{leaf}{suffix}.bias",), (_weight_shape(layer)[0],)
                    )
        return found

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # as nn.RNNBase calls them
        """As `nn.LSTM.forward`, `nn.GRU.forward` or `nn.RNN.forward`."""
        # ONNX knows no projection: there the recurrence is unrolled over the length of the example.
        unrolled = self.proj_size and torch.compiler.is_exporting()
        if not (self.calls_layers or unrolled):
            return self._kernel(input, hx)
        if isinstance(input, PackedSequence):
            raise DataError(
                "packed sequences were passed to a recurrent layer whose weights are to be fitted; "
                "pass padded ones, or exclude the layer."
            )
        single = input.ndim == 2
        x_TN = input[:, None] if single else input
        if self.batch_first and not single:
            x_TN = x_TN.transpose(0, 1)
        states, cells = self._initial(hx, x_TN, single)
        last_states, last_cells = [], []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs = []
            # Batch first, as masks are; one tensor for both directions.
            x_NTI = x_TN.transpose(0, 1)
            for direction in range(directions):
                index = layer * directions + direction
                suffix = self._suffixes()[index]
                output, cell = self._layer(suffix, x_NTI, states[index], cells[index])
                outputs.append(output)
                last_states.append(output[0] if direction else output[-1])
                last_cells.append(cell)
            x_TN = torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x_TN = nn.functional.dropout(x_TN, self.dropout, self.training)
        found, cells_out = torch.stack(last_states), torch.stack(last_cells)
        if single:
            x_TN, found, cells_out = x_TN[:, 0], found[:, 0], cells_out[:, 0]
        elif self.batch_first:
            x_TN = x_TN.transpose(0, 1)
        return x_TN, (found, cells_out) if self.mode == "LSTM" else found

    def _layer(
        self, suffix: str, x_NTI: Tensor, state_NR: Tensor, cell_NH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One direction of one layer by calling its layers: output sequence, last cell state."""
        gates_TNG = getattr(self, f"ih{suffix}")(x_NTI).transpose(0, 1)
        inner = getattr(self, f"hh{suffix}")
        width = gates_TNG.shape[-1]
        start = torch.stack(
            [
                nn.functional.pad(state, (0, width - state.shape[-1]))
                for state in (state_NR, cell_NH)
            ]
        )
        value = torch.cat([start, gates_TNG])
        hidden_TNH = inner(value)
        # The cell state is no output of the layer; nothing in a fit depends on the last one.
        cell_NH = inner.run(value)[2] if self.mode == "LSTM" else cell_NH
        projection = self._modules.get(f"hr{suffix}")
        if projection is not None:
            hidden_TNH = projection(hidden_TNH.transpose(0, 1)).transpose(0, 1)
        return hidden_TNH, cell_NH

    def _initial(self, hx: Any, x_TNI: Tensor, single: bool) -> tuple[Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        count, batch = self.num_layers * directions, x_TNI.shape[1]
        if hx is not None:
            states, cells = hx if self.mode == "LSTM" else (hx, None)
            if cells is None:
                cells = states.new_zeros(*states.shape[:-1], self.hidden_size)
            return (states[:, None], cells[:, None]) if single else (states, cells)
        zeros = x_TNI.new_zeros(count, batch, max(self.hidden_size, self.proj_size))
        width = self.proj_size or self.hidden_size
        return zeros[..., :width], zeros[..., : self.hidden_size]

    def _kernel(self, input: Any, hx: Any) -> tuple[Any, Any]:
        """By torch's own kernel on rebuilt dense weights."""
        made = self.__dict__.get("_shell")
        if made is None:
            made = self._make_shell()
            # Not a child: it has no weights of its own.
            self.__dict__["_shell"] = made
        weights = []
        for suffix in self._suffixes():
            inner, outer = getattr(self, f"ih{suffix}"), getattr(self, f"hh{suffix}")
            weights += [inner.weight, outer.weight]
            if self.has_bias:
                weights += [inner.bias, outer.bias]
            if self.proj_size:
                weights.append(getattr(self, f"hr{suffix}").weight)
        shell = copy.copy(made)  # of this call alone: others may be under way in other threads
        shell.training = self.training
        shell._flat_weights = weights
        found: tuple[Any, Any] = shell.forward(input, hx)
        return found

    def _make_shell(self) -> nn.RNNBase:
        options: dict[str, Any] = {
            "num_layers": self.num_layers,
            "bias": self.has_bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "bidirectional": self.bidirectional,
            "device": "meta",
        }
        if self.mode == "LSTM":
            return nn.LSTM(self.input_size, self.hidden_size, proj_size=self.proj_size, **options)
        if self.mode == "GRU":
            return nn.GRU(self.input_size, self.hidden_size, **options)
        nonlinearity = "relu" if self.mode == "RNN_RELU" else "tanh"
        return nn.RNN(self.input_size, self.hidden_size, nonlinearity=nonlinearity, **options)

    def __getstate__(self) -> dict[str, Any]:
        """All but the shell, which is made again when it is needed."""
        state = dict(self.__dict__)
        state.pop("_shell", None)
        return state


def layers_of_recurrences(model: nn.Module) -> set[int]:
    """The ids of layers whose dense weights torch's kernels and exported operators read."""
    return {
        id(layer)
        for module in model.modules()
        if isinstance(module, OpenRecurrent)
        for layer in module.children()
    }


def _weight_shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, MPOLayer):
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)
