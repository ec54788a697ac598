"""`MPOLinear` beside `nn.Linear`: values, gradients, state, dtypes, initialization, refusals."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from mpocompress.errors import BondDimError, ContractionError, DecompositionError, LayoutError
from mpocompress.layers import MPOLinear
from mpocompress.mpo import MPO, Layout
from tests.planted import LAWS, SEEDS, dense_twin, gaussian, layouts, random_chain, seeded
from tests.tolerances import SAMPLING, TOL

F64 = TOL[torch.float64]
LAYOUTS = ["12x10", "12x1,1x10", "1x10,12x1", "4x2,3x5", "2x5,2x2,3x1", "3x1,2x2,1x5,2x1"]
PADDED = Layout((4, 4), (3, 4), pad=True)  # 16 x 12 around 12 x 10


def linear(bias=True, dtype=torch.float64, seed=0):
    """A 10 -> 12 layer with seeded weights of size one."""
    layer = nn.Linear(10, 12, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(gaussian(12, 10, seed=seed) / 3)
        if bias:
            layer.bias.copy_(gaussian(12, seed=seed + 1))
    return layer


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def storages(module):
    return {storage(parameter) for parameter in module.parameters()}


# -- equal to nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 2, 2), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, PADDED], ids=str)
def test_equals_linear_at_maximal_bond_dims(layout, lead, bias):
    dense = linear(bias)
    layer = MPOLinear.from_linear(dense, layout=layout)
    x = gaussian(*lead, 10)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = layer(mine), dense(theirs)
    assert_close(output, expected, **F64["apply"])
    probe = gaussian(*output.shape, seed=7)
    output.backward(probe)
    expected.backward(probe)
    assert_close(mine.grad, theirs.grad, **F64["gradient"])
    if bias:
        assert_close(layer.bias.grad, dense.bias.grad, **F64["gradient"])
    # The chain rule: the dense weight's gradient, pulled back through W(cores).
    cores = [core.detach().clone().requires_grad_() for core in layer.cores]
    pulled = torch.autograd.grad(dense_twin(cores)[:12, :10], cores, dense.weight.grad)
    for core, gradient in zip(layer.cores, pulled, strict=True):
        assert_close(core.grad, gradient, **F64["gradient"])


@LAWS
@given(layouts(max_sites=4, max_dim=4), SEEDS, st.integers(min_value=1, max_value=5))
def test_truncated_layer_equals_its_dense_twin(layout, seed, bond_dim):
    torch.manual_seed(seed)
    layer = MPOLinear(
        layout.in_features,
        layout.out_features,
        layout=layout,
        bond_dim=bond_dim,
        dtype=torch.float64,
    )
    x = gaussian(3, layout.in_features, seed=seed).requires_grad_()
    cores = list(layer.cores)
    twin = functional.linear(x, dense_twin(cores), layer.bias)
    output = layer(x)
    assert_close(output, twin, **F64["apply"])
    probe = gaussian(*twin.shape, seed=seed + 1)
    leaves = [x, layer.bias, *cores]
    gradients = torch.autograd.grad(output, leaves, probe)
    for gradient, other in zip(gradients, torch.autograd.grad(twin, leaves, probe), strict=True):
        assert_close(gradient, other, **F64["gradient"])


@pytest.mark.parametrize("rows", [1, 1000])
def test_gradients_are_the_same_whether_the_matrix_is_built_or_not(rows):
    layer = MPOLinear.from_linear(linear(), layout="2x5,2x2,3x1")
    plan = layer._plans.best(rows)
    assert plan.builds_matrix == (rows == 1000)
    x = gaussian(rows, 10) / rows**0.5
    twin_cores = [core.detach().clone().requires_grad_() for core in layer.cores]
    functional.linear(x, dense_twin(twin_cores), layer.bias.detach()).square().sum().backward()
    layer(x).square().sum().backward()
    for core, twin in zip(layer.cores, twin_cores, strict=True):
        assert_close(core.grad, twin.grad, **F64["gradient"])


# -- what is kept of the source


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_bias_dtype_mode_and_requires_grad_are_kept(layout, bias):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        dense = linear(bias, dtype).eval()
        dense.weight.requires_grad_(False)
        layer = MPOLinear.from_linear(dense, layout=layout)
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert (layer.bias is None) == (not bias)
        assert not layer.training
        assert not any(core.requires_grad for core in layer.cores)
        if bias:
            assert layer.bias.requires_grad
            assert torch.equal(layer.bias, dense.bias)
            dense.bias.requires_grad_(False)
            assert not MPOLinear.from_linear(dense, layout=layout).bias.requires_grad
        assert_close(layer.weight, dense.weight, **TOL[dtype]["dense"])
    trained = MPOLinear.from_linear(linear(bias), layout=layout)
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_storage_is_shared_with_the_source_nor_with_the_way_back(layout):
    dense = linear()
    kept = copy.deepcopy(dense.state_dict())
    layer = MPOLinear.from_linear(dense, layout=layout)
    assert not storages(layer) & storages(dense)
    back = layer.to_linear()
    assert not storages(layer) & storages(back)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(dense.state_dict()[name], kept[name]) for name in kept)
    assert_close(back.weight, dense.weight, **F64["dense"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, PADDED], ids=str)
def test_to_linear_is_an_ordinary_layer(layout, bias):
    dense = linear(bias).eval()
    back = MPOLinear.from_linear(dense, layout=layout).to_linear()
    assert type(back) is nn.Linear
    assert (back.in_features, back.out_features) == (10, 12)
    assert (back.bias is None) == (not bias)
    assert not back.training
    assert back.weight.is_contiguous()
    assert back.weight.is_leaf
    assert back.weight.untyped_storage().nbytes() == 120 * 8
    x = gaussian(3, 10)
    assert_close(back(x), dense(x), **F64["apply"])
    assert [name for name, _ in back.named_parameters()] == [
        name for name, _ in dense.named_parameters()
    ]


def test_to_linear_keeps_what_is_frozen():
    dense = linear()
    dense.weight.requires_grad_(False)
    back = MPOLinear.from_linear(dense, layout="4x2,3x5").to_linear()
    assert not back.weight.requires_grad
    assert back.bias.requires_grad


def test_to_mpo_and_from_mpo():
    mpo = MPO.from_matrix(gaussian(12, 10), "4x2,3x5", bond_dim=4)
    bias = gaussian(12, seed=3)
    layer = MPOLinear.from_mpo(mpo, bias)
    assert layer.bond_dims == (4,)
    assert layer.layout == mpo.layout
    assert (layer.in_features, layer.out_features) == (10, 12)
    assert_close(layer.to_dense(), mpo.to_dense(), **F64["dense"])
    assert torch.equal(layer.bias, bias)
    again = layer.to_mpo()
    assert again.shape == (12, 10)
    for core, parameter in zip(again.cores, layer.cores, strict=True):
        assert not core.requires_grad
        assert storage(core) == storage(parameter)
    assert MPOLinear.from_mpo(mpo).bias is None


def test_parameters_of_an_mpo_are_taken_as_they_are_so_that_layers_can_share():
    cores = [nn.Parameter(core) for core in random_chain(Layout.parse("4x2,3x5"), (4,))]
    bias = nn.Parameter(gaussian(12))
    first, second = (MPOLinear.from_mpo(MPO(cores), bias) for _ in range(2))
    assert all(mine is core for mine, core in zip(first.cores, cores, strict=True))
    assert first.bias is second.bias is bias
    assert len(list(nn.ModuleList([first, second]).parameters())) == 3


def test_bias_of_another_shape_is_refused():
    mpo = MPO.from_matrix(gaussian(12, 10), "4x2,3x5")
    with pytest.raises(ContractionError, match=r"bias has shape \(10,\).*12 outputs"):
        MPOLinear.from_mpo(mpo, torch.zeros(10))


# -- state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["12x10", "4x2,3x5", "2x5,2x2,3x1"])
def test_state_dict_round_trip(layout, bias):
    source = MPOLinear(10, 12, bias, layout=layout, bond_dim=3)
    target = MPOLinear(10, 12, bias, layout=layout, bond_dim=3)
    state = source.state_dict()
    sites = source.layout.num_sites
    assert set(state) == {f"cores.{k}" for k in range(sites)} | ({"bias"} if bias else set())
    target.load_state_dict(state, strict=True)
    x = torch.randn(4, 10, generator=seeded(0))
    assert torch.equal(target(x), source(x))
    assigned = MPOLinear(10, 12, bias, layout=layout, bond_dim=3, device="meta")
    assigned.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(assigned(x), source(x))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: MPOLinear(10, 12, layout="4x2,3x5", bond_dim=2), r"size mismatch for cores\.0"),
        (lambda: MPOLinear(10, 12, layout="3x5,4x2", bond_dim=3), r"size mismatch for cores\.1"),
        (lambda: MPOLinear(10, 12, False, layout="4x2,3x5", bond_dim=3), r"Missing.*\"bias\""),
        (lambda: MPOLinear(10, 12, layout="12x10"), r"Missing key.*\"cores\.1\""),
        (lambda: nn.Linear(10, 12), r"Missing key.*\"cores\.0\", \"cores\.1\""),
    ],
)
def test_state_of_another_layer_is_refused(source, message):
    layer = MPOLinear(10, 12, layout="4x2,3x5", bond_dim=3)
    with pytest.raises(RuntimeError, match=rf"(?s){message}"):
        layer.load_state_dict(source().state_dict(), strict=True)


@pytest.mark.parametrize("layout", ["12x10", "4x2,3x5", "2x5,2x2,3x1", PADDED], ids=str)
def test_copies_are_equal_and_independent(layout):
    layer = MPOLinear.from_linear(linear(), layout=layout)
    x = gaussian(4, 10)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(x), layer(x))
        assert not storages(twin) & storages(layer)
        assert twin.layout == layer.layout
        assert repr(twin) == repr(layer)
        assert twin.to_mpo().shape == (12, 10)


def test_inside_containers():
    model = nn.Sequential(
        MPOLinear(10, 12, layout="4x2,3x5"), nn.ReLU(), MPOLinear(12, 2, layout="svd", bond_dim=2)
    )
    assert {"0.cores.0", "0.cores.1", "0.bias", "2.cores.0", "2.bias"} <= set(model.state_dict())
    assert model(torch.zeros(3, 10)).shape == (3, 2)
    assert len(list(model.parameters())) == 6
    assert sum(p.numel() for p in model[0].cores) == model[0].to_mpo().num_parameters


def test_printed_line_names_sizes_layout_and_bond_dims():
    layer = MPOLinear(784, 1024, layout="32x28,32x28", bond_dim=8)
    assert layer.extra_repr() == (
        "in_features=784, out_features=1024, bias=True, layout=32x28,32x28, bond_dims=[8]"
    )
    assert "bias=False" in repr(MPOLinear(4, 4, bias=False))


# -- the dense weight


def test_weight_is_dense_and_differentiable():
    layer = MPOLinear.from_linear(linear(), layout="4x2,3x5", bond_dim=3)
    x = gaussian(5, 10)
    assert_close(functional.linear(x, layer.weight, layer.bias), layer(x), **F64["apply"])
    assert layer.weight.shape == (12, 10)
    layer.weight.sum().backward()
    assert all(core.grad is not None for core in layer.cores)
    assert not layer.to_dense().requires_grad
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(12, 10)), torch.zeros(12, 10), None])
def test_weight_cannot_be_assigned(value):
    layer = MPOLinear(10, 12, layout="4x2,3x5")
    with pytest.raises((AttributeError, KeyError), match="weight"):
        layer.weight = value
    assert layer.weight.count_nonzero() > 0


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_conversion_to_another_dtype(layout, dtype):
    dense = linear(dtype=torch.float32)
    layer = MPOLinear.from_linear(dense, layout=layout).to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    x = gaussian(4, 10, dtype=dtype)
    output = layer(x)
    assert output.dtype == dtype
    expected = dense.to(dtype)(x)
    # The cores were rounded to float32 before they became float64.
    narrowest = torch.float32 if dtype == torch.float64 else dtype
    assert_close(output, expected, **TOL[narrowest]["apply"])


@pytest.mark.parametrize(
    ("method", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_half_precision_training_step(method, dtype):
    layer = getattr(MPOLinear(10, 12, layout="4x2,3x5", bond_dim=4), method)()
    layer(gaussian(4, 10, dtype=dtype)).sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("layout", [*LAYOUTS, PADDED], ids=str)
def test_autocast_gives_the_dtype_and_the_values_of_linear(layout, rows, bias):
    dense = linear(bias, torch.float32)
    layer = MPOLinear.from_linear(dense, layout=layout)
    x = gaussian(rows, 10, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = layer(x), dense(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_close(output, expected, **TOL[torch.bfloat16]["apply"])
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_meta_device():
    layer = MPOLinear(10, 12, layout="4x2,3x5", bond_dim=3, device="meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer(torch.zeros(5, 10, device="meta")).shape == (5, 12)
    filled = layer.to_empty(device="cpu")
    assert {parameter.device.type for parameter in filled.parameters()} == {"cpu"}


# -- from scratch


@pytest.mark.parametrize(
    ("layout", "bond_dim"),
    [
        ("24x36", 1),
        ("24x1,1x36", 1),
        ("24x1,1x36", 24),
        ("4x6,6x6", 1),
        ("4x6,6x6", 8),
        ("6x4,4x9", 24),
        ("2x3,3x3,4x4", 3),
        ("2x3,2x3,2x2,3x2", 4),
        (Layout((5, 5), (6, 7), pad=True), 4),
    ],
    ids=str,
)
def test_initial_variance_depends_on_neither_sites_nor_bond_dims(layout, bond_dim):
    torch.manual_seed(0)
    weights, activations = [], []
    for _ in range(500):
        layer = MPOLinear(36, 24, bias=False, layout=layout, bond_dim=bond_dim)
        with torch.no_grad():
            weights.append(layer.weight.square().mean())
            activations.append(layer(torch.randn(8, 36)).square().mean())
    assert_close(torch.stack(weights).mean(), torch.tensor(1 / (3 * 36)), **SAMPLING)
    assert_close(torch.stack(activations).mean(), torch.tensor(1 / 3), **SAMPLING)


def test_initial_variances_are_those_of_linear():
    torch.manual_seed(0)
    dense = [nn.Linear(36, 24) for _ in range(200)]
    mine = [MPOLinear(36, 24, bond_dim=8) for _ in range(200)]
    for name in ("weight", "bias"):
        variances = [
            torch.stack([getattr(layer, name).detach().square().mean() for layer in layers]).mean()
            for layers in (mine, dense)
        ]
        assert_close(*variances, **SAMPLING)
    bound = 36**-0.5
    assert all(float(layer.bias.detach().abs().max()) <= bound for layer in mine)


def test_seed_decides_the_start():
    def made(seed):
        torch.manual_seed(seed)
        return MPOLinear(10, 12, bond_dim=4)

    first, again, other = made(1), made(1), made(2)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_defaults():
    layer = MPOLinear(784, 1024)
    assert layer.layout.num_sites == 2
    assert layer.bond_dims == (16,)
    assert layer.bias.shape == (1024,)
    assert layer(torch.zeros(2, 784)).shape == (2, 1024)


def test_bond_dims_are_clipped_to_the_maximal_ones():
    assert MPOLinear(4, 4, layout="2x2,2x2", bond_dim=100).bond_dims == (4,)
    assert MPOLinear(8, 8, layout="2x2,2x2,2x2", bond_dim=(1, 100)).bond_dims == (1, 4)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    x, target = torch.randn(64, 36), torch.randn(64, 24) * 0.1
    target = target + x @ torch.randn(36, 24) / 6
    for layout in ("svd", "balanced", "2x3,3x3,4x4"):
        layer = MPOLinear(36, 24, layout=layout, bond_dim=6)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = functional.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.6 * losses[0]


def test_cutoff_and_bond_dim_of_from_linear():
    dense = linear()
    assert MPOLinear.from_linear(dense, layout="svd", bond_dim=3).bond_dims == (3,)
    layer = MPOLinear.from_linear(dense, layout="svd", cutoff=0.05)
    lost = (layer.to_dense() - dense.weight.detach()).square().sum()
    error = float(lost / dense.weight.detach().square().sum())
    assert 0.0 < error <= 0.05


# -- refusals


@pytest.mark.parametrize("shape", [(3, 9), (11,), (10, 3)], ids=str)
def test_input_of_another_size_is_refused(shape):
    layer = MPOLinear(10, 12, layout="4x2,3x5")
    with pytest.raises(
        ContractionError, match=rf"last dimension is {shape[-1]}, but the MPO has 10 inputs"
    ):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("bond_dim", [0, -3, True, 2.5])
def test_impossible_bond_dim_is_refused(bond_dim):
    with pytest.raises(BondDimError, match=f"bond_dim {bond_dim}"):
        MPOLinear(10, 12, bond_dim=bond_dim)
    with pytest.raises(BondDimError, match=f"bond_dim {bond_dim}"):
        MPOLinear.from_linear(linear(), bond_dim=bond_dim)


def test_no_bond_dim_means_the_maximal_one_here_too():
    assert MPOLinear(10, 12, layout="4x2,3x5", bond_dim=None).bond_dims == (8,)
    assert MPO.random("2x2,2x2,2x2", None).bond_dims == (4, 4)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("4x2,4x5", r"out_dims \(4, 4\) multiply to 16.*12 on its out"),
        ("oval", "cannot read 'oval'"),
        ([(4, 2), (3,)], "site 1 .* has 1 numbers"),
        (7, "layout 7: give a Layout"),
    ],
)
def test_layout_that_does_not_fit_is_refused(layout, message):
    with pytest.raises(LayoutError, match=message):
        MPOLinear(10, 12, layout=layout)
    with pytest.raises(LayoutError, match=message):
        MPOLinear.from_linear(linear(), layout=layout)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("layout", ["svd", "balanced"])
def test_empty_layer_is_refused(shape, layout):
    with pytest.raises(LayoutError, match="at least 1|is empty"):
        MPOLinear(*shape, layout=layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    dense = linear()
    with torch.no_grad():
        dense.weight[3, 4] = value
    with pytest.raises(DecompositionError, match=r"1 of 120 entries.*\[3, 4\]"):
        MPOLinear.from_linear(dense)
