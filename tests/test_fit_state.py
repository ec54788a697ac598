"""An interrupted run goes on where it stopped, and ends with the same result."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpocompress as mpo
from mpocompress.errors import BudgetError, DataError, LoadError, OutputExistsError, SaveError
from mpocompress.pipeline import Request, convert
from mpocompress.saving import CORES_FILE


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)]
    return nn.Sequential(*layers)


def batches():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(120, 24, generator=generator).split(30))


class InterruptedRunError(Exception):
    """What a signal would be."""


def stop_at(what, step):
    def progress(name, done, total):
        if name == what and done >= step:
            raise InterruptedRunError

    return progress


def stop_after_fits(folder, count):
    def progress(*_):
        if len(fits(folder)) == count:
            raise InterruptedRunError

    return progress


def fits(folder):
    return {file: file.stat().st_mtime_ns for file in folder.glob("layer-*.safetensors")}


def same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def compress(state=None, progress=None, **options):
    options = {"bond_dim": 4, "sites": 2, "data": batches(), **options}
    return mpo.compress(network(), **options, state=state, progress=progress)


def test_layers_that_were_fitted_are_not_fitted_again(tmp_path):
    with pytest.raises(InterruptedRunError):
        compress(tmp_path / "state", stop_after_fits(tmp_path / "state", 2))
    before = fits(tmp_path / "state")
    assert len(before) == 2
    resumed = compress(tmp_path / "state")
    after = fits(tmp_path / "state")
    assert len(after) == 3
    assert {file: after[file] for file in before} == before
    same(resumed.model, compress().model)


@pytest.mark.parametrize(
    "changed",
    [{"bond_dim": 3}, {"data": batches()[:3]}, {"sweeps": 2}, {"exclude": ["0"]}],
    ids=str,
)
def test_another_run_takes_nothing_from_it(changed, tmp_path):
    compress(tmp_path / "state")
    before = fits(tmp_path / "state")
    changed_run = compress(tmp_path / "state", **changed)
    assert not fits(tmp_path / "state").items() <= before.items()
    same(changed_run.model, compress(**changed).model)


def test_other_weights_take_nothing_from_it(tmp_path):
    compress(tmp_path / "state")
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    options = {"bond_dim": 4, "sites": 2, "data": batches()}
    found = mpo.compress(model, **options, state=tmp_path / "state")
    assert len(fits(tmp_path / "state")) == 6
    same(found.model, mpo.compress(model, **options).model)


def test_healing_goes_on_at_its_last_evaluation(tmp_path):
    state = tmp_path / "state"
    with pytest.raises(InterruptedRunError):
        compress(state, stop_at("distillation (model)", 30), distill=50)
    assert (state / "healing.safetensors").exists()
    steps = []
    resumed = compress(
        state,
        lambda name, done, total: steps.append(done) if name.startswith("distillation") else None,
        distill=50,
    )
    assert steps[0] > 20
    same(resumed.model, compress(distill=50).model)


def test_healing_of_other_data_names_them(tmp_path):
    """And not the weights that were fitted to them."""
    with pytest.raises(InterruptedRunError):
        compress(tmp_path / "state", stop_at("distillation (model)", 30), distill=50)
    with pytest.raises(DataError, match="a run with the SHA-256 of the data = "):
        compress(tmp_path / "state", data=[2 * x for x in batches()], distill=50)


def test_a_truncated_fit_is_named(tmp_path):
    compress(tmp_path / "state")
    for file in fits(tmp_path / "state"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(
        LoadError, match=r"layer-[0-9a-f]{32}\.safetensors' is truncated.*Remove it"
    ):
        compress(tmp_path / "state")


def interrupt(model, out, request, *, force=False):
    """A run with `--resume` that ends in the middle of its healing."""
    stop = stop_at("distillation (model)", 30)
    with pytest.raises(InterruptedRunError):
        convert(model, out, request, force=force, resume=True, progress=stop)


class TestCommand:
    """`--resume`, by its function."""

    request = staticmethod(
        lambda data: Request(bond_dim=4, sites=2, data=str(data), distill=50, trust_pickle=True)
    )

    @pytest.fixture
    def files(self, tmp_path):
        from safetensors.torch import save_file

        model, data = tmp_path / "model.pt2", tmp_path / "data.safetensors"
        torch.export.save(torch.export.export(network(), (batches()[0],)), model)
        save_file({"input": torch.cat(batches())}, data)
        return model, data

    def test_the_state_goes_when_the_run_is_done(self, files, tmp_path):
        model, data = files
        out, whole = tmp_path / "out", tmp_path / "whole"
        interrupt(model, out, self.request(data))
        assert not out.exists()
        assert len(fits(tmp_path / "out.state")) == 3
        convert(model, out, self.request(data), resume=True)
        assert not (tmp_path / "out.state").exists()
        convert(model, whole, self.request(data))
        ours, theirs = (load_file(folder / CORES_FILE) for folder in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        with pytest.raises(OutputExistsError, match="--force"):  # of another run, for all we know
            convert(model, out, self.request(data), resume=True)

    def test_what_began_with_force_goes_on_without(self, files, tmp_path):
        model, data = files
        out = tmp_path / "out"
        convert(model, out, Request(bond_dim=4, sites=2, trust_pickle=True))
        interrupt(model, out, self.request(data), force=True)
        report = convert(model, out, self.request(data), resume=True).report
        assert report.settings["distill"]["steps"] == 50

    def test_a_result_that_came_after_is_not_replaced(self, files, tmp_path):
        model, data = files
        out = tmp_path / "out"
        interrupt(model, out, self.request(data))
        convert(model, out, Request(bond_dim=4, sites=2, trust_pickle=True))
        with pytest.raises(OutputExistsError, match="--force"):
            convert(model, out, self.request(data), resume=True)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 1}, "seed = 0, and this one has 1"),
            ({"bond_dim": 5}, "bond_dim = 4, and this one has 5"),
            ({"layout": {"*": "svd"}, "sites": None}, r"layout = 'auto', and this one has {'\*'"),
        ],
    )
    def test_other_arguments_are_named_before_anything_is_fitted(
        self, files, tmp_path, change, named
    ):
        model, data = files
        out = tmp_path / "out"
        interrupt(model, out, self.request(data))
        before = fits(tmp_path / "out.state")
        other = replace(self.request(data), **change)
        with pytest.raises(DataError, match=f"out.state' belongs to a run with {named}"):
            convert(model, out, other, resume=True)
        assert fits(tmp_path / "out.state") == before

    def test_other_data_or_another_form(self, files, tmp_path):
        from safetensors.torch import save_file

        model, data = files
        out = tmp_path / "out"
        interrupt(model, out, self.request(data))
        save_file({"input": 2 * torch.cat(batches())}, tmp_path / "twice.safetensors")
        with pytest.raises(DataError, match="belongs to a run with data = "):
            convert(model, out, self.request(tmp_path / "twice.safetensors"), resume=True)
        data = data.rename(tmp_path / "moved.safetensors")
        convert(model, out, replace(self.request(data), form="dense"), resume=True)

    def test_a_run_that_fails_before_it_has_done_anything_leaves_no_state(self, files, tmp_path):
        model, data = files
        request = Request(ratio=1e9, data=str(data), trust_pickle=True)
        with pytest.raises(BudgetError):
            convert(model, tmp_path / "out", request, resume=True)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["data.safetensors", "model.pt2"]

    def test_a_truncated_record_is_named(self, files, tmp_path):
        model, data = files
        (tmp_path / "out.state").mkdir()
        (tmp_path / "out.state" / "run.json").write_text('{"force": tr')
        with pytest.raises(LoadError, match=r"run\.json' is truncated.*Remove its folder"):
            convert(model, tmp_path / "out", self.request(data), resume=True)

    def test_the_form_belongs_to_a_budget_that_is_measured_on_files(self, files, tmp_path):
        model, data = files
        out = tmp_path / "out"
        request = replace(self.request(data), bond_dim=None, sites=None, max_size="8kB")
        interrupt(model, out, request)
        with pytest.raises(DataError, match="a run with form = 'auto', and this one has 'dense'"):
            convert(model, out, replace(request, form="dense"), resume=True)

    def test_the_state_stays_until_the_result_is_in_its_place(self, files, tmp_path, monkeypatch):
        model, data = files

        def fail(_scratch, _target):
            raise SaveError("the disk is full")

        monkeypatch.setattr("mpocompress.saving.staging._publish", fail)
        with pytest.raises(SaveError, match="disk is full"):
            convert(model, tmp_path / "out", self.request(data), resume=True)
        assert len(fits(tmp_path / "out.state")) == 3

    def test_without_it_nothing_stays(self, files, tmp_path):
        model, data = files
        with pytest.raises(InterruptedRunError):
            convert(model, tmp_path / "out", self.request(data), progress=stop_at("4", 2))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["data.safetensors", "model.pt2"]

    def test_a_graph_has_no_state(self, tmp_path):
        (tmp_path / "model.onnx").write_bytes(b"")
        with pytest.raises(DataError, match="--resume keeps fitted layers"):
            convert(tmp_path / "model.onnx", tmp_path / "out", Request(bond_dim=4), resume=True)


def test_a_weight_that_is_called_again_is_taken_up(tmp_path):
    def compressed(state=None):
        torch.manual_seed(0)
        layer = nn.Linear(24, 24)
        model = nn.Sequential(layer, nn.Tanh(), layer)
        return mpo.compress(model, bond_dim=4, data=batches(), state=state).model

    first = compressed(tmp_path / "state")
    before = fits(tmp_path / "state")
    assert len(before) == 1
    same(compressed(tmp_path / "state"), first)
    assert fits(tmp_path / "state") == before
    same(compressed(), first)
