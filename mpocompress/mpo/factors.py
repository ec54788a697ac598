"""Balanced layouts: ordered factorizations of the two sides of a matrix."""

from functools import cache
from math import log, prod
from typing import SupportsIndex

from mpocompress.errors import LayoutError
from mpocompress.mpo.layout import Layout, LayoutLike, as_layout
from mpocompress.scalars import as_count


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


@cache
def balanced_factors(number: int, parts: int) -> tuple[int, ...]:
    """`parts` factors of `number`, as equal as its divisors allow, descending.

    Equal in the sense of the smallest sum of squared logarithms; a prime gives (p, 1, ...).
    """
    best: tuple[float, tuple[int, ...]] | None = None

    def extend(rest: int, chosen: tuple[int, ...], cost: float) -> None:
        nonlocal best
        if best is not None and cost >= best[0]:
            return
        left = parts - len(chosen)
        if left == 1:
            if not chosen or rest <= chosen[-1]:
                total = cost + log(rest) ** 2
                if best is None or total < best[0]:
                    best = (total, (*chosen, rest))
            return
        smallest = rest ** (1 / left) - 1e-9  # the largest of what is left is at least the mean
        for factor in reversed(divisors(rest)):
            if factor < smallest:
                break
            if not chosen or factor <= chosen[-1]:
                extend(rest // factor, (*chosen, factor), cost + log(factor) ** 2)

    extend(number, (), 0.0)
    if best is None:  # the last factor always closes some chain: (number, 1, ..., 1)
        raise LayoutError(f"{number} has no factorization into {parts} parts.")
    return best[1]


def check_sites(sites: SupportsIndex) -> int:
    """A number of sites, as a plain integer.

    Raises:
        LayoutError: fewer than one, or no integer.
    """
    return as_count("sites", sites, 1, LayoutError)


def _prime_factors(number: int) -> int:
    count, prime = 0, 2
    while prime * prime <= number:
        if number % prime:
            prime += 1
        else:
            number //= prime
            count += 1
    return count + (number > 1)


def balanced_layout(out_features: int, in_features: int, sites: int = 2) -> Layout:
    """A layout of `sites` sites whose sizes out_k * in_k are as equal as the divisors allow.

    Large out dims meet small in dims. Primes leave legs of size 1, which is allowed.

    Raises:
        LayoutError: fewer than one site, or an empty matrix.
    """
    sites = check_sites(sites)
    if out_features < 1 or in_features < 1:
        raise LayoutError(f"a matrix of {out_features}x{in_features} is empty.")
    outs = list(balanced_factors(out_features, sites))
    ins = sorted(balanced_factors(in_features, sites))
    # The largest sites stand in the middle: bonds are widest there, so they cost the same anyway,
    # while a large outer site would raise the maximal bond dimension of its neighbours.
    pairs = sorted(zip(outs, ins, strict=True), key=prod)
    left, right = pairs[0::2], pairs[1::2]
    return Layout.from_pairs([*left, *reversed(right)])


def carrying_layout(out_features: int, in_features: int, sites: int) -> Layout:
    """The balanced layout of so many sites, if all of them carry something.

    Raises:
        LayoutError: some would have size 1x1; the message says how many sites would not.
    """
    most = min(sites, _prime_factors(out_features) + _prime_factors(in_features))
    for fewer in range(most, 1, -1):
        found = balanced_layout(out_features, in_features, fewer)
        if (1, 1) not in found.pairs:
            break
    else:
        fewer, found = 1, balanced_layout(out_features, in_features, 1)
    if fewer < sites:
        raise LayoutError(
            f"{out_features}x{in_features} has no factors for {sites} sites: some would be 1x1 and "
            f"carry nothing. Try {fewer}."
        )
    return found


def resolve_layout(layout: LayoutLike, out_features: int, in_features: int) -> Layout:
    """The layout that a name, pairs or text means for a matrix of this shape.

    Args:
        layout: "svd", "balanced" (two sites), or anything that `as_layout` takes.
        out_features: rows.
        in_features: columns.

    Raises:
        LayoutError: it cannot be read, or does not fit the shape.
    """
    if layout == "svd":
        return Layout.svd(out_features, in_features)
    if layout == "balanced":
        return balanced_layout(out_features, in_features)
    found = as_layout(layout)
    found.check((out_features, in_features))
    return found
