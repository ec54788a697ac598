"""DMRG-like sweeps: one or two neighbouring cores at a time, exactly, along the chain.

A sweep is one pass over the sites in one direction; the orthogonality center moves along by QR. The
site where a sweep turns is solved once. The objective never rises in a one-site sweep; in a
two-site sweep it rises at most by what the truncations cost, which is measured and recorded.
"""

# Shape suffixes: O rows, I columns; L left bond, O out, I in, R right bond of a core.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mpocompress.mpo import linalg
from mpocompress.mpo.contract import Merge, merge_cores
from mpocompress.mpo.cores import Cores, bond_dims_of
from mpocompress.mpo.environment import Environments
from mpocompress.mpo.local_solve import (
    GramProblem,
    LocalProblem,
    OperatorProblem,
    kronecker_preconditioner,
)
from mpocompress.mpo.truncate import Truncation
from mpocompress.mpo.two_site import SplitMetric, split_pair
from mpocompress.mpo.weighing import Exact, Steering

# Up to this size a Gram matrix is formed and factorized (n³/3 flops, n² numbers); larger local
# problems take conjugate gradients. Pairs are larger and are solved only to be split again.
_GRAM_UP_TO = 4096
_PAIR_GRAM_UP_TO = 4096

# After a split, both cores are solved so many times.
_REFINEMENTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRecord:
    """One sweep.

    Attributes:
        kind: "start" for what the sweeps began with.
        objective: after the sweep; squared distance in the metric.
        relative_error: its root, relative to the target's norm in the metric.
        bond_dims: after the sweep.
        truncation: by how much the truncations of a two-site sweep raised the objective.
        cg_iterations: conjugate gradients iterations in all local solves; 0 if all were direct.
    """

    kind: Literal["start", "one-site", "two-site", "closed form"]
    objective: float
    relative_error: float
    bond_dims: tuple[int, ...]
    truncation: float = 0.0
    cg_iterations: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalUpdate:
    """One local update, as shown to an observer.

    Attributes:
        sites: the open sites.
        cores: the whole chain after it.
        objective: after it.
        gain: by how much the local solve lowered the objective.
        truncation: by how much a split raised it again.
    """

    sites: tuple[int, ...]
    cores: Cores
    objective: float
    gain: float
    truncation: float


Direction = Literal[1, -1]
"""1 to the right, -1 to the left."""

Observer = Callable[[LocalUpdate], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quadratic:
    """The objective of a fit, E(W) = weight - 2 <M, W> + tr(G W C Wᵀ), in the dtype of the work.

    Attributes:
        input_II: C.
        output_OO: G if it is not a Kronecker product over the sites; then local problems are solved
            by conjugate gradients, preconditioned by `out_weights`. None otherwise.
        out_weights: the factors of G at the sites, or of an approximation; None is the identity.
        linear_OI: M = G T C.
        weight: tr(G T C Tᵀ).
    """

    input_II: Tensor
    output_OO: Tensor | None
    out_weights: tuple[Tensor, ...] | None
    linear_OI: Tensor
    weight: float


class Sweeper:
    """A chain under way to the minimum of a quadratic objective.

    Args:
        quadratic: the objective.
        cores: the chain, at least two cores; the orthogonality center at site 0.
        cut: bond at which C is divided, see `environment`.
        observer: called after each local update.
    """

    def __init__(
        self,
        quadratic: Quadratic,
        cores: Sequence[Tensor],
        *,
        cut: int,
        observer: Observer | None = None,
    ) -> None:
        self._quadratic = quadratic
        self._observer = observer
        self._environments = Environments(
            cores,
            quadratic.input_II,
            quadratic.linear_OI,
            cut=cut,
            out_weights=quadratic.out_weights,
        )
        self._weighed_OI: Tensor | None = None  # G W C of the chain, where it is known
        self.objective, self._weighed_OI = self._measure(self._environments)
        self.truncation = 0.0
        self.cg_iterations = 0

    @cached_property
    def _weighing(self) -> Exact:
        output_OO, out_weights = self._quadratic.output_OO, self._quadratic.out_weights
        if output_OO is None and out_weights is not None:
            output_OO = reduce(torch.kron, out_weights)
        return Exact(self._quadratic.input_II, output_OO)

    @cached_property
    def _steering(self) -> Steering:
        return Steering(self._weighing)

    @property
    def cores(self) -> Cores:
        """The chain as it stands."""
        return self._environments.cores

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Its inner bond dimensions."""
        return bond_dims_of(self.cores)

    def record(self, kind: Literal["start", "one-site", "two-site"]) -> SweepRecord:
        """Where things stand; truncation and iterations are counted from the last record."""
        objective, weight = max(self.objective, 0.0), self._quadratic.weight
        record = SweepRecord(
            kind=kind,
            objective=objective,
            relative_error=(objective / weight) ** 0.5 if weight > 0 else 0.0,
            bond_dims=self.bond_dims,
            truncation=self.truncation,
            cg_iterations=self.cg_iterations,
        )
        self.truncation, self.cg_iterations = 0.0, 0
        return record

    def try_cores(self, cores: Sequence[Tensor]) -> bool:
        """Go on from another chain of the same layout if its objective is lower; say whether.

        The environments that measure it are those that the next sweep to the right begins with.
        """
        environments = self._environments.with_cores(cores)
        objective, weighed_OI = self._measure(environments)
        # The difference of large numbers: a fall below its rounding noise proves nothing.
        noise = 100 * torch.finfo(cores[0].dtype).eps * self._quadratic.weight
        if not objective < self.objective - noise:
            return False
        self._environments, self.objective = environments, objective
        self._weighed_OI = weighed_OI
        return True

    def sweep_one_site(self, direction: Direction, *, turning: bool) -> None:
        """Solve each core in turn, from one end to the other.

        Args:
            direction: 1 to the right, with the center at site 0; -1 to the left, with it at the
                last site.
            turning: the first site has just been solved by a sweep the other way.
        """
        last = self._environments.num_sites - 1
        sites = range(last + 1)[::direction]
        for site in sites:
            if not (turning and site == sites[0]):
                self._solve(site)
            if site != sites[-1]:
                self._move_center(site, direction)

    def sweep_two_site(self, direction: Direction, limits: Sequence[Truncation]) -> None:
        """Merge, solve and split each pair of neighbours in turn.

        A split that would cost more than the solve gained, at no smaller bond, is not made.

        Args:
            direction: as for `sweep_one_site`.
            limits: bond dimension and cutoff of each bond.
        """
        pairs = list(pairwise(range(self._environments.num_sites)))[::direction]
        for pair in pairs:
            self._solve_pair(pair, direction, limits[pair[0]])

    def _measure(self, environments: Environments) -> tuple[float, Tensor | None]:
        """The objective of a chain, and G W C if that was made on the way."""
        problem, core = self._problem(environments, 0, 0), environments.core(0)
        linear = float((core * problem.rhs_LOIR).sum())
        weighed_OI = None
        if isinstance(problem, GramProblem):
            applied = problem.apply(core)
        else:
            weighed_OI = problem.weigh(core)
            applied = problem.seen(weighed_OI)
        objective = self._quadratic.weight - 2 * linear + float((core * applied).sum())
        return objective, weighed_OI

    def _problem(self, environments: Environments, first: int, last: int) -> LocalProblem:
        quadratic, rhs_LOIR = self._quadratic, environments.rhs(first, last)
        weight_OO = self._out_weight(first, last)
        size = rhs_LOIR.numel() // rhs_LOIR.shape[1]
        small = size <= (_GRAM_UP_TO if first == last else _PAIR_GRAM_UP_TO)
        if small and quadratic.output_OO is None:
            return GramProblem(rhs_LOIR, environments.gram(first, last), weight_OO)

        def precondition() -> Callable[[Tensor], Tensor]:
            if small:
                gram_NN = environments.gram(first, last)
                return GramProblem(rhs_LOIR, gram_NN, weight_OO).precondition()
            bonds = (rhs_LOIR.shape[0], rhs_LOIR.shape[3])
            return kronecker_preconditioner(environments.marginals(first, last), weight_OO, bonds)

        return OperatorProblem(
            rhs_LOIR,
            _merge_outside(environments.cores[:first], rhs_LOIR)[0],
            _merge_outside(environments.cores[last + 1 :], rhs_LOIR)[..., 0],
            self._weighing,
            precondition,
            self._weighed_OI if environments is self._environments else None,
            self._steering,
        )

    def _out_weight(self, first: int, last: int) -> Tensor | None:
        weights = self._quadratic.out_weights
        return None if weights is None else reduce(torch.kron, weights[first : last + 1])

    def _solve(self, site: int, *, show: bool = True) -> None:
        environments = self._environments
        solution = self._problem(environments, site, site).solve(environments.core(site))
        environments.set_core(site, solution.core_LOIR)
        self._weighed_OI = solution.weighed_OI
        self.objective -= solution.gain
        self.cg_iterations += solution.iterations
        if show:
            self._show((site,), solution.gain, 0.0)

    def _solve_pair(self, pair: tuple[int, int], direction: Direction, limits: Truncation) -> None:
        environments = self._environments
        first, last = pair
        old, weighed_OI = (environments.core(first), environments.core(last)), self._weighed_OI
        problem = self._problem(environments, first, last)
        solution = problem.solve(merge_cores(old, (0, 1)))
        weights = self._quadratic.out_weights
        left, right, cut = split_pair(
            solution.core_LOIR,
            ((old[0].shape[1], old[0].shape[2]), (old[1].shape[1], old[1].shape[2])),
            SplitMetric(
                *environments.marginals(first, last),
                None if weights is None else (weights[first], weights[last]),
            ),
            limits,
        )
        lost_LOIR = merge_cores((left, right), (0, 1)) - solution.core_LOIR
        rise, self._weighed_OI = problem.rise(solution, lost_LOIR)
        before = self.objective
        self.cg_iterations += solution.iterations
        self.objective += rise - solution.gain
        environments.set_core(first, left)
        environments.set_core(last, right)
        self._refine_pair(pair)
        # What the truncation costs once both cores have been solved again.
        rise = self.objective - before + solution.gain
        gain = solution.gain
        if self.objective > before and cut.bond_dim >= old[0].shape[3]:
            environments.set_core(first, old[0])
            environments.set_core(last, old[1])
            self._weighed_OI = weighed_OI
            if direction == 1:
                self._move_center(first, 1)
            self.objective, gain, rise = before, 0.0, 0.0
        if direction == -1:
            self._move_center(last, -1)
        self.truncation += max(rise, 0.0)
        self._show(pair, gain, rise)

    def _refine_pair(self, pair: tuple[int, int]) -> None:
        """Solve both cores of a pair that has just been split; the center ends on the last."""
        first, last = pair
        for _ in range(_REFINEMENTS):
            self._solve(last, show=False)
            self._move_center(last, -1)
            self._solve(first, show=False)
            self._move_center(first, 1)

    def _move_center(self, site: int, direction: Direction) -> None:
        environments = self._environments
        left, out, in_, right = environments.core(site).shape
        neighbour = environments.core(site + direction)
        if direction == 1:
            q_XK, r_KR = linalg.qr(environments.core(site).reshape(-1, right))
            environments.set_core(site, q_XK.reshape(left, out, in_, -1))
            environments.set_core(site + 1, torch.tensordot(r_KR, neighbour, dims=1))
        else:
            q_YK, r_KL = linalg.qr(environments.core(site).reshape(left, -1).mT)
            environments.set_core(site, q_YK.mT.reshape(-1, out, in_, right))
            environments.set_core(site - 1, torch.tensordot(neighbour, r_KL.mT, dims=1))

    def _show(self, sites: tuple[int, ...], gain: float, truncation: float) -> None:
        if self._observer is not None:
            self._observer(
                LocalUpdate(
                    sites=sites,
                    cores=self.cores,
                    objective=self.objective,
                    gain=gain,
                    truncation=truncation,
                )
            )


def _merge_outside(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """All cores of one side merged, (left bond, outs, ins, right bond); a unit for no cores."""
    if not cores:
        return like.new_ones(1, 1, 1, 1)
    order: Merge = 0
    for site in range(1, len(cores)):
        order = (order, site)
    return merge_cores(cores, order)
