"""Models as users have them: what they take, whether rows stand for themselves, what they keep."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpocompress as mpo
from mpocompress.api.calling import check_calls, with_whole_batches
from mpocompress.api.data import calls_of, split_calls
from mpocompress.cli import main
from mpocompress.errors import DataError, LoadError
from mpocompress.loading import Batch


def net(outputs: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, outputs))


def rows(count: int = 100, features: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


class Graph(nn.Module):
    """Nodes, of which each sees its neighbours: a row of a batch is no example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(torch.relu(adjacency @ self.first(x)))


class TimeFirst(nn.Module):
    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 32), nn.Linear(32, 4)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(x)
        return self.head(states[-1] if self.last else states)


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(0, 1)


class Masked(Graph):
    """A graph whose outputs have a column of -inf, as masked logits do."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        found = super().forward(x, adjacency)
        return torch.cat([found, torch.full_like(found[:, :1], -torch.inf)], 1)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 32, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[1]  # (layers, batch, features)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        found = self.net(x)
        return found @ found.mT


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([(rows(), torch.zeros(100).long())], r"argument 1 of shape \(100,\), int64"),
        ([{"foo": rows()}], "foo of shape"),
        ([rows(features=31)], r"shape \(100, 31\), float32"),
        ([rows().long()], "int64"),
    ],
    ids=["labels without a name", "a wrong name", "features", "dtype"],
)
def test_batches_that_forward_does_not_take_are_refused(data, why):
    model = net()
    small = mpo.compress(model, bond_dim=4)
    for refuses in (
        lambda: mpo.plan(model, ratio=3, data=data),
        lambda: mpo.compress(model, ratio=3, data=data),
        lambda: mpo.compress(model, bond_dim=4, data=data),
        lambda: mpo.distill(small, reference=model, data=data, steps=3),
    ):
        with pytest.raises(DataError, match=f"does not take the first batch .*{why}") as refused:
            refuses()
        assert "as in {'input': x, 'labels': y}" in str(refused.value)


@pytest.mark.parametrize(
    ("later", "why"),
    [
        ([rows(), rows(features=31), rows()], r"batch 1, .*\(100, 31\), float32"),
        ([rows(), rows(), rows(features=33)], r"batch 2, .*\(100, 33\), float32"),
        ([rows(), (rows(), rows())], r"batch 1, .*argument 1 of shape"),
        ([rows(), rows().long()], r"batch 1, .*int64"),
    ],
    ids=["fewer features", "more features", "arguments", "dtype"],
)
def test_later_batches_that_forward_does_not_take_are_refused(later, why):
    model = net()
    with pytest.raises(DataError, match=f"does not take {why}"):
        mpo.compress(model, bond_dim=4, data=later)


def test_a_compiled_model_is_taken_as_the_module_that_it_wraps(tmp_path):
    compiled = torch.compile(net(), backend="eager")
    result = mpo.compress(compiled, bond_dim=4, include=["0"], data=[rows()])
    assert [layer.name for layer in result.plan.compressed] == ["0"]
    mpo.distill(result, reference=compiled, data=[rows()], steps=2)
    mpo.sweep(result, reference=compiled, data=[rows()], sweeps=1)
    mpo.save(torch.compile(result.model, backend="eager"), tmp_path / "out")
    for skeleton in (net(), compiled):
        again = mpo.load(tmp_path / "out", model=skeleton)
        assert torch.equal(again(rows()), result.model(rows()))


def test_lazy_layers_have_to_know_their_inputs():
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 5))
    with pytest.raises(DataError, match=r"'0\.weight' of Sequential has no shape yet"):
        mpo.compress(model, bond_dim=4, data=[rows()])
    model(rows())
    assert mpo.compress(model, bond_dim=4, data=[rows()]).plan.compressed


def test_of_sentences_the_shortest_and_the_longest_are_tried():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.seen = []

        def forward(self, x):
            self.seen.append(x.shape)
            return self.net(x)

    model = Lengths()
    calls = [Batch(args=(torch.randn(9, length, 32),)) for length in (5, 3, 8, 6, 3, 8)]
    check_calls(model, calls)
    assert model.seen == [(4, 5, 32), (4, 3, 32), (4, 8, 32)]


def test_data_for_a_state_dict_is_refused(tmp_path, capsys):
    torch.save(net().state_dict(), tmp_path / "state.pt")
    (tmp_path / "data.npz").touch()
    given = [str(tmp_path / "state.pt"), "--bond-dim", "4", "--data", str(tmp_path / "data.npz")]
    for option in (["-o", str(tmp_path / "out")], ["--dry-run"]):
        with pytest.raises(SystemExit) as stopped:
            main([*given, *option])
        assert stopped.value.code == 2
        assert "--model MODULE:FACTORY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "batch", "divisible"),
    [
        (net(), Batch((rows(),)), True),
        (Noisy(), Batch((rows(),)), True),
        (Graph(), Batch((rows(), torch.softmax(rows(100, 100), 1))), False),
        (TimeFirst(last=False), Batch((torch.randn(140, 6, 8),)), False),
        (TimeFirst(last=True), Batch((torch.randn(140, 6, 8),)), False),
        (Masked(), Batch((rows(), torch.softmax(rows(100, 100), 1))), False),
        (Flattened(), Batch((torch.randn(100, 7, 32),)), True),
        (LastState(), Batch((torch.randn(100, 7, 8),)), True),
        (LastState(), Batch((torch.randn(2, 7, 8),)), True),
        (Pairs(), Batch((rows(),)), True),
    ],
    ids=[
        *("rows", "random", "graph", "time first", "last time"),
        *("with -inf", "flattened", "layers first", "as many rows as layers", "pairs"),
    ],
)
def test_rows_are_taken_apart_where_they_stand_for_themselves(model, batch, divisible):
    (found,) = with_whole_batches(model.eval(), [batch])
    assert found.divisible == divisible


def test_too_little_memory_says_nothing_of_the_rows():
    class Full(nn.Module):
        def __init__(self, rows_that_fit: int) -> None:
            super().__init__()
            self.rows_that_fit = rows_that_fit
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < self.rows_that_fit:  # as when others take the memory meanwhile
                raise torch.OutOfMemoryError("out of memory")
            return self.net(x)

    batch = Batch((rows(),))
    for looked_at in (check_calls, with_whole_batches):
        with pytest.raises(torch.OutOfMemoryError):
            looked_at(Full(rows_that_fit=100), [batch])


def test_a_graph_is_healed_as_a_whole():
    torch.manual_seed(0)
    model = Graph()
    batch = (rows(300), torch.softmax(3 * rows(300, 300), 1))
    result = mpo.compress(model, bond_dim=6, include=["first"], data=[batch])
    found = mpo.distill(result, reference=model, data=[batch], steps=30)
    assert found.end_loss < found.start_loss
    with pytest.raises(DataError, match="cannot be taken apart"):
        mpo.compress(model, max_error=0.5, data=[batch])


def test_whole_batches_are_not_split():
    calls = [Batch((rows(40, seed=k),), divisible=False) for k in range(10)]
    parts = split_calls(calls, (0.2, 0.1), seed=0)
    assert [len(part) for part in parts] == [7, 2, 1]
    assert {id(call) for part in parts for call in part} == {id(call) for call in calls}


def test_inference_mode_changes_nothing():
    model = net()
    with torch.inference_mode():
        data = [rows(seed=k) for k in range(4)]
        found = mpo.compress(model, ratio=2, data=data, distill=10)
    plain = mpo.compress(model, ratio=2, data=[rows(seed=k) for k in range(4)], distill=10)
    assert torch.equal(found.model(rows()), plain.model(rows()))
    assert calls_of(data, model)[0].args[0].is_inference() is False


def test_a_forward_without_gradients_is_told_of():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Frozen()
    with pytest.warns(UserWarning, match="all count the same"):
        result = mpo.compress(model, ratio=2, data=[rows()])
    with pytest.raises(DataError, match="no gradient reaches"):
        mpo.distill(result, reference=model, data=[rows()], steps=5)


def test_buffers_that_forward_writes_stay_what_they_were():
    class Counting(nn.Module):
        calls: Tensor
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("calls", torch.tensor(7))
            self.register_buffer("seen", torch.zeros(32))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.seen + x.detach().sum(0)
            return self.net(x)

    model = Counting()
    result = mpo.compress(model, ratio=2, data=[rows()], distill=5)
    mpo.distill(result, reference=model, data=[rows()], steps=5)
    for found in (model, result.model):
        assert int(found.calls) == 7
        assert not found.seen.any()


def test_buffers_made_or_resized_in_forward_go_again():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("cache", None)
            self.register_buffer("grown", torch.zeros(1))
            self.register_buffer("wide", torch.zeros(1).expand(4))

        def forward(self, x: Tensor) -> Tensor:
            self.cache = torch.zeros(len(x))
            self.register_buffer("new", torch.zeros(len(x)))
            self.grown.resize_(len(x))
            self.wide.data = self.wide + 1
            return self.net(x)

    model = Lazy()
    mpo.compress(model, ratio=2, data=[rows()])
    assert model.cache is None
    assert not hasattr(model, "new")
    assert model.grown.shape == (1,)


def test_scripted_parts_are_left_alone():
    scripted = torch.jit.script(nn.BatchNorm1d(64))
    model = nn.Sequential(nn.Linear(32, 64), scripted, nn.Linear(64, 5)).eval()
    result = mpo.compress(model, bond_dim=8, data=[rows()])
    assert len(result.report.compressed_layers) == 1


def test_autocast_of_the_caller_changes_nothing():
    model, data = net(), [rows(64, 32, seed=seed) for seed in range(4)]

    def tuned() -> list[Tensor]:
        found = mpo.compress(model, data=data, ratio=2).model
        mpo.sweep(found, reference=model, data=data, sweeps=1)
        mpo.distill(found, reference=model, data=data, steps=2)
        return [parameter.detach() for parameter in found.parameters()]

    expected = tuned()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, tuned(), expected))


def test_models_and_labels_of_inference_mode():
    with torch.inference_mode():
        made = net()
        labels = torch.zeros(100, dtype=torch.long)
    with pytest.raises(DataError, match="made under torch.inference_mode"):
        mpo.compress(made, ratio=2, data=[rows()])
    (call,) = calls_of([{"input": rows(), "labels": labels}], net())
    assert call.labels is not None
    assert not call.labels.is_inference()


@pytest.mark.parametrize("given", ["model.pt", Path("model.pt"), {"weight": 1}], ids=str)
def test_what_is_no_model_is_refused_with_what_to_do(given, tmp_path):
    calls = [
        lambda: mpo.plan(given, bond_dim=4),
        lambda: mpo.compress(given, bond_dim=4),
        lambda: mpo.save(given, tmp_path / "out"),
        lambda: mpo.load(tmp_path, model=given),
    ]
    for call in calls:
        with pytest.raises(LoadError, match="a model is an nn.Module, and this is .*torch.load"):
            call()
    assert list(tmp_path.iterdir()) == []
