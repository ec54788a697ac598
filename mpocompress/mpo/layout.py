"""How a matrix is divided into sites.

A layout gives each site k an out dim o_k and an in dim i_k; the out dims multiply to the number
of rows, the in dims to the number of columns. Indices are row-major: the leftmost site is the most
significant. Legs of size 1 are allowed, so that one object covers a dense matrix (one site), the
truncated SVD ((out, 1), (1, in)), Kronecker products and the classical K-site MPO.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import SupportsIndex

from torch import Tensor, constant_pad_nd

from mpocompress.errors import BondDimError, LayoutError
from mpocompress.scalars import as_integer

_SITE = re.compile(r"(\d{1,9})x(\d{1,9})")


def _as_dim(dim: SupportsIndex) -> int:
    size = as_integer(dim)
    if size is None:
        raise LayoutError(f"{dim!r} is not the size of a site; sizes are integers of at least 1.")
    return size


@dataclass(frozen=True, slots=True)
class Layout:
    """The out and in dims of every site, leftmost most significant.

    Args:
        out_dims: rows per site, each at least 1.
        in_dims: columns per site, each at least 1; as many as `out_dims`.
        pad: allow a matrix that is smaller than the products; it is padded with zeros, and the
            padding is cut off again wherever the matrix is read.

    Raises:
        LayoutError: no site, unequal numbers of out and in dims, or a dim below 1.
    """

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    pad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_dims", tuple(_as_dim(dim) for dim in self.out_dims))
        object.__setattr__(self, "in_dims", tuple(_as_dim(dim) for dim in self.in_dims))
        if not self.out_dims or len(self.out_dims) != len(self.in_dims):
            raise LayoutError(
                f"out_dims {self.out_dims} and in_dims {self.in_dims} must be equally long and not "
                "empty: one pair (out, in) a site. Use 1 for a site without that leg."
            )
        if min(*self.out_dims, *self.in_dims) < 1:
            raise LayoutError(
                f"out_dims {self.out_dims}, in_dims {self.in_dims}: every dim must be at least 1."
            )

    @classmethod
    def from_pairs(cls, pairs: Iterable[Iterable[int]], *, pad: bool = False) -> "Layout":
        """Make a layout from (out, in) pairs, one a site."""
        sites = [tuple(pair) for pair in pairs]
        for position, site in enumerate(sites):
            if len(site) != 2:
                raise LayoutError(
                    f"site {position} of {sites} has {len(site)} numbers; a site is a pair "
                    "(out, in), as in [(32, 28), (32, 28)]."
                )
        return cls(tuple(site[0] for site in sites), tuple(site[1] for site in sites), pad)

    @classmethod
    def parse(cls, text: str, *, pad: bool = False) -> "Layout":
        """Read a layout as written on the command line: "32x28,32x28", out x in per site.

        Raises:
            LayoutError: the text is not a comma-separated list of OUTxIN.
        """
        sites = []
        for part in text.split(","):
            match = _SITE.fullmatch(part.strip())
            if match is None:
                raise LayoutError(
                    f"cannot read {part.strip()!r} in layout {text!r}: write OUTxIN for each site, "
                    "separated by commas, as in 32x28,32x28."
                )
            sites.append((int(match[1]), int(match[2])))
        return cls.from_pairs(sites, pad=pad)

    @classmethod
    def svd(cls, out_features: int, in_features: int) -> "Layout":
        """The degenerate layout ((out, 1), (1, in)): its MPOs are truncated SVDs."""
        return cls((out_features, 1), (1, in_features))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each site."""
        return tuple(zip(self.out_dims, self.in_dims, strict=True))

    @property
    def is_svd(self) -> bool:
        """Whether it is ((out, 1), (1, in)), padded or not: its MPOs are truncated SVDs."""
        return self.num_sites == 2 and self.in_dims[0] == 1 and self.out_dims[1] == 1

    @property
    def num_sites(self) -> int:
        """Number of sites L; there are L - 1 bonds."""
        return len(self.out_dims)

    @property
    def out_features(self) -> int:
        """Product of the out dims: rows, padding included."""
        return prod(self.out_dims)

    @property
    def in_features(self) -> int:
        """Product of the in dims: columns, padding included."""
        return prod(self.in_dims)

    @property
    def transposed(self) -> "Layout":
        """The layout of the transposed matrix."""
        return Layout(self.in_dims, self.out_dims, self.pad)

    def max_bond_dims(self) -> tuple[int, ...]:
        """Maximal bond dim of each bond: nothing is cut at it."""
        sizes = [out * in_ for out, in_ in self.pairs]
        left = list(accumulate(sizes, mul))
        total = left[-1]
        return tuple(min(size, total // size) for size in left[:-1])

    def clip(self, bond_dims: Iterable[int]) -> tuple[int, ...]:
        """Bond dims limited to what this layout can carry, bond by bond.

        A core of (L, o, i, R) cannot use more than L*o*i states to its right, nor R*o*i to its
        left; so a small bond limits its neighbours, too.

        Raises:
            BondDimError: another number of bond dims than bonds.
        """
        bond_dims = tuple(bond_dims)
        if len(bond_dims) != self.num_sites - 1:
            raise BondDimError(
                f"bond dims {bond_dims}: a layout of {self.num_sites} sites has "
                f"{self.num_sites - 1} bonds, but {len(bond_dims)} were given."
            )
        bonds = [1, *map(min, zip(bond_dims, self.max_bond_dims(), strict=True)), 1]
        sizes = [out * in_ for out, in_ in self.pairs]
        for k in range(1, len(bonds) - 1):
            bonds[k] = min(bonds[k], bonds[k - 1] * sizes[k - 1])
        for k in range(len(bonds) - 2, 0, -1):
            bonds[k] = min(bonds[k], bonds[k + 1] * sizes[k])
        return tuple(bonds[1:-1])

    def num_parameters(self, bond_dims: Iterable[int]) -> int:
        """Entries of all cores at these bond dims."""
        bonds = (1, *bond_dims, 1)
        return sum(bonds[k] * out * in_ * bonds[k + 1] for k, (out, in_) in enumerate(self.pairs))

    def degrees_of_freedom(self, bond_dims: Iterable[int]) -> int:
        """Numbers that say something about the matrix: `num_parameters` less the gauge.

        A bond of dimension D may carry any invertible D x D matrix and its inverse, so D^2 of the
        stored numbers are free. Bond dims beyond what the layout can carry add nothing.

        Raises:
            BondDimError: another number of bond dims than bonds.

        Source: Holtz, Rohwedder, Schneider, Numerische Mathematik 120 (2012) 701, theorem 1.
        """
        bonds = self.clip(bond_dims)
        return self.num_parameters(bonds) - sum(bond**2 for bond in bonds)

    def check(self, shape: tuple[int, int]) -> None:
        """Check that this layout divides a matrix of `shape` (out, in).

        Raises:
            LayoutError: the products differ from the shape, or, with `pad`, are smaller.
        """
        for side, dims, size in (
            ("out", self.out_dims, shape[0]),
            ("in", self.in_dims, shape[1]),
        ):
            product = prod(dims)
            if size < 1:
                raise LayoutError(f"a matrix of shape {shape[0]}x{shape[1]} is empty.")
            if product == size or (self.pad and product > size):
                continue
            advice = (
                f"Enlarge a dim until the product is at least {size}."
                if product < size
                else f"Divide {size} exactly, or allow padding with Layout(..., pad=True)."
            )
            raise LayoutError(
                f"layout {self}: {side}_dims {dims} multiply to {product}, but the matrix of shape "
                f"{shape[0]}x{shape[1]} has {size} on its {side} side. {advice}"
            )

    def split(self, matrix_OI: Tensor) -> Tensor:
        """Reorder a matrix (out, in) into one index per site, (o_1*i_1, ..., o_L*i_L).

        Raises:
            LayoutError: the layout does not fit the matrix.
        """
        shape = (int(matrix_OI.shape[0]), int(matrix_OI.shape[1]))
        self.check(shape)
        missing = (self.out_features - shape[0], self.in_features - shape[1])
        if any(missing):
            matrix_OI = constant_pad_nd(matrix_OI, [0, missing[1], 0, missing[0]])
        sites = self.num_sites
        order = [index for k in range(sites) for index in (k, sites + k)]
        tensor = matrix_OI.reshape(*self.out_dims, *self.in_dims).permute(order)
        return tensor.reshape([out * in_ for out, in_ in self.pairs])

    def join(self, tensor: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Inverse of `split`: one index per site to the matrix (out, in), padding cut off."""
        sites = self.num_sites
        interleaved = tensor.reshape([dim for pair in self.pairs for dim in pair])
        order = [*range(0, 2 * sites, 2), *range(1, 2 * sites, 2)]
        matrix_OI = interleaved.permute(order).reshape(self.out_features, self.in_features)
        return matrix_OI if shape is None else matrix_OI[: shape[0], : shape[1]]

    def __str__(self) -> str:
        return ",".join(f"{out}x{in_}" for out, in_ in self.pairs)


LayoutLike = Layout | Sequence[tuple[int, int]] | str
"""What a caller may give as a layout: see `as_layout`."""


def as_layout(layout: LayoutLike) -> Layout:
    """A `Layout` from one, from (out, in) pairs, or from text such as "32x28,32x28".

    Raises:
        LayoutError: it cannot be read.
    """
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, str):
        return Layout.parse(layout)
    try:
        return Layout.from_pairs(layout)
    except TypeError:
        raise LayoutError(
            f"layout {layout!r}: give a Layout, (out, in) pairs as in [(32, 28), (32, 28)], or "
            'text as in "32x28,32x28".'
        ) from None
