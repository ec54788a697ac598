"""How entanglement grows with the cut: like an area, or like a volume.

The *capacity* of a cut is the largest entropy that it can have, the logarithm of its maximal bond
dimension: for sites of equal size it is proportional to the number of sites on the smaller side.
Under an area law the entropy stops growing with it, under a volume law it grows in proportion.
"""

from collections.abc import Sequence
from math import exp, inf, isfinite, log
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mpocompress.errors import DataError
from mpocompress.mpo.spectra import entropy_nats, renyi_entropy_nats

Verdict = Literal["area-law-like", "volume-law-like", "intermediate", "undetermined"]

# Exponents up to a third are called an area law, from two thirds on a volume law.
_AREA, _VOLUME = 1 / 3, 2 / 3
# Entropies below this, in nats, are rounding of a product.
_PRODUCT = 1e-6
# From here on ln n is the harmonic number less Euler's constant, to the last digit.
_LARGE = 2**53
# Cuts count from this share of the largest capacity on: near the ends everything grows.
_WIDE = 0.5


class Frozen(BaseModel):
    """Figures that do not change; JSON by `model_dump_json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Growth(Frozen):
    """The exponent a of entropy ~ capacity^a over the wider half of the cuts, and what it means.

    Attributes:
        exponent: least-squares slope of ln(entropy) over ln(capacity); None if undetermined.
        verdict: "area-law-like" for an exponent of at most 1/3, or without entanglement;
            "volume-law-like" from 2/3 on; "intermediate" between; "undetermined" if the cuts of at
            least half the largest capacity all have the same one.

    A word for what is seen, no proof: with few sites there are few cuts to fit, and the entropies
    of a random chain of small bonds fluctuate.
    """

    exponent: float | None
    verdict: Verdict


class EntropyProfile(Frozen):
    """Entanglement at every cut of a chain, from left to right.

    Attributes:
        schmidt_values: at every cut; descending, not squared, not normalized.
        entropies_nats: von Neumann entropy of their normalized squares.
        renyi_nats: order -> Rényi entropies.
        effective_bond_dims: exponential of `entropies_nats`.
        capacities_nats: the largest possible entropies, ln of the maximal bond dimensions.
        growth: with the cut.
    """

    schmidt_values: tuple[tuple[float, ...], ...]
    entropies_nats: tuple[float, ...]
    renyi_nats: dict[float, tuple[float, ...]]
    effective_bond_dims: tuple[float, ...]
    capacities_nats: tuple[float, ...]
    growth: Growth

    @property
    def filling(self) -> float:
        """Entropies over capacities, both summed over the cuts, in [0, 1]; 0 without a cut."""
        capacity = sum(self.capacities_nats)
        return sum(self.entropies_nats) / capacity if capacity > 0 else 0.0

    @property
    def peak_entropy_nats(self) -> float:
        """Largest of the von Neumann entropies; 0 without a cut."""
        return max(self.entropies_nats, default=0.0)


def profile_fields(
    spectra: Sequence[Tensor], max_bond_dims: Sequence[int], renyi_orders: Sequence[float]
) -> dict[str, object]:
    """The fields of an `EntropyProfile` from the Schmidt values of all cuts."""
    entropies = [entropy_nats(spectrum) for spectrum in spectra]
    capacities = [log(size) for size in max_bond_dims]
    return {
        "schmidt_values": [spectrum.tolist() for spectrum in spectra],
        "entropies_nats": entropies,
        "renyi_nats": {
            float(order): [renyi_entropy_nats(spectrum, order) for spectrum in spectra]
            for order in renyi_orders
        },
        "effective_bond_dims": [exp(entropy) for entropy in entropies],
        "capacities_nats": capacities,
        "growth": classify_growth(entropies, capacities),
    }


def classify_growth(entropies_nats: Sequence[float], capacities_nats: Sequence[float]) -> Growth:
    """Judge how the entropy grows with the capacity of the cut; see `Growth` for the criterion.

    Args:
        entropies_nats: at every cut.
        capacities_nats: the largest possible entropy at every cut.

    Raises:
        DataError: unequal numbers of them, or NaN or Inf.
    """
    numbers = (*entropies_nats, *capacities_nats)
    if len(entropies_nats) != len(capacities_nats) or not all(map(isfinite, numbers)):
        raise DataError(
            f"{len(entropies_nats)} entropies and {len(capacities_nats)} capacities: give one of "
            "each for every cut, finite."
        )
    largest = max(capacities_nats, default=0.0)
    wide = [
        (capacity, entropy)
        for capacity, entropy in zip(capacities_nats, entropies_nats, strict=True)
        if capacity >= _WIDE * largest * (1 - 1e-9) and capacity > 0
    ]
    spread = max((c for c, _ in wide), default=0.0) / min((c for c, _ in wide), default=inf)
    if spread < 1 + 1e-9:
        return Growth(exponent=None, verdict="undetermined")
    if max(entropy for _, entropy in wide) < _PRODUCT:
        return Growth(exponent=0.0, verdict="area-law-like")
    x_C = torch.tensor([log(c) for c, _ in wide], dtype=torch.float64, device="cpu")
    y_C = torch.tensor([log(max(s, _PRODUCT)) for _, s in wide], dtype=torch.float64, device="cpu")
    x_C = x_C - x_C.mean()
    exponent = float(x_C @ y_C / (x_C @ x_C))
    verdict: Verdict = "intermediate"
    if exponent <= _AREA:
        verdict = "area-law-like"
    elif exponent >= _VOLUME:
        verdict = "volume-law-like"
    return Growth(exponent=exponent, verdict=verdict)


def page_entropy_nats(left_dim: int, right_dim: int) -> float:
    """Mean entanglement entropy, in nats, of a Haar-random pure state of two complex systems.

    sum over k from n + 1 to m n of 1 / k, minus (m - 1) / (2 n), for dimensions m <= n. It is
    about ln(m) - m / (2 n). Real random states are a little less entangled.

    Source: Page, Phys. Rev. Lett. 71 (1993) 1291; Sen, Phys. Rev. Lett. 77 (1996) 1.
    """
    small, large = sorted((left_dim, right_dim))
    return _harmonic(small * large) - _harmonic(large) - (small - 1) / (2 * large)


def _harmonic(number: int) -> float:
    """The sum of 1 / k up to a number, less Euler's constant."""
    if number >= _LARGE:
        return log(number)
    return float(torch.digamma(torch.tensor(number + 1.0, dtype=torch.float64, device="cpu")))
