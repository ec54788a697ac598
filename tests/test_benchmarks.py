"""The benchmarks run, say how they were run, and judge their claims by the numbers."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tensorly
import torch

from tests.tolerances import TOL

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def decomposition(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("decomposition")


def run_decomposition(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "decomposition.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.minilm
def test_a_real_weight_is_measured_and_written_with_how(tmp_path):
    out = tmp_path / "decomposition.json"
    arguments = ("--quick", "--only", "query/svd", "--threads", "1", "--seed", "3", "--out", out)
    finished = run_decomposition(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert "the claim was not checked" in finished.stdout
    written = json.loads(out.read_text())
    assert "50x faster than TensorLy" in written["claim"]
    facts = written["environment"]
    assert facts["seed"] == 3
    assert facts["threads"] == 1
    assert facts["versions"]["tensorly"]
    assert facts["command"].startswith("python benchmarks/decomposition.py --quick --only")
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == [
        "ours",
        "tensorly",
        "tensorly randomized",
        "torch.linalg.svd",
        "torch.svd_lowrank",
    ]
    for row in rows.values():
        assert row["seconds"]["repeats"] == 5
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["peak_memory_bytes"] > 0
    # No method is better than the least error; full SVDs reach it.
    tolerance = TOL[torch.float32]["dense"]["rtol"]
    assert all(row["error_over_least"] >= 1 - tolerance for row in rows.values())
    for method in ("ours", "tensorly", "torch.linalg.svd"):
        assert math.isclose(rows[method]["error_over_least"], 1, rel_tol=tolerance)


def test_a_name_that_matches_no_case_is_refused():
    finished = run_decomposition("--only", "resnet")
    assert finished.returncode == 2
    assert "--only 'resnet' matches no case; there are: query/svd" in finished.stderr


@pytest.mark.parametrize("spectrum", ["flat", "polynomial", "exponential"])
@pytest.mark.parametrize("layout", ["64x1,1x64", "8x8,8x8"])
def test_the_least_error_is_that_of_the_full_svd(decomposition, spectrum, layout):
    case = decomposition.Case("64/any", layout, 6, spectrum)
    matrix, least_error = decomposition.build(case, seed=0)
    tolerance = TOL[torch.float32]["dense"]
    for method in ("ours", "tensorly", "torch.linalg.svd"):
        cores = decomposition.METHODS[method](matrix, case.sites, case.bond_dim, 0)
        dense = decomposition.MPO(cores).to_dense()
        error = float((dense - matrix).norm() / matrix.norm())
        assert math.isclose(error, least_error, rel_tol=tolerance["rtol"]), method
    if spectrum != "flat":
        values = torch.tensor([decomposition.SPECTRA[spectrum](k) for k in range(1, 65)])
        unfolding = case.sites.split(matrix)
        torch.testing.assert_close(torch.linalg.svdvals(unfolding), values, **tolerance)


def test_tensorly_keeps_the_backend_that_it_had(decomposition):
    case = decomposition.Case("16/any", "4x4,4x4", 3, "flat")
    matrix, _ = decomposition.build(case, seed=0)
    with tensorly.backend_context("numpy"):
        decomposition.METHODS["tensorly"](matrix, case.sites, case.bond_dim, 0)
        assert tensorly.get_backend() == "numpy"


@pytest.mark.parametrize(
    ("seconds_of_tensorly", "error", "held"),
    [(60.0, 1.005, (True, True)), (40.0, 1.005, (False, True)), (60.0, 1.02, (True, False))],
)
def test_claims_are_judged_by_the_numbers(decomposition, capsys, seconds_of_tensorly, error, held):
    def measured(method, seconds):
        return decomposition.Measured(
            case="4096-flat/svd",
            layout="4096x1,1x4096",
            bond_dim=64,
            method=method,
            relative_error=0.9 * error,
            least_error=0.9,
            least_error_is="exact",
            peak_memory_bytes=1,
            first_seconds=seconds,
            seconds=[seconds],
        )

    results = [measured("ours", 1.0), measured("tensorly", seconds_of_tensorly)]
    (claim,) = decomposition.claims(decomposition.as_rows(results))
    assert (claim["speedup_held"], claim["error_held"]) == held
    decomposition.print_claims([claim])
    assert ("DID NOT HOLD" in capsys.readouterr().out) == (held != (True, True))


def test_sentences_are_read_split_and_compared(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    sentences = importlib.import_module("sentences")
    long = [
        f"sentence number {k} is long enough to be read, with its\nline folded" for k in range(9)
    ]
    (tmp_path / "topic").write_text("\n%\n".join([*long, long[0], "too short"]), encoding="utf-8")
    (tmp_path / "topic.dat").write_bytes(b"\0" * 80)
    found = sentences.read_sentences(tmp_path)
    assert found == [" ".join(text.split()) for text in long]
    first, second = sentences.split_sentences(found, [4, 5], seed=1)
    assert sorted(first + second) == sorted(found)
    assert sentences.split_sentences(found, [4, 5], seed=1) == [first, second]
    with pytest.raises(SystemExit, match="20 sentences are needed, there are 9"):
        sentences.split_sentences(found, [20], seed=1)
    with pytest.raises(SystemExit, match="install the fortunes package"):
        sentences.read_sentences(tmp_path / "none")
    dense = torch.nn.functional.normalize(torch.randn(30, 8), dim=1)
    assert sentences.fidelity(dense, dense) == pytest.approx((1.0, 1.0))
    turned = dense @ torch.linalg.qr(torch.randn(8, 8)).Q  # all similarities stay
    cosine, spearman = sentences.fidelity(turned, dense)
    assert cosine < 0.99
    assert spearman == pytest.approx(1.0, abs=TOL[torch.float32]["apply"]["atol"])


def test_quantized_twin_has_the_bytes_and_the_error_of_its_bits(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality = importlib.import_module("minilm_quality")
    model = torch.nn.Sequential()
    model.add_module("encoder", torch.nn.Sequential(torch.nn.Linear(64, 32)))
    for bits, block, ratio in ((8, None, 32 * 64 * 4 / (32 * 64 + 32 * 4)), (4, 32, 64 / 9)):
        result, reached = quality.quantized(model, bits, block)
        assert reached == pytest.approx(ratio)
        weight, rounded = model.encoder[0].weight, result.encoder[0].weight
        step = weight.abs().max() / (2 ** (bits - 1) - 1)
        assert (
            0
            < float((weight - rounded).abs().max())
            <= float(step) / 2 * (1 + TOL[torch.float32]["dense"]["rtol"])
        )
        assert rounded is not weight


@pytest.fixture
def expressive_power(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("expressive_power")


def test_entropies_of_networks_beside_their_references(expressive_power, monkeypatch, capsys):
    monkeypatch.setattr(expressive_power, "SPINS", 6)
    monkeypatch.setattr(expressive_power, "BONDS", (1, 4))
    monkeypatch.setattr(expressive_power, "DEPTHS", (1, 4))
    entropies = expressive_power.measure_entropies(seeds=3, seed=0)
    references = expressive_power.measure_references(seeds=3, seed=0)
    assert len(entropies) == 2 * 2 * 2
    assert all(0 <= row["entropy_nats"] <= 3 * math.log(2) for row in entropies)
    product, chain, haar = references
    assert product["entropy_nats"] < 1e-9
    assert chain["entropy_nats"] <= math.log(4)
    assert haar["entropy_nats"] > chain["entropy_nats"]
    expressive_power.print_entropies(entropies, references)
    assert "product state 0; Haar-random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("deep", "error", "held"),
    [
        (2.0, 1e-4, [True, True, True]),
        (1.05, 1e-4, [False, True, True]),
        (0.5, 2e-3, [False, False, False]),
        (2.0, -1e-4, [True, True, False]),
    ],
)
def test_expressive_power_is_judged_by_the_numbers(expressive_power, deep, error, held):
    def row(entropy, **fields):
        return {"entropy_nats": entropy, "standard_error": 0.1, **fields}

    entropies = [
        row(deep if depth == 4 else 1.0, gain=8.0, depth=depth, bond_dim=bond)
        for depth in (1, 4)
        for bond in expressive_power.BONDS
    ]
    chains = [row(0.5, state="MPS", bond_dim=bond) for bond in expressive_power.BONDS]
    found = expressive_power.claims(entropies, chains, [{"absolute_error": error}])
    assert list(found.values()) == held


def test_expressive_power_needs_a_spread():
    finished = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "expressive_power.py", "--seeds", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 2
    assert "--seeds 1: a spread needs at least 2" in finished.stderr
