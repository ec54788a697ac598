"""One matrix times many: torch.matmul's values and derivatives, in every mode of torch."""

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.testing import assert_close

from mpocompress.layers import MPOLinear
from mpocompress.mpo import repeated_product as module
from mpocompress.mpo.repeated_product import repeated_product
from tests.planted import gaussian
from tests.tolerances import TOL

F64, F32 = TOL[torch.float64], TOL[torch.float32]
SIZES = [(32, 3, 5, 32), (40, 1, 1, 33), (33, 7, 2, 64)]


@pytest.fixture
def counted(monkeypatch):
    """How often torch.matmul is not what runs."""
    calls = []
    own = module._RepeatedProduct

    class Counted:
        @staticmethod
        def apply(*inputs):
            calls.append(inputs)
            return own.apply(*inputs)

    monkeypatch.setattr(module, "_RepeatedProduct", Counted)
    return calls


def tensors(repetitions, produced, contracted, columns, dtype=torch.float64):
    weight = gaussian(produced, contracted, dtype=dtype).requires_grad_()
    return weight, gaussian(repetitions, contracted, columns, dtype=dtype, seed=1).requires_grad_()


@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_matmul(sizes, counted):
    weight, states = tensors(*sizes)
    found, wanted = repeated_product(weight, states), weight @ states
    assert len(counted) == 1
    assert_close(found, wanted, **F64["apply"])
    toward = gaussian(*wanted.shape, dtype=torch.float64, seed=2)
    for ours, theirs in zip(
        torch.autograd.grad(found, (weight, states), toward),
        torch.autograd.grad(wanted, (weight, states), toward),
        strict=True,
    ):
        assert_close(ours, theirs, **F64["gradient"])


def test_derivatives_of_first_and_second_order_forwards_and_backwards(counted):
    pair = tensors(32, 2, 2, 32)
    options = {"fast_mode": True, "check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(repeated_product, pair, **options)
    assert torch.autograd.gradgradcheck(repeated_product, pair, fast_mode=True)
    assert counted


def test_a_frozen_matrix_few_columns_and_no_gradients_are_left_to_matmul(counted):
    weight, states = tensors(40, 3, 4, 40)
    repeated_product(weight.detach(), states)
    repeated_product(weight, states[..., :31])
    repeated_product(weight, states[:31])
    with torch.no_grad():
        repeated_product(weight, states)
    assert not counted
    repeated_product(weight, states.detach())
    assert len(counted) == 1


def test_function_transforms(counted):
    weight, states = tensors(32, 3, 4, 32)

    def ours(weight, states):
        return repeated_product(weight, states).tanh().sum()

    def theirs(weight, states):
        return (weight @ states).tanh().sum()

    several = torch.stack([states.detach(), 2 * states.detach()])
    assert_close(
        torch.func.grad(ours)(weight, states), torch.func.grad(theirs)(weight, states),
        **F64["gradient"],
    )  # fmt: skip
    mapped = torch.func.vmap(torch.func.grad(ours), in_dims=(None, 0))(weight, several)
    wanted = torch.func.vmap(torch.func.grad(theirs), in_dims=(None, 0))(weight, several)
    assert_close(mapped, wanted, **F64["gradient"])
    assert_close(
        torch.func.hessian(ours)(weight, states),
        torch.func.hessian(theirs)(weight, states),
        **F64["gradient"],
    )
    assert counted


def test_a_tangent_of_either_argument(counted):
    weight, states = tensors(32, 3, 4, 32)
    tangent = gaussian(*states.shape, dtype=torch.float64, seed=3)
    with dual_level():
        found = unpack_dual(repeated_product(weight, make_dual(states, tangent))).tangent
        assert_close(found, weight @ tangent, **F64["apply"])
    assert counted


def layer_and_batch(dtype=torch.float32):
    torch.manual_seed(0)
    layer = MPOLinear(1024, 1024, layout="32x32,32x32", bond_dim=2, dtype=dtype)
    return layer, gaussian(40, 1024, dtype=dtype)


def test_a_layer_takes_it_when_trained_and_has_the_same_gradients(counted, monkeypatch):
    layer, rows = layer_and_batch(torch.float64)

    def gradients():
        return torch.autograd.grad(layer(rows).tanh().sum(), list(layer.parameters()))

    found = gradients()
    assert counted
    monkeypatch.setattr(module, "_LEAST_COLUMNS", 10**9)
    for ours, theirs in zip(found, gradients(), strict=True):
        assert_close(ours, theirs, **F64["gradient"])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_autocast_and_graphs_are_left_to_matmul(counted):
    layer, rows = layer_and_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(rows)
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    found = [
        torch.export.export(layer, (rows,)).module()(rows),
        torch.compile(layer, backend="eager", fullgraph=True)(rows),
        torch.jit.trace(layer, rows)(rows),
    ]
    assert not counted
    for output in found:
        assert_close(output, layer(rows), **F32["apply"])
    assert counted
