"""Benchmarks of ONNX files: what is measured is there, alike for all files, and in turns."""

import json
from itertools import pairwise

import onnx
import pytest
import torch
from torch import nn

from mpocompress.cli import main
from mpocompress.errors import DataError, ExportError, LoadError
from mpocompress.export import export_onnx
from mpocompress.export.bench import Spread, bench, interleaved_seconds, probe_session

pytestmark = pytest.mark.onnx


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    for name, width in (("small", 8), ("large", 2048)):
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64))
        export_onnx(model, tmp_path / f"{name}.onnx", torch.randn(2, 64))
    return tmp_path / "small.onnx", tmp_path / "large.onnx"


def test_figures_of_each_file(files):
    found = bench(files, batch_sizes=(16, 1), repeats=3, processes=1)
    small, large = found.files
    assert list(small.latency_seconds) == [1, 16]
    assert small.num_bytes == files[0].stat().st_size
    for file in found.files:
        for spread in (*file.latency_seconds.values(), file.session_start_seconds):
            assert 0 < spread.low <= spread.median <= spread.high
        assert file.latency_seconds[1].repeats == 3
    assert small.latency_seconds[16].median < large.latency_seconds[16].median
    # The larger one keeps 1 MB of weights, if not twice (ONNX Runtime packs them).
    assert large.resident_bytes.median - small.resident_bytes.median > 0.8 * 4 * 2 * 64 * 2040
    json.dumps(found.to_dict())


def test_calls_are_timed_in_turns():
    seen = []
    timings = interleaved_seconds([lambda: seen.append("a"), lambda: seen.append("b")], 4)
    assert [len(seconds) for seconds in timings] == [4, 4]
    turns = [seen[0], *(now for last, now in pairwise(seen) if now != last)]
    # Warm-up of each, then forth and back: what comes last in a round comes first in the next.
    assert "".join(turns) == "abababa"


def test_spread():
    assert Spread.of([3.0]) == Spread(median=3.0, low=3.0, high=3.0, repeats=1)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(
        median=3.0, low=2.0, high=4.0, repeats=5
    )


def test_sequence_length_and_inputs_of_other_names(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids)).mean(1)

    example = torch.randint(0, 50, (2, 9))
    one = export_onnx(Net(), tmp_path / "a.onnx", example).path
    two = export_onnx(Net(), tmp_path / "b.onnx", example, input_names=["tokens"]).path
    found = bench([one, two], batch_sizes=[2], repeats=1, processes=1, sizes={"sequence": 5})
    assert found.sizes == {"sequence": 5}


def test_bytes_are_those_of_all_data_files(files, tmp_path):
    """Optimum calls them model.onnx_data; what merely lies beside does not count."""
    graph = onnx.load(files[1])
    place = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0}
    onnx.save(graph, tmp_path / "model.onnx", **place)
    (tmp_path / "model.onnx.data").write_bytes(b"of an earlier run")
    both = [tmp_path / name for name in ("model.onnx", "model.onnx_data")]
    found = bench(both[:1], batch_sizes=[1], repeats=1, processes=1)
    assert found.files[0].num_bytes == sum(file.stat().st_size for file in both)
    assert found.files[0].num_bytes > 4 * 2 * 64 * 2048


def test_refusals(files, tmp_path):
    with pytest.raises(DataError, match=r"batch sizes \[0\]"):
        bench(files, batch_sizes=[0])
    with pytest.raises(LoadError, match="no such file"):
        bench([tmp_path / "no.onnx"])
    other = export_onnx(nn.Linear(3, 2), tmp_path / "o.onnx", torch.randn(2, 3)).path
    with pytest.raises(DataError, match=r"takes 'input': float32 \(batch, 3\)"):
        bench([files[0], other])
    with pytest.raises(DataError, match="no open size 'sequence'; it has none besides the batch"):
        bench([other], sizes={"sequence": 3})
    with pytest.raises(ExportError, match="process of its own"):
        probe_session(files[0], {"wrong": torch.zeros(1).numpy()})


def test_command_line(files, capsys):
    small, large = map(str, files)
    main_code = _run("bench", small, "--against", large, "--batch", "1,2", "--repeats", "2")
    assert main_code == 0
    out = capsys.readouterr().out
    assert "session start, ms" in out
    assert "batch 2, ms" in out
    assert _run("bench", small, "--batch", "1", "--repeats", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"][0]["latency_seconds"]["1"]["repeats"] == 1
    assert _run("bench", small, "--batch", "one") == 2
    assert "Try --batch 1,16,128" in capsys.readouterr().err
    assert _run("bench", small, "--length", "0") == 2


def _run(*arguments):
    try:
        main(list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0
