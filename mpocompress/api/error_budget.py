"""A ceiling for errors: of the outputs of every layer and of the model, or of the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf, isnan

from torch import Tensor, nn

from mpocompress.api.budgets import Met, rounded_up, with_setting
from mpocompress.api.job import Built, Job
from mpocompress.errors import BudgetError, OutputsDifferError
from mpocompress.loading import Batch
from mpocompress.planning import Plan, Sharing
from mpocompress.planning.search import Measured, smallest_that_fits
from mpocompress.planning.tolerance import curves_of, plan_tolerances, smallest_error
from mpocompress.report.collect import weight_error
from mpocompress.tuning import OutputErrors, output_error_curve, output_errors

HELD_OUT = (0.2,)
"""Share of the data that outputs are measured on and nothing is fitted on."""

_ROUNDS = 10
_ERROR_STEPS = 7


def meet_weight_error(job: Job, max_error: float) -> tuple[Built, Met]:
    """Without data: the relative weight error of every layer is within the limit.

    Raises:
        BudgetError: no layer gets smaller within it; the message has the least error of any.
    """
    sharing = job.sharing()
    with job.clock("planning"):
        curves = curves_of(sharing)
        _refuse_if_beyond(sharing, curves, max_error, "weight")
    names = [part.site.name for part in sharing.parts]
    limit = max_error
    for trial in range(1, _ROUNDS + 1):
        why = f"a weight error of at most {max_error:g}"
        plan = plan_tolerances(sharing, curves, dict.fromkeys(names, limit), why)
        if not plan.compressed:
            break
        built = job.build(with_setting(job, plan, "max_error", max_error))
        errors = [weight_error(site, weight) for site, weight in built.weights.items()]
        if max(errors) <= max_error:
            met = Met(
                target="max_error",
                asked=max_error,
                reached=max(errors),
                what="largest relative weight error of a compressed layer (no data was given, so "
                "outputs were not measured)",
                where="the weights as written",
                trials=trial,
            )
            return built, met
        limit *= 0.99 * max_error / max(errors)  # rounding to a narrow dtype, mostly
    raise _no_plan("weight error", max_error, smallest_error(sharing, curves))


def meet_output_error(job: Job, max_error: float, held: Sequence[Batch]) -> tuple[Built, Met]:
    """With data: outputs of every compressed layer and of the model, on batches held out.

    First the parameters are bracketed that the layers share by sensitivity, which suits the bound
    on the model. Where the error of a layer is what binds, tolerances of the layers' own errors are
    moved as well, until all that is measured is within the limit; the smaller model counts.

    Raises:
        BudgetError: not met by any plan that compresses something; the message has the least.
    """
    job.take_statistics()
    job.evidence.is_kept = True
    sharing = job.sharing()
    why = f"an output error of at most {max_error:g}"
    if not sharing.parts:
        sharing.of_model(job.inventory.parameters, why)  # says why there is nothing
    trials = _ErrorTrials(job, max_error, held)
    elsewhere = job.inventory.parameters - sharing.dense

    def measure(size: float) -> Measured:
        with job.clock("planning"):
            plan = sharing.of_model(elsewhere + size, why)
        errors = trials.attempt(plan)
        return Measured(size, errors.largest, errors.largest <= max_error)

    most = sharing.dense - 1  # so that something is compressed
    smallest_that_fits(sharing.least - elsewhere, most, measure, steps=_ERROR_STEPS)
    if trials.best is None or trials.best.errors.model < trials.best.errors.largest:
        _move_tolerances(job, sharing, trials, why)
    job.evidence.forget()
    best = trials.best
    if best is None:
        raise _no_plan("output error", max_error, trials.least)
    met = Met(
        target="max_error",
        asked=max_error,
        reached=best.errors.largest,
        what="largest relative output error of a compressed layer or of the model",
        where=f"{best.errors.rows} rows held out from fitting",
        trials=len(trials.seen),
    )
    return best.built, met


@dataclass(frozen=True, slots=True, eq=False)
class _Fitting:
    """A model within the limit."""

    size: int
    built: Built
    errors: OutputErrors


class _ErrorTrials:
    """Plans that were built and measured; the smallest that fits is kept."""

    def __init__(self, job: Job, max_error: float, held: Sequence[Batch]) -> None:
        self.max_error = max_error
        self.best: _Fitting | None = None
        self.least = float("inf")
        self.seen: dict[tuple[str, ...], OutputErrors] = {}
        self._job = job
        self._held = held

    def attempt(self, plan: Plan) -> OutputErrors:
        """Build and measure a plan, or look it up."""
        choice = tuple(layer.choice for layer in plan.layers)
        if choice in self.seen:
            return self.seen[choice]
        if self._job.progress is not None:
            self._job.progress("trial", len(self.seen), _ERROR_STEPS)
        built = self._job.build(with_setting(self._job, plan, "max_error", self.max_error))
        errors = measured_errors(self._job, built, self._held)
        self.seen[choice] = errors
        self.least = min(self.least, errors.largest)
        size = sum(layer.parameters for layer in plan.layers)
        fits = errors.largest <= self.max_error
        if fits and (self.best is None or size < self.best.size):
            self.best = _Fitting(size, built, errors)
        return errors


def _move_tolerances(job: Job, sharing: Sharing, trials: _ErrorTrials, why: str) -> None:
    """Try plans by what each layer may err itself, corrected by what is measured there.

    What is measured at a layer contains what those before it did.
    """
    limit = trials.max_error
    with job.clock("planning"):
        moments = job.evidence.moments or {}
        curves = curves_of(sharing, lambda site: output_error_curve(site, moments))
    tolerances = {part.site.name: 0.7 * limit for part in sharing.parts}
    for _ in range(_ROUNDS):
        plan = plan_tolerances(sharing, curves, tolerances, why)
        if not plan.compressed:
            break
        known = len(trials.seen)
        errors = trials.attempt(plan)
        stuck = len(trials.seen) == known
        # A layer's own tolerance follows what was measured there, and all follow the model's.
        whole = _step(limit / max(errors.model, 1e-12))
        for name in tolerances:
            own = errors.layers.get(name)
            step = 1.2 if own is None else _step(limit / max(own, 1e-12))
            tolerances[name] *= min(step, whole) * (0.9 if stuck and whole < 1 else 1.0)
    if trials.best is None:  # the one layer that is least changed, and nothing else
        edge = 1.001 * smallest_error(sharing, curves)
        trials.attempt(plan_tolerances(sharing, curves, dict.fromkeys(tolerances, edge), why))


def measured_errors(job: Job, built: Built, calls: Sequence[Batch]) -> OutputErrors:
    """Outputs of the compressed layers and of the model on these batches."""
    names = [layer.name for layer in built.plan.compressed]
    return output_errors(job.opened, built.model, names, calls)


def output_change(
    dense: nn.Module, compressed: nn.Module, calls: Sequence[Batch]
) -> tuple[float | None, str]:
    """Relative change of a model's outputs, or None and why there is no such number, in words."""
    try:
        error = output_errors(dense, compressed, (), calls).model
    except OutputsDifferError:
        return None, "which outputs there are depends on their values"
    if isnan(error):
        return None, "outputs are not finite"
    return (None, "all outputs of the dense model are zero") if isinf(error) else (error, "")


def _step(wanted: float) -> float:
    """How far a tolerance moves: back below the limit at once, towards it with care."""
    return max(0.25, 0.97 * wanted) if wanted < 1 else min(1.5, 1 + 0.7 * (wanted - 1))


def _refuse_if_beyond(
    sharing: Sharing, curves: Mapping[str, Tensor], max_error: float, of: str
) -> None:
    if not sharing.parts:
        sharing.of_model(sharing.inventory.parameters, "a maximal error")  # says why
    least = smallest_error(sharing, curves)
    if least > max_error:
        raise _no_plan(f"{of} error", max_error, least)


def _no_plan(what: str, max_error: float, least: float) -> BudgetError:
    return BudgetError(
        f"no layer gets smaller within {_article(what)} {what} of {max_error:g}: the least that "
        f"was found is {rounded_up(least)}. Allow that much, or in Python take "
        "gauge='identity', in which larger bond dimensions pay."
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
