"""`MPOEmbeddingBag` against `nn.EmbeddingBag`: its options, and what `test_kinds` leaves out."""

import copy

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.errors import BondDimError, ContractionError, DataError, LayoutError, LoadError
from mpocompress.export import export_onnx, verify
from mpocompress.layers import MPOEmbedding, MPOEmbeddingBag
from mpocompress.layers.opened import layers_called
from mpocompress.loading import Batch, example_inputs, load_source, parse_input_spec
from mpocompress.mpo import MPO, Layout
from mpocompress.saving import save_state
from mpocompress.surgery import find_weights, open_modules, select_sites
from mpocompress.tuning.statistics.gradients import take_statistics
from tests.kinds import KINDS
from tests.planted import gaussian
from tests.tolerances import TOL

ROWS, COLUMNS = 12, 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MODES = pytest.mark.parametrize("mode", ["sum", "mean", "max"])
EXACT = {"bond_dim": 10_000, "if_smaller": False}

# Two empty bags, one of them last; one of padding alone; a row twice in a bag.
FLAT = torch.tensor([3, 5, 5, 0, 2, 2, 11, 2, 7])
OFFSETS = torch.tensor([0, 3, 3, 4, 6, 9])
BAGS = torch.tensor([[3, 5, 5, 0], [2, 2, 2, 2], [2, 7, 11, 2]])


def dense_bag(dtype: torch.dtype = torch.float64, **options) -> nn.EmbeddingBag:
    bag = nn.EmbeddingBag(ROWS, COLUMNS, **options).to(dtype)
    bag.weight.data.copy_(gaussian(ROWS, COLUMNS, seed=5))
    return bag


def inputs(shape: str, weighted: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    indices, offsets = (BAGS, None) if shape == "2-D" else (FLAT, OFFSETS)
    if not weighted:
        return (indices, offsets)
    return indices, offsets, gaussian(*indices.shape, seed=6).to(dtype).requires_grad_()


OPTIONS = [
    (mode, shape, padding, last, weighted)
    for mode in ("sum", "mean", "max")
    for shape in ("2-D", "offsets")
    for padding in (None, 2, -1)
    for last in ((False, True) if shape == "offsets" else (False,))
    for weighted in ((False, True) if mode == "sum" else (False,))
]


@DTYPES
@pytest.mark.parametrize(("mode", "shape", "padding", "last", "weighted"), OPTIONS)
def test_values_and_gradients_are_those_of_the_dense_bag(
    mode, shape, padding, last, weighted, dtype
):
    dense = dense_bag(dtype, mode=mode, padding_idx=padding, include_last_offset=last)
    layer = MPOEmbeddingBag(
        ROWS,
        COLUMNS,
        mode=mode,
        padding_idx=padding,
        include_last_offset=last,
        layout="3x2,4x3",
        bond_dim=None,
        dtype=dtype,
    )
    assert layer.padding_idx == dense.padding_idx
    layer.table.set_cores_(MPO.from_matrix(dense.weight.detach(), layer.table.layout).cores)
    assert_close(layer.weight, dense.weight, **TOL[dtype]["dense"])
    cores = list(layer.table.cores)
    twin = layer.weight
    arguments = inputs(shape, weighted, dtype)
    expected = torch.func.functional_call(dense, {"weight": twin}, arguments)
    found = layer(*arguments)
    assert_close(found, expected, **TOL[dtype]["lookup"])
    upstream = gaussian(*expected.shape, seed=7).to(dtype)
    wanted = [*cores, *arguments[2:]]
    ours = torch.autograd.grad(found, wanted, upstream)
    theirs = torch.autograd.grad(expected, wanted, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, **TOL[dtype]["lookup"])
    with layers_called(layer):  # as statistics are taken
        assert_close(layer(*arguments), expected, **TOL[dtype]["lookup"])
    with layers_called(opened := open_modules(dense)):
        assert_close(opened(*arguments), dense(*arguments), **TOL[dtype]["lookup"])


@MODES
def test_inputs_without_entries(mode):
    none = torch.zeros(0, dtype=torch.long)
    for padding in (None, 1):
        dense = dense_bag(mode=mode, padding_idx=padding)
        for layout in ("svd", "balanced"):
            layer = compressed(dense, layout=layout).model
            for arguments in ((none, torch.tensor([0, 0])), (none, none), (none.reshape(0, 3),)):
                found, expected = layer(*arguments), dense(*arguments)
                assert torch.equal(found, expected)
                assert not found.any()
                found.sum().backward()


def compressed(model: nn.Module, **options) -> mpo.CompressionResult:
    return mpo.compress(model, include=["*table"], **{**EXACT, **options})


class Reads(nn.Module):
    """Takes what `nn.EmbeddingBag` takes, and gives numbers."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 16, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None):
        return self.head(torch.tanh(self.bag(ids, offsets, weights)))


def reads(**options) -> nn.Module:
    torch.manual_seed(0)
    return Reads(**options).eval()


def skewed(count: int = 4, entries: int = 60) -> list[Tensor]:
    """Flat indices; a few of the 40 rows make most of them, those from 30 on do not occur."""
    share = 1.0 / torch.arange(1, 31, dtype=torch.float64) ** 2
    generator = torch.Generator().manual_seed(3)
    return [
        torch.multinomial(share, entries, replacement=True, generator=generator)
        for _ in range(count)
    ]


OFTEN = torch.tensor([0, 7, 7, 20, 33, 50])


@MODES
@pytest.mark.parametrize("layout", ["svd", "8x4,5x4"])
def test_data_with_offsets_make_it_better_at_equal_parameters(mode, layout):
    dense = reads(mode=mode, padding_idx=2)
    batches = []
    for number, ids in enumerate(skewed()):
        batch = {"ids": ids, "offsets": OFTEN}
        if mode == "sum":
            batch["weights"] = gaussian(*ids.shape, seed=number).float().abs()
        batches.append(batch)
    options = {"bond_dim": 2, "layout": layout, "if_smaller": False}
    plain = compressed(dense, **options)
    fitted = compressed(dense, data=batches, **options)
    assert plain.report.totals.parameters == fitted.report.totals.parameters
    errors = []
    with torch.no_grad():
        for model in (fitted.model, plain.model):
            wrong = [(model(**batch) - dense(**batch)).square().sum() for batch in batches]
            errors.append(float(sum(wrong)) ** 0.5)
    assert errors[0] < 0.8 * errors[1]


def test_lookups_are_counted_without_padding_and_measured_behind_the_reduction():
    dense = open_modules(reads(mode="mean", padding_idx=2))
    ids = torch.tensor([[2, 2, 2, 5], [5, 2, 7, 7]])
    table = dense.bag.table
    found = take_statistics(dense, [table], [Batch(args=(ids,))]).layers[table]
    wanted = torch.zeros(40, dtype=torch.float64)
    wanted[5], wanted[7] = 0.5, 0.5
    assert_close(found.counts.frequencies(), wanted)
    assert found.counts.rows == found.gradients.rows == 4
    # An error of a row reaches the output of a mean divided by the number of entries.
    one, three = (
        take_statistics(dense, [table], [Batch(args=(torch.tensor([bag]),))])
        .layers[table]
        .gradients.mean(centered=False)[0]
        for bag in ([5, 2, 2], [5, 5, 5])
    )
    assert_close(one, 9 * three, **TOL[torch.float32]["dense"])


def test_ties_state_mode_and_flags_are_kept():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.EmbeddingBag(40, 16, mode="sum")
            self.again = nn.EmbeddingBag(40, 16, mode="max", padding_idx=3)
            self.words = nn.Embedding(40, 16)
            self.head = nn.Linear(16, 40)
            for module in (self.again, self.words, self.head):
                module.weight = self.first.weight
            self.shared = self.first

        def forward(self, ids: Tensor) -> Tensor:
            mixed = self.first(ids) + self.again(ids) + self.words(ids).sum(1) + self.shared(ids)
            return self.head(mixed)

    torch.manual_seed(0)
    dense = Tied().double()
    dense.first.weight.requires_grad_(False)
    names = [name for name, _ in dense.named_parameters(remove_duplicate=False)]
    ids = skewed(1)[0].reshape(12, 5)
    (site,) = find_weights(open_modules(dense)).sites
    assert site.names == ("first.table", "again.table", "words", "head", "shared.table")
    model = compressed(dense).model
    assert_close(model(ids), dense(ids), **TOL[torch.float64]["apply"])
    assert isinstance(model.first, MPOEmbeddingBag)
    assert model.shared is model.first
    for layer in (model.again.table, model.words, model.head):
        assert all(map(torch.equal, layer.cores, model.first.table.cores))
        assert layer.cores[0] is model.first.table.cores[0]
    assert not any(core.requires_grad for core in model.first.table.cores)
    assert model.first.training
    assert names == [name for name, _ in dense.named_parameters(remove_duplicate=False)]
    fitted = compressed(dense, data=[ids], bond_dim=4, if_smaller=True).model
    assert fitted.head.cores[0] is fitted.again.table.cores[0]


def test_trained_copied_saved_loaded_and_dense_again(tmp_path):
    dense = reads(mode="sum", padding_idx=2, include_last_offset=True).train()
    result = compressed(dense, bond_dim=3)
    ids, offsets = skewed(1)[0], torch.tensor([0, 7, 20, 20, 60])
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(result.model)
    before = {name: value.clone() for name, value in result.model.state_dict().items()}
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = twin(ids, offsets, weights).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert all(torch.equal(before[n], v) for n, v in result.model.state_dict().items())
    assert twin.bag.training
    assert not twin.eval().bag.table.training
    result.model.load_state_dict(twin.state_dict())
    mpo.save(result, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=reads(mode="sum", padding_idx=2))
    assert not loaded.bag.include_last_offset  # options are the skeleton's
    loaded = mpo.load(
        tmp_path / "out", model=reads(mode="sum", padding_idx=2, include_last_offset=True)
    )
    assert torch.equal(loaded(ids, offsets, weights), twin(ids, offsets, weights))
    state = mpo.densify(tmp_path / "out")
    assert set(state) == set(dense.state_dict())
    dense.load_state_dict(state)
    assert_close(dense(ids, offsets, weights), twin(ids, offsets, weights))
    with pytest.raises(LoadError, match=r"'bag\.table' .* has nothing there"):
        mpo.load(tmp_path / "out", model=nn.ModuleDict({"bag": nn.Linear(2, 2)}))


def test_what_is_tied_is_written_once_when_it_is_made_dense_again(tmp_path):
    kind = KINDS["embedding bag tied with the head"]
    result = compressed(kind.make(), bond_dim=4)
    mpo.save(result, tmp_path / "out")
    state = mpo.densify(tmp_path / "out")
    assert state["bag.weight"] is state["head.weight"]
    save_state(state, tmp_path / "dense.safetensors")
    assert set(load_file(tmp_path / "dense.safetensors")) == set(kind.make().state_dict())


class Starts(nn.Module):
    """Computes the offsets itself, and weights that depend on the indices."""

    def __init__(self, *, flat: bool, last: bool, weighted: bool, **options) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 16, include_last_offset=last, **options)
        self.flat, self.last, self.weighted = flat, last, weighted

    def forward(self, ids: Tensor) -> Tensor:
        weights = 1.0 / (1.0 + ids) if self.weighted else None
        if not self.flat:
            return self.bag(ids, None, weights)
        bags, entries = ids.shape
        offsets = torch.arange(0, bags * entries + self.last, entries)
        weights = None if weights is None else weights.reshape(-1)
        return self.bag(ids.reshape(-1), offsets, weights)


@pytest.mark.onnx
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    ("mode", "flat", "last", "weighted"),
    [
        ("sum", False, False, False),
        ("sum", False, False, True),
        ("mean", False, False, False),
        ("max", False, False, False),
        ("sum", True, False, True),
        ("mean", True, True, False),
        ("max", True, False, False),
    ],
)
def test_onnx_runtime_agrees_at_any_number_of_bags_and_entries(
    mode, flat, last, weighted, padding, tmp_path
):
    torch.manual_seed(0)
    dense = Starts(flat=flat, last=last, weighted=weighted, mode=mode, padding_idx=padding).eval()
    model = compressed(dense, bond_dim=3).model
    ids = skewed(1)[0].reshape(12, 5)
    ids[3] = 2  # nothing but padding
    exported = export_onnx(model, tmp_path / "model.onnx", ids)
    assert exported.inputs[0].shape == ("batch", "sequence")
    batches = [ids, ids[:1, :3], skewed(1, 56)[0].reshape(7, 8), ids[3:4]]
    found = verify(tmp_path / "model.onnx", model, batches, tolerance=1e-4)
    found.raise_if_failed()
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"Loop", "Scan", "If", "SequenceInsert"}


@pytest.mark.onnx
def test_flat_indices_and_offsets_are_no_batch_of_a_graph(tmp_path):
    model = compressed(reads(mode="sum"), bond_dim=3).model
    example = {"ids": skewed(1)[0], "offsets": OFTEN}
    with pytest.raises(DataError, match=r"offsets of the bags of 'bag'.*\(bags, entries\)"):
        export_onnx(model, tmp_path / "model.onnx", example)


REFUSED = {
    "max_norm": (lambda: nn.EmbeddingBag(4, 3, max_norm=1.0), "max_norm rescales its rows"),
    "frequency": (
        lambda: nn.EmbeddingBag(4, 3, scale_grad_by_freq=True, mode="sum"),
        "scale_grad_by_freq rescales the gradient",
    ),
    "own forward": (
        lambda: type("Own", (nn.EmbeddingBag,), {"forward": lambda self, x: x})(4, 3),
        "has its own forward",
    ),
    "hook": (lambda: with_hook(nn.EmbeddingBag(4, 3)), "it has a forward hook"),
}


def with_hook(bag: nn.EmbeddingBag) -> nn.EmbeddingBag:
    bag.register_forward_hook(lambda *_: None)
    return bag


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_bag_does_beside_reducing_rows_keeps_it_dense(make, reason):
    model = nn.ModuleDict({"bag": make(), "other": nn.Linear(3, 3)})
    inventory = find_weights(open_modules(model))
    assert reason in inventory.refused["bag"]
    assert [site.name for site in inventory.sites] == ["other"]
    (kept,) = (entry for entry in inventory.kept if entry.kind == "embedding")
    assert reason in kept.reason


def test_a_table_whose_weight_somebody_else_reads_stays_dense():
    class Other(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.matrix = weight

    bag = nn.EmbeddingBag(4, 3)
    model = nn.ModuleDict({"bag": bag, "other": Other(bag.weight)})
    refused = find_weights(open_modules(model)).refused
    assert "also the parameter 'other.matrix' of Other" in refused["bag.table"]


def test_layers_from_scratch_say_what_they_are_and_what_does_not_fit():
    layer = MPOEmbeddingBag(12, 6, mode="max", padding_idx=-1, bond_dim=2)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (12, 6, 11)
    assert isinstance(layer.table, MPOEmbedding)
    assert "mode='max', padding_idx=11" in repr(layer)
    assert_close(layer.weight, layer.table.weight)
    with pytest.raises(ContractionError, match="mode 'min': bags are reduced by sum, mean or max"):
        MPOEmbeddingBag(12, 6, mode="min")
    with pytest.raises(ContractionError, match="padding_idx 12 in a table of 12 rows"):
        MPOEmbeddingBag(12, 6, padding_idx=12)
    with pytest.raises(LayoutError):
        MPOEmbeddingBag(12, 6, layout="5x2,3x3")
    with pytest.raises(BondDimError):
        MPOEmbeddingBag(12, 6, bond_dim=0)
    indices = torch.tensor([[0, 1]])
    with pytest.raises(IndexError):
        layer(indices + 12)
    padded = MPO.from_matrix(torch.randn(10, 6), Layout((4, 4), (2, 3), pad=True))
    with pytest.raises(IndexError):
        MPOEmbedding.from_mpo(padded)(indices + 11)  # below the 16 rows of its sites
    with pytest.raises(ValueError, match="offsets has to be None"):
        layer(indices, torch.tensor([0]))
    with pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
        layer(indices[0])
    with pytest.raises(NotImplementedError, match="only supported for mode='sum'"):
        layer(indices, None, torch.ones(1, 2))


def test_it_is_counted_loaded_and_given_inputs(tmp_path):
    model = nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 4))
    inventory = find_weights(open_modules(model))
    assert [(site.name, site.kind) for site in inventory.sites] == [
        ("0.table", "embedding"),
        ("1", "linear"),
    ]
    assert inventory.parameters == sum(p.numel() for p in model.parameters())
    assert [site.name for site in select_sites(inventory, ["0.*"])] == ["0.table"]
    kept = {layer.name: layer.reason for layer in mpo.plan(model, bond_dim=2)}
    assert "without data it is not known which rows matter" in kept["0.table"]
    torch.save(model, tmp_path / "model.pt")
    loaded = load_source(tmp_path / "model.pt").module
    assert type(loaded[0]) is nn.EmbeddingBag
    (ids,) = example_inputs(loaded, specs=[parse_input_spec("5x9:int64")]).args
    assert ids.unique().numel() > 2
    assert int(ids.max()) < 30


def test_padding_of_a_table_counts_from_the_end_and_is_in_it():
    torch.manual_seed(0)
    table = MPOEmbedding(20, 8, padding_idx=-1)
    table(torch.tensor([19])).sum().backward()
    assert not table.cores[0].grad.any()
    again = MPOEmbedding.from_mpo(table.to_mpo(), padding_idx=-20)
    assert again.padding_idx == 0
    for wrong in (20, -21):
        with pytest.raises(ContractionError, match="padding_idx .* in a table of 20 rows"):
            MPOEmbedding(20, 8, padding_idx=wrong)
