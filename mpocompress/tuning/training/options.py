"""How a network is trained on labels, and what it tells."""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from mpocompress.errors import DataError
from mpocompress.mpo.truncate import Truncation
from mpocompress.scalars import as_count, as_number, as_seed, put_plain
from mpocompress.tuning.minibatches import check_held_out
from mpocompress.tuning.sweeps.options import GradientPath, check_choice

Method = Literal["dmrg", "adam"]
Sites = Literal[1, 2, "grow"]

# Peaks. Sweeps: relative to the root mean square of the core at the center, as it was at the start;
# Adam: absolute, for cores whose entries are some tenths. Dense weights of some hundredths take
# smaller steps in both.
_CORE_RATES: dict[str, float] = {"dmrg": 0.05, "adam": 1e-2}
_DENSE_RATES: dict[str, float] = {"dmrg": 3e-3, "adam": 2e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How a model with MPO layers is trained from the start.

    Attributes:
        method: "dmrg": sweeps along the cores, gradient steps on the open one at the orthogonality
            center of each layer, dense parameters along; "adam": all at once.
        epochs: passes over the training rows; sweeps see as many, but are two at least.
        batch_size: rows of a minibatch.
        learning_rate: peak for the cores; "dmrg": relative to the root mean square that the open
            core, with the norm of the whole matrix, had at the start; 0.05 by default; "adam":
            0.01.
        dense_learning_rate: likewise for all others, absolute: 0.003 by default; "adam": 0.002.
        sites: for "dmrg": 1; 2, pairs that are merged and split again, so that bonds change; or
            "grow": 2 in the first half of the sweeps, then 1.
        local_steps: for "dmrg", gradient steps at each position; fewer where the epochs do not
            suffice for two sweeps.
        bond_dim: for two sites, the largest bond dimension; None: the largest one at the start, or
            no limit with a cutoff. It is approached by doubling from sweep to sweep.
        cutoff: for two sites, the largest truncation error of a split (relative discarded weight).
        gradient: for "dmrg", of the open core: "autograd", or "manual", contracted by hand.
        train_dense: train parameters that are not cores along.
        held_out: share of the data that is not trained on, if no validation data is given: it
            decides which weights are kept. 0 for none: then the last ones are.
        patience: stop after so many evaluations without a better one; None: never.
        seed: of the held-out part, the order of the data, and dropout.

    Raises:
        DataError: impossible values.
        BondDimError: `bond_dim` below 1.
        DecompositionError: `cutoff` outside [0, 1).
    """

    method: Method = "dmrg"
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float | None = None
    dense_learning_rate: float | None = None
    sites: Sites = 1
    local_steps: int = 8
    bond_dim: int | None = None
    cutoff: float = 0.0
    gradient: GradientPath = "autograd"
    train_dense: bool = True
    held_out: float = 0.1
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("gradient", self.gradient, get_args(GradientPath))
        limits = Truncation(bond_dim=self.bond_dim, cutoff=self.cutoff)
        found: dict[str, object] = {
            "sites": check_choice("sites", self.sites, get_args(Sites)),
            "bond_dim": limits.bond_dim,
            "cutoff": limits.cutoff,
            "held_out": check_held_out(self.held_out),
            "seed": as_seed(self.seed),
        }
        for name in ("epochs", "batch_size", "local_steps"):
            found[name] = as_count(name, getattr(self, name), 1, DataError)
        if self.patience is not None:
            found["patience"] = as_count("patience", self.patience, 1, DataError)
        for name in ("learning_rate", "dense_learning_rate"):
            if (rate := getattr(self, name)) is not None:
                found[name] = as_number(rate)
                if not 0 < as_number(rate) < inf:
                    raise DataError(f"{name} {rate!r}: it is above 0. Try 1e-2.")
        put_plain(self, found)
        changes_bonds = self.method == "dmrg" and self.sites != 1
        if not changes_bonds and (self.bond_dim is not None or self.cutoff > 0):
            raise DataError(
                f"bond_dim {self.bond_dim} and cutoff {self.cutoff} are for two-site sweeps; "
                'otherwise bonds stay as they are. Try method="dmrg" with sites="grow".'
            )

    @property
    def core_rate(self) -> float:
        """Peak learning rate of the cores."""
        return self.learning_rate or _CORE_RATES[self.method]

    @property
    def dense_rate(self) -> float:
        """Peak learning rate of the other parameters."""
        return self.dense_learning_rate or _DENSE_RATES[self.method]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecord:
    """One evaluation: after each epoch of "adam", after the sweeps of "dmrg" that fit in one.

    After each sweep if it is longer than an epoch.

    Attributes:
        epoch: passes over the training rows so far; 0 is the start.
        train_loss: mean over the minibatches since the last record; None at the start.
        validation_loss: on the held-out rows; None if there are none.
        score: of the same rows: accuracy in [0, 1], or R^2 (NaN where all labels are equal); None
            for a loss of your own.
        bond_dims: of every MPO layer, by name.
        entropies_nats: entanglement entropies at the bonds of every MPO layer, by name.
    """

    epoch: float
    train_loss: float | None
    validation_loss: float | None
    score: float | None
    bond_dims: dict[str, tuple[int, ...]]
    entropies_nats: dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a training did.

    Attributes:
        history: all evaluations, the start first.
        best: position in the history of the weights that were kept.
        score_name: "accuracy", "R2", or None.
    """

    history: tuple[TrainRecord, ...]
    best: int
    score_name: str | None

    @property
    def kept(self) -> TrainRecord:
        """The evaluation of the weights that were kept."""
        return self.history[self.best]
