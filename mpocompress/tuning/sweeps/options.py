"""How sweeps on the loss are run, and what they tell."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal, get_args

from mpocompress.errors import DataError
from mpocompress.mpo.truncate import Truncation
from mpocompress.scalars import as_count, as_number, as_seed, plain, put_plain

Optimizer = Literal["adam", "sgd", "lbfgs"]
GradientPath = Literal["manual", "autograd"]
Progress = Callable[[str, int, int], None]

# Adam's and momentum's steps relative to the size of the open core, L-BFGS's as a plain factor.
# With the center at the open core its norm is that of the whole matrix, whatever the gauge was.
_LEARNING_RATES: dict[str, float] = {"adam": 0.02, "sgd": 0.02, "lbfgs": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalOptions:
    """A local problem: one core, or two merged ones, all else frozen.

    Attributes:
        steps: gradient steps, each on one batch; for "lbfgs" the number of gradients that a single
            minimization on one batch may take.
        optimizer: "adam", "sgd" (momentum 0.9) or "lbfgs" (strong Wolfe line search). It starts
            anew for every core.
        learning_rate: relative to the open core: a step of "adam" changes an entry by this share of
            the core's root mean square, "sgd" goes this share of the squared norm along the
            gradient. None: 0.02; 1 for "lbfgs", where it is a plain factor.
        gradient: "manual", contracted by hand, or "autograd".

    Raises:
        DataError: impossible values.
    """

    steps: int = 8
    optimizer: Optimizer = "adam"
    learning_rate: float | None = None
    gradient: GradientPath = "manual"

    def __post_init__(self) -> None:
        found: dict[str, object] = {"steps": as_count("local_steps", self.steps, 1, DataError)}
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("gradient", self.gradient, get_args(GradientPath))
        if self.learning_rate is not None:
            found["learning_rate"] = rate = as_number(self.learning_rate)
            if not (isfinite(rate) and rate > 0):
                raise DataError(
                    f"learning_rate {self.learning_rate!r}: it is above 0. Try "
                    f"{_LEARNING_RATES[self.optimizer]} for {self.optimizer!r}."
                )
        put_plain(self, found)

    @property
    def rate(self) -> float:
        """The learning rate, given or by default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _LEARNING_RATES[self.optimizer]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSweepOptions:
    """Sweeps over all layers of a model.

    Attributes:
        sweeps: passes over the sites of every layer; to the right, then to the left, and so on.
        sites: 1, or 2 for pairs that are merged, solved and split, so that bonds grow and shrink.
        local: see `LocalOptions`.
        bond_dim: for two sites, the largest bond dimension after a split; None: the largest that
            the layer had at the start, or no limit with a cutoff.
        cutoff: for two sites, the largest truncation error of a split (relative discarded weight).
        eval_batches: so many batches judge every update; None for all.
        train_dense: train the parameters that are not cores along with every open core.
        seed: of the choice and the order of batches.

    Raises:
        DataError: impossible values.
        BondDimError: `bond_dim` below 1.
        DecompositionError: `cutoff` outside [0, 1).
    """

    sweeps: int = 4
    sites: int = 1
    local: LocalOptions = field(default_factory=LocalOptions)
    bond_dim: int | None = None
    cutoff: float = 0.0
    eval_batches: int | None = 4
    train_dense: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        found = {
            "sweeps": as_count("sweeps", self.sweeps, 0, DataError),
            "sites": check_choice("sites", self.sites, (1, 2)),
            "seed": as_seed(self.seed),
        }
        if self.eval_batches is not None:
            found["eval_batches"] = as_count("eval_batches", self.eval_batches, 1, DataError)
        limits = Truncation(bond_dim=self.bond_dim, cutoff=self.cutoff)
        put_plain(self, {**found, "bond_dim": limits.bond_dim, "cutoff": limits.cutoff})
        if self.sites == 1 and (self.bond_dim is not None or self.cutoff > 0):
            raise DataError(
                f"bond_dim {self.bond_dim} and cutoff {self.cutoff} are for two-site sweeps; with "
                "one site bonds stay as they are. Try sites=2."
            )

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before; not the number of sweeps."""
        found = asdict(self)
        del found["sweeps"]
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSweepRecord:
    """One sweep along one layer.

    Attributes:
        sweep: number of the pass, from 0.
        layer: name of the layer; tied ones go by the first.
        direction: 1 to the right, -1 to the left.
        loss_before: mean over the evaluation batches when the sweep began.
        loss_after: the same when it ended; never above `loss_before`.
        bond_dims: after the sweep.
        entropies_nats: entanglement entropy at every bond after the sweep.
        gradient_evaluations: forward and backward passes, one batch each.
        loss_evaluations: forward passes of one batch to judge updates.
        rejected: updates that were rolled back.
    """

    sweep: int
    layer: str
    direction: int
    loss_before: float
    loss_after: float
    bond_dims: tuple[int, ...]
    entropies_nats: tuple[float, ...]
    gradient_evaluations: int
    loss_evaluations: int
    rejected: int


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    """The one of `known` that a value equals.

    Raises:
        DataError: none; the message has all.
    """
    meant = plain(value)
    if isinstance(meant, bool) or meant not in known:
        raise DataError(f"{name} {value!r}: there are {', '.join(map(repr, known))}.")
    return known[known.index(meant)]
