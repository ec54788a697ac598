"""`MPOLinear` in the identity gauge: beside the plain layer, in models, on disk, compiled."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress import saving
from mpocompress.errors import ContractionError, LayoutError, LoadError
from mpocompress.layers import MPOLinear
from mpocompress.layers.gauges import plain_gauge
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.identity_gauge import fix_identity_gauge
from mpocompress.surgery import copy_with_replacements, find_weights
from tests.planted import dense_twin, gaussian
from tests.tolerances import TOL

F64 = TOL[torch.float64]
LAYOUTS = ["12x10", "12x1,1x10", "4x2,3x5", "2x5,2x2,3x1", Layout((4, 4), (3, 4), pad=True)]


def layer_of(layout="4x2,3x5", bond_dim=4, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return MPOLinear(10, 12, bias, layout=layout, bond_dim=bond_dim, dtype=dtype)


def stored(layer):
    return sum(p.numel() for name, p in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fixing_and_freeing_the_gauge_keep_what_is_computed(layout):
    layer = layer_of(layout)
    x = gaussian(5, 10)
    before, weight = layer(x), layer.to_dense()
    assert layer.gauge == "none"
    assert layer.fix_gauge_() is layer
    assert layer.gauge == "identity"
    assert stored(layer) == layer.layout.degrees_of_freedom(layer.bond_dims)
    assert sum(core.numel() for core in layer.cores) == layer.layout.num_parameters(layer.bond_dims)
    assert_close(layer(x), before, **F64["apply"])
    assert_close(layer.weight, weight, **F64["dense"])
    assert_close(layer.to_mpo().to_dense(), weight, **F64["dense"])
    assert_close(layer.to_linear().weight, weight, **F64["dense"])
    state = copy.deepcopy(layer.state_dict())
    layer.fix_gauge_()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert layer.free_gauge_() is layer
    assert layer.gauge == "none"
    assert set(layer.state_dict()) == set(layer_of(layout).state_dict())
    assert_close(layer(x), before, **F64["apply"])


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_equal_those_through_the_dense_matrix(layout, rows):
    layer = layer_of(layout).fix_gauge_()
    x = gaussian(rows, 10) / rows**0.5
    leaves = list(layer.parameters())
    twin = functional.linear(x, dense_twin(list(layer.cores))[:12, :10], layer.bias)
    expected = torch.autograd.grad(twin.square().sum(), leaves)
    found = torch.autograd.grad(layer(x).square().sum(), leaves)
    for gradient, other in zip(found, expected, strict=True):
        assert_close(gradient, other, **F64["gradient"])


def test_it_trains():
    layer = layer_of(dtype=torch.float32).fix_gauge_()
    x, target = torch.randn(64, 10), torch.randn(64, 12) * 0.1
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_frozen_stays_so():
    layer = layer_of("2x5,2x2,3x1", 3)
    layer.cores[1].requires_grad_(False)
    flags = [core.requires_grad for core in layer.cores]
    layer.fix_gauge_()
    assert [
        *(c.free.requires_grad for c in layer.cores.gauged),
        layer.cores.last.requires_grad,
    ] == flags
    assert [core.requires_grad for core in layer.cores] == flags
    layer.free_gauge_()
    assert [core.requires_grad for core in layer.cores] == flags
    layer.cores.requires_grad_(False)
    with torch.no_grad():
        assert not layer.fix_gauge_().to_linear().weight.requires_grad
        assert layer_of().fix_gauge_().to_linear().weight.requires_grad


def test_from_mpo_in_either_gauge():
    weight = MPO.from_matrix(gaussian(12, 10), "4x2,3x5", bond_dim=4)
    gauge = fix_identity_gauge(weight.cores)
    assert MPOLinear.from_mpo(weight).gauge == "none"
    assert MPOLinear.from_mpo(gauge).gauge == "identity"
    assert MPOLinear.from_mpo(weight, gauge="identity").gauge == "identity"
    free = MPOLinear.from_mpo(gauge, gauge="none")
    assert free.gauge == "none"
    assert_close(free.weight, weight.to_dense(), **F64["dense"])
    assert "gauge='identity'" in repr(MPOLinear.from_mpo(gauge))
    with pytest.raises(LayoutError, match="gauge 'left'"):
        MPOLinear.from_mpo(weight, gauge="left")
    with pytest.raises(ContractionError, match="meta device"):
        MPOLinear(10, 12, device="meta").fix_gauge_()


# -- state


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    source = layer_of("2x5,2x2,3x1", 3).fix_gauge_()
    state = source.state_dict()
    assert set(state) == {
        *(f"cores.{site}.{part}" for site in (0, 1) for part in ("free", "pivots")),
        "cores.2",
        "bias",
    }
    assert state["cores.0.pivots"].dtype == torch.uint8
    target = MPOLinear.from_mpo(
        MPO.random("2x5,2x2,3x1", 3, dtype=torch.float64),
        torch.zeros(12).double(),
        gauge="identity",
    )
    x = gaussian(4, 10)
    for twin in (target, copy.deepcopy(target).to("meta").to_empty(device="cpu")):
        wide = {n: v.long() if n.endswith("pivots") else v for n, v in state.items()}
        twin.load_state_dict(wide, strict=True, assign=assign)
        assert torch.equal(twin(x), source(x))
        assert twin.state_dict()["cores.0.pivots"].dtype == torch.uint8


def test_state_that_does_not_fit_is_refused():
    layer = layer_of("12x1,1x10").fix_gauge_()
    before = layer.to_dense()
    damaged = layer.state_dict() | {"cores.0.pivots": torch.tensor([0, 1, 2, 99])}
    with pytest.raises(RuntimeError, match=r"cores\.0\.pivots: .*ascending numbers from 0 to 11"):
        layer.load_state_dict(damaged)
    assert torch.equal(layer.to_dense(), before)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*cores\.0\.free"):
        layer.load_state_dict(layer_of("12x1,1x10").state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*cores\.0\""):
        layer_of("12x1,1x10").load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer_of("12x1,1x10", 3).fix_gauge_().load_state_dict(layer.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_copies_are_equal_and_independent(layout):
    layer = layer_of(layout).fix_gauge_()
    x = gaussian(4, 10)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        assert not {p.data_ptr() for p in twin.parameters() if p.numel()} & {
            p.data_ptr() for p in layer.parameters()
        }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_conversion_to_another_dtype(layout, dtype):
    layer = layer_of(layout, dtype=torch.float32).fix_gauge_()
    x = gaussian(4, 10, dtype=torch.float32)
    expected = layer(x)
    layer.to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert not any(buffer.is_floating_point() for buffer in layer.buffers())
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    narrowest = torch.float32 if dtype == torch.float64 else dtype
    assert_close(output.float(), expected, **TOL[narrowest]["apply"])
    output.sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())


def test_autocast():
    layer = layer_of(dtype=torch.float32).fix_gauge_()
    x = gaussian(4, 10, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), layer(x), **TOL[torch.bfloat16]["apply"])


# -- tracing


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_export_compile_and_functional_call(layout):
    layer = layer_of(layout).fix_gauge_()
    dims = ({0: torch.export.Dim("batch")},)
    for strict in (False, True):
        program = torch.export.export(
            layer, (gaussian(40, 10),), dynamic_shapes=dims, strict=strict
        )
        for node in program.graph.nodes:
            value = node.meta.get("val")
            assert not isinstance(value, torch.Tensor) or value.ndim <= 4
        for rows in (2, 7):
            x = gaussian(rows, 10)
            assert_close(program.module()(x), layer(x), **F64["apply"])
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = gaussian(3, 10)
    assert_close(compiled(x), layer(x), **F64["apply"])
    parameters = dict(layer.named_parameters())

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample,)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        assert_close(rows[name].sum(0), parameter.grad, **F64["gradient"])


# -- in models and on disk


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.shared = nn.Linear(32, 24, bias=False)
        self.again = self.shared

    def forward(self, x):
        return self.again(torch.relu(self.second(torch.relu(self.first(x)))))


def test_surgery_ties_gauged_layers():
    model = Tied().double()
    model.first.weight.requires_grad_(False)
    sites = find_weights(model).sites
    gauges = {
        site: fix_identity_gauge(MPO.from_matrix(site.matrix(), Layout.svd(*site.shape)).cores)
        for site in sites
    }
    copied = copy_with_replacements(model, gauges)
    x = gaussian(3, 32)
    assert_close(copied(x), model(x), **F64["apply"])
    assert copied.first.cores.last is copied.second.cores.last
    assert copied.first.bias is not copied.second.bias
    assert not any(p.requires_grad for p in copied.first.cores.parameters())
    assert copied.shared is copied.again
    for gauge in gauges.values():  # a copy: one gauge may go into several models
        for layer in (copied.first, copied.shared):
            assert layer.cores.last.data_ptr() != gauge.last.data_ptr()
    twin = copy.deepcopy(copied)
    assert twin.first.cores.last is twin.second.cores.last
    assert torch.equal(twin(x), copied(x))


@pytest.mark.parametrize("layout", ["svd", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_is_bit_identical_small_and_keeps_ties(tmp_path, layout, dtype):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    result = mpo.compress(model, bond_dim=9, layout=layout, gauge="identity")
    mpo.save(result, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=Tied())
    x = torch.randn(5, 32, dtype=dtype)
    assert torch.equal(loaded(x), result.model(x))
    assert loaded.first.gauge == "identity"
    assert loaded.first.cores.last is loaded.second.cores.last
    assert loaded.first.cores[0].shape == result.model.first.cores[0].shape
    state = load_file(tmp_path / "out" / saving.CORES_FILE)
    assert sum(t.nbytes for t in state.values()) == result.report.totals.bytes.model.compressed
    count = sum(p.numel() for p in result.model.parameters())
    assert result.report.totals.parameters.model.compressed == count
    dense = Tied().to(dtype)
    dense.load_state_dict(mpo.densify(tmp_path / "out"))
    assert_close(dense(x), result.model(x), **TOL[dtype]["apply"])
    assert {record.gauge for record in saving.read_manifest(tmp_path / "out").layers} == {
        "identity"
    }


def test_files_without_a_gauge_still_load_and_damaged_ones_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    file = tmp_path / "out" / saving.CORES_FILE
    mpo.save(mpo.compress(model, bond_dim=4, layout="svd"), tmp_path / "out")
    manifest = json.loads(saving.read_manifest(file).model_dump_json())
    del manifest["layers"][0]["gauge"]
    save_file(load_file(file), file, metadata={"mpocompress": json.dumps(manifest)})
    assert mpo.load(file, model=model)[0].gauge == "none"
    result = mpo.compress(model, bond_dim=4, layout="svd", gauge="identity")
    mpo.save(result, tmp_path / "out", force=True)
    metadata = {"mpocompress": saving.read_manifest(file).model_dump_json()}
    state = load_file(file)
    save_file(state | {"0.cores.0.pivots": state["0.cores.0.pivots"] + 30}, file, metadata)
    with pytest.raises(LoadError, match=r"layer '0' of the saved result: core 0.*0 to 31"):
        mpo.load(file, model=model)
    del state["0.cores.0.free"]
    save_file(state, file, metadata)
    with pytest.raises(LoadError, match=r"lacks '0\.cores\.0\.free'; it is incomplete"):
        mpo.load(file, model=model)


def test_plain_gauge_opens_all_cores_and_fixes_them_again():
    torch.manual_seed(0)
    first = MPOLinear(12, 12, layout="3x4,4x3", bond_dim=5)
    second = MPOLinear(12, 12, layout="3x4,4x3", bond_dim=5)
    first.fix_gauge_()
    second.cores = first.cores  # as the surgery ties layers
    model = nn.Sequential(first, nn.Tanh(), second, MPOLinear(12, 6, bond_dim=2))
    x = torch.randn(4, 12)
    before = model(x).detach()
    with plain_gauge(model):
        assert [layer.gauge for layer in (first, second, model[3])] == ["none"] * 3
        assert second.cores is first.cores
        assert_close(model(x), before, **TOL[torch.float32]["apply"])
        first.set_cores_(
            [core[..., :1] if s == 0 else core[:1] for s, core in enumerate(first.cores)]
        )
        after = model(x).detach()
    assert [layer.gauge for layer in (first, second, model[3])] == ["identity", "identity", "none"]
    assert second.cores is first.cores
    assert first.bond_dims == second.bond_dims == (1,)
    assert_close(model(x), after, **TOL[torch.float32]["apply"])


@pytest.mark.parametrize("way", ["distill", "sweep", "train"])
def test_frozen_numbers_in_a_gauge_keep_their_values(way):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    model = mpo.compress(dense, bond_dim=3, layout="svd", gauge="identity").model
    frozen = next(model[0].cores.parameters()).requires_grad_(False)
    before, other = frozen.clone(), model[2].to_dense().detach()
    if way == "distill":
        mpo.distill(model, reference=dense, data=[x], steps=3, learning_rate=1e-2)
    elif way == "sweep":
        mpo.sweep(model, reference=dense, data=[x], sweeps=2)
    else:
        mpo.train(model, (x, x[:, 0].gt(0).long()), epochs=2)
    assert [layer.gauge for layer in (model[0], model[2])] == ["identity"] * 2
    assert torch.equal(next(model[0].cores.parameters()), before)
    assert not torch.equal(model[2].to_dense(), other)


def test_sweep_on_the_loss_keeps_the_gauge():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    result = mpo.compress(dense, bond_dim=3, include=["0"], layout="4x4,4x4", gauge="identity")
    before = float((result.model(x) - dense(x)).detach().norm())
    records = mpo.sweep(result.model, reference=dense, data=list(x.split(16)), sweeps=2)
    assert records[-1].loss_after < records[0].loss_before
    assert result.model[0].gauge == "identity"
    assert float((result.model(x) - dense(x)).detach().norm()) < before


def test_healing_trains_the_free_numbers_and_the_report_stays_true(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).eval()
    data = list(torch.randn(256, 32).split(32))
    result = mpo.compress(
        dense, ratio=2, of="layers", layout="svd", gauge="identity", data=data, distill=40
    )
    assert [layer.gauge for layer in (result.model[0], result.model[2])] == ["identity"] * 2
    totals = result.report.totals.parameters
    assert totals.layers.ratio >= 2
    assert totals.model.compressed == sum(p.numel() for p in result.model.parameters())
    losses = result.report.settings["distill"]["held_out_loss"]
    assert losses["after"] < losses["before"]
    mpo.save(result, tmp_path / "out")
    again = mpo.load(tmp_path / "out", model=dense)
    assert torch.equal(again(data[0]), result.model(data[0]))


def test_healing_trains_plain_cores_and_keeps_the_gauge():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    plain, gauged = (
        mpo.compress(dense, bond_dim=3, include=["0"], layout="4x4,4x4", gauge=gauge)
        for gauge in ("none", "identity")
    )
    for result in (plain, gauged):
        mpo.distill(result, reference=dense, data=list(x.split(16)), steps=30, learning_rate=1e-3)
    assert gauged.model[0].gauge == "identity"
    stored = sum(parameter.numel() for parameter in gauged.model[0].cores.parameters())
    assert stored == 2 * 3 * 16 - 3 * 3
    # The function that is found does not depend on how the layer is stored.
    assert_close(gauged.model(x), plain.model(x), rtol=1e-3, atol=1e-4)
    assert float((gauged.model(x) - dense(x)).detach().norm()) > 0


def test_healing_leaves_a_frozen_layer_in_the_gauge_alone():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    result = mpo.compress(dense, bond_dim=3, include=["0"], layout="4x4,4x4", gauge="identity")
    result.model[0].requires_grad_(False)
    before = result.model[0].to_dense().clone()
    mpo.distill(result, reference=dense, data=list(x.split(16)), steps=5, learning_rate=1e-2)
    assert_close(result.model[0].to_dense(), before, **TOL[torch.float32]["apply"])
    assert not any(parameter.requires_grad for parameter in result.model[0].parameters())
