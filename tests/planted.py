"""Matrices, spectra and chains whose exact properties are known beforehand.

Nothing here calls the code under test, but for the `Layout` that names the sites: the dense twins
are written out with NumPy-like reshapes and one einsum over all indices.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mpocompress.mpo import Layout

# The same examples in every run, with no time limit for each: the machine may be busy.
LAWS = settings(derandomize=True, deadline=None, max_examples=40, database=None)

SEEDS = st.integers(min_value=0, max_value=2**16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- matrices


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


@cache
def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Orthonormal columns, float64; made once, so not to be written to."""
    return torch.linalg.qr(gaussian(rows, columns, seed=seed)).Q


def with_spectrum(
    values: Tensor, rows: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A matrix with these singular values between random singular vectors."""
    left = orthonormal(rows, len(values), seed)
    right = orthonormal(columns, len(values), seed + 1)
    return ((left * values.double()) @ right.T).to(dtype)


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = torch.kron(product, factor)
    return product


def kronecker_of_noise(layout: Layout, seed: int) -> Tensor:
    return kronecker(
        [gaussian(out, in_, seed=seed + 100 * k) for k, (out, in_) in enumerate(layout.pairs)]
    )


def shift(size: int) -> Tensor:
    """Ones right above the diagonal, without wrap."""
    return torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)


def cyclic_shift(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64).roll(1, dims=1)


def second_difference(size: int) -> Tensor:
    """Tridiagonal 2, -1, -1, not periodic."""
    return 2 * torch.eye(size, dtype=torch.float64) - shift(size) - shift(size).T


def hadamard(qubits: int) -> Tensor:
    """Sylvester's matrix of size 2^qubits."""
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return kronecker([block] * qubits)


def toeplitz(symbol: Tensor) -> Tensor:
    """Entries that depend on the difference of the indices alone: `symbol` of length 2n - 1."""
    size = (len(symbol) + 1) // 2
    index = torch.arange(size)
    return symbol[index[:, None] - index[None, :] + size - 1]


def swap(dim: int) -> Tensor:
    """Exchanges two systems of `dim` states: maximally entangled between the two sites."""
    matrix = torch.eye(dim * dim, dtype=torch.float64).reshape(dim, dim, dim, dim)
    return matrix.transpose(0, 1).reshape(dim * dim, dim * dim)


# -- dense twins


def interleaved(matrix: Tensor, layout: Layout) -> Tensor:
    """The matrix as one index per site, (o_1 i_1, ..., o_L i_L), by an explicit einsum."""
    sites = layout.num_sites
    outs, ins = "abcdefgh"[:sites], "ijklmnop"[:sites]
    tensor = matrix.reshape(*layout.out_dims, *layout.in_dims)
    mixed = "".join(o + i for o, i in zip(outs, ins, strict=True))
    ordered = torch.einsum(f"{outs}{ins}->{mixed}", tensor)
    return ordered.reshape([out * in_ for out, in_ in layout.pairs])


def unfolding(matrix: Tensor, layout: Layout, bond: int) -> Tensor:
    """The matrix across one bond: sites up to `bond` in the rows, the others in the columns."""
    tensor = interleaved(matrix, layout)
    return tensor.reshape(prod(tensor.shape[: bond + 1]), -1)


def spectrum_at(matrix: Tensor, layout: Layout, bond: int) -> Tensor:
    return torch.linalg.svdvals(unfolding(matrix.double(), layout, bond))


def dense_twin(cores: Sequence[Tensor]) -> Tensor:
    """Sum over all bonds at once, differentiable; for chains of up to 6 sites."""
    sites = len(cores)
    outs, ins, bonds = "abcdef"[:sites], "ijklmn"[:sites], "tuvwxyz"[: sites + 1]
    operands = [bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(sites)]
    matrix = torch.einsum(f"{','.join(operands)}->{outs}{ins}", *cores)
    return matrix.reshape(
        prod(core.shape[1] for core in cores), prod(core.shape[2] for core in cores)
    )


# -- chains


def random_chain(
    layout: Layout,
    bond_dims: Sequence[int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[Tensor]:
    """Gaussian cores at exactly these bond dims, even where they are larger than the maximal ones.

    Scaled so that the matrix has entries of size one.
    """
    bonds = (1, *bond_dims, 1)
    scale = prod(bonds) ** (-0.5 / layout.num_sites)
    cores = []
    for k, (out, in_) in enumerate(layout.pairs):
        core = scale * gaussian(bonds[k], out, in_, bonds[k + 1], seed=seed + 1000 * k)
        cores.append(core.to(dtype).requires_grad_(requires_grad))
    return cores


def regauged(cores: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The same matrix with a random invertible G and its inverse put on every bond."""
    moved = [core.clone() for core in cores]
    for bond in range(len(cores) - 1):
        size = cores[bond].shape[3]
        scales = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
        left, right = (
            orthonormal(size, size, seed + bond),
            orthonormal(size, size, seed + bond + 50),
        )
        gauge, inverse = (left * scales) @ right.T, (right / scales) @ left.T
        moved[bond] = torch.tensordot(moved[bond], gauge.to(cores[bond].dtype), dims=1)
        moved[bond + 1] = torch.tensordot(inverse.to(cores[bond].dtype), moved[bond + 1], dims=1)
    return moved


@st.composite
def layouts(draw: st.DrawFn, max_sites: int = 4, max_dim: int = 4) -> Layout:
    """Rectangular sites, legs of size 1 included."""
    dim = st.integers(min_value=1, max_value=max_dim)
    return Layout.from_pairs(draw(st.lists(st.tuples(dim, dim), min_size=1, max_size=max_sites)))


@st.composite
def chains(
    draw: st.DrawFn, max_sites: int = 4, max_dim: int = 3, max_bond: int = 4
) -> tuple[Layout, tuple[int, ...]]:
    """A layout, and bond dims that need not be attainable."""
    layout = draw(layouts(max_sites, max_dim))
    bonds = st.lists(
        st.integers(min_value=1, max_value=max_bond),
        min_size=layout.num_sites - 1,
        max_size=layout.num_sites - 1,
    )
    return layout, tuple(draw(bonds))
