"""One matrix times many: `weight @ states`, without the copies that autograd's rule makes."""

# Shape suffixes: N repetitions, P produced, C contracted, K columns.

from typing import Any

import torch
from torch import Tensor

# Measured on one thread of a CPU (see `repeated_product`); below, copies are cheaper than many
# small products.
_LEAST_COLUMNS = 32
_LEAST_REPETITIONS = 32


def repeated_product(weight_PC: Tensor, states_NCK: Tensor) -> Tensor:
    """`weight @ states`, (N, P, K), differentiable in both, twice and in every mode.

    Where the weight requires a gradient, `torch.matmul` folds repetitions and columns into one
    dimension, so that it can take one large product for the weight's gradient; on row-major states
    that is a transposed copy of the states, of the result, and of their gradients. With many
    columns a batched product forwards and an accumulated one backwards read them where they are:
    half the time at 100 repetitions of (32, 160) @ (160, 32). It is `torch.matmul` for few columns
    and on other devices; in graphs (compiled, exported, traced), whose makers know that operator
    best; and under autocast, which decides the types of its arguments.
    """
    if (
        torch.compiler.is_compiling()  # first: the sizes below would become guards
        or torch.jit.is_tracing()  # type: ignore[attr-defined]  # documented, not listed
        or states_NCK.shape[0] < _LEAST_REPETITIONS
        or states_NCK.shape[2] < _LEAST_COLUMNS
        or not weight_PC.requires_grad
        or not torch.is_grad_enabled()
        or weight_PC.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
    ):
        return weight_PC @ states_NCK
    result: Tensor = _RepeatedProduct.apply(weight_PC, states_NCK)
    return result


class _RepeatedProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight_PC: Tensor, states_NCK: Tensor) -> Tensor:
        return torch.bmm(weight_PC.expand(len(states_NCK), -1, -1), states_NCK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient_NPK,) = gradients
        weight_PC, states_NCK = ctx.saved_tensors
        of_weight = of_states = None
        if ctx.needs_input_grad[0]:
            nothing = torch.zeros_like(weight_PC)
            of_weight = torch.addbmm(nothing, gradient_NPK, states_NCK.mT, beta=0)
        if ctx.needs_input_grad[1]:
            of_states = torch.bmm(weight_PC.mT.expand(len(states_NCK), -1, -1), gradient_NPK)
        return of_weight, of_states

    @staticmethod
    def jvp(ctx: Any, weight_PC: Tensor | None, states_NCK: Tensor | None) -> Tensor | None:
        at_weight_PC, at_states_NCK = ctx.saved_tensors
        parts = []
        if weight_PC is not None:
            parts.append(weight_PC @ at_states_NCK)
        if states_NCK is not None:
            parts.append(at_weight_PC @ states_NCK)
        return sum(parts[1:], parts[0]) if parts else None
