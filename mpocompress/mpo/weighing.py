"""The metric applied to a dense matrix, X to G X C: exactly, and cheaply to steer a search.

The output metric of real data has a few directions that carry most of it. `Coarse` keeps these, and
C on them, exact; of the rest it keeps the diagonal of G, and with it the leading directions and the
diagonal of C. If few directions do carry most, conjugate gradients find with it nearly what they
find with G and C, at a fraction of the products. The searcher measures what a search has left, with
the exact ones, and asks for a finer stand-in if that is much.
"""

# Shape suffixes: O rows (outputs), I columns (inputs), N side of a moment, R its leading part, M
# any number of columns.

from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.mpo import linalg

# Shares of the directions that are leading, to begin with and when asked for finer ones; then comes
# the metric itself. Two layers of a digit classifier of 784 inputs, in four sites, need the first
# one, layers of networks on 64 pixels the second or third.
_LEADING_SHARES = (16, 8, 4)
# Below, products with a moment are too small to gain from.
_LEADING_FROM = 512


@dataclass(frozen=True)
class Exact:
    """X to G X C.

    Attributes:
        input_II: C.
        output_OO: G; None is the identity.
    """

    input_II: Tensor
    output_OO: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the moments, and of what they are applied to."""
        return self.input_II.dtype

    def apply(self, matrix_OI: Tensor) -> Tensor:
        """G X C."""
        weighed_OI = matrix_OI @ self.input_II
        return weighed_OI if self.output_OO is None else self.output_OO @ weighed_OI

    @property
    def diagonals(self) -> tuple[Tensor | None, Tensor]:
        """Those of G, None for the identity, and of C."""
        outputs_O = None if self.output_OO is None else self.output_OO.diagonal()
        return outputs_O, self.input_II.diagonal()


class Steering:
    """Stand-ins of a metric in float32, from coarse to fine, the metric itself the last."""

    def __init__(self, exact: Exact) -> None:
        output_OO = None if exact.output_OO is None else exact.output_OO.to(torch.float32)
        self._whole = Exact(exact.input_II.to(torch.float32), output_OO)
        large = output_OO is not None and min(len(output_OO), len(exact.input_II)) >= _LEADING_FROM
        left: list[int | None] = [*_LEADING_SHARES] if large else []
        # In float32 the metric is no stand-in of itself.
        self._left = left if exact.dtype == torch.float32 else [*left, None]
        self.current = self._make()

    def refine(self) -> bool:
        """Go on to the next finer one; False if there is none."""
        if self._left[0] is None:  # as fine as float32 can be; other solves may do with it
            return False
        del self._left[0]
        self.current = self._make()
        return self.current is not None

    def _make(self) -> "Exact | Coarse | None":
        if not self._left:
            return None
        share, (input_II, output_OO) = self._left[0], (self._whole.input_II, self._whole.output_OO)
        if share is None or output_OO is None:
            return self._whole
        return Coarse(input_II, Leading.of(input_II, share), Leading.of(output_OO, share))


@dataclass(frozen=True, slots=True)
class Leading:
    """Q S Qᵀ + diag(t): a moment in its leading directions Q, and the diagonal of what is left."""

    basis_NR: Tensor
    middle_RR: Tensor
    rest_N: Tensor

    @classmethod
    def of(cls, moment_NN: Tensor, share: int) -> "Leading":
        """Find one in `share` directions by two products with a random block, of a fixed seed.

        Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011) 217, algorithm 4.4.
        """
        size = len(moment_NN)
        generator = torch.Generator(device=moment_NN.device).manual_seed(0)
        basis_NR = torch.randn(
            (size, -(-size // share)),
            generator=generator,
            device=moment_NN.device,
            dtype=moment_NN.dtype,
        )
        for _ in range(2):
            basis_NR = linalg.qr(moment_NN @ basis_NR)[0]
        middle_RR = basis_NR.mT @ (moment_NN @ basis_NR)
        covered_N = ((basis_NR @ middle_RR) * basis_NR).sum(1)
        return cls(basis_NR, middle_RR, (moment_NN.diagonal() - covered_N).clamp_min(0.0))

    @property
    def diagonal(self) -> Tensor:
        """Of the moment (N,)."""
        return ((self.basis_NR @ self.middle_RR) * self.basis_NR).sum(1) + self.rest_N

    def apply_right(self, matrix_MN: Tensor) -> Tensor:
        """A matrix times the moment."""
        leading_MN = ((matrix_MN @ self.basis_NR) @ self.middle_RR) @ self.basis_NR.mT
        return torch.addcmul(leading_MN, self.rest_N, matrix_MN)


@dataclass(frozen=True)
class Coarse:
    """X to Q S Qᵀ X C + diag(t) X C', of G = Q S Qᵀ + diag(t) and C', C with its leading part.

    Attributes:
        input_II: C.
        inputs: C'.
        outputs: G.
    """

    input_II: Tensor
    inputs: Leading
    outputs: Leading

    @property
    def dtype(self) -> torch.dtype:
        """Of the moments, and of what they are applied to."""
        return self.input_II.dtype

    def apply(self, matrix_OI: Tensor) -> Tensor:
        """What stands for G X C."""
        outputs = self.outputs
        small_RI = outputs.middle_RR @ ((outputs.basis_NR.mT @ matrix_OI) @ self.input_II)
        rest_OI = self.inputs.apply_right(matrix_OI)
        return torch.addmm(rest_OI.mul_(outputs.rest_N[:, None]), outputs.basis_NR, small_RI)

    @property
    def diagonals(self) -> tuple[Tensor | None, Tensor]:
        """Those of G and of C, which are kept."""
        return self.outputs.diagonal, self.input_II.diagonal()
