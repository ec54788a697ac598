"""A ceiling for the drop of a metric, found by bracketing and measured again at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import nn

from mpocompress.api.budgets import Met, rounded_up, with_setting
from mpocompress.api.job import Built, Job
from mpocompress.errors import BudgetError, DataError
from mpocompress.loading import Batch
from mpocompress.planning.search import Measured, smallest_that_fits
from mpocompress.tuning import task_score

HELD_OUT = (0.2, 0.2)
"""Shares of the data that a drop is searched with, and measured with at the end."""

EvalFn = Callable[[nn.Module], float]
"""The user's metric of a model, the higher the better."""

_DROP_STEPS = 7
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class Metric:
    """What a drop is a drop of: the user's function, or a score from labels.

    Attributes:
        eval_fn: the user's function, or None.
        search: labelled batches for the search.
        final: labelled batches that the search never sees.
    """

    eval_fn: EvalFn | None
    search: Sequence[Batch] = ()
    final: Sequence[Batch] = ()

    def value(self, model: nn.Module, *, final: bool) -> float:
        """The metric of a model.

        Raises:
            DataError: the user's function gave no finite number, or labels do not fit.
        """
        if self.eval_fn is None:
            return task_score(model, self.final if final else self.search).value
        given = self.eval_fn(model)
        try:
            found = float(given)
        except (TypeError, ValueError):
            raise DataError(f"eval_fn gave {given!r}; it has to give a number.") from None
        if not isfinite(found):
            raise DataError(f"eval_fn gave {found}; it has to give a finite number.")
        return found

    @property
    def where(self) -> str:
        """On what the last figure is measured."""
        if self.eval_fn is not None:
            return "by the given eval_fn, which the search used, too"
        rows = sum(call.num_rows for call in self.final)
        return f"{rows} labelled rows that neither the fit nor the search has seen"


def meet_drop(job: Job, max_drop: float, metric: Metric) -> tuple[Built, Met]:
    """The smallest model found whose metric is within the drop, bracketed over the allocation.

    At the end it is measured on data that the search has not seen; where it fails there, the next
    larger one is measured, up to five in all.

    Raises:
        BudgetError: not met; the message has the least drop that was found.
        DataError: see `Metric.value`.
    """
    job.take_statistics()
    job.evidence.is_kept = True
    sharing = job.sharing()
    why = f"a drop of at most {max_drop:g}"
    whole = job.inventory.parameters
    if not sharing.parts:
        sharing.of_model(whole, why)  # says why there is nothing
    elsewhere = whole - sharing.dense
    dense = {final: metric.value(job.model, final=final) for final in (False, True)}
    if metric.eval_fn is None and not all(found > 0 for found in dense.values()):
        name = task_score(job.model, metric.final).name
        raise DataError(
            f"the dense model itself has {min(dense.values()):.4g} of {name} by these labels, no "
            "better than chance, so that nothing can be said of a drop. Check that the labels "
            "belong to its first output, and are in the order of the rows; in Python, eval_fn may "
            "be any other metric."
        )
    builds: dict[float, Built] = {}

    def measure(size: float) -> Measured:
        if job.progress is not None:
            job.progress(f"trial with {size:,.0f} parameters in layers", len(builds), _DROP_STEPS)
        with job.clock("planning"):
            plan = sharing.of_model(elsewhere + size, why)
        if not plan.compressed:
            return Measured(size, 0.0, False)
        built = job.build(with_setting(job, plan, "max_drop", max_drop))
        drop = dense[False] - metric.value(built.model, final=False)
        fits = drop <= max_drop
        if fits:
            builds[size] = built
            for large in sorted(builds)[_LOOKS:]:
                del builds[large]  # so many are not looked at
        return Measured(size, drop, fits)

    most = sharing.dense - 1  # so that something is compressed
    tried = smallest_that_fits(sharing.least - elsewhere, most, measure, steps=_DROP_STEPS)
    least = min(found.figure for found in tried)
    sizes = [found.size for found in tried if found.fits]
    if sizes:  # and, should none of these hold at the end, some that change less
        sizes += [(sizes[-1] * most) ** 0.5, most]
    looks, missed = 0, float("inf")
    for size in sizes:
        if looks == _LOOKS:
            break
        if size not in builds and not measure(size).fits:
            continue
        looks += 1
        drop = dense[True] - metric.value(builds[size].model, final=True)
        if drop <= max_drop:
            job.evidence.forget()
            met = Met(
                target="max_drop",
                asked=max_drop,
                reached=drop,
                what=f"drop of the metric, which is {dense[True]:.4g} for the dense model",
                where=metric.where + (f" (candidate {looks} of the search)" if looks > 1 else ""),
                trials=len(tried),
            )
            return builds[size], met
        missed = min(missed, drop)
    if looks:
        raise BudgetError(
            f"a drop of at most {max_drop:g} was met where it was searched for, but on the data "
            f"held out for the end the best of {looks} candidates drops by {rounded_up(missed)}. "
            "Allow that much, or give more data."
        )
    raise BudgetError(
        f"a drop of at most {max_drop:g} cannot be met: the least that was found is "
        f"{rounded_up(least)}. Allow that much, give (more) data to fit on, or exclude layers."
    )
