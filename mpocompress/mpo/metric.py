"""The metric of a fit: what a change of the weights does to a layer's outputs on real data.

With C = E[x xᵀ], the second moment of a layer's inputs, and optionally G, a metric on its outputs
(such as the covariance of the loss gradient there), replacing the matrix T by W costs

    distance(T, W)² = tr(G (T − W) C (T − W)ᵀ).

C is estimated from samples, often fewer than there are inputs. A *ridge*, a share of its diagonal,
is added to it: it stands for inputs that the sample did not show, and makes the metric definite. As
each entry gets its own share, a few inputs in much finer units do not matter. With `ridge=0` the
metric may be singular: what the data never excites then costs nothing, and nothing determines it.
"""

# Shape suffixes: O rows (outputs), I columns (inputs), N side of a square metric, R its rank.

from dataclasses import dataclass
from functools import cached_property, reduce
from math import isfinite, sqrt

import torch
from torch import Tensor

from mpocompress.errors import ContractionError, DecompositionError
from mpocompress.mpo import linalg
from mpocompress.mpo.cholesky import cholesky_, ridge_on
from mpocompress.mpo.layout import Layout

# Entries of C and its transpose may differ by this share of the largest one: the rounding of an
# accumulation over many batches, far below what a wrong (say, rectangular) product gives.
_ASYMMETRY = {torch.float64: 1e-8, torch.float32: 1e-4}
# What is added for inputs that the data hardly show does not grow with what few rows leave open of
# the others: a fit would spend its bond dimensions on them.
_FLOOR = 1e-3
# So far below zero, relative to the largest, an eigenvalue may lie by accumulation in float32.
_NEGATIVE = 1e-5


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor F of a positive semidefinite matrix F Fᵀ, and solves with it.

    Attributes:
        factor_NR: lower triangular (Cholesky), or rectangular where the matrix is singular.
        inverse_RN: a left inverse of the rectangular one; None if it is triangular.
    """

    factor_NR: Tensor
    inverse_RN: Tensor | None

    @property
    def rank(self) -> int:
        """Columns of F: the numerical rank of the matrix."""
        return int(self.factor_NR.shape[1])

    def apply(self, matrix_MN: Tensor) -> Tensor:
        """X F, whitened rows: (M, N) to (M, R)."""
        return matrix_MN @ self.factor_NR

    def solve(self, matrix_MR: Tensor) -> Tensor:
        """An X with X F = Y, (M, R) to (M, N); the one with least in what F does not see."""
        if self.inverse_RN is None:
            return torch.linalg.solve_triangular(self.factor_NR, matrix_MR, upper=False, left=False)
        return matrix_MR @ self.inverse_RN


def factorize_metric(matrix_NN: Tensor, name: str) -> Factor:
    """Factorize a positive semidefinite matrix: Cholesky, or eigenvalues where it is singular.

    What is noise is judged with all features in units of about their own size: of a raw timestamp
    beside numbers around 1, all of these would be.

    Raises:
        DecompositionError: an eigenvalue is negative beyond rounding, or all are zero.
    """
    size = matrix_NN.shape[0]
    diagonal_N = matrix_NN.diagonal()
    # Powers of two, by which nothing is rounded.
    units_N = torch.where(diagonal_N > 0, diagonal_N, 1.0).log2().div(2).round().exp2()
    scaled_NN = matrix_NN / units_N / units_N[:, None]
    noise = linalg.rank_tolerance((size,), matrix_NN.dtype)
    factor_NN = scaled_NN.clone()
    # A singular matrix may pass by the luck of rounding; its small pivots are then noise.
    if cholesky_(factor_NN) and bool(
        factor_NN.diagonal().min() ** 2 > noise * scaled_NN.diagonal().max()
    ):
        return Factor(units_N[:, None] * factor_NN, None)
    values_N, vectors_NN = torch.linalg.eigh(scaled_NN)
    smallest, largest = float(values_N[0]), float(values_N[-1])
    if smallest < -_NEGATIVE * max(largest, 0.0) or largest <= 0.0:
        raise DecompositionError(
            f"{name} has eigenvalues from {smallest:.3g} to {largest:.3g}; a second "
            "moment has none below 0 and at least one above. Accumulate it as a sum of x xᵀ in "
            "float64, over at least one sample that is not zero, or raise the ridge."
        )
    # Negative eigenvalues are rounding of the accumulation: they show how large it was.
    kept = values_N > max(noise * largest, -10 * smallest)
    root_R, vectors_NR = values_N[kept].sqrt(), vectors_NN[:, kept]
    return Factor(units_N[:, None] * vectors_NR * root_R, (vectors_NR / root_R).mT / units_N)


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moments that say which change of a matrix (out, in) matters.

    Args:
        input_II: C, (in, in), symmetric positive semidefinite, of any rank; any scale. float32 or
            float64 (half types are converted to float32). Not copied.
        output_OO: G, (out, out), likewise; None is the identity.
        ridge: share of the diagonal of C that is added to it, see `cholesky.ridge_on`.
        output_ridge: the same for G.

    Raises:
        ContractionError: not square matrices.
        DecompositionError: NaN or Inf entries, not symmetric, a negative diagonal, all zeros, or a
            negative or non-finite ridge.

    Dtype and device of the moments are those of the work done with them; factorizations are made
    when first needed, and kept.
    """

    input_II: Tensor
    output_OO: Tensor | None = None
    ridge: float = 1e-3
    output_ridge: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("ridge", "output_ridge"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise DecompositionError(
                    f"{name} {value!r}: it is a share of the diagonal and not negative. Try 1e-3."
                )
        object.__setattr__(self, "input_II", _checked(self.input_II, "the input second moment"))
        if self.output_OO is not None:
            checked_OO = _checked(self.output_OO, "the output metric")
            if checked_OO.device != self.input_II.device:
                raise ContractionError(
                    f"the output metric is on {checked_OO.device}, the input second moment on "
                    f"{self.input_II.device}. Move them together with .to(...)."
                )
            object.__setattr__(self, "output_OO", checked_OO.to(self.input_II.dtype))

    @classmethod
    def identity(
        cls,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> "Metric":
        """The Frobenius metric: every entry of the matrix counts the same."""
        return cls(torch.eye(in_features, dtype=dtype, device=device), ridge=0.0)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "Metric":
        """The same moments in another dtype or on another device; itself if nothing changes."""
        moved_II = self.input_II.to(dtype=dtype, device=device)
        if moved_II is self.input_II:
            return self
        moved_OO = None if self.output_OO is None else self.output_OO.to(dtype=dtype, device=device)
        return Metric(moved_II, moved_OO, self.ridge, self.output_ridge)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the moments."""
        return self.input_II.dtype

    @property
    def device(self) -> torch.device:
        """Device of the moments."""
        return self.input_II.device

    @cached_property
    def ridged_input_II(self) -> Tensor:  # noqa: N802  # shape suffix
        """C with its ridge, exactly symmetric: what distances are measured with."""
        return _ridged(self.input_II, self.ridge, min(self.ridge, _FLOOR))

    @cached_property
    def ridged_output_OO(self) -> Tensor | None:  # noqa: N802  # shape suffix
        """G with its ridge, exactly symmetric; None is the identity."""
        return (
            None
            if self.output_OO is None
            else _ridged(self.output_OO, self.output_ridge, self.output_ridge)
        )

    @cached_property
    def input_factor(self) -> Factor:
        """Factor of C with its ridge.

        Raises:
            DecompositionError: C has a negative eigenvalue.
        """
        return factorize_metric(self.ridged_input_II, "the input second moment")

    @cached_property
    def output_factor(self) -> Factor | None:
        """Factor of G with its ridge; None is the identity.

        Raises:
            DecompositionError: G has a negative eigenvalue.
        """
        if self.ridged_output_OO is None:
            return None
        return factorize_metric(self.ridged_output_OO, "the output metric")

    def over_sites(self, layout: Layout) -> "Metric":
        """The same with G replaced by a Kronecker product over the sites: its partial traces.

        Every local problem of a fit is then solved directly instead of by conjugate gradients; what
        G says of outs of different sites together is lost. A layout with padding keeps G.
        """
        if self.output_OO is None or layout.out_features != self.output_OO.shape[0]:
            return self
        factors = site_metrics(self.output_OO, layout)
        return Metric(self.input_II, reduce(torch.kron, factors), self.ridge, self.output_ridge)

    def weigh(self, matrix_OI: Tensor) -> Tensor:
        """G X C: the linear map of which distance² is the quadratic form."""
        weighed_OI = matrix_OI @ self.ridged_input_II
        if self.ridged_output_OO is not None:
            weighed_OI = self.ridged_output_OO @ weighed_OI
        return weighed_OI

    def whiten(self, matrix_OI: Tensor) -> Tensor:
        """G^½ X C^½, whose Frobenius norm is `norm(X)`, in the metric's dtype.

        Symmetric roots, unlike triangular ones, do not depend on the order of the features, and
        are Kronecker products where the moments are: they do not mix sites that are independent.

        Raises:
            ContractionError: the shapes do not fit.
        """
        self.check(matrix_OI)
        white_OI = matrix_OI.to(self.dtype) @ _symmetric_root(self.ridged_input_II)
        if self.ridged_output_OO is not None:
            white_OI = _symmetric_root(self.ridged_output_OO) @ white_OI
        return white_OI

    def norm(self, matrix_OI: Tensor) -> float:
        """sqrt(tr(G X C Xᵀ))."""
        self.check(matrix_OI)
        matrix_OI = matrix_OI.to(self.dtype)
        return sqrt(max(float((matrix_OI * self.weigh(matrix_OI)).sum()), 0.0))

    def distance(self, target_OI: Tensor, matrix_OI: Tensor) -> float:
        """Root of the objective of a fit, sqrt(tr(G (T - W) C (T - W)ᵀ)).

        Raises:
            ContractionError: the shapes do not fit.
        """
        self.check(target_OI)
        self.check(matrix_OI)
        return self.norm(target_OI.to(self.dtype) - matrix_OI.to(self.dtype))

    def relative_error(self, target_OI: Tensor, matrix_OI: Tensor) -> float:
        """`distance` relative to the norm of the target (0 if both are zero).

        Raises:
            ContractionError: the shapes do not fit.
        """
        distance, norm = self.distance(target_OI, matrix_OI), self.norm(target_OI)
        return _ratio(distance, norm)

    def relative_output_error(self, target_OI: Tensor, matrix_OI: Tensor) -> float:
        """Relative change of the layer's outputs on the data: no ridge, and G the identity.

        Raises:
            ContractionError: the shapes do not fit.
        """
        bare = Metric(self.input_II, ridge=0.0)
        return bare.relative_error(target_OI, matrix_OI)

    def check(self, matrix_OI: Tensor) -> None:
        """Raise ContractionError unless this metric can measure the matrix (out, in)."""
        expected_in = self.input_II.shape[0]
        expected_out = None if self.output_OO is None else self.output_OO.shape[0]
        shape = tuple(matrix_OI.shape)
        if len(shape) != 2 or shape[1] != expected_in or expected_out not in (None, shape[0]):
            raise ContractionError(
                f"a matrix of shape {shape} does not fit a metric of {expected_in} inputs"
                + ("" if expected_out is None else f" and {expected_out} outputs")
                + ". The matrix is (out, in), as a Linear's weight; transpose it, or accumulate "
                "the moments at this layer."
            )
        if matrix_OI.device != self.device:
            raise ContractionError(
                f"the matrix is on {matrix_OI.device}, the metric on {self.device}. "
                "Move one of them with .to(device=...)."
            )


def site_metrics(output_OO: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Factors of a metric on the outputs, if it is a Kronecker product over the sites.

    The partial traces, which are positive semidefinite and scaled so that the trace is kept. Of any
    other metric they give an approximation.
    """
    trace = float(output_OO.diagonal().sum())
    weights = []
    outside = 1
    for site, out in enumerate(layout.out_dims):
        inside = layout.out_features // outside // out
        legs = output_OO.reshape(outside, out, inside, outside, out, inside)
        legs = torch.diagonal(torch.diagonal(legs, dim1=0, dim2=3), dim1=1, dim2=3)
        traced_OO = legs.sum((-1, -2))
        weights.append(traced_OO if site == 0 else traced_OO / trace)
        outside *= out
    return tuple(weights)


def _ratio(distance: float, norm: float) -> float:
    if norm > 0:
        return distance / norm
    return 0.0 if distance == 0 else float("inf")


def _checked(matrix_NN: Tensor, name: str) -> Tensor:
    shape = tuple(matrix_NN.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ContractionError(
            f"{name} has shape {shape}; it is a square matrix, one row for each feature. "
            "Sum x xᵀ over the samples."
        )
    matrix_NN = matrix_NN.detach().to(linalg.working_dtype(matrix_NN.dtype))
    linalg.check_finite(matrix_NN)
    largest = float(matrix_NN.abs().max())
    asymmetry = float((matrix_NN - matrix_NN.mT).abs().max())
    if asymmetry > _ASYMMETRY[matrix_NN.dtype] * largest:
        raise DecompositionError(
            f"{name} is not symmetric: an entry and its mirror image differ by {asymmetry:.3g}, "
            f"the largest entry is {largest:.3g}. Sum x xᵀ over the samples."
        )
    smallest = float(matrix_NN.diagonal().min())
    if smallest < 0 or largest == 0:
        raise DecompositionError(
            f"{name} has a diagonal from {smallest:.3g} to "
            f"{float(matrix_NN.diagonal().max()):.3g}; it holds mean squares, not negative and not "
            "all zero. Check that data reached this layer, or fit without data."
        )
    return matrix_NN


def _ridged(matrix_NN: Tensor, ridge: float, floor: float) -> Tensor:
    symmetric_NN = (matrix_NN + matrix_NN.mT) / 2
    symmetric_NN.diagonal().add_(ridge_on(matrix_NN.diagonal(), ridge, floor=floor))
    return symmetric_NN


def _symmetric_root(matrix_NN: Tensor) -> Tensor:
    values_N, vectors_NN = torch.linalg.eigh(matrix_NN)
    return (vectors_NN * values_N.clamp_min(0.0).sqrt()) @ vectors_NN.mT
