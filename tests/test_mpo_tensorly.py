"""TensorLy as an oracle of the decomposition, and the way to and from its TT-matrices."""

import builtins

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.decomposition import tensor_train_matrix
from torch.testing import assert_close

from mpocompress.errors import ContractionError, MissingExtraError
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.interop_tensorly import from_tensorly, to_tensorly
from tests.planted import gaussian, random_chain, with_spectrum
from tests.tolerances import TOL

F64 = TOL[torch.float64]


@pytest.fixture(autouse=True)
def _numpy_backend():
    """The oracle computes in NumPy, whatever TENSORLY_BACKEND or another test has chosen."""
    with tl.backend_context("numpy"):
        yield


@pytest.mark.parametrize(
    ("sites", "bonds"),
    [
        ("6x1,1x5", (3,)),
        ("8x6,4x5", (7,)),
        ("8x6,4x5", (20,)),
        ("2x3,3x2,4x4", (3, 5)),
        ("4x2,3x3,2x4", (4, 6)),
        ("2x2,2x3,3x2,2x2", (3, 6, 2)),
        ("2x2,2x2,2x2,2x2", (4, 16, 4)),
        ("7x1,1x3,1x1,2x5", (3, 4, 2)),
    ],
)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_sequential_svd_agrees_with_tensorly(sites, bonds, decay):
    layout = Layout.parse(sites)
    rows, columns = layout.out_features, layout.in_features
    spectrum = (1.0 + torch.arange(min(rows, columns))) ** -decay
    matrix = with_spectrum(spectrum, rows, columns) if decay else gaussian(rows, columns)
    oracle = tensor_train_matrix(
        matrix.numpy().reshape(*layout.out_dims, *layout.in_dims), rank=(1, *bonds, 1)
    )
    mpo = MPO.from_matrix(matrix, layout, bond_dim=bonds)
    # TensorLy clips bonds from the left only, so ours may be smaller; the matrix is the same.
    assert all(a <= b for a, b in zip(mpo.bond_dims, oracle.rank[1:-1], strict=True))
    assert_close(mpo.to_dense(), torch.from_numpy(oracle.to_matrix()), **F64["dense"])


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_round_trip(backend, dtype):
    mpo = MPO(random_chain(Layout.parse("2x3,3x2,2x4"), (4, 3), dtype=dtype))
    with tl.backend_context(backend):
        tt_matrix = to_tensorly(mpo)
        kind = torch.Tensor if backend == "pytorch" else np.ndarray
        assert all(isinstance(factor, kind) for factor in tt_matrix.factors)
        dense = torch.as_tensor(tt_matrix.to_matrix())
        back = from_tensorly(tt_matrix)
    assert_close(dense, mpo.to_dense(), **TOL[dtype]["dense"])
    assert back.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(back.cores, mpo.cores, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_reach_numpy(dtype):
    mpo = MPO(random_chain(Layout.parse("2x3,3x2"), (4,), dtype=dtype))
    with tl.backend_context("numpy"):
        dense = to_tensorly(mpo).to_matrix()
    expected = mpo.to(dtype=torch.float32).to_dense()
    assert_close(torch.as_tensor(dense).float(), expected, **TOL[dtype]["dense"])


def test_parameters_are_handed_over_without_gradient():
    cores = random_chain(Layout.parse("2x3,3x2"), (4,), requires_grad=True)
    with tl.backend_context("pytorch"):
        assert not any(factor.requires_grad for factor in to_tensorly(MPO(cores)).factors)
    with tl.backend_context("numpy"):
        assert len(to_tensorly(MPO(cores)).factors) == 2


def test_decomposition_of_tensorly_becomes_an_mpo():
    matrix = gaussian(24, 30)
    oracle = tensor_train_matrix(matrix.numpy().reshape(4, 6, 5, 6), rank=(1, 20, 1))
    mpo = from_tensorly(oracle)
    assert mpo.layout == Layout.parse("4x5,6x6")
    assert_close(mpo.to_dense(), matrix, **F64["dense"])
    assert_close(mpo.norm(), float(matrix.norm()), **F64["dense"])


def test_plain_list_of_factors_is_read_too():
    factors = [core.numpy() for core in random_chain(Layout.parse("2x3,3x2"), (4,))]
    assert from_tensorly(factors).bond_dims == (4,)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([], "no factors"),
        ([np.zeros((1, 4, 1))], r"core 0 has shape \(1, 4, 1\)"),
        ([np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 2, 1))], "bond 0: core 0 ends with"),
    ],
    ids=["none", "tensor-train", "broken"],
)
def test_factors_that_form_no_chain_are_refused(factors, message):
    with pytest.raises(ContractionError, match=message):
        from_tensorly(factors)


def test_missing_tensorly_names_the_extra(monkeypatch):
    mpo = MPO(random_chain(Layout.parse("2x3,3x2"), (4,)))
    real = builtins.__import__

    def without_tensorly(name, *args, **kwargs):
        if name == "tensorly":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorly)
    with pytest.raises(MissingExtraError, match=r"pip install \"mpocompress\[tensorly\]\""):
        to_tensorly(mpo)
    with pytest.raises(MissingExtraError, match="TensorLy is not installed"):
        from_tensorly([])
