"""The gradient of a loss with respect to one core of a chain, by hand-written contractions.

With y = W x for every row of a batch and g the gradient of the loss at y, the gradient of the loss
with respect to core k is the network of x, g and all other cores, summed over the rows and over
every index but the four of core k:

    x (rows, i_1 ... i_L),  g (rows, o_1 ... o_L),  cores j != k (b_j, o_j, i_j, b_j+1).

Contracting x with g first would form the dense gradient of W; with few rows, or sites far from the
middle, other orders are cheaper by orders of magnitude. As x and g alone share the index of the
rows, every step of every order is one matrix product, so the orders can be compared by their
multiply-adds: exactly, over all orders, up to eight tensors, greedily beyond.

The open core may stand for two merged neighbours: their legs are neighbours in x and g, too.
"""

# Shape suffixes: N rows, I input features, O output features of the layer; LOIR of the open core.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, constant_pad_nd

from mpocompress.errors import ContractionError
from mpocompress.mpo.algebra import transpose_cores
from mpocompress.mpo.contract import apply_cores
from mpocompress.mpo.cores import Cores, bond_dims_of, check_cores, layout_of
from mpocompress.mpo.layout import Layout
from mpocompress.mpo.linalg import working_dtype

# 3^8 pairs of disjoint subsets take some milliseconds to compare, once for a shape.
_MAX_EXACT = 8

_X, _G = 0, 1  # positions of the two batch tensors in a network; frozen cores follow

Tree = int | tuple["Tree", "Tree"]
"""A tensor of the network, or two trees that are contracted with each other."""


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """In which order the network of a core's gradient is contracted.

    Attributes:
        tree: over x (0), the gradient at the output (1) and the frozen cores (2, 3, ...).
        fixed_macs: multiply-adds among frozen cores, which need be done once only.
        macs: multiply-adds for each batch.
    """

    tree: Tree
    fixed_macs: int
    macs: int


@dataclass(frozen=True, slots=True)
class _Network:
    """Indices of each tensor, numbered, as bit masks; `outer` are those of the open core."""

    tensors: tuple[int, ...]
    sizes: tuple[int, ...]
    outer: int

    def size(self, indices: int) -> int:
        return prod(size for index, size in enumerate(self.sizes) if indices >> index & 1)

    def open_indices(self, members: int) -> int:
        """What is left of the indices once the tensors `members` (a bit mask) are contracted."""
        inside, outside = 0, self.outer
        for number, indices in enumerate(self.tensors):
            if members >> number & 1:
                inside |= indices
            else:
                outside |= indices
        return inside & outside


def _network(layout: Layout, bond_dims: Sequence[int], site: int, rows: int) -> _Network:
    """Index 0 is that of the rows, then per site k: out 3k+1, in 3k+2, right bond 3k+3."""
    sizes = [rows]
    for (out, in_), right in zip(layout.pairs, (*bond_dims, 1), strict=True):
        sizes += [out, in_, right]
    x = g = 1
    cores = []
    for k in range(layout.num_sites):
        g |= 1 << 3 * k + 1
        x |= 1 << 3 * k + 2
        left = 1 << 3 * k if k else 0
        right = 1 << 3 * k + 3 if k < layout.num_sites - 1 else 0
        cores.append(left | 1 << 3 * k + 1 | 1 << 3 * k + 2 | right)
    outer = cores.pop(site)
    return _Network((x, g, *cores), tuple(sizes), outer)


@lru_cache(maxsize=4096)
def plan_gradient(
    layout: Layout, bond_dims: tuple[int, ...], site: int, rows: int, calls: int = 1
) -> GradientPlan:
    """The order with the fewest multiply-adds for the gradient of the core at `site`.

    Args:
        layout: of the chain; two merged neighbours count as one site.
        bond_dims: the inner bonds.
        site: of the open core.
        rows: of the batch.
        calls: for so many batches the frozen cores stay as they are.
    """
    network = _network(layout, bond_dims, site, rows)
    count = len(network.tensors)
    tree = _exact(network, calls) if count <= _MAX_EXACT else _greedy(network)
    fixed, each = _macs(network, tree)
    return GradientPlan(tree, fixed, each)


def _exact(network: _Network, calls: int) -> Tree:
    """Dynamic programming over all subsets of the tensors."""
    count = len(network.tensors)
    batch = 1 << _X | 1 << _G
    best: dict[int, tuple[int, Tree]] = {1 << number: (0, number) for number in range(count)}
    left_open = [network.open_indices(members) for members in range(1 << count)]
    for members in range(1, 1 << count):
        if members in best:
            continue
        lowest = members & -members
        found: tuple[int, Tree] | None = None
        part = (members - 1) & members
        while part:
            if part & lowest:  # every split once
                other = members ^ part
                macs = network.size(left_open[part] | left_open[other])
                weight = calls if members & batch else 1
                total = best[part][0] + best[other][0] + weight * macs
                if found is None or total < found[0]:
                    found = (total, (best[part][1], best[other][1]))
            part = (part - 1) & members
        if found is None:
            raise ContractionError(f"the subset {members:b} of a network cannot be divided.")
        best[members] = found
    return best[(1 << count) - 1][1]


def _greedy(network: _Network) -> Tree:
    """Always the pair of connected tensors whose product grows least."""
    parts: dict[int, Tree] = {1 << number: number for number in range(len(network.tensors))}
    while len(parts) > 1:
        options = []
        masks = list(parts)
        for position, first in enumerate(masks):
            for second in masks[position + 1 :]:
                a, b = network.open_indices(first), network.open_indices(second)
                growth = network.size(network.open_indices(first | second))
                growth -= network.size(a) + network.size(b)
                options.append((not a & b, growth, network.size(a | b), first, second))
        *_, first, second = min(options)
        parts[first | second] = (parts.pop(first), parts.pop(second))
    return next(iter(parts.values()))


def _members(tree: Tree) -> int:
    return 1 << tree if isinstance(tree, int) else _members(tree[0]) | _members(tree[1])


def _macs(network: _Network, tree: Tree) -> tuple[int, int]:
    """Multiply-adds among frozen cores, and those that a batch takes part in."""
    if isinstance(tree, int):
        return 0, 0
    fixed_a, each_a = _macs(network, tree[0])
    fixed_b, each_b = _macs(network, tree[1])
    first, second = _members(tree[0]), _members(tree[1])
    macs = network.size(network.open_indices(first) | network.open_indices(second))
    if (first | second) & (1 << _X | 1 << _G):
        return fixed_a + fixed_b, each_a + each_b + macs
    return fixed_a + fixed_b + macs, each_a + each_b


class OpenCore:
    """A chain of which one core is open and all others are frozen.

    Args:
        cores: the chain; the core at `site` only says which shape the open one has. For two open
            neighbours give the chain in which they are merged (`contract.merge_cores`).
        site: of the open core.
        shape: (out, in) of the matrix; what the sites have beyond it is padding.
        calls: for about so many batches the frozen cores stay as they are; products among them are
            made once and kept.

    Raises:
        ContractionError: the cores do not form a chain, or there is no such site.
        LayoutError: the shape is larger than what the sites multiply to.
    """

    def __init__(
        self,
        cores: Sequence[Tensor],
        site: int,
        *,
        shape: tuple[int, int] | None = None,
        calls: int = 1,
    ) -> None:
        check_cores(cores)
        if not 0 <= site < len(cores):
            raise ContractionError(
                f"open core {site}: the sites of this chain are 0 to {len(cores) - 1}."
            )
        self._cores: Cores = tuple(core.detach() for core in cores)
        self._site = site
        self._layout = layout_of(cores, pad=True)
        self._bond_dims = bond_dims_of(cores)
        self.shape = shape or (self._layout.out_features, self._layout.in_features)
        self._layout.check(self.shape)
        self._calls = calls
        self._kept: dict[Tree, Tensor] = {}

    def chain(self, core_LOIR: Tensor) -> Cores:
        """The whole chain with this core in the open place."""
        return (*self._cores[: self._site], core_LOIR, *self._cores[self._site + 1 :])

    def apply(self, core_LOIR: Tensor, x: Tensor) -> Tensor:
        """W x with this core: (..., in) to (..., out); differentiable in the core and in x."""
        return apply_cores(self.chain(core_LOIR), x, shape=self.shape)

    def apply_transposed(self, core_LOIR: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the input, W^T g: (..., out) to (..., in)."""
        cores = transpose_cores(self.chain(core_LOIR))
        return apply_cores(cores, gradient, shape=(self.shape[1], self.shape[0]))

    def plan(self, rows: int) -> GradientPlan:
        """How the gradient is contracted for a batch of so many rows."""
        return plan_gradient(self._layout, self._bond_dims, self._site, rows, self._calls)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the loss with respect to the open core; it does not depend on that core.

        Args:
            x: input of the layer, (..., in).
            gradient: of the loss at the layer's output (without bias), (..., out).

        Returns:
            (left bond, out, in, right bond) in the dtype of the cores. Half types are summed in
            float32.

        Raises:
            ContractionError: shapes that do not belong to this chain, or to each other.
        """
        out_features, in_features = self.shape
        if (
            x.ndim == 0
            or gradient.ndim == 0
            or x.shape[:-1] != gradient.shape[:-1]
            or (x.shape[-1], gradient.shape[-1]) != (in_features, out_features)
        ):
            raise ContractionError(
                f"input of shape {tuple(x.shape)} and gradient of shape {tuple(gradient.shape)}: "
                f"this layer needs (..., {in_features}) and (..., {out_features}) with equal "
                "leading dimensions."
            )
        core = self._cores[self._site]
        rows = prod(x.shape[:-1])
        if rows == 0:
            return torch.zeros_like(core)
        dtype = working_dtype(core.dtype)
        network = _network(self._layout, self._bond_dims, self._site, rows)
        operands = [
            _with_legs(x, rows, self._layout.in_dims, dtype),
            _with_legs(gradient, rows, self._layout.out_dims, dtype),
        ]
        for site, frozen in enumerate(self._cores):
            if site != self._site:
                first, last = site == 0, site == len(self._cores) - 1
                legs = frozen.shape[int(first) : 3 if last else 4]
                operands.append(frozen.to(dtype).reshape(legs))
        found = self._contract(network, operands, self.plan(rows).tree)
        order = sorted(found.indices)
        dims = [found.indices.index(index) for index in order]
        return found.tensor.permute(dims).contiguous().reshape(core.shape).to(core.dtype)

    def _contract(self, network: _Network, operands: list[Tensor], tree: Tree) -> "_Labelled":
        members = _members(tree)
        indices = tuple(
            index
            for index in range(len(network.sizes))
            if network.open_indices(members) >> index & 1
        )
        if isinstance(tree, int):
            own = network.tensors[tree]
            return _Labelled(
                operands[tree], tuple(i for i in range(len(network.sizes)) if own >> i & 1)
            )
        frozen = not members & (1 << _X | 1 << _G)
        if frozen and tree in self._kept:
            return _Labelled(self._kept[tree], indices)
        a = self._contract(network, operands, tree[0])
        b = self._contract(network, operands, tree[1])
        shared = [index for index in a.indices if index in b.indices]
        product = torch.tensordot(
            a.tensor,
            b.tensor,
            dims=([a.indices.index(i) for i in shared], [b.indices.index(i) for i in shared]),
        )
        order = [index for index in (*a.indices, *b.indices) if index not in shared]
        result = _Labelled(product, tuple(order))
        if frozen:
            kept = product.permute([order.index(index) for index in indices])
            self._kept[tree] = kept
            return _Labelled(kept, indices)
        return result


@dataclass(frozen=True, slots=True)
class _Labelled:
    tensor: Tensor
    indices: tuple[int, ...]


def _with_legs(rows_NF: Tensor, rows: int, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat_NF = rows_NF.detach().to(dtype).reshape(rows, rows_NF.shape[-1])
    missing = prod(dims) - flat_NF.shape[1]
    if missing:
        flat_NF = constant_pad_nd(flat_NF, [0, missing])
    return flat_NF.reshape(rows, *dims)


def core_gradient(
    cores: Sequence[Tensor],
    site: int,
    x: Tensor,
    gradient: Tensor,
    *,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """The gradient of a loss with respect to one core of a layer y = W x.

    Args:
        cores: the chain, each (left bond, out, in, right bond).
        site: of the core.
        x: input of the layer, (..., in).
        gradient: of the loss at its output, (..., out).
        shape: (out, in) of the matrix if the sites multiply to more.

    Returns:
        Like the core.

    Raises:
        ContractionError: shapes that do not contract, or no such site.
        LayoutError: the shape is larger than what the sites multiply to.

    Source: Jahromi, Orús, arXiv 2211.14657, section on the variational update.
    """
    return OpenCore(cores, site, shape=shape).gradient(x, gradient)
