"""The transverse-field Ising chain of spins 1/2, exactly, on all 2^n amplitudes.

H = - sum over neighbours of Z_i Z_{i+1}  -  h sum over sites of X_i, open or periodic. Below h = 1
the chain is ordered, above it is disordered; at h = 1 it is critical. In the Z basis all elements
off the diagonal are not positive, so the ground state is positive everywhere, and the same for a
configuration and the one with all spins flipped.
"""

# Shape suffixes: B all configurations (2^n), N sites.

from dataclasses import dataclass
from functools import cached_property
from math import isfinite, sqrt
from numbers import Integral, Real

import torch
from torch import Tensor

from mpocompress.analysis.functions import all_configurations
from mpocompress.errors import DataError

# Diagonalized as a dense matrix of half as many rows: 2^11 take 34 MB and seconds.
MAX_SITES = 12


@dataclass(frozen=True)
class IsingChain:
    """H = -sum Z_i Z_{i+1} - h sum X_i.

    Args:
        num_sites: n, 2 to 12.
        field: h, not negative (a rotation of all spins about Z changes its sign).
        periodic: whether the last site is the neighbour of the first (then n >= 3).

    Raises:
        DataError: a size or field that is out of range.
    """

    num_sites: int
    field: float
    periodic: bool = True

    def __post_init__(self) -> None:
        least = 3 if self.periodic else 2
        if not isinstance(self.num_sites, Integral) or not least <= self.num_sites <= MAX_SITES:
            raise DataError(
                f"num_sites {self.num_sites}: a periodic chain has 3 to {MAX_SITES} sites here, "
                f"an open one 2 to {MAX_SITES}."
            )
        if not (isinstance(self.field, Real) and isfinite(self.field) and self.field >= 0):
            raise DataError(f"field {self.field!r}: it is a finite number of at least 0.")

    @cached_property
    def spins_BN(self) -> Tensor:  # noqa: N802  # shape suffix
        """All configurations, Z eigenvalues 1 and -1, float64; the order of the amplitudes."""
        digits_BN = all_configurations(self.num_sites, 2, torch.device("cpu"))
        return (1 - 2 * digits_BN).double()

    @cached_property
    def diagonal_B(self) -> Tensor:  # noqa: N802  # shape suffix
        """-sum of z_i z_{i+1}."""
        bonds_BN = self.spins_BN * self.spins_BN.roll(-1, dims=1)
        return -(bonds_BN if self.periodic else bonds_BN[:, :-1]).sum(1)

    def apply(self, psi_B: Tensor) -> Tensor:
        """H psi, (2^n,), differentiable; psi is real or complex.

        Raises:
            DataError: another number of amplitudes.
        """
        sites = self.num_sites
        if tuple(psi_B.shape) != (2**sites,):
            raise DataError(
                f"a state of shape {tuple(psi_B.shape)}: {sites} spins have {2**sites} amplitudes, "
                "in one vector."
            )
        psi = psi_B.reshape([2] * sites)
        flipped = torch.stack([psi.flip(site) for site in range(sites)]).sum(0)
        return self.diagonal_B.to(psi_B) * psi_B - self.field * flipped.reshape(-1)

    def energy(self, psi_B: Tensor) -> Tensor:
        """<psi|H|psi> / <psi|psi>, 0-d, real, differentiable; psi is real or complex."""
        return torch.vdot(psi_B, self.apply(psi_B)).real / torch.vdot(psi_B, psi_B).real

    def ground_state(self) -> tuple[float, Tensor]:
        """The lowest energy and its positive, normalized amplitudes (2^n,), float64.

        Without a field two states are lowest; it is the even one.
        """
        # Among even states, by the half of the configurations (H) whose first spin is 1: below
        # h = 1 the lowest odd state is so near that a solver would return any mixture of both.
        half = 2 ** (self.num_sites - 1)
        unit_HH = torch.eye(half, dtype=torch.float64)
        matrix_HH = torch.diag(self.diagonal_B[:half])
        for site in range(self.num_sites - 1):
            matrix_HH -= self.field * unit_HH.reshape(2**site, 2, -1, half).flip(1).reshape(
                half, half
            )
        # The first spin flipped is all others flipped.
        matrix_HH -= self.field * unit_HH.flip(0)
        values_H, vectors_HH = torch.linalg.eigh(matrix_HH)
        ground_H = vectors_HH[:, 0] * torch.sign(vectors_HH[:, 0].sum())
        return float(values_H[0]), torch.cat((ground_H, ground_H.flip(0))) / sqrt(2)
