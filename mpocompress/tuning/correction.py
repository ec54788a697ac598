"""What a weight can repair of what is lost upstream of its layer: a cross-validated regression."""

# Shape suffixes: O out features, I in features.

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpocompress.tuning.upstream import Moments

# Ridges tried for the correction of upstream errors, relative to the mean diagonal.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, slots=True)
class Regression:
    """What is left to explain, e = W (x - x^) + (h - h^), against x^.

    Attributes:
        inputs_II: E[x^ x^T].
        residual_OI: E[e x^T].
        mean_I: E[x^].
        residual_mean_O: E[e].
        rows: that were seen.
    """

    inputs_II: Tensor
    residual_OI: Tensor
    mean_I: Tensor
    residual_mean_O: Tensor
    rows: int

    def single(self) -> "Regression":
        """The same with its matrices in float32, in which regressions take half the time."""
        return replace(self, inputs_II=self.inputs_II.float(), residual_OI=self.residual_OI.float())

    def correction(self, ridge: float) -> Tensor:
        """K (out, in) that minimizes E|e - K x^|^2 with a ridge relative to the mean diagonal."""
        shifted_II = self.inputs_II.clone()
        shifted_II.diagonal().add_(ridge * float(shifted_II.diagonal().mean()))
        return _solve_right(self.residual_OI, shifted_II)

    def gain(self, correction_OI: Tensor) -> float:
        """How much of E|e|^2 a correction explains here; negative if it does harm."""
        cross = torch.sum(correction_OI * self.residual_OI)
        return float(2 * cross - torch.sum(correction_OI @ self.inputs_II * correction_OI))


def regression(weight_OI: Tensor, moments: Moments, *, centered: bool) -> Regression:
    """What is lost upstream of a weight W (out, in), against the inputs of its layer, in float64.

    Args:
        weight_OI: W.
        moments: at its layer.
        centered: of what is left without the means, which a bias takes up.
    """
    inputs_II, mean_ours_I, _ = moments.inputs.mean(centered=centered)
    weight_OI = weight_OI.to(inputs_II)
    residual_OI = torch.zeros_like(weight_OI)
    residual_mean_O = weight_OI.new_zeros(weight_OI.shape[0])
    if moments.cross is not None and moments.cross is not moments.inputs:
        cross_II, mean_dense_I, _ = moments.cross.mean(centered=centered)
        residual_OI += weight_OI @ (cross_II - inputs_II)
        residual_mean_O += weight_OI @ (mean_dense_I - mean_ours_I)
    if moments.residual is not None:
        seen_OI, seen_O, _ = moments.residual.mean(centered=centered)
        residual_OI += seen_OI
        residual_mean_O += seen_O
    return Regression(inputs_II, residual_OI, mean_ours_I, residual_mean_O, moments.inputs.rows)


def cross_validated_correction(
    weight_OI: Tensor, folds: Sequence[Moments], whole: Regression, *, centered: bool
) -> Tensor:
    """K (out, in) of the target T = W + K, with the ridge that carries over to the other fold best.

    A regression on a few thousand rows explains a good deal of these very rows and little of
    others; without a check it would spend the bond dimension on noise. No correction at all is
    among the choices.
    """
    none = torch.zeros_like(whole.residual_OI)
    if not bool(whole.residual_OI.any()):
        return none
    if len(folds) < 2:
        return whole.correction(_RIDGES[0])
    # A ridge is known well enough from float32; what it is used for is computed in float64.
    parts = [regression(weight_OI, fold, centered=centered).single() for fold in folds]
    if not all(bool(part.inputs_II.any()) for part in parts):  # as of a single row without its mean
        return none

    def gain(ridge: float) -> float:
        found = parts[1].gain(parts[0].correction(ridge))
        return found + parts[0].gain(parts[1].correction(ridge))

    most, ridge = max((gain(ridge), ridge) for ridge in _RIDGES)
    return whole.correction(ridge) if most > 0 else none


def _solve_right(right_OI: Tensor, symmetric_II: Tensor) -> Tensor:
    """X with X A = B for positive definite A; in float64 if rounding leaves A indefinite."""
    exact = symmetric_II.dtype == torch.float64
    factor_II, failed = torch.linalg.cholesky_ex(symmetric_II, check_errors=exact)
    if failed:
        return _solve_right(right_OI.double(), symmetric_II.double()).to(right_OI.dtype)
    return torch.cholesky_solve(right_OI.mT, factor_II).mT
