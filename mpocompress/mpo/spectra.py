"""Schmidt spectra and entanglement entropies of a chain, bond by bond.

With the orthogonality center beside a bond, the singular values of the center core there are the
Schmidt values of the whole matrix across that cut: descending, not squared, not normalized. With
p_i = s_i^2 / sum s^2 the entanglement entropy is -sum p_i ln p_i, in nats; its exponential is the
effective bond dimension.
"""

from collections.abc import Sequence
from math import inf, isfinite, log

import torch
from torch import Tensor

from mpocompress.errors import DecompositionError
from mpocompress.mpo import linalg
from mpocompress.mpo.canonical import Center, move_center

# So near to order 1 the difference of two logarithms, divided by that to 1, would be rounding.
_NEAR_ONE = 0.5


def schmidt_spectra(cores: Sequence[Tensor], center: Center) -> list[Tensor]:
    """Schmidt values at every bond, left to right, in one pass of the center along the chain."""
    moved = list(move_center(cores, center, 0, 0)[0])
    spectra = []
    for site in range(len(moved) - 1):
        left, out, in_, right = moved[site].shape
        left_XK, values_K, right_KR = linalg.svd(moved[site].reshape(left * out * in_, right))
        spectra.append(values_K)
        moved[site] = left_XK.reshape(left, out, in_, -1)
        moved[site + 1] = torch.tensordot(values_K[:, None] * right_KR, moved[site + 1], dims=1)
    return spectra


def entropy_nats(spectrum_S: Tensor) -> float:
    """Entanglement entropy of one Schmidt spectrum, in nats; 0 for a zero matrix.

    Raises:
        DecompositionError: NaN or Inf in the spectrum.
    """
    p = _probabilities(spectrum_S)
    return max(0.0, float(torch.special.entr(p).sum()))


def renyi_entropy_nats(spectrum_S: Tensor, order: float) -> float:
    """Rényi entropy ln(sum p_i^a) / (1 - a) of one Schmidt spectrum, in nats.

    Args:
        spectrum_S: Schmidt values; neither squared nor normalized.
        order: a, not negative. 1 is the entanglement entropy, 0 the logarithm of the number of
            values that are not zero up to rounding, `inf` that of 1 over the largest p.

    Raises:
        DecompositionError: a negative order, or NaN; NaN or Inf in the spectrum.

    Source: Rényi, Proc. Fourth Berkeley Symposium 1 (1961) 547.
    """
    if not order >= 0:
        raise DecompositionError(f"order {order!r} of a Rényi entropy: it is not negative. Try 2.")
    if order == 1:
        return entropy_nats(spectrum_S)
    p = _probabilities(spectrum_S)
    if not bool(p.any()):
        return 0.0
    if order == 0:
        # Relative to the largest value: what rounding leaves of a zero in the spectrum's dtype.
        noise = spectrum_S.numel() * torch.finfo(spectrum_S.dtype).eps
        return log(int((p > noise**2 * p.max()).sum()))
    largest = float(p.max())
    if order == inf:
        return -log(largest)
    if abs(order - 1) < _NEAR_ONE:
        p = p[p > 0]
        excess = torch.special.xlogy(order - 1, p).expm1()  # p^(a - 1) - 1
        return max(0.0, float((p @ excess).log1p()) / (1 - order))
    total = float(((p / largest) ** order).sum())
    return max(0.0, (log(total) + order * log(largest)) / (1 - order))


def _probabilities(spectrum_S: Tensor) -> Tensor:
    """Normalized squares, float64; zeros for a zero matrix. No square over- or underflows.

    Raises:
        DecompositionError: NaN or Inf in the spectrum.
    """
    values = spectrum_S.detach().double()
    largest = float(values.max()) if values.numel() else 0.0
    if not isfinite(largest):
        raise DecompositionError(
            f"a spectrum of {values.numel()} values with {largest} in it has no entropy. Check the "
            "matrix for NaN, Inf and entries near the largest float."
        )
    if largest == 0.0:
        return torch.zeros_like(values)
    weights = (values / largest) ** 2
    return weights / weights.sum()
