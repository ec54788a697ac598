import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpocompress as mpo
from mpocompress import saving
from mpocompress.errors import LoadError, OutputExistsError, SaveError
from mpocompress.layers import MPOLinear
from mpocompress.saving.tensor_file import read_tensors
from tests.tolerances import TOL


class Tied(nn.Module):
    """A shared module, two Linears with one weight, a tied head, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.shared = nn.Linear(32, 32, bias=False)
        self.again = self.shared
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens).mean(1))
        x = self.second(torch.relu(self.first(x)))
        return self.head(self.again(torch.relu(self.shared(x))))


@pytest.fixture
def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


TOKENS = torch.arange(12).reshape(3, 4)


def test_round_trip_is_bit_identical_and_keeps_ties(tied, tmp_path):
    result = mpo.compress(tied, bond_dim=6)
    mpo.save(result, tmp_path / "out")
    skeleton = Tied().eval()
    before = {name: tensor.clone() for name, tensor in skeleton.state_dict().items()}
    loaded = mpo.load(tmp_path / "out", model=skeleton)
    assert torch.equal(loaded(TOKENS), result.model(TOKENS))
    assert isinstance(loaded.first, MPOLinear)
    assert loaded.first.cores[0] is loaded.second.cores[0]
    assert loaded.shared is loaded.again
    assert loaded.head.weight is loaded.embed.weight
    assert isinstance(skeleton.first, nn.Linear), "the skeleton was changed"
    assert all(torch.equal(before[name], t) for name, t in skeleton.state_dict().items())
    assert not loaded.training


@pytest.mark.parametrize("length", range(1, 9))
def test_outputs_do_not_depend_on_where_the_tensors_lie_in_the_file(length, tmp_path):
    torch.manual_seed(0)

    def network():
        last = nn.Sequential()
        last.add_module("x" * length, nn.Linear(1024, 10))  # the name moves all that follows
        return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), last)

    result = mpo.compress(network(), bond_dim=8, layout="svd", include=["0"])
    mpo.save(result, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=network())
    x = torch.ones(1, 64)
    assert torch.equal(loaded(x), result.model(x))


def test_skeleton_may_be_on_meta(tied, tmp_path):
    result = mpo.compress(tied, bond_dim=6)
    mpo.save(result, tmp_path / "out")
    with torch.device("meta"):
        skeleton = Tied().eval()
    loaded = mpo.load(tmp_path / "out", model=skeleton)
    assert torch.equal(loaded(TOKENS), result.model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saved_dtype_wins(dtype, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 30)).to(dtype)
    result = mpo.compress(network, bond_dim=4)
    mpo.save(result, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=nn.Sequential(nn.Linear(24, 30)))
    x = torch.randn(3, 24, dtype=dtype)
    assert loaded(x).dtype == dtype
    assert torch.equal(loaded(x), result.model(x))


def test_each_tensor_is_stored_once_and_nothing_is_pickled(tied, tmp_path):
    result = mpo.compress(tied, bond_dim=6)
    mpo.save(result, tmp_path / "out")
    stored = read_tensors(tmp_path / "out" / saving.CORES_FILE)
    unique = {id(p): p.numel() for p in result.model.parameters()}
    buffers = sum(b.numel() for b in result.model.buffers())
    assert sum(t.numel() for t in stored.values()) == sum(unique.values()) + buffers
    manifest = saving.read_manifest(tmp_path / "out")
    assert manifest.aliases["second.cores.0"] == "first.cores.0"
    report = mpo.CompressionReport.load(tmp_path / "out")
    assert report.totals.parameters.model.compressed == sum(unique.values())
    assert set(report.files) == {saving.CORES_FILE}


def test_densify(tied, tmp_path):
    result = mpo.compress(tied, bond_dim=6)
    mpo.save(result, tmp_path / "out")
    dense = Tied().eval()
    dense.load_state_dict(mpo.densify(tmp_path / "out"))
    torch.testing.assert_close(dense(TOKENS), result.model(TOKENS), **TOL[torch.float32]["apply"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_dense_checkpoints(tied, tmp_path, suffix):
    from mpocompress.api import save_dense
    from mpocompress.loading import load_source

    mpo.save(mpo.compress(tied, bond_dim=6), tmp_path / "out")
    save_dense(tmp_path / "out", tmp_path / f"dense{suffix}")
    source = load_source(tmp_path / f"dense{suffix}")
    assert set(source.state_dict) == set(tied.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", f"dense{suffix}"])
    with pytest.raises(SaveError, match=r"ends in \.safetensors, \.pt or \.pth"):
        save_dense(tmp_path / "out", tmp_path / "dense.bin")


def test_a_plain_module_can_be_saved(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(MPOLinear(12, 20, bond_dim=3), nn.ReLU())
    mpo.save(network, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=nn.Sequential(nn.Linear(12, 20), nn.ReLU()))
    x = torch.randn(2, 12)
    assert torch.equal(loaded(x), network(x))
    assert loaded[0].weight.requires_grad


def test_a_linear_alone(tmp_path):
    layer = nn.Linear(24, 30)
    result = mpo.compress(layer, bond_dim=4)
    mpo.save(result, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=nn.Linear(24, 30))
    x = torch.randn(2, 24)
    assert torch.equal(loaded(x), result.model(x))
    assert set(mpo.densify(tmp_path / "out")) == {"weight", "bias"}


def test_refusals_on_load(tied, tmp_path):
    out = tmp_path / "out"
    mpo.save(mpo.compress(tied, bond_dim=6), out)
    with pytest.raises(LoadError, match=r"there is no file '.*model\.mpo\.safetensors'"):
        mpo.load(tmp_path, model=tied)
    other = Tied()
    other.first = nn.Linear(32, 40)
    with pytest.raises(LoadError, match="'first' is 32x32 in the saved result, but 40x32"):
        mpo.load(out, model=other)
    other.first = nn.Identity()
    with pytest.raises(LoadError, match="has a Identity there instead of an nn.Linear"):
        mpo.load(out, model=other)
    extra = Tied()
    extra.more = nn.Linear(2, 2)
    with pytest.raises(LoadError, match="does not match the saved result.*more.weight"):
        mpo.load(out, model=extra)

    def copy_to(name: str):
        target = tmp_path / name
        shutil.copytree(out, target)
        return target, target / saving.CORES_FILE

    target, file = copy_to("truncated")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LoadError, match=r"\(100 bytes\) is truncated or not a safetensors"):
        mpo.load(target, model=tied)
    target, file = copy_to("foreign")
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(LoadError, match="without our manifest"):
        mpo.load(target, model=tied)
    target, file = copy_to("future")
    manifest = json.loads(saving.read_manifest(out).model_dump_json())
    save_file(
        {"a": torch.ones(2)},
        file,
        metadata={"mpocompress": json.dumps(manifest | {"format_version": 7})},
    )
    with pytest.raises(LoadError, match="format version 7; this release"):
        mpo.load(target, model=tied)
    save_file({"a": torch.ones(2)}, file, metadata={"mpocompress": json.dumps(manifest)})
    with pytest.raises(LoadError, match="it is incomplete"):
        mpo.load(target, model=tied)
    save_file({"a": torch.ones(2)}, file, metadata={"mpocompress": '{"layers": 3}'})
    with pytest.raises(LoadError, match="manifest of .* is malformed: layers"):
        mpo.load(target, model=tied)


def test_existing_output_needs_force_and_foreign_files_survive(tied, tmp_path):
    out = tmp_path / "out"
    result = mpo.compress(tied, bond_dim=6)
    mpo.save(result, out)
    (out / "notes.txt").write_text("mine")
    (out / saving.ONNX_FILE).write_text("stale")
    with pytest.raises(OutputExistsError, match="--force"):
        mpo.save(result, out)
    assert (out / saving.ONNX_FILE).exists()
    mpo.save(result, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / saving.ONNX_FILE).exists(), "a stale ONNX file of another run was left"
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "scratch files were left"


@pytest.mark.parametrize("name", [saving.ONNX_FILE, "report.html"])
def test_files_of_others_are_not_replaced_by_force(tied, tmp_path, name):
    (tmp_path / name).write_text("not ours")
    with pytest.raises(OutputExistsError, match="no run of mpocompress has written it"):
        mpo.save(mpo.compress(tied, bond_dim=6), tmp_path, force=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["not ours"]


def test_what_is_read_is_not_replaced(tied, tmp_path):
    mpo.save(mpo.compress(tied, bond_dim=6), tmp_path / "out")
    cores = tmp_path / "out" / saving.CORES_FILE
    before = cores.read_bytes()
    with (
        pytest.raises(OutputExistsError, match="is what is read"),
        saving.staged_output(tmp_path / "out", force=True, source=cores),
    ):
        pass
    assert cores.read_bytes() == before


def test_the_folder_where_one_is(tied, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mpo.save(mpo.compress(tied, bond_dim=6), ".")
    assert (tmp_path / "here" / saving.CORES_FILE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_an_empty_directory_needs_no_force(tied, tmp_path):
    (tmp_path / "out").mkdir()
    mpo.save(mpo.compress(tied, bond_dim=6), tmp_path / "out")
    assert (tmp_path / "out" / saving.CORES_FILE).exists()


def test_results_have_ordinary_permissions(tied, tmp_path):
    (tmp_path / "plain").write_text("")
    mpo.save(mpo.compress(tied, bond_dim=6), tmp_path / "out")
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}


def test_nothing_is_left_of_a_run_that_fails(tmp_path):
    def fail() -> None:
        with saving.staged_output(tmp_path / "new" / "deep" / "out") as scratch:
            (scratch / "half").write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_outputs(tied, tmp_path):
    (tmp_path / "file").write_text("")
    result = mpo.compress(tied, bond_dim=6)
    with pytest.raises(SaveError, match="is a file; give a directory"):
        mpo.save(result, tmp_path / "file")
    with pytest.raises(SaveError, match="cannot write to"):
        mpo.save(result, tmp_path / "file" / "out")


def test_what_was_trained_from_scratch_is_loaded_into_its_own_architecture(tmp_path):
    def network():
        return nn.Sequential(MPOLinear(16, 32, bond_dim=2), nn.ReLU(), nn.Linear(32, 2))

    torch.manual_seed(0)
    trained = network()
    data = (torch.randn(64, 16), torch.randn(64, 2))
    mpo.train(trained, data, loss="mse", epochs=2, sites="grow", bond_dim=6)
    assert trained[0].bond_dims != (2,)
    mpo.save(trained, tmp_path / "out")
    skeleton = network()
    before = {name: value.clone() for name, value in skeleton.state_dict().items()}
    found = mpo.load(tmp_path / "out", model=skeleton)
    assert found[0].bond_dims == trained[0].bond_dims
    assert torch.equal(found(data[0]), trained(data[0]))
    assert all(torch.equal(before[name], v) for name, v in skeleton.state_dict().items())
    other = nn.Sequential(MPOLinear(16, 30, bond_dim=2), nn.ReLU(), nn.Linear(30, 2))
    with pytest.raises(LoadError, match="'0' is 32x16 in the saved result, but 30x16"):
        mpo.load(tmp_path / "out", model=other)


@pytest.mark.parametrize(
    "buffer", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()], ids=str
)
def test_tensors_that_the_format_does_not_know_are_refused(tmp_path, buffer):
    network = nn.Sequential(MPOLinear(12, 20, bond_dim=3))
    network.register_buffer("odd", buffer)
    with pytest.raises(SaveError, match="state entry 'odd' is torch"):
        mpo.save(network, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"a": 1}

    network = nn.Sequential(MPOLinear(12, 20, bond_dim=3), Extra())
    with pytest.raises(SaveError, match="'1._extra_state' is a dict, not a tensor"):
        mpo.save(network, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
