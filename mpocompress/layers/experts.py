"""Fused experts of a mixture, (experts, out, in) in one parameter, opened: see `opened`."""

# Shape suffixes: B tokens, K experts chosen for each, E experts, I features, F inner features.

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.layers.attention import linear_around
from mpocompress.layers.opened import Opened, Origin


class OpenExperts(Opened):
    """Computes what the experts of transformers' mixtures do, with two layers for each expert.

    Every expert is a pair of layers of its own; each sees the tokens that are sent to it. A traced
    graph sends all tokens to all experts, as its sizes cannot depend on the routing.

    Args:
        experts: with 3-D parameters `gate_up_proj` or `up_proj`, and `down_proj`; shared as views.
        apply_gate: from the outputs of the first layer to the inputs of the second.
    """

    def __init__(self, experts: Any, apply_gate: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts = int(experts.down_proj.shape[0])
        self.is_transposed = bool(experts.is_transposed)
        self.first_name = "gate_up_proj" if experts.has_gate else "up_proj"
        # What the gate may ask for: the activation, limits, ...
        for name, value in vars(experts).items():
            if name not in vars(self) and isinstance(value, bool | int | float | str):
                setattr(self, name, value)
        self.act_fn: Any = experts.act_fn
        self._apply_gate = apply_gate
        self._shapes = {}
        for name in (self.first_name, "down_proj"):
            weights = getattr(experts, name)
            biases = getattr(experts, f"{name}_bias", None)
            self._shapes[name] = tuple(weights.shape)
            self.add_module(
                name,
                nn.ModuleList(
                    linear_around(
                        nn.Parameter(weights.detach()[expert], weights.requires_grad),
                        None
                        if biases is None
                        else nn.Parameter(biases.detach()[expert], biases.requires_grad),
                    )
                    for expert in range(self.num_experts)
                ),
            )
        self.train(experts.training)

    def origins(self) -> Mapping[str, Origin]:
        """The 3-D parameters, expert below expert."""
        found = {}
        for name, shape in self._shapes.items():
            layers = self._layers(name)
            parts = tuple(f"{name}.{expert}.weight" for expert in range(self.num_experts))
            found[name] = Origin(parts, shape)
            if layers[0].bias is not None:
                parts = tuple(f"{name}.{expert}.bias" for expert in range(self.num_experts))
                found[f"{name}_bias"] = Origin(parts, shape[:2])
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send tokens (B, I) to the experts top_k_index (B, K) and add up what they return."""
        output_BI = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            chosen_BK = top_k_index == expert
            if torch.compiler.is_exporting():
                weights_B = (chosen_BK * top_k_weights).sum(-1)
                output_BI = output_BI + weights_B[:, None] * self._expert(expert, hidden_states)
                continue
            # Experts without tokens are called, too: every batch takes the same path.
            token, place = torch.where(chosen_BK)
            found = self._expert(expert, hidden_states[token])
            found = found * top_k_weights[token, place, None]
            output_BI = output_BI.index_add(0, token, found.to(output_BI.dtype))
        return output_BI

    def _expert(self, expert: int, tokens_BI: Tensor) -> Tensor:
        first, second = self._layers(self.first_name)[expert], self._layers("down_proj")[expert]
        inner = first(tokens_BI)
        has_gate = self.first_name == "gate_up_proj"
        output: Tensor = second(self._apply_gate(self, inner) if has_gate else self.act_fn(inner))
        return output

    def _layers(self, name: str) -> Any:
        return self._modules[name]
