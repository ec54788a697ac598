"""Bipartite entanglement of a function's amplitudes: what a network can say as a quantum state."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mpocompress.analysis.cross import interpolate
from mpocompress.analysis.functions import (
    MAX_AMPLITUDES,
    AmplitudeFunction,
    Encoding,
    all_amplitudes,
)
from mpocompress.analysis.growth import EntropyProfile, page_entropy_nats, profile_fields
from mpocompress.errors import DataError
from mpocompress.mpo.linalg import svd_values
from mpocompress.mpo.truncate import check_bond_dim

Method = Literal["exact", "cross"]
_FAR_OFF = 0.1


class StateEntanglement(EntropyProfile):
    """Entanglement of a pure state between the first k sites and the others, k = 1 to n - 1.

    Attributes:
        num_sites: n.
        local_dim: d.
        method: "exact" from all amplitudes, or "cross" from a cross interpolation.
        converged: whether the interpolation met its tolerance; True if exact.
        relative_error: of the amplitudes, in norm, as measured on random ones; 0 if exact.
        bond_dims: of the matrix product state: pivots of the interpolation, or the numerical ranks.
        page_nats: mean entropies of a Haar-random state, the bound to compare with; a product state
            has 0, and `capacities_nats` are the largest possible ones.
    """

    num_sites: int
    local_dim: int
    method: Method
    converged: bool
    relative_error: float
    bond_dims: tuple[int, ...]
    page_nats: tuple[float, ...]


def state_entanglement(
    function: Callable[[Tensor], Tensor],
    num_sites: int,
    *,
    local_dim: int = 2,
    encoding: Encoding = "spins",
    log_amplitudes: bool = False,
    method: Literal["auto"] | Method = "auto",
    renyi_orders: Sequence[float] = (2.0,),
    tolerance: float | None = None,
    bond_dim: int = 128,
    start: Tensor | None = None,
    seed: int = 0,
) -> StateEntanglement:
    """Entanglement of psi(x) = f(x) over all configurations of n inputs with d values each.

    Args:
        function: of the encoded configurations, such as a network; one number a row.
        num_sites: n, at least 2.
        local_dim: d.
        encoding: what the function takes: "spins" (1 and -1), "bits" (0 and 1), "digits" (int64),
            "one-hot", or a function of digits; see `functions.encode`.
        log_amplitudes: the function gives ln psi instead of psi.
        method: "exact" (up to 2^20 amplitudes), "cross" (real amplitudes), or "auto" for the first
            where possible.
        renyi_orders: orders of the Rényi entropies; `inf` is allowed.
        tolerance: of the interpolation, relative to the largest |psi|; see `cross_interpolation`.
        bond_dim: of the interpolation, at most. What it cannot carry is in `relative_error`, which
            is refused above 0.1.
        start: configurations where psi does not vanish, to start the interpolation from.
        seed: of the interpolation.

    Raises:
        DataError: not one finite number a row, psi = 0, too many amplitudes, a complex function
            that is to be interpolated, or an interpolation that is far off.
        BondDimError: a bond dimension below 1.
    """
    check_bond_dim(bond_dim)
    psi = AmplitudeFunction(
        function,
        num_sites,
        local_dim=local_dim,
        encoding=encoding,
        log_amplitudes=log_amplitudes,
    )
    if num_sites < 2:
        raise DataError(f"num_sites {num_sites}: entanglement is between 2 sites or more.")
    if method not in ("auto", "exact", "cross"):
        raise DataError(f"method {method!r}: there are 'auto', 'exact' and 'cross'.")
    if method == "exact" or (method == "auto" and local_dim**num_sites <= MAX_AMPLITUDES):
        return vector_entanglement(
            all_amplitudes(psi), local_dim=local_dim, renyi_orders=renyi_orders
        )
    found = interpolate(
        psi,
        tolerance=tolerance,
        bond_dim=bond_dim,
        max_sweeps=20,
        start=start,
        check_points=2000,
        seed=seed,
    )
    if not found.relative_error <= _FAR_OFF:
        raise DataError(
            f"the interpolation is off by {found.relative_error:.2g} of the state's norm at bond "
            f"dimension {max(found.bond_dims)}, so its entanglement would mean nothing. Raise "
            "bond_dim; a state whose entropy grows with the volume has no compact form. "
            "cross_interpolation returns what there is."
        )
    return _profile(
        found.mpo.schmidt_spectra(),
        num_sites,
        local_dim,
        renyi_orders,
        method="cross",
        converged=found.converged,
        relative_error=found.relative_error,
        bond_dims=found.bond_dims,
    )


def vector_entanglement(
    psi: Any, *, local_dim: int = 2, renyi_orders: Sequence[float] = (2.0,)
) -> StateEntanglement:
    """Entanglement of a state vector (d^n,), real or complex; it need not be normalized.

    Args:
        psi: a tensor, or what `torch.as_tensor` takes, such as an array of NumPy.
        local_dim: d, at least 2.
        renyi_orders: orders of the Rényi entropies; `inf` is allowed.

    Raises:
        DataError: the length is no power of d of at least 2 sites, or the vector is zero or has NaN
            or Inf in it.
    """
    psi = torch.as_tensor(psi)
    num_sites, size = 0, 1
    while local_dim >= 2 and size < psi.numel():
        num_sites, size = num_sites + 1, size * local_dim
    if psi.ndim != 1 or size != psi.numel() or num_sites < 2 or local_dim < 2:
        raise DataError(
            f"a state of shape {tuple(psi.shape)} is not that of at least 2 sites with {local_dim} "
            "values each: it is a vector, and its length a power of 2 or more values. Flatten it, "
            "or give local_dim."
        )
    if not bool(torch.isfinite(psi).all()):
        raise DataError("amplitudes with NaN or Inf: there is no such state.")
    if not bool(psi.any()):
        raise DataError("all amplitudes are 0: there is no such state.")
    psi = psi.detach().to(torch.complex128 if psi.is_complex() else torch.float64)
    spectra, ranks = [], []
    for cut in range(1, num_sites):
        matrix_LR = psi.reshape(local_dim**cut, -1)
        values_K = svd_values(matrix_LR)
        spectra.append(values_K)
        noise = max(matrix_LR.shape) * torch.finfo(values_K.dtype).eps
        ranks.append(int((values_K > noise * values_K[0]).sum()))
    return _profile(
        spectra,
        num_sites,
        local_dim,
        renyi_orders,
        method="exact",
        converged=True,
        relative_error=0.0,
        bond_dims=tuple(ranks),
    )


def _profile(
    spectra: Sequence[Tensor],
    num_sites: int,
    local_dim: int,
    renyi_orders: Sequence[float],
    **fields: object,
) -> StateEntanglement:
    smaller = [local_dim ** min(cut, num_sites - cut) for cut in range(1, num_sites)]
    larger = [local_dim ** max(cut, num_sites - cut) for cut in range(1, num_sites)]
    return StateEntanglement.model_validate(
        {
            "num_sites": num_sites,
            "local_dim": local_dim,
            "page_nats": [page_entropy_nats(a, b) for a, b in zip(smaller, larger, strict=True)],
            **profile_fields(spectra, smaller, renyi_orders),
            **fields,
        }
    )
