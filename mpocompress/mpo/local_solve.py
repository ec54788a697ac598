"""Exact least squares in the open core or cores of a chain, all else fixed.

Around the present core x the objective is E(x + d) = E(x) - 2 <d, residual> + <d, N d>, where the
residual is rhs - N x. Both solvers look for the *change* d, which has three merits: the decrease
of E is known to full relative precision even where E itself is rounding noise; a small ridge on N
damps the step instead of shrinking the core, so that every solution lowers E whatever the ridge;
and what the metric leaves undetermined stays as it was, up to rounding over that ridge.

* `GramProblem`: N is formed, and factorized by Cholesky.
* `OperatorProblem`: N is only applied, and the system is solved by conjugate gradients (each
  iterate lowers E). For open cores too large to form N, and for an output metric that is not a
  Kronecker product over the sites.
"""

# Shape suffixes: L left bond, O out, I in, R right bond of the open core; N = L*I*R; P and A all
# outs and ins to its left, Q and B to its right; X, Y the groups of legs of a Kronecker product.

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mpocompress.mpo.cholesky import damped_cholesky, solve_factored
from mpocompress.mpo.weighing import Coarse, Exact, Steering

# Conjugate gradients stop when the residual, in the norm of the preconditioner, has fallen by this
# factor, or to rounding. The next sweep solves the same core again, closer to the end: a layer of a
# sentence encoder, in two sites with a full output metric, ends within 0.1 % of the error that 1e-2
# gives, in 0.6 of the time; with 0.3 it is 0.4 % above.
_CG_REDUCTION = 1e-1
_CG_ITERATIONS = 100
# Relative residuals above this are far enough from the rounding of float32.
_COARSE_ABOVE = 1e-4
# A search in float32 has done its part if it leaves no more than this of the residual, in float64.
# In a metric of features in very different units rounding leaves most of it.
_COARSE_LEAVES = 0.3


class Solution(NamedTuple):
    """Outcome of a local solve.

    `gain` is by how much the objective fell, at least 0; `iterations` those of conjugate gradients,
    and `residual` what they left, relative to the right-hand side (0 for a direct solve).
    `weighed_OI` is G W C of the chain with this core, where it is known: as long as W stays, the
    next local problem begins with it, wherever the orthogonality center goes.
    """

    core_LOIR: Tensor
    gain: float
    iterations: int
    residual: float
    weighed_OI: Tensor | None = None


class _Left(NamedTuple):
    """A residual, the preconditioner of it, and its square in that norm."""

    residual_LOIR: Tensor
    conditioned: Tensor
    square: float


@dataclass(frozen=True, slots=True)
class GramProblem:
    """A local problem whose Gram matrix is at hand.

    Attributes:
        rhs_LOIR: right-hand side, of the shape of the open core.
        gram_NN: on (left bond, in, right bond).
        out_weight_OO: on the out leg; None is the identity.
    """

    rhs_LOIR: Tensor
    gram_NN: Tensor
    out_weight_OO: Tensor | None = None

    def apply(self, core_LOIR: Tensor) -> Tensor:
        """N times a core."""
        core_ON = _flatten(core_LOIR)
        if self.out_weight_OO is not None:
            core_ON = self.out_weight_OO @ core_ON
        return _unflatten(core_ON @ self.gram_NN, core_LOIR)

    def diagonal(self) -> Tensor:
        """That of N, of the shape of a core."""
        left, out, _, right = self.rhs_LOIR.shape
        diagonal_LOIR = self.gram_NN.diagonal().reshape(left, 1, -1, right)
        weight = self.out_weight_OO
        outs_O = diagonal_LOIR.new_ones(out) if weight is None else weight.diagonal()
        return outs_O[:, None, None] * diagonal_LOIR

    def precondition(self) -> Callable[[Tensor], Tensor]:
        """N⁻¹, by its Cholesky factors, as a function of a core-shaped tensor."""
        left, _, _, right = self.rhs_LOIR.shape
        factor_NN = damped_cholesky(self.gram_NN, (left, right))
        weight = self.out_weight_OO
        out_factor_OO = None if weight is None else damped_cholesky(weight)

        def solve(residual_LOIR: Tensor) -> Tensor:
            change_ON = solve_factored(_flatten(residual_LOIR).mT, factor_NN).mT
            if out_factor_OO is not None:
                change_ON = solve_factored(change_ON, out_factor_OO)
            return _unflatten(change_ON, residual_LOIR)

        return solve

    def solve(self, core_LOIR: Tensor) -> Solution:
        """The best core given all others; the present one if nothing lowers the objective."""
        if not bool(self.gram_NN.diagonal().any()):
            return Solution(core_LOIR, 0.0, 0, 0.0)
        residual_LOIR = self.rhs_LOIR - self.apply(core_LOIR)
        change_LOIR = self.precondition()(residual_LOIR)
        moved_LOIR = self.apply(change_LOIR)
        noise = _Noise(self.rhs_LOIR, self.diagonal())
        gain = noise.gain(core_LOIR, change_LOIR, residual_LOIR, moved_LOIR)
        return Solution(core_LOIR + change_LOIR if gain > 0 else core_LOIR, gain, 0, 0.0)

    def rise(self, solution: Solution, change_LOIR: Tensor) -> tuple[float, Tensor | None]:
        """By how much a change of a solved core raises the objective, and None for G W C."""
        residual_LOIR = self.rhs_LOIR - self.apply(solution.core_LOIR)
        moved_LOIR = self.apply(change_LOIR)
        return float((change_LOIR * (moved_LOIR - 2 * residual_LOIR)).sum()), None


@dataclass(frozen=True, slots=True)
class OperatorProblem:
    """A local problem whose Gram matrix is only applied: x to the part of G W(x) C seen from x.

    Attributes:
        rhs_LOIR: right-hand side, of the shape of the open core.
        left_PAL: all cores to the left, merged.
        right_RQB: all cores to the right, merged.
        weighing: X to G X C.
        precondition: makes an approximate inverse of N.
        weighed_OI: G W C of the chain as it stands, if it is known.
        steering: cheaper stand-ins of the metric for searches; None for none.
    """

    rhs_LOIR: Tensor
    left_PAL: Tensor
    right_RQB: Tensor
    weighing: Exact | Coarse
    precondition: Callable[[], Callable[[Tensor], Tensor]]
    weighed_OI: Tensor | None = None
    steering: Steering | None = None

    def apply(self, core_LOIR: Tensor) -> Tensor:
        """N times a core: to the dense matrix, through the metric, and back."""
        return self.seen(self.weigh(core_LOIR))

    def weigh(self, core_LOIR: Tensor) -> Tensor:
        """G W C of the chain with this core, (out, in)."""
        left, out, in_, right = core_LOIR.shape
        outs_left, ins_left, _ = self.left_PAL.shape
        _, outs_right, ins_right = self.right_RQB.shape
        merged = self.left_PAL.reshape(-1, left) @ core_LOIR.reshape(left, -1)
        merged = merged.reshape(-1, right) @ self.right_RQB.reshape(right, -1)
        legs = merged.reshape(outs_left, ins_left, out, in_, outs_right, ins_right)
        legs = legs.permute(0, 2, 4, 1, 3, 5)  # outs, then ins
        return self.weighing.apply(legs.reshape(outs_left * out * outs_right, -1))

    def seen(self, matrix_OI: Tensor) -> Tensor:
        """What of a dense matrix is seen from the open core: all other cores contracted with it."""
        left, out, in_, right = self.rhs_LOIR.shape
        outs_left, ins_left, _ = self.left_PAL.shape
        _, outs_right, ins_right = self.right_RQB.shape
        legs = matrix_OI.reshape(outs_left, out, outs_right, ins_left, in_, ins_right)
        legs = legs.permute(0, 3, 1, 4, 2, 5)
        closed = legs.reshape(-1, outs_right * ins_right) @ self.right_RQB.reshape(right, -1).mT
        closed = self.left_PAL.reshape(-1, left).mT @ closed.reshape(outs_left * ins_left, -1)
        return closed.reshape(left, out, in_, right)

    def diagonal(self) -> Tensor:
        """That of N, of the shape of a core, as if G and C were diagonal.

        Nothing cancels in it, so that it says how large the numbers are that products with N add.
        """
        outs_O, ins_I = self.weighing.diagonals
        outs = self.left_PAL.shape[0] * self.rhs_LOIR.shape[1] * self.right_RQB.shape[1]
        sizes_OI = ins_I.expand(outs, -1) if outs_O is None else torch.outer(outs_O, ins_I)
        left_PAL, right_RQB = self.left_PAL.square(), self.right_RQB.square()
        return replace(self, left_PAL=left_PAL, right_RQB=right_RQB).seen(sizes_OI)

    def solve(self, core_LOIR: Tensor) -> Solution:
        """The best core given all others, with a residual a tenth of that of the present core.

        Preconditioned conjugate gradients from the present core, at most 100 iterations; wherever
        they stop, the objective is lower than before. As long as the residual is far from rounding,
        products with N are made with a cheaper metric: they only steer the search. What it finds is
        judged by the exact one, and it goes on with finer ones if that was not enough.
        """
        preconditioner, noise = self.precondition(), _Noise(self.rhs_LOIR, self.diagonal())
        weighed_OI = self.weigh(core_LOIR) if self.weighed_OI is None else self.weighed_OI
        solution = Solution(core_LOIR, 0.0, 0, 0.0, weighed_OI)
        scale = float((self.rhs_LOIR * preconditioner(self.rhs_LOIR)).sum())
        left = self._left(solution, preconditioner)
        square = left.square
        goal = max(_CG_REDUCTION**2 * square, torch.finfo(core_LOIR.dtype).eps ** 2 * scale)
        steering = self.steering
        if not square > _COARSE_ABOVE**2 * scale:
            steering = None
            # So close to rounding, not even that of the solves before may stay in the residual.
            if self.weighed_OI is not None:
                solution = solution._replace(weighed_OI=self.weigh(core_LOIR))
                left = self._left(solution, preconditioner)
        while steering is not None and (current := steering.current) is not None:
            searched = self._with(current)
            solution, _ = self._improved(searched, solution, left, preconditioner, goal, noise)
            left = self._left(solution, preconditioner)
            if left.square <= _COARSE_LEAVES**2 * square:
                return solution._replace(residual=_relative(left.square, scale))
            if not steering.refine():
                break
        solution, expected = self._improved(self, solution, left, preconditioner, goal, noise)
        return solution._replace(residual=_relative(expected, scale))

    def rise(self, solution: Solution, change_LOIR: Tensor) -> tuple[float, Tensor | None]:
        """By how much a change of a solved core raises the objective, and G W C after it."""
        change_OI = self.weigh(change_LOIR)
        doubled_LOIR = 2 * self._residual(solution)
        rise = float((change_LOIR * (self.seen(change_OI) - doubled_LOIR)).sum())
        return rise, self._weighed(solution) + change_OI

    def _with(self, weighing: Exact | Coarse) -> "OperatorProblem":
        """The same with a metric that stands for this one; the right-hand side stays as it is."""
        return replace(
            self,
            left_PAL=self.left_PAL.to(weighing.dtype),
            right_RQB=self.right_RQB.to(weighing.dtype),
            weighing=weighing,
        )

    def _weighed(self, solution: Solution) -> Tensor:
        known_OI = solution.weighed_OI
        return self.weigh(solution.core_LOIR) if known_OI is None else known_OI

    def _residual(self, solution: Solution) -> Tensor:
        return self.rhs_LOIR - self.seen(self._weighed(solution))

    def _left(self, solution: Solution, preconditioner: Callable[[Tensor], Tensor]) -> "_Left":
        residual_LOIR = self._residual(solution)
        conditioned = preconditioner(residual_LOIR)
        return _Left(residual_LOIR, conditioned, float((residual_LOIR * conditioned).sum()))

    def _improved(
        self,
        searched: "OperatorProblem",
        start: Solution,
        left: "_Left",
        preconditioner: Callable[[Tensor], Tensor],
        goal: float,
        noise: "_Noise",
    ) -> tuple[Solution, float]:
        """What a search makes of a core, judged by this problem; gains and iterations add up.

        `left` is what the start has left.

        Returns:
            The solution, and the square of the residual that the search expects.
        """
        residual_LOIR, conditioned, _ = left
        change_LOIR, square, iterations = searched.search(
            residual_LOIR, conditioned, preconditioner, goal, noise
        )
        found = start._replace(iterations=start.iterations + iterations)
        change_OI = self.weigh(change_LOIR)
        gain = noise.gain(start.core_LOIR, change_LOIR, residual_LOIR, self.seen(change_OI))
        if gain > 0:
            found = found._replace(
                core_LOIR=start.core_LOIR + change_LOIR,
                gain=start.gain + gain,
                weighed_OI=self._weighed(start) + change_OI,
            )
        return found, square

    def search(
        self,
        residual_LOIR: Tensor,
        conditioned: Tensor,
        preconditioner: Callable[[Tensor], Tensor],
        goal: float,
        noise: "_Noise",
    ) -> tuple[Tensor, float, int]:
        """Conjugate gradients for N d = residual.

        Args:
            residual_LOIR: its dtype is that of all vectors.
            conditioned: the preconditioner of it.
            preconditioner: an approximate inverse of N.
            goal: square of a residual, in the norm of the preconditioner, that is small enough.
            noise: of products with N.

        Returns:
            The change d, the square of what is left of the residual, and the iterations.
        """
        dtype = self.weighing.dtype
        change_LOIR = torch.zeros_like(residual_LOIR)
        direction_LOIR = conditioned
        square = float((residual_LOIR * conditioned).sum())
        iterations = 0
        while square > goal and iterations < _CG_ITERATIONS:
            applied_LOIR = self.apply(direction_LOIR.to(dtype)).to(direction_LOIR)
            curvature = float((direction_LOIR * applied_LOIR).sum())
            if not curvature > torch.finfo(dtype).eps * noise.size(direction_LOIR) ** 2:
                break  # the metric does not see this direction, only rounding does
            step = square / curvature
            change_LOIR = change_LOIR + step * direction_LOIR
            residual_LOIR = residual_LOIR - step * applied_LOIR
            conditioned = preconditioner(residual_LOIR)
            previous, square = square, float((residual_LOIR * conditioned).sum())
            direction_LOIR = conditioned + (square / previous) * direction_LOIR
            iterations += 1
        return change_LOIR, square, iterations


def _relative(square: float, scale: float) -> float:
    return (max(square, 0.0) / scale) ** 0.5 if scale > 0 else 0.0


LocalProblem = GramProblem | OperatorProblem


@dataclass(frozen=True, slots=True)
class _Noise:
    """Rounding of products with N: to eps times the size of a core, entry by entry of N.

    In directions that the metric hardly determines, what solves for such noise is large; it must
    not pass for a gain. Nor may noise be judged by the norm of N: with one feature in units a
    hundred times finer, what all others gain in float32 would be less than that.

    Attributes:
        rhs_LOIR: right-hand side.
        diagonal_LOIR: that of N. Of a positive semidefinite matrix it bounds all other entries.
    """

    rhs_LOIR: Tensor
    diagonal_LOIR: Tensor

    def size(self, core_LOIR: Tensor) -> float:
        """Root of <x, diag(N) x>."""
        return float((self.diagonal_LOIR.clamp_min(0.0).sqrt() * core_LOIR).norm())

    def gain(
        self, core_LOIR: Tensor, change_LOIR: Tensor, residual_LOIR: Tensor, moved_LOIR: Tensor
    ) -> float:
        """The gain 2 <d, rhs - N x> - <d, N d> of a change d of a core x if it is real, else 0.

        `moved_LOIR` is N d.
        """
        gain = float((change_LOIR * (2 * residual_LOIR - moved_LOIR)).sum())
        change = self.size(change_LOIR)
        parts = change * (self.size(core_LOIR) + change)
        parts += float((change_LOIR * self.rhs_LOIR).norm())
        return gain if gain > torch.finfo(core_LOIR.dtype).eps * parts else 0.0


def kronecker_preconditioner(
    marginals: tuple[Tensor, Tensor],
    out_weight_OO: Tensor | None,
    bonds: tuple[int, int] = (1, 1),
) -> Callable[[Tensor], Tensor]:
    """Inverse of the Kronecker product of the partial traces of a Gram matrix, over its trace.

    Args:
        marginals: (X, X) and (Y, Y) with X * Y = left * in * right, as from
            `Environments.marginals`.
        out_weight_OO: metric on the out leg; None is the identity.
        bonds: dimensions of the left and the right bond.
    """
    trace = float(marginals[0].diagonal().sum())
    factor_XX = damped_cholesky(marginals[0], (bonds[0], 1))
    factor_YY = damped_cholesky(marginals[1], (1, bonds[1]))
    out_factor_OO = None if out_weight_OO is None else damped_cholesky(out_weight_OO)
    sizes = (factor_XX.shape[0], factor_YY.shape[0])

    def solve(residual_LOIR: Tensor) -> Tensor:
        flat_ON = _flatten(residual_LOIR)
        legs = flat_ON.reshape(-1, *sizes)
        legs = solve_factored(legs.mT.reshape(-1, sizes[0]).mT, factor_XX)
        legs = legs.mT.reshape(-1, sizes[1], sizes[0]).mT
        legs = solve_factored(legs.reshape(-1, sizes[1]).mT, factor_YY).mT
        change_ON = trace * legs.reshape(flat_ON.shape)
        if out_factor_OO is not None:
            change_ON = solve_factored(change_ON, out_factor_OO)
        return _unflatten(change_ON, residual_LOIR)

    return solve


def _flatten(core_LOIR: Tensor) -> Tensor:
    return core_LOIR.transpose(0, 1).reshape(core_LOIR.shape[1], -1)


def _unflatten(core_ON: Tensor, like_LOIR: Tensor) -> Tensor:
    left, out, in_, right = like_LOIR.shape
    return core_ON.reshape(out, left, in_, right).transpose(0, 1)
