"""What a weight can repair of what is lost upstream of its layer: a cross-validated regression."""

# Shape suffixes: O out features, I in features, D random combinations of out features.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from mpocompress.mpo.cholesky import solve_ridged
from mpocompress.tuning.statistics.upstream import Moments

# Ridges tried for the correction of upstream errors, shares of the diagonal.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Random combinations of the outputs on which ridges are compared. Of 66 layers of an encoder 65 get
# the ridge that all outputs choose, and the other one a ridge that gains a thousandth less; with 64
# combinations, three get others that gain up to 7 % less.
_DIRECTIONS = 128

# Inputs that vary by no more than this share of their mean are constant, up to rounding in float32
# on the way to the layer.
_CONSTANT = 1e-6


@dataclass(frozen=True, slots=True)
class Regression:
    """What is left to explain, e = W (x - x^) + (h - h^), against x^.

    Attributes:
        inputs_II: E[x^ x^T].
        residual_OI: E[e x^T].
        mean_I: E[x^].
        residual_mean_O: E[e].
    """

    inputs_II: Tensor
    residual_OI: Tensor
    mean_I: Tensor
    residual_mean_O: Tensor

    def sketched(self, whole: "Regression") -> "Regression":
        """The same in float32, and of random combinations of the outputs where there are many.

        Whatever is a sum of squares over the outputs has the same expectation. Both moments are
        relative to the largest entries of those of all rows, which float32 need not hold; that
        scales the gains of all parts and ridges alike.
        """
        residual_OI = (self.residual_OI / whole.residual_OI.abs().max()).float()
        inputs_II = self.inputs_II
        if bool(whole.inputs_II.any()):
            inputs_II = inputs_II / whole.inputs_II.abs().max()
        outputs = residual_OI.shape[0]
        if outputs >= 2 * _DIRECTIONS:
            generator = torch.Generator().manual_seed(0)
            directions_DO = torch.randn(_DIRECTIONS, outputs, generator=generator, device="cpu")
            residual_OI = directions_DO.to(residual_OI) @ residual_OI / sqrt(_DIRECTIONS)
        return replace(self, inputs_II=inputs_II.float(), residual_OI=residual_OI)

    def correction(self, ridge: float) -> Tensor:
        """K (out, in) that minimizes E|e - K x^|^2 with a ridge, a share of the diagonal."""
        return solve_ridged(self.residual_OI, self.inputs_II, ridge)

    def gain(self, correction_OI: Tensor) -> float:
        """How much of E|e|^2 a correction explains here; negative if it does harm."""
        cross = torch.sum(correction_OI * self.residual_OI)
        return float(2 * cross - torch.sum(correction_OI @ self.inputs_II * correction_OI))


def regression(weight_OI: Tensor, moments: Moments, *, centered: bool) -> Regression:
    """What is lost upstream of a weight W (out, in), against the inputs of its layer, in float64.

    Of centered inputs that vary by rounding alone, nothing is left to explain, nor to explain with.

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
    variance = float(inputs_II.diagonal().sum())
    if centered and variance <= _CONSTANT**2 * float(mean_ours_I.square().sum()):
        inputs_II, residual_OI = torch.zeros_like(inputs_II), torch.zeros_like(residual_OI)
    return Regression(inputs_II, residual_OI, mean_ours_I, residual_mean_O)


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
    if not all(fold.inputs.rows for fold in folds):  # as of an expert that few rows are sent to
        return none
    # A ridge is known well enough from these; what it is used for is computed in full.
    parts = [regression(weight_OI, fold, centered=centered).sketched(whole) for fold in folds]
    if not all(bool(part.inputs_II.any()) for part in parts):  # as of a single row without its mean
        return none

    def gain(ridge: float) -> float:
        found = parts[1].gain(parts[0].correction(ridge))
        return found + parts[0].gain(parts[1].correction(ridge))

    most, ridge = max((gain(ridge), ridge) for ridge in _RIDGES)
    return whole.correction(ridge) if most > 0 else none
