"""One compression: its model, options and data, and the steps from a plan to a result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from mpocompress.api.evidence import Evidence
from mpocompress.api.result import Clock, CompressionResult
from mpocompress.api.site_plans import correctable, site_plans
from mpocompress.api.storage import (
    check_precision,
    record_stored_,
    stored_bytes,
)
from mpocompress.api.stored_weights import stored_weights
from mpocompress.loading import Batch
from mpocompress.mpo import Layout
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.weight import Weight
from mpocompress.planning import (
    Latency,
    Objective,
    Plan,
    PlanOptions,
    PlanTrials,
    Progress,
    Sharing,
    Trials,
    with_predictions,
)
from mpocompress.planning.byte_sharing import ByteSharing
from mpocompress.report import Source
from mpocompress.report.collect import Outcome, collect_report, measure
from mpocompress.surgery import (
    WeightSite,
    check_finite,
    find_weights,
    open_modules,
    opened_for,
    select_sites,
)
from mpocompress.tuning import (
    FitOptions,
    FitStore,
    FittedWeight,
    LayerMoments,
    OutputMetrics,
    SitePlan,
    correction_plans,
    fit_in_sequence,
    is_corrected,
    later_calls,
    take_statistics,
    tied_heads,
    with_fitted,
)
from mpocompress.tuning.fitting.plan import exact_takes_long
from mpocompress.tuning.fitting.rounding import Rounded
from mpocompress.tuning.statistics.layer_rows import adapter_of

# Fits on trial take long: not for budgets whose every step fits a model and measures it.
_TRIED_FOR = ("ratio", "max_size")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Built:
    """A compressed model before it is reported on.

    Attributes:
        plan: that was executed.
        model: with MPO layers.
        weights: of each compressed site, as stored.
        fitted: what the fit found, of layers that stay dense, too; empty without data.
        bounds: on the relative weight errors, of weights that were not fitted.
        rounded: weights that are not stored in float32.
        uncorrected: layers that were to take up what is lost before them and could not, and why.
    """

    plan: Plan
    model: nn.Module
    weights: Mapping[WeightSite, Weight]
    fitted: Mapping[WeightSite, FittedWeight]
    bounds: Mapping[WeightSite, float]
    rounded: Mapping[WeightSite, Rounded] = field(default_factory=dict)
    uncorrected: Mapping[WeightSite, str] = field(default_factory=dict)


@runtime_checkable
class ExactLatency(Protocol):
    """A table of times that can also be measured anew at given bond dimensions."""

    def __call__(
        self, shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]
    ) -> float:
        """Seconds of a layer from the table."""
        ...

    def measure(
        self, shape: tuple[int, int], layout: Layout | None, bond_dims: Sequence[int]
    ) -> float:
        """Seconds of a layer, timed now."""
        ...


class Job:
    """What all plans that are tried for one model have in common.

    Args:
        model: dense; only read.
        options: what was asked for.
        calls: batches to fit on; None without data.
        sweeps: of the fit of a layer.
        seed: of everything random.
        latency: the table of times, for the objective "latency".
        state: folder for the state of an interrupted run; None keeps none.
        progress: called as `progress(what, done, total)`.
    """

    def __init__(
        self,
        model: nn.Module,
        options: PlanOptions,
        *,
        calls: Sequence[Batch] | None,
        sweeps: int,
        seed: int,
        latency: Latency | None = None,
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        # Modules that read their weights themselves are opened: they call layers that share them.
        self.opened = open_modules(model)
        self.inventory = find_weights(self.opened)
        self.options = options
        self.calls = calls
        self.sweeps = sweeps
        self.seed = seed
        self.state = state
        self.progress = progress
        self.clock = Clock()
        self._latency = latency
        self.evidence = Evidence(
            self.opened, self.inventory.sites, calls, seed=seed, clock=self.clock, progress=progress
        )

    @property
    def objective(self) -> Objective:
        """What is to be small."""
        return self.options.aim(self._latency)

    @property
    def has_data(self) -> bool:
        """Whether there are batches to fit on."""
        return self.calls is not None

    @property
    def trials(self) -> Trials | None:
        """What layers in other layouts do to the outputs; None where no trials are made."""
        return self.evidence.trial if self._tries else None

    @property
    def plan_trials(self) -> PlanTrials | None:
        """What whole plans do to them; None where no trials are made."""
        return self.evidence.plan_trial if self._tries else None

    @property
    def _tries(self) -> bool:
        if not self.evidence.moments or self.options.target not in _TRIED_FOR:
            return False
        sites = select_sites(self.inventory, self.options.include, self.options.exclude)
        return not exact_takes_long(site.shape for site in sites)

    def take_statistics(self, sites: Sequence[WeightSite] | None = None) -> None:
        """Collect what the dense model shows of weights on the data; default: the selected ones."""
        if sites is None and self.has_data:
            sites = select_sites(self.inventory, self.options.include, self.options.exclude)
        self.evidence.take(sites or ())

    def sharing(self) -> Sharing:
        """What a budget is shared among."""
        with self.clock("planning"):
            return self.options.sharing(
                self.inventory,
                objective=self.objective,
                gains=self.evidence.gains,
                trials=self.trials,
                plan_trials=self.plan_trials,
                tables=self.has_data,
                progress=self.progress,
            )

    def byte_sharing(self) -> ByteSharing:
        """What a budget of bytes is shared among."""
        with self.clock("planning"):
            return ByteSharing(
                self.inventory,
                self.evidence.storage_choices,
                include=self.options.include,
                exclude=self.options.exclude,
                output_energy=self.evidence.energy,
                progress=self.progress,
            )

    def plan(self) -> Plan:
        """The plan for a bond dimension or a ratio."""
        with self.clock("planning"):
            found = self.options.make(
                self.inventory,
                objective=self.objective,
                gains=self.evidence.gains,
                trials=self.trials,
                plan_trials=self.plan_trials,
                tables=self.has_data,
                progress=self.progress,
            )
            return self.predicted(found)

    def predicted(self, plan: Plan) -> Plan:
        """The plan with what is expected of it."""
        return with_predictions(
            plan,
            self.inventory,
            objective=self.objective,
            gains=self.evidence.gains,
            trials=self.evidence.made_trial,  # of trials that were made
            output_energy=self.evidence.energy,
        )

    def measured_seconds(self, plan: Plan) -> tuple[float, float] | None:
        """Seconds of a batch through all listed layers, dense and as planned, timed exactly."""
        if not isinstance(self._latency, ExactLatency):
            return None
        dense = after = 0.0
        for layer in plan.layers:
            before = self._latency(layer.shape, None, ())
            dense += before
            if layer.action == "compress":
                layout = layer.sites()
                bonds = layout.clip(layer.bond_dims or ())
                before = self._latency.measure(layer.shape, layout, bonds)
            after += before
        return dense, after

    def build(self, plan: Plan) -> Built:
        """Fit, factorize and replace the planned weights in a copy of the model."""
        with self.clock("inventory"):
            opened, moments = _opened_as_planned(
                self.model, self.opened, plan, self.evidence.moments
            )
            by_name = {site.name: site for site in find_weights(opened).sites}
        planned = site_plans(plan, by_name)
        for entry, layer in zip(planned, plan.compressed, strict=True):
            check_finite(entry.site)
            check_precision(entry.site, layer)
        gauges: dict[str, Gauge] = {layer.name: layer.gauge for layer in plan.compressed}
        corrections: list[SitePlan] = []
        if self.calls is not None:
            kept = correctable(plan, by_name)
            with self.clock("fitting"):
                corrections = correction_plans(opened, kept, planned, self.calls)
        fitted = self._fit(opened, [*planned, *corrections], moments)
        # Behind a compressed router rows may go elsewhere than in the dense model.
        uncorrected = {
            entry.site: "once layers are compressed, no batch calls it any more"
            for entry in corrections
            if entry.site not in fitted
        }
        with self.clock("factorization"):
            stored = stored_weights(
                planned, fitted, gauges=gauges, seed=self.seed, progress=self.progress
            )
        with self.clock("surgery"):
            compressed = with_fitted(opened, stored.weights, fitted)
            record_stored_(compressed, stored.rounded)
        return Built(
            plan=plan,
            model=compressed,
            weights=stored.weights,
            fitted=fitted,
            bounds=stored.bounds,
            rounded=stored.rounded,
            uncorrected=uncorrected,
        )

    def finish(self, built: Built, *, source: Source | None) -> CompressionResult:
        """Measure what was built, layer by layer, and report."""
        outcomes: dict[str, Outcome] = {}
        with self.clock("measurement"):
            for site, weight in built.weights.items():
                found = built.fitted.get(site)
                stored = built.rounded.get(site)
                outcomes[site.name] = measure(
                    site,
                    weight,
                    discarded_weight_bound=built.bounds.get(site),
                    relative_output_error=None if found is None else found.relative_output_error,
                    num_bytes=None if stored is None else stored_bytes(stored),
                )
        gauges = {layer.name: layer.gauge for layer in built.plan.compressed}
        # As executed: a plan that was edited may give each layer its own.
        used = set(gauges.values())
        settings: dict[str, Any] = {
            **built.plan.asked,
            "gauge": used.pop() if len(used) == 1 else gauges,
            "seed": self.seed,
        }
        if self.calls is not None:
            rows = sum(call.num_rows for call in self.calls)
            settings |= {"sweeps": self.sweeps, "rows_of_data": rows}
            seen = [found.rows for site, found in built.fitted.items() if site in built.weights]
            if seen:
                settings["fewest_rows_at_a_layer"] = min(seen)
        report = collect_report(
            self.inventory,
            built.plan,
            outcomes,
            source=source or Source(name=type(self.model).__name__),
            seconds=self.clock.total(),
            settings=settings,
            corrected=[
                site.name
                for site, found in built.fitted.items()
                if site not in built.weights and is_corrected(site, found)
            ],
            uncorrected={site.name: why for site, why in built.uncorrected.items()},
        )
        return CompressionResult(model=built.model, report=report, plan=built.plan)

    def _fit(
        self,
        opened: nn.Module,
        planned: Sequence[SitePlan],
        moments: Mapping[nn.Module, LayerMoments] | None,
    ) -> dict[WeightSite, FittedWeight]:
        if self.calls is None:
            return {}
        if moments is None:
            fitted_anew = [entry.site for entry in planned if not entry.stays_dense]
            modules = [module for site in fitted_anew for module in site.modules]
            with self.clock("statistics"):
                found = take_statistics(
                    opened,
                    modules,
                    self.calls,
                    seed=self.seed,
                    inputs_of=_tied_modules(fitted_anew),
                )
                moments = found.layers
        elif not self.evidence.is_kept:  # they have said what there was to plan with
            tied = _tied_modules([entry.site for entry in planned])
            for module, moment in moments.items():
                if module not in tied:
                    moment.inputs.forget()
        with self.clock("fitting"):
            fitted = fit_in_sequence(
                opened,
                planned,
                self.calls,
                output_metrics=OutputMetrics(moments),
                heads={entry.site: tied_heads(entry.site, moments) for entry in planned},
                later=later_calls([entry.site for entry in planned], moments),
                options=FitOptions(sweeps=self.sweeps),
                store=None if self.state is None else FitStore(self.state),
                progress=self.progress,
            )
        self.evidence.forget_if_done()
        return fitted


def _tied_modules(sites: Sequence[WeightSite]) -> set[nn.Module]:
    """Modules of weights that are a table as well as a matrix: how they use it is asked for."""
    return {
        module
        for site in sites
        if any(adapter_of(module).looks_up for module in site.modules)
        for module in site.modules
    }


def _opened_as_planned(
    model: nn.Module,
    opened: nn.Module,
    plan: Plan,
    moments: Mapping[nn.Module, LayerMoments] | None,
) -> tuple[nn.Module, Mapping[nn.Module, LayerMoments] | None]:
    """The model with those modules opened that hold a weight to compress; the rest as it was.

    Args:
        model: dense.
        opened: with all modules opened that can be.
        plan: what is compressed.
        moments: of modules of `opened`; they are returned for the modules of the result.
    """
    compressed = [name for layer in plan.compressed for name in (layer.name, *layer.also_known_as)]
    result = opened_for(model, opened, compressed)
    if moments is None or result is opened:
        return result, moments
    theirs = dict(result.named_modules())
    return result, {
        theirs[name]: moments[module]
        for name, module in opened.named_modules()
        if module in moments and name in theirs
    }
