"""Schmidt spectra and entanglement entropies of a chain, bond by bond.

With the orthogonality center beside a bond, the singular values of the center core there are the
Schmidt values of the whole matrix across that cut: descending, not squared, not normalized. With
p_i = s_i^2 / sum s^2 the entanglement entropy is -sum p_i ln p_i, in nats; its exponential is the
effective bond dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpocompress.mpo import linalg
from mpocompress.mpo.canonical import Center, move_center


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
    """Entanglement entropy of one Schmidt spectrum, in nats; 0 for a zero matrix."""
    weights = spectrum_S.detach().double() ** 2
    total = weights.sum()
    if float(total) == 0.0:
        return 0.0
    return max(0.0, float(torch.special.entr(weights / total).sum()))
