"""Shrinkage of second moments of few rows."""

import pytest
import torch

from mpocompress.tuning.statistics.shrinkage import shrinkage_ridge


def sample(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample's second moment, and the true one, of 40 features of different scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    mix *= torch.exp(-torch.arange(40) / 8)[:, None]
    x = torch.randn(rows, 40, generator=generator, dtype=torch.float64) @ mix
    return x.mT @ x / rows, mix.mT @ mix


@pytest.mark.parametrize("rows", [5, 10, 40])
def test_a_shrunk_moment_is_nearer_to_the_true_one(rows):
    gains = []
    for seed in range(10):
        found, true = sample(rows, seed)
        ridge = shrinkage_ridge(found, rows, least=0.0)
        diagonal = found.diagonal().diag()
        shrunk = (found + ridge * diagonal) / (1 + ridge)
        gains.append(float((shrunk - true).norm() / (found - true).norm()))
    assert sum(gains) / len(gains) < 1.0


def test_more_rows_are_trusted_more():
    ridges = [shrinkage_ridge(sample(rows)[0], rows, least=1e-4) for rows in (10, 100, 1000, 10**6)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridges[0] > 0.5
    assert ridges[-1] == 1e-4


def test_units_and_dead_features_do_not_matter():
    found, _ = sample(100)
    units = 10.0 ** torch.linspace(-5, 5, 40).double()
    ridge = shrinkage_ridge(found, 100, least=0.0)
    assert shrinkage_ridge(units[:, None] * found * units, 100, least=0.0) == pytest.approx(ridge)
    with_dead = torch.zeros(50, 50, dtype=torch.float64)
    with_dead[:40, :40] = found
    assert shrinkage_ridge(with_dead, 100, least=0.0) == pytest.approx(ridge)


def test_what_cannot_be_told_has_the_least():
    assert shrinkage_ridge(torch.zeros(3, 3), 5, least=1e-3) == 1e-3
    assert shrinkage_ridge(torch.ones(1, 1), 5, least=1e-3) == 1e-3
    assert shrinkage_ridge(torch.eye(3), 5, least=1e-3) == 1.0  # as the identity as can be
