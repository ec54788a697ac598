"""Contracting a chain with a batch, in the order that costs the fewest multiply-adds.

Every step is one matrix product on a tensor of rank 3 at most, and no step transposes data: a
state keeps its indices in an order such that the legs of the next core are neighbours.

* *Outside-in*: the state is (M, L, N, R, P): outputs M done on the left, left bond L, inputs N
  open, right bond R, outputs P done on the right. The leftmost open core takes (L, i) to (o, L'),
  the rightmost takes (i, R) to (R', o); the last core closes both bonds.
* *Inside-out*: the state is (N, L, M, R, P): a block of outputs M done in the middle between open
  inputs N (left) and P (right). It begins at some core and grows to either side.

Neighbouring cores may be merged first ("build W" merges all of them): that costs the same for any
batch, so the best choice depends on the number of rows. All choices are reduced to lines
`fixed + rows * per_row` once for a chain, and the lower envelope is read for a batch.
"""

# Shape suffixes: B batch rows, L left bond, O out, I in, R right bond.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, constant_pad_nd

from mpocompress.errors import ContractionError
from mpocompress.mpo.cores import bond_dims_of, layout_of
from mpocompress.mpo.repeated_product import repeated_product

# Every subset of bonds may be merged: 2^(L-1) groupings. Longer chains consider none and all.
_MAX_SITES_FOR_GROUPING = 7


Merge = int | tuple["Merge", "Merge"]
"""A site, or two runs of sites that are merged into one core, in the order of their products."""


# Batches whose states would be larger than this pass in pieces. Blocks above 32 MiB glibc's malloc
# gives back to the kernel, and each is faulted in anew, zeroed, page by page. A step of training of
# a layer of width 65,536 went from 590 to 310 ms, of 1024 x 1024 layers with 2,000 rows from 230 to
# 120 ms.
_STATE_BYTES = 16 << 20
# Plans that are remembered: a search for bond dimensions asks for those of very many sizes.
_PLANS = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """One matrix product: `weight @ state`, with the state seen as (rows, contracted, columns).

    Attributes:
        group: which group of merged cores is contracted.
        order: axes of the (L, O, I, R) core that come first in the weight's matrix.
        produced: rows of the weight, the product of those axes.
        contracted: columns of the weight.
        rows: how often the product is repeated for one row of the batch.
        columns: trailing size that the product carries along.
    """

    group: int
    order: tuple[int, ...]
    produced: int
    contracted: int
    rows: int
    columns: int

    @property
    def macs(self) -> int:
        """Multiply-adds for one row of the batch."""
        return self.produced * self.contracted * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class ContractionPlan:
    """Which cores are merged beforehand, then in which order the groups meet the batch.

    Attributes:
        groups: the sites, or runs of merged sites, left to right.
        steps: one per group.
        fixed_macs: multiply-adds of the merging, once for a batch.
        macs_per_row: multiply-adds of the steps for each row of the batch.
    """

    groups: tuple[Merge, ...]
    steps: tuple[Step, ...]
    fixed_macs: int
    macs_per_row: int

    @property
    def widest(self) -> int:
        """Numbers of the largest state that one row of the batch becomes on its way."""
        return max(step.produced * step.rows * step.columns for step in self.steps)

    @property
    def builds_matrix(self) -> bool:
        """Whether the whole matrix is rebuilt before it meets the batch."""
        return len(self.groups) == 1

    def macs(self, rows: int) -> int:
        """Multiply-adds for a batch of `rows` rows."""
        return self.fixed_macs + rows * self.macs_per_row


@dataclass(frozen=True, slots=True)
class ContractionPlans:
    """All undominated plans of a chain, ascending in fixed cost; the first merges nothing."""

    plans: tuple[ContractionPlan, ...]

    @property
    def chain(self) -> ContractionPlan:
        """The plan without merging: the only one whose order is independent of the batch."""
        return self.plans[0]

    def best(self, rows: int) -> ContractionPlan:
        """The cheapest plan for a batch of `rows` rows."""
        cheapest = self.plans[0]  # a plain loop: torch.compile traces it, min(key=...) it does not
        for plan in self.plans[1:]:
            if plan.macs(rows) < cheapest.macs(rows):
                cheapest = plan
        return cheapest

    def for_call(self, rows: int) -> ContractionPlan:
        """The cheapest; in an exported graph, which is for any batch, the one without merging."""
        return self.chain if torch.compiler.is_exporting() else self.best(rows)


@dataclass(frozen=True, slots=True)
class _Chain:
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bonds: tuple[int, ...]  # with the outer ones: core k sits between bonds[k] and bonds[k + 1]


@lru_cache(maxsize=_PLANS)
def plan_contractions(
    out_dims: tuple[int, ...], in_dims: tuple[int, ...], bond_dims: tuple[int, ...]
) -> ContractionPlans:
    """All undominated ways to contract a chain of these sizes with a batch.

    Args:
        out_dims: out dim of each of L sites.
        in_dims: in dim of each of L sites.
        bond_dims: the L - 1 inner bond dimensions.
    """
    chain = _Chain(out_dims, in_dims, (1, *bond_dims, 1))
    plans = [_plan_groups(chain, groups) for groups in _groupings(len(out_dims))]
    plans.sort(key=lambda plan: (plan.fixed_macs, plan.macs_per_row))
    kept: list[ContractionPlan] = []
    for plan in plans:
        if not kept or plan.macs_per_row < kept[-1].macs_per_row:
            kept.append(plan)
    return ContractionPlans(tuple(kept))


def plans_for(cores: Sequence[Tensor]) -> ContractionPlans:
    """`plan_contractions` for the sizes of these cores."""
    layout = layout_of(cores)
    return plan_contractions(layout.out_dims, layout.in_dims, bond_dims_of(cores))


def apply_cores(
    cores: Sequence[Tensor],
    x: Tensor,
    *,
    shape: tuple[int, int],
    plan: ContractionPlan | None = None,
) -> Tensor:
    """W x for every row of a batch: (..., in) to (..., out), differentiable in cores and x.

    Args:
        cores: the chain.
        x: in features last.
        shape: (out, in) of the matrix; what the sites have beyond it is padding.
        plan: how to contract; default: the cheapest for this number of rows.

    Raises:
        ContractionError: the last dimension of x is not the number of inputs.
    """
    out_features, in_features = shape
    if x.ndim == 0 or x.shape[-1] != in_features:
        last = f"its last dimension is {x.shape[-1]}" if x.ndim else "it has no dimensions"
        raise ContractionError(
            f"input of shape {tuple(x.shape)}: {last}, but the MPO has {in_features} inputs. "
            f"Transpose or reshape the input to (..., {in_features})."
        )
    lead = x.shape[:-1]
    if plan is None:
        plan = plans_for(cores).best(prod(lead))
    # Made once for all parts: merged cores may be as large as the dense weight.
    weights = [_as_matrix(merge_cores(cores, plan.groups[step.group]), step) for step in plan.steps]
    padded = (prod([core.shape[1] for core in cores]), prod([core.shape[2] for core in cores]))
    # A graph is for batches of any size; a single product has no state in between.
    if len(plan.steps) > 1 and not torch.compiler.is_compiling():
        at_once = max(1, _STATE_BYTES // (plan.widest * x.element_size()))
        if prod(lead) > at_once:
            parts_NI = x.reshape(-1, in_features).split(at_once)
            parts = [_apply_steps(plan, weights, part, shape, padded) for part in parts_NI]
            return torch.cat(parts).reshape(*lead, out_features)
    return _apply_steps(plan, weights, x, shape, padded)


def _apply_steps(
    plan: ContractionPlan,
    weights: Sequence[Tensor],
    x: Tensor,
    shape: tuple[int, int],
    padded: tuple[int, int],
) -> Tensor:
    """`apply_cores` with the matrix of each step; `padded` is the shape with its padding."""
    (out_features, in_features), (padded_out, padded_in) = shape, padded
    lead = x.shape[:-1]
    state = constant_pad_nd(x, [0, padded_in - in_features]) if padded_in > in_features else x
    flat = False  # whether the leading dimensions have been folded into one
    for step, weight in zip(plan.steps, weights, strict=True):
        if step.columns == 1:
            # An ordinary matrix product; without repetition it needs no reshape at all.
            if flat or step.rows != 1:
                state = state.reshape(-1, step.contracted)
                flat = True
            state = state @ weight.mT
        else:
            state = repeated_product(weight, state.reshape(-1, step.contracted, step.columns))
            flat = True
    if flat:
        state = state.reshape(*lead, padded_out)
    return state[..., :out_features] if padded_out > out_features else state


def _as_matrix(core_LOIR: Tensor, step: Step) -> Tensor:
    rest = tuple(axis for axis in range(4) if axis not in step.order)
    return core_LOIR.permute(*step.order, *rest).reshape(step.produced, step.contracted)


def merge_cores(cores: Sequence[Tensor], merge: Merge) -> Tensor:
    """Contract a run of neighbouring cores into one (left bond, prod out, prod in, right bond)."""
    if isinstance(merge, int):
        return cores[merge]
    left_LOIK, right_KOIR = merge_cores(cores, merge[0]), merge_cores(cores, merge[1])
    left, out_a, in_a, bond = left_LOIK.shape
    _, out_b, in_b, right = right_KOIR.shape
    product = left_LOIK.reshape(-1, bond) @ right_KOIR.reshape(bond, -1)
    product = product.reshape(left, out_a, in_a, out_b, in_b, right).permute(0, 1, 3, 2, 4, 5)
    return product.reshape(left, out_a * out_b, in_a * in_b, right)


@lru_cache(maxsize=_PLANS)
def _cheapest_merge(chain: _Chain, first: int, last: int) -> tuple[int, Merge]:
    """Multiply-adds and order of the cheapest merge of the sites first..last."""
    if first == last:
        return 0, first
    sizes = [out * in_ for out, in_ in zip(chain.out_dims, chain.in_dims, strict=True)]
    outer = chain.bonds[first] * prod(sizes[first : last + 1]) * chain.bonds[last + 1]
    options: list[tuple[int, Merge]] = []
    for split in range(first + 1, last + 1):
        left_macs, left = _cheapest_merge(chain, first, split - 1)
        right_macs, right = _cheapest_merge(chain, split, last)
        options.append((left_macs + right_macs + outer * chain.bonds[split], (left, right)))
    return min(options, key=lambda option: option[0])


def _groupings(sites: int) -> list[tuple[tuple[int, int], ...]]:
    single = tuple((k, k) for k in range(sites))
    if sites > _MAX_SITES_FOR_GROUPING:
        return [single, ((0, sites - 1),)]
    found = []
    for mask in range(1 << (sites - 1)):
        cuts = [0, *(k + 1 for k in range(sites - 1) if not mask >> k & 1), sites]
        found.append(tuple((a, b - 1) for a, b in pairwise(cuts)))
    return found


def _plan_groups(chain: _Chain, groups: tuple[tuple[int, int], ...]) -> ContractionPlan:
    merges = [_cheapest_merge(chain, first, last) for first, last in groups]
    merged = _Chain(
        tuple(prod(chain.out_dims[first : last + 1]) for first, last in groups),
        tuple(prod(chain.in_dims[first : last + 1]) for first, last in groups),
        (*(chain.bonds[first] for first, _ in groups), 1),
    )
    steps = min(
        (_outside_in(merged), _inside_out(merged)),
        key=lambda path: sum(step.macs for step in path),
    )
    return ContractionPlan(
        groups=tuple(merge for _, merge in merges),
        steps=steps,
        fixed_macs=sum(macs for macs, _ in merges),
        macs_per_row=sum(step.macs for step in steps),
    )


Path = tuple[int, tuple[Step, ...]]


def _outside_in(chain: _Chain) -> tuple[Step, ...]:
    """Cheapest interleaving of left and right steps, by dynamic programming over open intervals."""
    sites = len(chain.out_dims)

    @cache
    def best(first: int, last: int) -> Path:
        outs, ins, bonds = chain.out_dims, chain.in_dims, chain.bonds
        done_left, done_right = prod(outs[:first]), prod(outs[last + 1 :])
        left, right = bonds[first], bonds[last + 1]
        if first == last:
            # (L, i, R) are neighbours now: close the chain.
            step = Step(first, (1,), outs[first], left * ins[first] * right, done_left, done_right)
            return step.macs, (step,)
        step = Step(
            first,
            (1, 3),
            outs[first] * bonds[first + 1],
            left * ins[first],
            done_left,
            prod(ins[first + 1 : last + 1]) * right * done_right,
        )
        macs, steps = best(first + 1, last)
        from_left = (step.macs + macs, (step, *steps))
        step = Step(
            last,
            (0, 1),
            bonds[last] * outs[last],
            ins[last] * right,
            done_left * left * prod(ins[first:last]),
            done_right,
        )
        macs, steps = best(first, last - 1)
        from_right = (step.macs + macs, (step, *steps))
        return min(from_left, from_right, key=lambda path: path[0])

    return best(0, sites - 1)[1]


def _inside_out(chain: _Chain) -> tuple[Step, ...]:
    """Cheapest growth of a block of done sites from any core, by dynamic programming."""
    sites = len(chain.out_dims)
    outs, ins, bonds = chain.out_dims, chain.in_dims, chain.bonds

    @cache
    def best(first: int, last: int) -> Path:
        """What remains to be done once the sites first..last are."""
        options: list[Path] = []
        done = prod(outs[first : last + 1])
        if first > 0:
            step = Step(
                first - 1,
                (0, 1),
                bonds[first - 1] * outs[first - 1],
                ins[first - 1] * bonds[first],
                prod(ins[: first - 1]),
                done * bonds[last + 1] * prod(ins[last + 1 :]),
            )
            macs, steps = best(first - 1, last)
            options.append((step.macs + macs, (step, *steps)))
        if last < sites - 1:
            step = Step(
                last + 1,
                (1, 3),
                outs[last + 1] * bonds[last + 2],
                bonds[last + 1] * ins[last + 1],
                prod(ins[:first]) * bonds[first] * done,
                prod(ins[last + 2 :]),
            )
            macs, steps = best(first, last + 1)
            options.append((step.macs + macs, (step, *steps)))
        return min(options, key=lambda path: path[0]) if options else (0, ())

    starts: list[Path] = []
    for site in range(sites):
        step = Step(
            site,
            (0, 1, 3),
            bonds[site] * outs[site] * bonds[site + 1],
            ins[site],
            prod(ins[:site]),
            prod(ins[site + 1 :]),
        )
        macs, steps = best(site, site)
        starts.append((step.macs + macs, (step, *steps)))
    return min(starts, key=lambda path: path[0])[1]
