"""Splitting a merged pair of cores where it costs least in the metric of a fit.

A plain SVD of the merged core discards what is smallest in the weights. What counts is the Gram
matrix N on (left bond, ins; ins, right bond). Its partial traces A and B on the two groups of legs
give N ≈ A ⊗ B / tr N, so with A = F Fᵀ and B = H Hᵀ the core Fᵀ θ H is the one whose discarded
squared singular values are the rise of the objective, as far as N is such a product.
"""

# Shape suffixes: X = L*O*I of the first site, Y = O*I*R of the second, K the new bond; D outs of
# the first site and U of the second, M = L*I and N = I*R the groups that the metric acts on.

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from mpocompress.mpo import linalg
from mpocompress.mpo.cholesky import damped_cholesky
from mpocompress.mpo.truncate import Cut, Truncation, choose_bond_dim


@dataclass(frozen=True, slots=True)
class SplitMetric:
    """Metric on the two groups of legs of a merged pair, and on its out legs.

    Attributes:
        left_MM: on (left bond, ins of the first site).
        right_NN: on (ins of the second site, right bond), of the same trace.
        out_weights: on the out legs of the two sites; None is the identity.
    """

    left_MM: Tensor
    right_NN: Tensor
    out_weights: tuple[Tensor, Tensor] | None


class Split(NamedTuple):
    """A pair of cores that was one, and what the split cost.

    `first_LOIK` is left canonical (in the ordinary sense); the weights of `cut` are in units of the
    objective.
    """

    first_LOIK: Tensor
    last_KOIR: Tensor
    cut: Cut


def split_pair(
    theta_LOIR: Tensor,
    pairs: tuple[tuple[int, int], tuple[int, int]],
    metric: SplitMetric,
    limits: Truncation,
) -> Split:
    """Split a merged pair of cores by an SVD in the metric.

    Args:
        theta_LOIR: (left bond, outs of both, ins of both, right bond).
        pairs: (out, in) of the two sites.
        metric: what the discarded part is weighed with.
        limits: `cutoff` is relative to the weight of the pair in the metric.

    Raises:
        DecompositionError: the spectrum is not finite.
    """
    (out, in_), (out_right, in_right) = pairs
    left, right = theta_LOIR.shape[0], theta_LOIR.shape[3]
    legs = theta_LOIR.reshape(left, out, out_right, in_, in_right, right)
    # (D outs, M left and ins; U outs, N ins and right): the metric acts on M, N and, if any, D, U.
    legs = legs.permute(1, 0, 3, 2, 4, 5).reshape(out, left * in_, out_right, in_right * right)
    factor_MM = damped_cholesky(metric.left_MM, (left, 1))
    factor_NN = damped_cholesky(metric.right_NN, (1, right))
    trace = float(metric.left_MM.diagonal().sum()) or 1.0
    weighed = torch.tensordot(legs, factor_NN, dims=1)
    weighed = torch.tensordot(weighed, factor_MM, dims=([1], [0]))  # D U N M
    factors = None
    if metric.out_weights is not None:
        factors = tuple(damped_cholesky(weight) for weight in metric.out_weights)
        weighed = torch.tensordot(weighed, factors[1], dims=([1], [0]))  # D N M U
        weighed = torch.tensordot(weighed, factors[0], dims=([0], [0]))  # N M U D
        weighed = weighed.permute(3, 2, 0, 1)
    theta_XY = weighed.permute(0, 3, 1, 2).reshape(out * left * in_, -1) / sqrt(trace)
    left_XK, values_K, right_KY = linalg.svd(theta_XY)
    tolerance = linalg.rank_tolerance(tuple(theta_XY.shape), theta_XY.dtype)
    cut = choose_bond_dim(values_K, limits, rank_tolerance=tolerance)
    bond = cut.bond_dim
    first = _unweigh(left_XK[:, :bond].mT.reshape(bond * out, -1), factor_MM)
    second = _unweigh(
        (values_K[:bond, None] * right_KY[:bond]).reshape(bond * out_right, -1), factor_NN
    )
    first, second = first.reshape(bond, out, -1), second.reshape(bond, out_right, -1)
    if factors is not None:
        first = _unweigh(first.mT, factors[0]).mT
        second = _unweigh(second.mT, factors[1]).mT
    core_KDLI = first.reshape(bond, out, left, in_)
    second_core = second.reshape(bond, out_right, in_right, right) * sqrt(trace)
    q_XK, r_KK = linalg.qr(core_KDLI.permute(2, 1, 3, 0).reshape(-1, bond))
    first_core = q_XK.reshape(left, out, in_, -1)
    return Split(first_core, torch.tensordot(r_KK, second_core, dims=1), cut)


def _unweigh(matrix: Tensor, factor: Tensor) -> Tensor:
    """X with X F = Y."""
    return torch.linalg.solve_triangular(factor, matrix, upper=False, left=False)
