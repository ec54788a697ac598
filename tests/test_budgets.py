"""Budgets hold for what is written: random models and targets, each measured on its files."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.api.data import calls_of, split_calls
from mpocompress.api.drop_budget import HELD_OUT as DROP_HELD_OUT
from mpocompress.api.error_budget import HELD_OUT as ERROR_HELD_OUT
from mpocompress.errors import BudgetError
from mpocompress.tuning import output_errors, task_score

WIDTHS = (64, 96, 128, 192, 256)
CLASSES = 10


class Case:
    """A random network that does a task, data for it, and its labels."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        sizes = [self.random.choice(WIDTHS) for _ in range(self.random.choice((2, 3, 4)))]
        activation = self.random.choice((nn.Tanh, nn.ReLU, nn.GELU))
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for before, after in zip(sizes, [*sizes[1:], CLASSES], strict=True):
                layers += [nn.Linear(before, after), activation()]
        self.model = nn.Sequential(*layers[:-1]).eval()
        mix = torch.randn(sizes[0], sizes[0], generator=generator)
        mix *= torch.exp(-torch.arange(sizes[0]) / self.random.choice((8, 16, 32)))
        self.inputs = torch.randn(1200, sizes[0], generator=generator) @ mix.T
        with torch.no_grad():
            logits = self.model(self.inputs)
            # Some labels are wrong, as in life, so that the dense model is not perfect.
            self.labels = (logits + 0.1 * torch.randn(logits.shape, generator=generator)).argmax(-1)
        self.dense = sum(p.numel() for p in self.model.parameters())

    def data(self) -> list[dict[str, torch.Tensor]]:
        pairs = zip(self.inputs.split(60), self.labels.split(60), strict=True)
        return [{"input": x, "labels": y} for x, y in pairs]

    def written(self, result: mpo.CompressionResult, folder: Path) -> nn.Module:
        mpo.save(result, folder)
        return mpo.load(folder, model=self.model)

    def one_step(self) -> int:
        """Parameters of one more bond dimension in the largest layer."""
        return max(sum(layer.weight.shape) for layer in self.model if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("seed", range(12))
def test_ratios_hold_on_the_written_file(seed, tmp_path):
    case = Case(seed)
    ratio = case.random.choice((1.3, 1.7, 2.2, 3.1, 4.5))
    gauge = case.random.choice(("none", "identity"))
    data = case.data() if seed % 3 else None
    result = mpo.compress(case.model, ratio=ratio, data=data, gauge=gauge)
    loaded = case.written(result, tmp_path / "out")
    parameters = sum(p.numel() for p in loaded.parameters())
    ceiling = case.dense / ratio
    assert parameters <= ceiling
    # Within 2 %, or within one bond dimension where that is more.
    assert parameters >= min(0.98 * ceiling, ceiling - case.one_step())


@pytest.mark.onnx
@pytest.mark.parametrize("seed", range(20, 28))
def test_sizes_hold_on_the_written_file(seed, tmp_path):
    case = Case(seed)
    size = int(4 * case.dense / case.random.choice((1.5, 2.0, 3.0, 4.0)))
    gauge = case.random.choice(("none", "identity"))
    data = case.data()
    result = mpo.compress(case.model, max_size=size, data=data, gauge=gauge)
    path = tmp_path / "model.onnx"
    mpo.export_onnx(result.model, path, case.inputs[:2])
    written = path.stat().st_size
    assert written <= size
    assert written >= min(0.98 * size, size - 4 * case.one_step())
    assert result.report.budget is not None
    assert result.report.budget.reached == written


@pytest.mark.parametrize("seed", range(40, 52))
def test_errors_hold_on_the_written_file(seed, tmp_path):
    case = Case(seed)
    limit = case.random.choice((0.05, 0.1, 0.2, 0.4))
    try:
        result = mpo.compress(case.model, max_error=limit, data=case.data(), seed=seed)
    except BudgetError as error:
        assert "the least that was found is" in str(error)
        reached = float(str(error).split("found is ")[1].split(". ")[0])
        assert reached > limit
        return
    loaded = case.written(result, tmp_path / "out")
    names = [layer.name for layer in result.plan.compressed]
    _, held = split_calls(calls_of(case.data(), case.model), ERROR_HELD_OUT, seed=seed)
    errors = output_errors(case.model, loaded, names, held)
    assert set(errors.layers) == set(names)
    assert errors.largest <= limit
    assert result.report.budget is not None
    assert result.report.budget.reached == pytest.approx(errors.largest, rel=1e-6)
    # Fitted on none of it: rows of the same kind that no part of the run has seen.
    fresh = Case(seed).inputs.roll(1, 0) @ torch.eye(case.inputs.shape[1])
    assert output_errors(case.model, loaded, names, calls_of([fresh], case.model)).model < 1.3 * (
        limit
    )


@pytest.mark.parametrize("seed", range(60, 70))
def test_drops_hold_on_the_written_file(seed, tmp_path):
    case = Case(seed)
    limit = case.random.choice((0.01, 0.03, 0.1))
    try:
        result = mpo.compress(case.model, max_drop=limit, data=case.data(), seed=seed)
    except BudgetError as error:
        assert f"a drop of at most {limit:g}" in str(error)
        return
    loaded = case.written(result, tmp_path / "out")
    _, _, final = split_calls(calls_of(case.data(), case.model), DROP_HELD_OUT, seed=seed)
    drop = task_score(case.model, final).value - task_score(loaded, final).value
    assert drop <= limit
    assert result.report.budget is not None
    assert result.report.budget.reached == pytest.approx(drop)
    assert sum(p.numel() for p in loaded.parameters()) < case.dense
