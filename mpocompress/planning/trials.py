"""Trials: layers and plans that are fitted to see what they lose, where it cannot be predicted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isinf, isnan, log

import torch
from torch import Tensor

from mpocompress.mpo import Layout
from mpocompress.planning.allocation import Share
from mpocompress.planning.parts import Bonds, Part
from mpocompress.planning.plan import Plan
from mpocompress.surgery import WeightSite

# Trials are made on the data that is fitted to: what is hardly better may be worse, and is slower.
# With healing ahead, more sites are taken unless they are clearly worse: they heal better.
_CLEARLY = 0.8
# Bond dimensions of trials that tell how the loss of a layout falls: each takes about twice the
# numbers of the one before.
_TRIED = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a layer fitted in a layout, all else dense, does to the model's outputs.

    Attributes:
        loss: their squared change on the data, on the scale of the gains.
        distance: mean of what healing would minimize; with logits it sees probabilities.
    """

    loss: float
    distance: float


Trials = Callable[[WeightSite, Layout, tuple[int, ...]], Trial | None]
"""Makes a trial of a layer in a layout at bond dimensions; None where none can be made."""

PlanTrials = Callable[[Plan], float | None]
"""Fits a whole plan on trial: mean of what healing would minimize; None where that cannot be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """A plan that may be taken.

    Attributes:
        plan: the rows.
        bonds: of each weight that the budget is shared among.
        dropped: how many weights stay dense because bond dimension 1 is not compact enough.
    """

    plan: Plan
    bonds: Bonds
    dropped: int


class Judge:
    """Says by trials which of several ways to meet a budget loses the least.

    Args:
        trials: makes trials of layers; None makes none.
        plan_trials: likewise of whole plans; None adds up what layers do.
        healed: the compressed model will be trained to do what the dense one does.
    """

    def __init__(
        self, trials: Trials | None, plan_trials: PlanTrials | None, *, healed: bool
    ) -> None:
        self.tries = trials is not None
        self.tries_plans = plan_trials is not None
        self._trials = trials
        self._plan_trials = plan_trials
        self._healed = healed

    def trial(self, part: Part, bond_dims: tuple[int, ...]) -> Trial | None:
        """Of one layer; None where none can be made."""
        return None if self._trials is None else self._trials(part.site, part.layout, bond_dims)

    def gains(self, part: Part, kept: float) -> Tensor | None:
        """What bond dimensions of a layout in the place of a bottleneck are worth, if known.

        From trials at two of a few bond dimensions, so that neighbouring budgets share them.
        """
        matters = None if part.bottleneck is None else part.bottleneck.matters
        if not matters:
            return None
        share = part.share
        most = min(share.within(kept * share.dense), share.max_bond_dim)  # one more is dense
        losses: dict[int, float] = {}
        for bond in [bond for bond in _TRIED if bond <= most][-2:]:
            trial = self.trial(part, part.layout.clip([bond] * (part.layout.num_sites - 1)))
            if trial is None or isnan(trial.loss):
                return None
            losses[bond] = trial.loss
        return gains_of_losses(share, matters, losses)

    def is_worse(self, part: Part, bonds: Bonds, factors: Part) -> bool:
        """Whether a layout in the place of a bottleneck is, by trials, or by the rule for healing.

        One that is not part of the plan has nothing to be worse in.
        """
        found = part.bottleneck
        if found is None or part not in bonds:
            return False
        distance = self._distance(part, bonds[part])
        if isinf(distance):
            return not self._healed
        limit = 1 / _CLEARLY if self._healed else 1.0
        narrow = factors.bond_dims(found.bond)
        return found.bond > 0 and not distance < limit * self._distance(factors, narrow)

    def prefers(self, wide: Shared, narrow: Shared) -> bool:
        """Whether a plan with more sites is to be taken, and not the one in factors throughout."""
        distances = self._of_plans(wide, narrow)
        if distances is None:
            same = set(wide.bonds.items()) & set(narrow.bonds.items())
            distances = tuple(
                sum(self._distance(*choice) for choice in plan.bonds.items() if choice not in same)
                for plan in (wide, narrow)
            )
        if isinf(distances[0]):  # too large for trials
            return self._healed
        return distances[0] < (1 / _CLEARLY if self._healed else _CLEARLY) * distances[1]

    def is_better(self, one: Shared, other: Shared) -> bool:
        """Whether one plan loses less than another of the same layouts, as far as trials tell."""
        distances = self._of_plans(one, other)
        return distances is not None and distances[0] < distances[1]

    def _of_plans(self, *plans: Shared) -> tuple[float, ...] | None:
        """What healing would minimize, of whole models; None if not known of one of them."""
        found = []
        for shared in plans:
            distance = None if self._plan_trials is None else self._plan_trials(shared.plan)
            if distance is None:
                return None
            found.append(distance)
        return tuple(found)

    def _distance(self, part: Part, bond_dims: tuple[int, ...] | None) -> float:
        if bond_dims is None:
            return 0.0
        trial = self.trial(part, bond_dims)
        return inf if trial is None else trial.distance


def gains_of_losses(share: Share, matters: float, losses: Mapping[int, float]) -> Tensor:
    """What each bond dimension of a chain is worth, from what it loses at one or two of them.

    From all that matters at bond dimension 0 the loss falls exponentially in the numbers stored,
    and from the first known one on by the power of them that the two show.

    Args:
        share: of the layer in the layout of the chain.
        matters: the loss without the layer, above 0.
        losses: by bond dimension, at least 1.

    Returns:
        (max_bond_dim + 1,) float64, on the scale of the losses, not rising but for the last entry:
        what is then still lost, and won by the dense layer.
    """
    numbers = [float(share.numbers(bond)) for bond in range(share.max_bond_dim + 1)]
    numbers_D = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    (first, loss), *later = sorted(losses.items())
    least = torch.finfo(torch.float64).eps * matters
    loss = min(max(loss, least), matters)
    at_D = numbers_D / numbers_D[first]
    loss_D = matters * (loss / matters) ** at_D
    for bond, found in [entry for entry in later[:1] if at_D[entry[0]] > 1]:
        power = min(0.0, log(max(found, least) / loss) / log(float(at_D[bond])))
        loss_D = torch.where(at_D > 1, loss * at_D**power, loss_D)
    gains_D = (loss_D[:-1] - loss_D[1:]).cummin(0).values
    return torch.cat([gains_D, loss_D[-1:]])
