"""Cores as plain tensors: what a valid chain of them is.

A chain is a sequence of tensors of shape (left bond, out, in, right bond). Neighbouring bonds are
equal and the outermost are 1. The functions of this room work on such sequences; `operator.MPO`
wraps one together with its orthogonality center.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from mpocompress.errors import BondDimError, ContractionError
from mpocompress.mpo.layout import Layout
from mpocompress.mpo.truncate import check_bond_dim
from mpocompress.scalars import plain

Cores = tuple[Tensor, ...]


def check_cores(cores: Sequence[Tensor]) -> None:
    """Check that `cores` form a chain of one dtype on one device.

    Raises:
        ContractionError: empty, a core that is no tensor or not 4-dimensional, bonds that do not
            match, an open outer bond, or mixed dtypes or devices; the message names the site.
    """
    if not cores:
        raise ContractionError("an MPO needs at least one core, shape (1, out, in, 1).")
    for site, core in enumerate(cores):
        if not isinstance(core, Tensor):
            raise ContractionError(
                f"core {site} is a {type(core).__name__}, not a torch tensor. Convert it with "
                "torch.as_tensor."
            )
        if core.ndim != 4 or 0 in core.shape:
            raise ContractionError(
                f"core {site} has shape {tuple(core.shape)}; a core has four non-empty dimensions "
                "(left bond, out, in, right bond)."
            )
        if core.dtype != cores[0].dtype or core.device != cores[0].device:
            raise ContractionError(
                f"core {site} is {core.dtype} on {core.device}, core 0 is {cores[0].dtype} on "
                f"{cores[0].device}. Move them together with .to(...)."
            )
    for bond, (left, right) in enumerate(pairwise(cores)):
        if left.shape[3] != right.shape[0]:
            raise ContractionError(
                f"bond {bond}: core {bond} ends with bond dimension {left.shape[3]}, core "
                f"{bond + 1} begins with {right.shape[0]}."
            )
    if cores[0].shape[0] != 1 or cores[-1].shape[3] != 1:
        raise ContractionError(
            f"the outermost bonds have dimensions {cores[0].shape[0]} and {cores[-1].shape[3]}; "
            "they must be 1."
        )


def layout_of(cores: Sequence[Tensor], *, pad: bool = False) -> Layout:
    """The layout that the physical sizes of the cores spell."""
    return Layout(
        tuple(int(core.shape[1]) for core in cores),
        tuple(int(core.shape[2]) for core in cores),
        pad,
    )


def bond_dims_of(cores: Sequence[Tensor]) -> tuple[int, ...]:
    """Bond dimensions of the L - 1 inner bonds."""
    return tuple(int(core.shape[3]) for core in cores[:-1])


def expand_bond_dims(
    bond_dim: int | Sequence[int] | None, num_bonds: int
) -> tuple[int | None, ...]:
    """One bond dimension per bond, from one number, a sequence, or None (no limit).

    Raises:
        BondDimError: a number below 1, or a sequence of another length.
    """
    if bond_dim is None:
        return (None,) * num_bonds
    bond_dim = plain(bond_dim)  # NumPy's and torch's scalars call themselves iterable
    if isinstance(bond_dim, str) or not isinstance(bond_dim, Iterable):
        return (check_bond_dim(bond_dim),) * num_bonds
    bonds = tuple(bond_dim)
    if len(bonds) != num_bonds:
        raise BondDimError(
            f"bond_dim {bonds} has {len(bonds)} entries, but {num_bonds + 1} sites have "
            f"{num_bonds} bonds. Give one number for all bonds, or one for each."
        )
    return tuple(check_bond_dim(bond, f" at bond {k}") for k, bond in enumerate(bonds))
