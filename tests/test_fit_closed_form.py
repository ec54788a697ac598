"""The closed form for layouts with all outs on one site and all ins on the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mpocompress.errors import DecompositionError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.fit import fit
from mpocompress.mpo.metric import Metric
from tests.fit_problems import fits, moment, objective
from tests.planted import LAWS, gaussian
from tests.tolerances import TOL

F64 = TOL[torch.float64]


def mirrored(out, in_):
    return Layout((1, out), (in_, 1))


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_the_fit_does_not_depend_on_the_units_of_a_few_inputs():
    target, c = gaussian(8, 6, seed=0), moment(6, seed=1)
    units = torch.ones(6, dtype=torch.float64)
    units[c.diagonal().argsort()[-2:]] = torch.tensor([1e4, 1e2]).double()
    plain = fit(target, Metric(c), Layout.svd(8, 6), 3).mpo.to_dense()
    scaled = fit(target / units, Metric(units[:, None] * c * units), Layout.svd(8, 6), 3)
    assert_close(scaled.mpo.to_dense() * units, plain, rtol=1e-8, atol=1e-8)


@LAWS
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.sampled_from([Layout.svd, mirrored]))
def test_error_is_the_tail_of_the_whitened_spectrum(data, out, in_, make):
    layout = make(out, in_)
    target, c, g = data.draw(fits(Layout((out,), (in_,))))
    metric = Metric(c, g, ridge=1e-3, output_ridge=1e-2)
    c, g = metric.ridged_input_II, metric.ridged_output_OO
    whitened = target @ root(c) if g is None else root(g) @ target @ root(c)
    values = torch.linalg.svdvals(whitened)
    bond = data.draw(st.integers(1, min(out, in_)))
    result = fit(target, metric, layout, bond)
    tail = float(values[bond:].square().sum()) / float(values.square().sum())
    dense = result.mpo.to_dense()
    measured = objective(target, dense, c, g) / float(values.square().sum())
    assert_close(measured, tail, **F64["dense"])
    assert_close(result.objective, objective(target, dense, c, g), **F64["dense"])
    assert_close(result.relative_error**2, tail, **F64["dense"])
    assert result.mpo.layout == layout
    assert [record.kind for record in result.history] == ["closed form"]
    assert result.converged


@pytest.mark.parametrize("make", [Layout.svd, mirrored], ids=["svd", "mirrored"])
def test_identity_metric_is_the_truncated_svd(make):
    target = gaussian(6, 8, seed=0)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    for metric in (None, Metric.identity(8), Metric(5 * torch.eye(8, dtype=torch.float64))):
        dense = fit(target, metric, make(6, 8), 3).mpo.to_dense()
        assert_close(dense, (left[:, :3] * values[:3]) @ right[:3], **F64["dense"])


def test_sweeps_end_at_the_closed_form():
    layout = Layout.svd(7, 9)
    target, metric = gaussian(7, 9, seed=0), Metric(moment(9, seed=1), moment(7, seed=2))
    closed = fit(target, metric, layout, 3)
    start = fit(target, None, layout, 3).mpo
    swept = fit(target, metric, layout, 3, start=start, round_trips=400, tolerance=0.0)
    assert swept.history[0].kind == "start"
    assert swept.history[0].objective > closed.objective
    assert_close(swept.mpo.to_dense(), closed.mpo.to_dense(), **TOL[torch.float32]["dense"])
    assert_close(swept.objective, closed.objective, **F64["dense"])


def test_singular_moment_without_ridge():
    c = moment(9, seed=1, samples=4)
    target = gaussian(7, 9, seed=0)
    result = fit(target, Metric(c, ridge=0.0), Layout.svd(7, 9), 4)
    # What C does not see may differ much, so the square is known to rounding of that, not of 0.
    assert_close(result.relative_error**2, 0.0, **F64["dense"])
    assert result.mpo.bond_dims == (4,)


@pytest.mark.parametrize("cutoff", [1e-1, 1e-3])
def test_bond_dim_from_a_cutoff(cutoff):
    target, metric = gaussian(8, 9, seed=0), Metric(moment(9, seed=1))
    result = fit(target, metric, Layout.svd(8, 9), cutoff=cutoff)
    assert result.relative_error**2 <= cutoff
    (bond,) = result.mpo.bond_dims
    assert fit(target, metric, Layout.svd(8, 9), bond - 1).relative_error ** 2 > cutoff


def test_padding_is_invisible():
    target, metric = gaussian(5, 7, seed=0), Metric(moment(7, seed=1), moment(5, seed=2))
    padded = fit(target, metric, Layout((6, 1), (1, 8), pad=True), 2)
    plain = fit(target, metric, Layout.svd(5, 7), 2)
    assert padded.mpo.shape == (5, 7)
    assert_close(padded.mpo.to_dense(), plain.mpo.to_dense(), **F64["dense"])


def test_one_site_is_the_target():
    target = gaussian(5, 7, seed=0)
    result = fit(target, Metric(moment(7, seed=1)), Layout((5,), (7,)))
    assert_close(result.mpo.to_dense(), target, rtol=0, atol=0)
    assert result.cores[0].data_ptr() != target.data_ptr()


def test_refuses_negative_eigenvalues():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    for layout in (Layout.svd(4, 2), Layout((2, 2), (2, 1))):
        with pytest.raises(DecompositionError, match="has eigenvalues from -0.99"):
            fit(gaussian(4, 2), Metric(indefinite), layout, 1)


@pytest.mark.parametrize("layout", ["8x1,1x6", "4x3,2x2"])
def test_an_mpo_of_a_matrix_in_a_metric(layout):
    target, metric = gaussian(8, 6, seed=0), Metric(moment(6, seed=1))
    found = MPO.from_matrix(target, layout, bond_dim=2, metric=metric)
    assert torch.equal(found.to_dense(), fit(target, metric, layout, 2).mpo.to_dense())
    plain = MPO.from_matrix(target, layout, bond_dim=2)
    distances = [metric.distance(target, mpo.to_dense()) for mpo in (found, plain)]
    assert distances[0] < distances[1]
