"""The start of MPO layers: activations and gradients have one scale for all sites and bonds."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mpocompress.errors import ContractionError, DataError, LayoutError
from mpocompress.layers import MPOLinear, TensorContractionLayer, TensorRegressionLayer
from mpocompress.mpo import Layout
from mpocompress.mpo.initialize import initial_cores
from tests.planted import gaussian, seeded
from tests.tolerances import SAMPLING, TOL

F64 = TOL[torch.float64]

LAYOUTS = ["64x36", "64x1,1x36", "8x6,8x6", "4x3,4x4,4x3", "2x3,4x2,4x2,2x3"]


@pytest.mark.parametrize("bond_dim", [1, 2, 7, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_single_draw_has_the_mean_square_that_was_asked_for(layout, bond_dim):
    for seed in range(3):
        layer = MPOLinear(
            36, 64, layout=layout, bond_dim=bond_dim, gain=1.5, dtype=torch.float64,
            generator=seeded(seed),
        )  # fmt: skip
        assert_close(
            layer.weight.square().mean(), torch.tensor(1.5**2 / 36).double(), **F64["norm"]
        )


@pytest.mark.parametrize("bond_dim", [1, 3, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variances_of_activations_and_gradients(layout, bond_dim):
    layer = MPOLinear(36, 64, False, layout=layout, bond_dim=bond_dim, gain=1, generator=seeded(0))
    x = gaussian(4000, 36, seed=1, dtype=torch.float32).requires_grad_()
    y = layer(x)
    assert_close(y.square().mean(), torch.tensor(1.0), **SAMPLING)
    y.backward(gaussian(4000, 64, seed=2, dtype=torch.float32))
    assert_close(x.grad.square().mean(), torch.tensor(64 / 36), **SAMPLING)


@pytest.mark.parametrize("bond_dim", [2, 8])
@pytest.mark.parametrize("sites", [2, 3, 6])
def test_a_deep_relu_network_neither_fades_nor_explodes(sites, bond_dim):
    layout = {2: "8x8,8x8", 3: "4x4,4x4,4x4", 6: ",".join(["2x2"] * 6)}[sites]
    depth, forward, backward = 12, [], []
    for seed in range(10):
        generator = seeded(seed)
        x = gaussian(200, 64, seed=seed, dtype=torch.float32).requires_grad_()
        hidden = x
        for _ in range(depth):
            layer = MPOLinear(
                64, 64, False, layout=layout, bond_dim=bond_dim, gain=2**0.5, generator=generator
            )
            hidden = torch.relu(layer(hidden))
        hidden.backward(gaussian(200, 64, seed=seed + 1, dtype=torch.float32))
        forward.append(2 * hidden.detach().square().mean())
        backward.append(2 * x.grad.square().mean())
    # Hidden units are not isotropic, so this is no law: a factor of 0.73 at worst (six small sites,
    # bond 2), where the start of nn.Linear has one of 1/6 per layer.
    for squares in (forward, backward):
        per_layer = float(torch.stack(squares).log().mean().div(depth).exp())
        assert 0.6 < per_layer < 1.6


def test_padding_and_half_types_and_meta():
    layer = MPOLinear(41, 24, layout=Layout((5, 5), (6, 7), pad=True), bond_dim=3)
    assert layer.weight.shape == (24, 41)
    half = initial_cores(Layout.parse("8x8,8x8"), 4, variance=1.0, dtype=torch.bfloat16)
    assert all(core.dtype == torch.bfloat16 for core in half)
    meta = MPOLinear(64, 64, layout="8x8,8x8", device="meta")
    assert all(core.is_meta for core in meta.cores)


@pytest.mark.parametrize("gain", [0, -1.0, float("nan"), float("inf"), True])
def test_impossible_gains_are_refused(gain):
    with pytest.raises(DataError, match=r"gain .* above 0"):
        MPOLinear(8, 8, gain=gain)


# -- activations that are tensors


def test_a_contraction_layer_is_an_mpo_of_bond_one():
    layer = TensorContractionLayer((3, 4, 5), (2, 6, 1), dtype=torch.float64)
    x = gaussian(7, 2, 3, 4, 5, seed=0)
    expected = torch.einsum("zyabc,ia,jb,kc->zyijk", x, *layer.factors) + layer.bias
    assert_close(layer(x), expected, **F64["apply"])
    assert layer.to_mpo().bond_dims == (1, 1)
    flat = x.flatten(2) @ layer.to_mpo().to_dense().T
    assert_close(layer(x) - layer.bias, flat.reshape(7, 2, 2, 6, 1), **F64["apply"])


def test_gradients_of_a_contraction_layer_are_those_of_its_dense_twin():
    layer = TensorContractionLayer((3, 4), (2, 5), bias=False, dtype=torch.float64)
    x, g = gaussian(6, 3, 4, seed=1), gaussian(6, 2, 5, seed=2)
    found = torch.autograd.grad((layer(x) * g).sum(), list(layer.factors))
    twin = (torch.einsum("zab,ia,jb->zij", x, *layer.factors) * g).sum()
    for mine, theirs in zip(found, torch.autograd.grad(twin, list(layer.factors)), strict=True):
        assert_close(mine, theirs, **F64["gradient"])


def test_a_regression_layer_is_the_inner_product_with_a_tucker_tensor():
    layer = TensorRegressionLayer((3, 4, 5), 6, (2, 3, 5, 4), dtype=torch.float64)
    x = gaussian(7, 3, 4, 5, seed=0)
    expected = torch.einsum("zabc,abco->zo", x, layer.weight_tensor()) + layer.bias
    assert_close(layer(x), expected, **F64["apply"])
    unfolded = layer.weight_tensor().reshape(3, -1)
    assert torch.linalg.matrix_rank(unfolded) == 2


def test_relatives_start_at_the_same_scale():
    contraction = TensorContractionLayer((6, 6), (8, 8), False, gain=1, generator=seeded(0))
    y = contraction(gaussian(3000, 6, 6, seed=1, dtype=torch.float32))
    assert_close(y.square().mean(), torch.tensor(1.0), **SAMPLING)
    squares = []
    for seed in range(40):
        layer = TensorRegressionLayer((6, 6), 32, (4, 5, 8), False, gain=1, generator=seeded(seed))
        squares.append(layer(gaussian(200, 6, 6, seed=seed, dtype=torch.float32)).square().mean())
    assert_close(torch.stack(squares).mean(), torch.tensor(1.0), **SAMPLING)


def test_all_mix_with_dense_layers():
    model = nn.Sequential(
        nn.Unflatten(1, (4, 4)),
        TensorContractionLayer((4, 4), (3, 5)),
        nn.ReLU(),
        TensorRegressionLayer((3, 5), 8, (2, 3, 4)),
        MPOLinear(8, 12, layout="3x2,4x4", bond_dim=2),
        nn.Linear(12, 2),
    )
    x = gaussian(5, 16, dtype=torch.float32)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "ranks=(2, 3, 4)" in repr(model)
    assert "(4, 4), (3, 5)" in repr(model)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ContractionError, match=r"last 2 dimensions must be \(3, 4\)"):
        TensorContractionLayer((3, 4), (2, 2))(torch.ones(5, 4, 3))
    with pytest.raises(LayoutError, match="equally long"):
        TensorContractionLayer((3, 4), (2,))
    with pytest.raises(LayoutError, match=r"ranks \(2, 5, 1\)"):
        TensorRegressionLayer((3, 4), 2, (2, 5, 1))
    with pytest.raises(LayoutError, match=r"ranks \(2, 2\)"):
        TensorRegressionLayer((3, 4), 2, (2, 2))


def test_contraction_layers_compile_as_one_graph():
    torch.manual_seed(0)
    layer = TensorContractionLayer((4, 5, 6), (2, 3, 2))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for rows in (7, 3):
        x = torch.randn(rows, 4, 5, 6)
        torch.testing.assert_close(compiled(x), layer(x))
