import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.errors import (
    BondDimError,
    BudgetError,
    ConversionError,
    LayoutError,
    NoLayerMatched,
    PlanError,
    SaveError,
)
from mpocompress.mpo import Layout, sequential_svd
from mpocompress.mpo.factors import balanced_factors, balanced_layout, divisors
from mpocompress.planning import predicted_totals
from mpocompress.planning.layouts import (
    candidate_layouts,
    candidates_within,
    choose,
    make_candidate,
    with_error,
)
from tests.tolerances import TOL


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )


@pytest.mark.parametrize(
    ("number", "parts", "expected"),
    [
        (1024, 2, (32, 32)),
        (784, 2, (28, 28)),
        (1536, 2, (48, 32)),
        (13, 3, (13, 1, 1)),
        (1, 2, (1, 1)),
        (30, 1, (30,)),
        (64, 4, (4, 4, 2, 2)),
        (30522, 2, (5087, 6)),
    ],
)
def test_balanced_factors(number, parts, expected):
    assert balanced_factors(number, parts) == expected


def test_divisors():
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36)


@pytest.mark.parametrize("shape", [(1024, 784), (384, 1536), (7, 13), (30522, 384), (1, 6)])
@pytest.mark.parametrize("sites", [1, 2, 3, 4])
def test_balanced_layout_multiplies_to_the_shape(shape, sites):
    layout = balanced_layout(*shape, sites)
    assert (layout.out_features, layout.in_features) == shape
    assert layout.num_sites == sites


@pytest.mark.parametrize("sites", [0, -1, 2.0, True])
def test_balanced_layout_refuses_odd_numbers_of_sites(sites):
    with pytest.raises(LayoutError, match=rf"sites {sites}: it is an integer, 1 or more"):
        balanced_layout(4, 4, sites)


@pytest.mark.parametrize("shape", [(96, 60), (384, 1536), (64, 64), (13, 17)])
@pytest.mark.parametrize("bond_dim", [1, 4, 24])
def test_candidates_keep_to_the_budget_of_the_svd(shape, bond_dim):
    budget = bond_dim * sum(shape)
    found = candidates_within(shape, bond_dim)
    assert bool(found) == (min(budget, min(shape) * sum(shape)) < shape[0] * shape[1])
    for candidate in found:
        assert candidate.parameters <= budget
        assert candidate.parameters < shape[0] * shape[1]
        assert candidate.parameters == candidate.layout.num_parameters(candidate.bond_dims)


def test_candidates_cover_all_families():
    layouts = candidate_layouts(96, 60)
    sites = {layout.num_sites for layout in layouts}
    assert sites == {2, 3, 4}
    assert Layout.svd(96, 60) in layouts
    assert balanced_layout(96, 60) in layouts
    two_sites = {layout for layout in layouts if layout.num_sites == 2}
    assert two_sites - {Layout.svd(96, 60), balanced_layout(96, 60)}, "no skewed layout"


def test_a_prime_shape_has_only_the_svd():
    assert candidate_layouts(13, 17) == [Layout.svd(13, 17)]


@pytest.mark.parametrize("text", ["24x1,1x36", "4x6,6x6", "2x3,3x3,4x4"])
def test_candidate_error_is_that_of_the_sequential_svd(text):
    weight = torch.randn(24, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    candidate = with_error(make_candidate(Layout.parse(text), 5), weight)
    expected = sequential_svd(weight, Layout.parse(text), bond_dim=5).relative_error
    torch.testing.assert_close(
        candidate.relative_weight_error, expected, **TOL[torch.float64]["spectrum"]
    )


def test_choose_least_error_and_breaks_near_ties_by_size():
    layout = Layout.svd(8, 8)
    small = make_candidate(layout, 1, 0.501)
    large = make_candidate(layout, 2, 0.500)
    assert choose([large, small]) is small
    assert choose([large, make_candidate(layout, 1, 0.52)]) is large


def test_kronecker_weight_is_found():
    generator = torch.Generator().manual_seed(0)
    weight = torch.kron(
        torch.randn(8, 6, generator=generator), torch.randn(8, 8, generator=generator)
    )
    layer = nn.Linear(48, 64, bias=False)
    layer.weight = nn.Parameter(weight)
    plan = mpo.plan(layer, bond_dim=2, layout={"*": [(8, 6), (8, 8)]})
    result = mpo.compress(layer, plan)
    assert result.report.compressed_layers[0].relative_weight_error < 1e-6
    assert result.report.compressed_layers[0].bond_dims == [1]


def test_auto_prefers_the_svd_on_low_rank_weights_and_reports_the_others():
    layer = nn.Linear(48, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 3) @ torch.randn(3, 48))
    plan = mpo.plan(layer, bond_dim=4)
    (entry,) = plan.layers
    assert entry.sites() == Layout.svd(64, 48)
    assert len(entry.candidates) > 3
    assert sum(candidate.chosen for candidate in entry.candidates) == 1


def test_a_layer_within_the_bond_dimension_stays_dense():
    plan = mpo.plan(model(), bond_dim=8)
    actions = {layer.name: layer.action for layer in plan}
    assert actions == {"0": "compress", "2": "compress", "4": "keep"}
    assert "within bond dimension 8" in plan.layers[2].reason


def test_if_smaller_false_replaces_it_anyway():
    network = model()
    result = mpo.compress(network, bond_dim=64, if_smaller=False)
    assert len(result.report.compressed_layers) == 3
    x = torch.randn(4, 48)
    torch.testing.assert_close(result.model(x), network(x), **TOL[torch.float32]["apply"])


def test_forced_layouts():
    network = model()
    assert mpo.plan(network, bond_dim=4, layout="svd").layers[0].layout == ((64, 1), (1, 48))
    assert mpo.plan(network, bond_dim=4, layout="balanced").layers[1].layout == ((8, 8), (8, 8))
    three = mpo.plan(network, bond_dim=4, sites=3, exclude=["4"])
    assert len(three.layers[0].layout) == 3
    explicit = mpo.plan(network, bond_dim=4, layout="8x6,8x8")
    assert [layer.action for layer in explicit] == ["compress", "keep", "keep"]
    assert "does not fit" in explicit.layers[1].reason
    by_pattern = mpo.plan(network, bond_dim=4, layout={"0": "svd", "2": [(8, 8), (8, 8)]})
    assert by_pattern.layers[0].layout == ((64, 1), (1, 48))
    assert by_pattern.layers[1].layout == ((8, 8), (8, 8))


def test_refusals():
    network = model()
    with pytest.raises(BondDimError, match="bond_dim 0.*at least 1"):
        mpo.plan(network, bond_dim=0)
    with pytest.raises(BondDimError, match="bond_dim -3"):
        mpo.compress(network, bond_dim=-3)
    with pytest.raises(LayoutError, match="multiply to 21, but the matrix of shape 64x48"):
        mpo.plan(network, bond_dim=4, layout="3x5,7x11")
    with pytest.raises(LayoutError, match="cannot read 'oops'"):
        mpo.plan(network, bond_dim=4, layout="oops")
    with pytest.raises(LayoutError, match="both force a layout"):
        mpo.plan(network, bond_dim=4, layout="svd", sites=3)
    with pytest.raises(NoLayerMatched, match="layout by pattern.*'nope'"):
        mpo.plan(network, bond_dim=4, layout={"nope": "svd"})
    with pytest.raises(NoLayerMatched, match="only layers that are not selected"):
        mpo.plan(network, bond_dim=4, include=["0"], layout={"2": "svd"})
    with pytest.raises(NoLayerMatched):
        mpo.plan(nn.ReLU(), bond_dim=4)
    with pytest.raises(NoLayerMatched, match="every layer stays dense"):
        mpo.compress(nn.Linear(4, 4), bond_dim=16)
    # What was not selected does not say why the selected ones stay.
    chain = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)), nn.Linear(2, 1))
    for options in ({"bond_dim": 16}, {"ratio": 2}):
        with pytest.raises(NoLayerMatched, match=r"dense|smaller") as caught:
            mpo.compress(chain, include=["[45]"], **options)
        said = str(caught.value)
        assert re.search(r"\('5': .*; '4': ", said)
        assert "not selected" not in said
        assert "'0'" not in said
    broken = model()
    with torch.no_grad():
        broken[2].weight[3, 5] = float("nan")
    with pytest.raises(ConversionError, match="'2'.*1 of 4096 weights are NaN or Inf"):
        mpo.compress(broken, bond_dim=4)
    # What is not selected is not looked at.
    mpo.compress(broken, bond_dim=4, include=["0"])


@pytest.mark.parametrize("gauge", ["none", "identity"])
@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("ratio", [5.0, 60.0, 150.0])
def test_no_single_bond_could_be_larger_within_the_budget(ratio, sites, gauge):
    model = nn.Sequential(nn.Linear(324, 256), nn.ReLU(), nn.Linear(256, 256))
    dense = 256 * (324 + 256)
    try:
        planned = mpo.plan(model, ratio=ratio, of="layers", sites=sites, gauge=gauge)
    except BudgetError:
        assert sites == 2
        assert ratio > 60
        return
    if len(planned.compressed) < 2:  # one is too large even at bond dimension 1
        dense = sum(layer.shape[0] * layer.shape[1] for layer in planned.compressed)
    used = sum(layer.parameters for layer in planned.compressed)
    assert used <= dense / ratio
    for layer in planned.compressed:
        layout, bonds = layer.sites(), layer.bond_dims
        assert list(layout.clip(bonds)) == list(bonds)
        for place in range(len(bonds)):
            raised = layout.clip([bond + (k == place) for k, bond in enumerate(bonds)])
            more = make_candidate(layout, raised, gauge=gauge).parameters - layer.parameters
            assert list(raised) == list(bonds) or used + more > dense / ratio


def test_of_equal_bonds_the_middle_one_is_raised_first():
    model = nn.Sequential(nn.Linear(256, 256))
    at_four = mpo.plan(model, sites=4, bond_dim=4).compressed[0]
    assert at_four.bond_dims == (4, 4, 4)
    layout = at_four.sites()
    target = make_candidate(layout, (4, 5, 4)).parameters
    found = mpo.plan(model, ratio=256 * 256 / target, of="layers", sites=4)
    assert found.compressed[0].bond_dims == (4, 5, 4)


@pytest.mark.parametrize("asked", [{"bond_dim": 4}, {"ratio": 2.0}])
def test_sites_of_size_one_are_refused_with_what_there_is(asked):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 13))
    with pytest.raises(LayoutError, match=r"32x64 has no factors for 12 sites.* Try 11"):
        mpo.plan(model, sites=12, **asked)


@pytest.mark.parametrize("asked", [{"bond_dim": 4}, {"ratio": 2.0}])
def test_sites_and_a_layout_exclude_each_other(asked):
    for layout in ("svd", {"0": "svd"}):
        with pytest.raises(LayoutError, match="both force a layout"):
            mpo.plan(model(), layout=layout, sites=20, **asked)
    with pytest.raises(LayoutError, match="sites 0: it is an integer, 1 or more"):
        mpo.plan(model(), sites=0, **asked)
    with pytest.raises(LayoutError, match=r"has no factors for 90000 sites"):
        mpo.plan(model(), sites=90_000, **asked)


def test_a_layer_without_enough_factors_stays_dense():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(13, 7))
    first, last = mpo.plan(net, sites=4, bond_dim=3).layers
    assert first.action == "compress"
    assert last.action == "keep"
    assert "7x13 has no factors for 4 sites" in last.reason


def test_a_plan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan = mpo.plan(model(), bond_dim=4)
    plan.save(path)

    def full(source, target):
        raise OSError("No space left on device")

    other = mpo.plan(model(), bond_dim=5)
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(SaveError, match=r"plan\.json.*No space"):
            other.save(path)
    assert mpo.Plan.load(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(
        SaveError, match=r"cannot write '.*plan\.json': there is no folder '.*none'"
    ):
        plan.save(tmp_path / "none" / "plan.json")
    with pytest.raises(SaveError, match="it is a folder"):
        plan.save(tmp_path)


def test_a_plan_is_written_through_a_link(tmp_path):
    plan = mpo.plan(nn.Linear(8, 8), bond_dim=2)
    (tmp_path / "link.json").symlink_to(tmp_path / "plan.json")
    for _ in range(2):
        plan.save(tmp_path / "link.json")
        assert (tmp_path / "link.json").is_symlink()
        assert mpo.Plan.load(tmp_path / "plan.json") == plan
    plan.save("/dev/null")
    assert not Path("/dev/null").is_file()


def test_plan_round_trip_and_edit(tmp_path):
    network = model()
    plan = mpo.plan(network, bond_dim=4)
    plan.save(tmp_path / "plan.json")
    assert mpo.Plan.load(tmp_path / "plan.json") == plan
    edited = json.loads(plan.to_json())
    edited["layers"][0].update(layout=[[8, 6], [8, 8]], bond_dims=[3])
    edited["layers"][1].update(action="keep")
    edited["layers"][2].update(action="keep")
    result = mpo.compress(network, mpo.Plan.from_json(json.dumps(edited)))
    (layer,) = result.report.compressed_layers
    assert layer.layout == [[8, 6], [8, 8]]
    assert layer.bond_dims == [3]
    assert "layout" in str(plan) or "ratio" in str(plan)


def test_the_identity_gauge_counts_degrees_of_freedom():
    network = model()
    plan = mpo.plan(network, bond_dim=30, layout="svd", gauge="identity")
    # 64x48 takes 30 * 112 numbers in the plain form: more than it has.
    assert [layer.action for layer in plan] == ["compress", "compress", "keep"]
    assert [layer.gauge for layer in plan.compressed] == ["identity"] * 2
    assert mpo.Plan.from_json(plan.to_json()) == plan
    assert "identity gauge" in str(plan)
    plain = mpo.plan(network, bond_dim=30, layout="svd")
    assert [layer.action for layer in plain] == ["keep", "compress", "keep"]
    result = mpo.compress(network, plan)
    first, second = result.report.compressed_layers
    assert first.parameters.compressed == 30 * (64 + 48) - 30**2
    assert second.parameters.compressed == 30 * (64 + 64) - 30**2
    stored = sum(p.numel() for p in result.model.parameters())
    assert result.report.totals.parameters.model.compressed == stored
    state = result.model.state_dict().values()
    assert result.report.totals.bytes.model.compressed == sum(t.nbytes for t in state)
    assert result.report.settings["gauge"] == "identity"
    assert result.report == mpo.CompressionReport.from_json(result.report.to_json())


@pytest.mark.parametrize("layout", ["svd", "balanced", "auto"])
def test_the_gauge_loses_nothing(layout):
    network = model()
    x = torch.randn(16, 48)
    for data in (None, [x]):
        plain, gauged = (
            mpo.compress(network, bond_dim=6, layout=layout, data=data, gauge=gauge)
            for gauge in ("none", "identity")
        )
        torch.testing.assert_close(gauged.model(x), plain.model(x), **TOL[torch.float32]["apply"])
        for mine, theirs in zip(
            gauged.report.compressed_layers, plain.report.compressed_layers, strict=True
        ):
            assert mine.layout == theirs.layout
            saved = sum(bond**2 for bond in mine.bond_dims)
            assert mine.parameters.compressed == theirs.parameters.compressed - saved


def test_gauges_by_layer_and_those_that_do_not_exist():
    network = model()
    plan = mpo.plan(network, bond_dim=4, layout="svd", gauge="identity")
    edited = json.loads(plan.to_json())
    edited["layers"][1]["gauge"] = "none"
    result = mpo.compress(network, mpo.Plan.from_json(json.dumps(edited)))
    assert [result.model[k].gauge for k in (0, 2)] == ["identity", "none"]
    assert result.report.settings["gauge"] == {"0": "identity", "2": "none", "4": "identity"}
    edited["layers"][1]["gauge"] = "left"
    with pytest.raises(PlanError, match=r"layers\.1\.gauge: Input should be 'none' or 'identity'"):
        mpo.Plan.from_json(json.dumps(edited))
    with pytest.raises(LayoutError, match="gauge \"left\"|gauge 'left'"):
        mpo.plan(network, bond_dim=4, gauge="left")
    old = json.loads(plan.to_json())
    for layer in old["layers"]:
        del layer["gauge"]
    assert {layer.gauge for layer in mpo.Plan.from_json(json.dumps(old))} == {"none"}


def test_a_weight_of_less_rank_than_planned_keeps_its_chosen_candidate():
    network = model()
    layer = network[0]
    layer.weight.data = layer.weight.data[:, :3] @ torch.randn(3, layer.in_features)
    report = mpo.compress(network, bond_dim=8).report
    found = report.compressed_layers[0]
    assert found.bond_dims == [3]
    assert sum(candidate.chosen for candidate in found.candidates) == 1


def test_an_edited_entry_has_sizes_of_its_own_and_no_stale_prediction():
    network = model()
    data = [torch.randn(64, 48, generator=torch.Generator().manual_seed(0))]
    plan = mpo.plan(network, ratio=2, data=data)
    before = predicted_totals(plan)
    assert before.relative_output_error is not None
    parameters = sum(p.numel() for p in network.parameters())
    assert before.parameters[0] == parameters
    assert before.bytes == (4 * parameters, 4 * before.parameters[1])
    edited = json.loads(plan.to_json())
    edited["layers"][0]["bond_dims"] = [1]
    again = mpo.Plan.from_json(json.dumps(edited))
    after = predicted_totals(again)
    result = mpo.compress(network, again, data=data)
    assert result.report.totals.parameters.model.compressed == after.parameters[1]
    assert after.parameters[1] < before.parameters[1]
    assert after.relative_output_error is None
    rows = {row.quantity: row for row in result.report.predictions}
    assert rows["relative change of the model's outputs"].predicted is None
    assert rows["relative change of the model's outputs"].measured > 0


@pytest.mark.parametrize("gauge", ["none", "identity"])
def test_a_plan_has_the_curve_of_each_layer_and_the_report_draws_it(gauge):
    network = model()
    data = [torch.randn(64, 48, generator=torch.Generator().manual_seed(0))]
    plan = mpo.plan(network, ratio=3, layout="svd", data=data, gauge=gauge)
    layer = plan.compressed[0]
    curve = {candidate.bond_dims[0]: candidate for candidate in layer.candidates}
    assert [bond for bond, found in curve.items() if found.chosen] == [*layer.bond_dims]
    assert curve[layer.bond_dims[0]].loss == layer.predicted.loss
    assert {1, 2, 4, 8, 16} <= curve.keys()
    largest = max(curve)
    dense = layer.shape[0] * layer.shape[1]
    assert curve[largest].parameters < dense
    losses = [curve[bond].loss for bond in sorted(curve)]
    assert losses == sorted(losses, reverse=True)
    # What is predicted for another bond dimension is what a plan that has it predicts.
    other = mpo.plan(network, ratio=5, layout="svd", data=data, gauge=gauge).compressed[0]
    assert other.bond_dims != layer.bond_dims
    again = {c.bond_dims: c.loss for c in other.candidates}
    for bond in curve.keys() - {*layer.bond_dims}:
        assert again[(bond,)] == curve[bond].loss
    edited = json.loads(plan.to_json())
    edited["layers"][0]["bond_dims"] = [4]
    result = mpo.compress(network, mpo.Plan.from_json(json.dumps(edited)), data=data)
    chosen = [c.bond_dims for c in result.report.compressed_layers[0].candidates if c.chosen]
    assert chosen == [[4]]
    page = result.report.to_html()
    assert "What the size of each layer buys" in page
    assert 'class="narrow"' in page
    assert "Output change, predicted" in result.report.to_markdown()
    assert "What the size of each layer buys" not in mpo.compress(network, ratio=3).report.to_html()


@pytest.mark.parametrize("shape", [(96, 60), (384, 1536), (13, 17)])
@pytest.mark.parametrize("bond_dim", [1, 4, 24])
def test_gauged_candidates_keep_to_the_budget_of_the_gauged_svd(shape, bond_dim):
    budget = Layout.svd(*shape).degrees_of_freedom([bond_dim])
    for candidate in candidates_within(shape, bond_dim, gauge="identity"):
        assert candidate.parameters <= budget
        assert candidate.parameters < shape[0] * shape[1]
        assert candidate.parameters == candidate.layout.degrees_of_freedom(candidate.bond_dims)


def test_plans_that_do_not_belong(tmp_path):
    plan = mpo.plan(model(), bond_dim=4)
    with pytest.raises(PlanError, match="names layer '0'"):
        mpo.compress(nn.Sequential(nn.Flatten(), nn.Linear(48, 64)), plan)
    with pytest.raises(PlanError, match="'0' is 64x48 in the plan, but 64x40"):
        mpo.compress(
            nn.Sequential(
                nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
            ),
            plan,
        )
    smaller = plan.model_copy(update={"layers": plan.layers[:1]})
    with pytest.raises(PlanError, match="says nothing of layer '2'"):
        mpo.compress(model(), smaller)
    with pytest.raises(PlanError, match="either a plan, or a bond_dim or ratio"):
        mpo.compress(model())
    with pytest.raises(PlanError, match="so layout and gauge would not be looked at"):
        mpo.compress(model(), plan, layout="balanced", gauge="identity")
    with pytest.raises(PlanError, match="so ratio would not be looked at"):
        mpo.compress(model(), plan, ratio=2)
    with pytest.raises(PlanError, match="so bond_dim would not be looked at"):
        mpo.compress(model(), plan, bond_dim=0)
    with pytest.raises(PlanError, match="this is not a plan"):
        mpo.Plan.from_json("{}")
    with pytest.raises(PlanError, match="format version 99"):
        mpo.Plan.from_json(plan.model_copy(update={"format_version": 99}).to_json())
    with pytest.raises(PlanError, match="cannot read the plan"):
        mpo.Plan.load(tmp_path / "missing.json")
    bad = json.loads(plan.to_json())
    bad["layers"][0]["bond_dims"] = [2, 2]
    with pytest.raises(PlanError, match="1 bonds, but bond_dims"):
        mpo.Plan.from_json(json.dumps(bad))
