"""Batches from files, functions and Python objects."""

import itertools
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpocompress.errors import DataError, LoadError
from mpocompress.loading import Batch, as_batch, as_batches, load_batches


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_npz_is_cut_into_batches_that_can_be_read_again(folder):
    x, mask = np.arange(70.0).reshape(70, 1), np.ones((70, 2), dtype=np.int64)
    np.savez("data.npz", x, mask=mask, labels=np.arange(70))
    batches = load_batches("data.npz")
    assert len(batches) == 3
    for _ in range(2):
        seen = list(batches)
        assert [batch.num_rows for batch in seen] == [32, 32, 6]
        assert torch.equal(torch.cat([b.args[0] for b in seen]), torch.from_numpy(x))
        assert [list(batch.kwargs) for batch in seen] == [["mask"]] * 3
        assert torch.equal(torch.cat([b.labels for b in seen]), torch.arange(70))


def test_positional_arrays_keep_their_order(folder):
    arrays = [np.full((2, 1), i, dtype=np.float32) for i in range(12)]
    np.savez("data.npz", *arrays)
    (batch,) = load_batches("data.npz")
    assert [int(arg[0, 0]) for arg in batch.args] == list(range(12))
    assert batch.kwargs == {}


def test_safetensors_are_read_the_same_way(folder):
    save_file(
        {"input_ids": torch.ones(5, 3, dtype=torch.int64), "y": torch.ones(5)}, "d.safetensors"
    )
    (batch,) = load_batches("d.safetensors", batch_size=8)
    assert batch.kwargs["input_ids"].shape == (5, 3)
    assert torch.equal(batch.labels, torch.ones(5))


@pytest.mark.parametrize(("limit", "rows"), [(1, [1]), (8, [8]), (9, [8, 1]), (99, [8, 8, 4])])
def test_limit_of_a_file_is_exact(limit, rows, folder):
    np.savez("data.npz", np.ones((20, 3)))
    batches = load_batches("data.npz", batch_size=8, limit=limit)
    assert [batch.num_rows for batch in batches] == rows
    assert len(batches) == len(rows)


def test_other_byte_orders_and_read_only_arrays(folder):
    array = np.arange(4, dtype=">f4").reshape(2, 2)
    array.flags.writeable = False
    assert torch.equal(as_batch(array).args[0], torch.arange(4.0).reshape(2, 2))


def test_function_is_called_for_each_pass(folder):
    (folder / "data_fn.py").write_text(
        "import torch\n"
        "calls = []\n"
        "def batches():\n"
        "    calls.append(1)\n"
        "    import data_fn_later\n"
        "    for i in range(4):\n"
        "        yield {'x': torch.full((3, 2), float(i)), 'labels': torch.ones(3)}\n"
        "listed = [torch.ones(2, 2), (torch.ones(1, 2), torch.ones(1, 1))]\n"
    )
    (folder / "data_fn_later.py").write_text("")
    path = list(sys.path)
    batches = load_batches("data_fn:batches", limit=7)
    for _ in range(2):
        assert [float(batch.kwargs["x"][0, 0]) for batch in batches] == [0.0, 1.0, 2.0]
    assert len(sys.modules["data_fn"].calls) == 2
    assert sys.path == path
    with pytest.raises(TypeError, match="number of batches is not known"):
        len(batches)
    listed = load_batches("data_fn:listed")
    assert len(listed) == 2
    assert [len(batch.args) for batch in listed] == [1, 2]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(): return 1 / 0", "data_bad:f raised ZeroDivisionError: division by zero"),
        ("def f():\n    yield [torch.ones(1)]\n    1 / 0", "raised ZeroDivisionError"),
        ("def f(): return 3", "gave an object of type int; needed is an iterable of batches"),
        (
            "def f(): return torch.ones(3, 2)",
            "gave an object of type Tensor; needed is an iterable of batches",
        ),
        ("def f(): return []", "there are no batches in it"),
        ("def f(): return ['text']", "data_bad:f, batch 0 is of type str"),
        ("def f(needed): return []", "raised TypeError: .*needed"),
    ],
)
def test_function_that_gives_no_batches(code, message, folder):
    (folder / "data_bad.py").write_text(f"import torch\n{code}\n")
    with pytest.raises(DataError, match=message):
        list(load_batches("data_bad:f"))


def test_function_that_cannot_be_imported(folder):
    with pytest.raises(LoadError, match=r"--data no_such_data_module:f: there is no module"):
        load_batches("no_such_data_module:f")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data.csv", r"neither a \.npz nor a \.safetensors file nor MODULE:FUNCTION"),
        ("data.npy", r"Wrap a single array with numpy\.savez"),
        ("just words", "neither"),
    ],
)
def test_unknown_kinds_of_data(spec, message, folder):
    with pytest.raises(DataError, match=message):
        load_batches(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", r"is empty \(0 bytes\)"),
        (b"text", "cannot be read as .npz"),
        (b"PK\x03\x04 and no more", "cannot be read as .npz"),
        (b"\x80\x04N.", "cannot be read as .npz"),
    ],
)
def test_unreadable_npz(content, message, folder):
    if content is not None:
        (folder / "data.npz").write_bytes(content)
    with pytest.raises(LoadError, match=f"data.npz.*{message}"):
        load_batches("data.npz")


def test_damaged_npz(folder):
    np.savez_compressed("data.npz", x=np.random.default_rng(0).normal(size=(50, 5)))
    content = (folder / "data.npz").read_bytes()
    (folder / "data.npz").write_bytes(content[:-200])
    with pytest.raises(LoadError, match=r"data\.npz"):
        load_batches("data.npz")
    (folder / "data.npz").write_bytes(content[:500] + bytes(40) + content[540:])
    with pytest.raises(LoadError, match="array 'x' cannot be read"):
        load_batches("data.npz")
    with (folder / "data.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(LoadError, match="holds a single array"):
        load_batches("data.npz")


class Evil:
    def __reduce__(self):
        return exec, ("open('was_here', 'w')",)


def test_object_arrays_are_never_unpickled(folder):
    np.savez("data.npz", x=np.array([Evil(), None], dtype=object))
    with pytest.raises(
        DataError, match="array 'x' holds Python objects, which are never unpickled"
    ):
        load_batches("data.npz")
    assert not (folder / "was_here").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 2)), "m": np.ones((4, 2))}, r"same first dim.*x \(3, 2\), m \(4, 2\)"),
        ({"x": np.ones((3, 2)), "s": np.float32(1)}, r"same first dimension.*s \(\)"),
        ({"x": np.array(["a", "b"])}, "'x' has dtype <U1"),
        ({"x": np.ones(2, dtype=np.complex64)}, "'x' has dtype complex64"),
        ({"x": np.ones(2, dtype=np.longdouble)}, "'x' has dtype"),
        ({"x": np.ones((0, 4))}, r"'x' has shape \(0, 4\): there is nothing in it"),
        ({"x": np.array([[1.0, np.nan]])}, "'x' has 1 entries that are NaN or Inf, of 2"),
        ({"x": np.array([[np.inf, np.nan]])}, "'x' has 2 entries"),
        ({"y": np.ones(3)}, "holds no inputs: y"),
        ({"x": np.ones(3), "y": np.ones(3), "labels": np.ones(3)}, "has both 'labels' and 'y'"),
        ({"arr_0": np.ones(3), "arr_2": np.ones(3)}, r"numbered \[0, 2\]"),
    ],
)
def test_arrays_that_are_no_inputs(arrays, message, folder):
    np.savez("data.npz", **arrays)
    with pytest.raises(DataError, match=rf"data\.npz.*{message}"):
        load_batches("data.npz")


@pytest.mark.parametrize("option", ["batch_size", "limit"])
def test_sizes_below_one(option, folder):
    np.savez("data.npz", np.ones((2, 2)))
    with pytest.raises(DataError, match="at least 1 is needed"):
        load_batches("data.npz", **{option: 0})


def test_forms_of_a_python_batch():
    x, y = torch.ones(2, 3), torch.zeros(2)
    assert as_batch(x).args == (x,)
    assert as_batch((x, y)).args == (x, y)
    assert as_batch([x.numpy(), y]).args[1] is y
    named = as_batch({"input": x, "labels": y})
    assert (list(named.kwargs), named.labels is y, named.num_rows) == (["input"], True, 2)
    assert as_batch(named) is named
    mask = torch.zeros(2, 2).fill_(-torch.inf)
    assert as_batch((x, mask)).args[1] is mask


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "batch is of type int; a batch is a tensor"),
        ("text", "batch is of type str"),
        (None, "batch is of type NoneType"),
        (("text",), "'argument 0' is of type str"),
        ({"x": None}, "'x' is of type NoneType"),
        ((), "no input with a batch dimension"),
        (torch.tensor(1.0), "no input with a batch dimension"),
        ({"labels": torch.ones(2)}, "no input with a batch dimension"),
        (torch.tensor([[torch.nan]]), "'argument 0' has 1 entries"),
        (torch.ones(2, dtype=torch.complex64), "'argument 0' is complex"),
        ({"x": torch.ones(2, 1), "labels": torch.ones(3)}, r"labels have shape \(3,\).*2 rows"),
    ],
)
def test_python_batches_that_are_refused(value, message):
    with pytest.raises(DataError, match=message):
        as_batch(value)


def test_python_data_in_any_iterable():
    rows = torch.arange(12.0).reshape(6, 2)
    dataset = torch.utils.data.TensorDataset(rows)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    for data in (loader, [rows[:4], rows[4:]], lambda: iter([rows[:4], rows[4:]])):
        batches = as_batches(data)
        for _ in range(2):
            assert torch.equal(torch.cat([batch.args[0] for batch in batches]), rows)
    assert len(as_batches([rows, rows])) == 2
    assert as_batches(batches) is batches
    assert sum(1 for _ in as_batches(itertools.repeat(rows), limit=13)) == 3
    assert sum(1 for _ in as_batches(as_batches([rows] * 5), limit=7)) == 2


def test_iterator_gives_one_pass_only():
    batches = as_batches(iter([torch.ones(1, 1)]))
    assert len(list(batches)) == 1
    with pytest.raises(DataError, match="can be read only once"):
        list(batches)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(3, 2), r"data is one Tensor.*data=\[batch\]"),
        ({"x": torch.ones(3, 2)}, "data is one dict"),
        (Batch((torch.ones(1),)), "data is one Batch"),
        ("data.npz", r"data is of type str.*load_batches"),
        (3, "data is of type int"),
    ],
)
def test_data_that_is_no_iterable_of_batches(data, message):
    with pytest.raises(DataError, match=message):
        as_batches(data)


def test_cast_touches_floating_inputs_only():
    batch = Batch(
        (torch.ones(2, 2, dtype=torch.float64),),
        {"ids": torch.ones(2, dtype=torch.int64)},
        torch.ones(2, dtype=torch.float64),
    )
    for cast in (batch.cast(torch.float32), next(iter(as_batches([batch]).cast(torch.float32)))):
        assert cast.args[0].dtype == torch.float32
        assert cast.kwargs["ids"].dtype == torch.int64
        assert cast.labels.dtype == torch.float64
