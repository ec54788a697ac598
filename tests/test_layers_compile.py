"""`MPOLinear` under torch.export, torch.compile and torch.func."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mpocompress.layers import MPOLinear
from mpocompress.mpo import Layout
from tests.planted import gaussian
from tests.tolerances import TOL

F32 = TOL[torch.float32]
LAYOUTS = [
    "24x12",
    "svd",
    "4x3,6x4",
    "2x3,3x2,4x2",
    "2x2,2x2,2x3,3x1",
    Layout((5, 5), (4, 4), pad=True),
]
LEADS = [(2, 3), (1, 1), (7, 1), (1, 9), (64, 40)]


def layer_of(layout, bias=True, bond_dim=3):
    torch.manual_seed(0)
    return MPOLinear(12, 24, bias, layout=layout, bond_dim=bond_dim)


def batch(*lead):
    return gaussian(*lead, 12, dtype=torch.float32)


def exported(module, *, strict=False):
    """With batch and sequence left open; traced at a size where W would be cheaper to build."""
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    return torch.export.export(
        module.eval(), (batch(40, 50),), dynamic_shapes=(dims,), strict=strict
    )


@pytest.mark.parametrize(
    ("layout", "bias"), [*((layout, True) for layout in LAYOUTS), ("4x3,6x4", False)], ids=str
)
def test_export_holds_for_batches_and_sequences_of_other_sizes(layout, bias):
    layer = layer_of(layout, bias)
    program = exported(layer)
    module = program.module()
    for lead in LEADS:
        x = batch(*lead)
        expected = x @ layer.weight.T + (layer.bias if bias else 0)
        assert_close(module(x), expected, **F32["apply"])
        assert_close(module(x), layer(x), **F32["apply"])
    for graph in (program, program.run_decompositions()):
        for node in graph.graph.nodes:
            assert "einsum" not in str(node.target)
            assert "aten.to." not in str(node.target)
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                assert value.ndim <= 4, node


@pytest.mark.parametrize("layout", ["svd", "2x3,3x2,4x2"])
def test_strict_export(layout):
    layer = layer_of(layout)
    module = exported(layer, strict=True).module()
    for lead in LEADS:
        assert_close(module(batch(*lead)), layer(batch(*lead)), **F32["apply"])


def test_exported_graph_does_not_depend_on_the_batch_it_was_traced_with():
    layer = layer_of("4x3,6x4").eval()
    dims = ({0: torch.export.Dim("batch")},)
    graphs = []
    for rows in (2, 5000):
        program = torch.export.export(layer, (batch(rows),), dynamic_shapes=dims)
        graphs.append([str(node.target) for node in program.graph.nodes])
    assert graphs[0] == graphs[1]
    assert not layer._plans.best(2).builds_matrix
    assert layer._plans.best(5000).builds_matrix


def test_export_of_a_model_around_the_layer():
    model = nn.Sequential(layer_of("2x3,3x2,4x2"), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 3))
    module = exported(model).module()
    for lead in LEADS:
        assert_close(module(batch(*lead)), model(batch(*lead)), **F32["apply"])


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compile_in_one_graph_without_warnings(layout, dynamic):
    torch.compiler.reset()
    layer = layer_of(layout)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
        for rows in (1, 3, 2000):
            x, twin = batch(rows).requires_grad_(), batch(rows).requires_grad_()
            output, expected = compiled(x), layer(twin)
            assert_close(output, expected, **F32["apply"])
            output.square().mean().backward()
            expected.square().mean().backward()
            assert_close(x.grad, twin.grad, **F32["gradient"])
    assert [str(w.message) for w in caught if "lru_cache" in str(w.message)] == []
    assert [str(w.message) for w in caught if "mpocompress" in w.filename] == []


def test_vmap_over_samples_and_functional_call():
    layer = layer_of("4x3,6x4")
    parameters = dict(layer.named_parameters())
    x = batch(5)

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for row in range(5):
        layer.zero_grad()
        layer(x[row]).square().sum().backward()
        for name, parameter in parameters.items():
            assert_close(per_sample[name][row], parameter.grad, **F32["gradient"])
