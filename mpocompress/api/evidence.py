"""What data show of a dense model: statistics, what bonds are worth, layouts on trial."""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from mpocompress.api.result import Clock
from mpocompress.api.site_plans import correctable, site_plans
from mpocompress.errors import NoRowsError, OutputsDifferError
from mpocompress.loading import Batch
from mpocompress.mpo import Layout
from mpocompress.planning import Gains, Plan, Progress, Trial
from mpocompress.planning.storage_choice import StorageChoice
from mpocompress.surgery import WeightSite, check_finite
from mpocompress.tuning import (
    LayerMoments,
    OutputMetrics,
    correction_plans,
    effect_alone,
    effect_together,
    gain_of_bonds,
    later_calls,
    take_statistics,
    tied_heads,
)
from mpocompress.tuning.fitting.storage_choices import storage_choices
from mpocompress.tuning.lockstep import Call


class Evidence:
    """Statistics of one model on one set of batches, and what plans read off them.

    All is computed when it is first asked for, and once: several plans are tried on the same.

    Args:
        opened: the dense model, with all modules opened that can be; only read.
        sites: its weights.
        calls: batches; None without data.
        seed: of the random directions of the gradients.
        clock: for the time that statistics take.
        progress: called as `progress(what, done, total)`.

    Attributes:
        moments: what was seen at each layer; None before `take`, after `forget`, and without data.
        is_kept: that further plans will be made, so that `forget_if_done` forgets nothing.
        energy: sum of the squares of the model's outputs; None before `take`.
    """

    def __init__(
        self,
        opened: nn.Module,
        sites: Sequence[WeightSite],
        calls: Sequence[Batch] | None,
        *,
        seed: int,
        clock: Clock,
        progress: Progress | None,
    ) -> None:
        self.moments: dict[nn.Module, LayerMoments] | None = None
        self.is_kept = False
        self.energy: float | None = None
        self._opened = opened
        self._sites = sites
        self._calls = calls
        self._seed = seed
        self._clock = clock
        self._progress = progress
        self._seen: Sequence[Call] = ()
        self._gains: dict[WeightSite, Tensor | None] = {}
        self._trials: dict[tuple[WeightSite, Layout, tuple[int, ...]], Trial | None] = {}
        self._plan_trials: dict[Hashable, float | None] = {}
        self._choices: dict[WeightSite, Sequence[StorageChoice]] = {}

    def take(self, sites: Sequence[WeightSite]) -> None:
        """Collect the statistics of some weights, unless they are there or there is no data.

        Raises:
            ConversionError: NaN or Inf in one of the weights.
        """
        if self._calls is None or self.moments is not None:
            return
        if self._progress is not None:
            self._progress("inputs of the layers and gradients at their outputs", 0, len(sites))
        for site in sites:
            check_finite(site)
        modules = [module for site in sites for module in site.modules]
        with self._clock("statistics"):
            found = take_statistics(self._opened, modules, self._calls, seed=self._seed)
            self.moments, self.energy = found.layers, found.output_energy
            # Trials need no more: these show enough of every layer, and the energy is theirs.
            self._seen = found.calls

    def forget(self) -> None:
        """All plans have been made: free the largest thing that is no longer needed."""
        self.is_kept = False
        self.moments = None

    def forget_if_done(self) -> None:
        """The same, unless further plans will be made."""
        if not self.is_kept:
            self.forget()

    @property
    def gains(self) -> Gains | None:
        """What each bond dimension is worth on the data; None without statistics."""
        if self.moments is None:
            return None
        compute = partial(gain_of_bonds, moments=self.moments)

        def known(site: WeightSite) -> Tensor | None:
            if site not in self._gains:
                self._gains[site] = compute(site)
            return self._gains[site]

        return known

    def trial(self, site: WeightSite, layout: Layout, bond_dims: tuple[int, ...]) -> Trial | None:
        """What a layer alone, in a layout, does to the outputs; None without statistics.

        None, too, where values decide how many outputs there are.
        """
        if not self._seen or self.moments is None or not self.energy:
            return None
        key = (site, layout, bond_dims)
        if key not in self._trials:
            if self._progress is not None:
                self._progress(f"{site.name}: {layout.num_sites} sites on trial", 0, 1)
            self._trials[key] = None
            with suppress(OutputsDifferError):
                change, distance = effect_alone(
                    self._opened,
                    site,
                    layout,
                    bond_dims,
                    self._seen,
                    output_metrics=OutputMetrics(self.moments),
                    moments=self.moments,
                )
                self._trials[key] = Trial(loss=change**2 * self.energy, distance=distance)
        return self._trials[key]

    def plan_trial(self, plan: Plan) -> float | None:
        """Mean of what healing would minimize, of the model as planned; None without statistics.

        None, too, where these reach none of the planned layers, or values decide how many outputs
        there are.
        """
        if not self._seen or self.moments is None:
            return None
        key = tuple((layer.name, layer.layout, layer.bond_dims) for layer in plan.compressed)
        if key not in self._plan_trials:
            if self._progress is not None:
                self._progress("a plan on trial", 0, 1)
            by_name = {site.name: site for site in self._sites}
            planned = site_plans(plan, by_name)
            kept = correctable(plan, by_name)
            planned += correction_plans(self._opened, kept, planned, self._seen)
            self._plan_trials[key] = None
            with suppress(NoRowsError, OutputsDifferError):
                _, self._plan_trials[key] = effect_together(
                    self._opened,
                    planned,
                    self._seen,
                    output_metrics=OutputMetrics(self.moments),
                    heads={e.site: tied_heads(e.site, self.moments) for e in planned},
                    later=later_calls([entry.site for entry in planned], self.moments),
                )
        return self._plan_trials[key]

    def made_trial(
        self, site: WeightSite, layout: Layout, bond_dims: tuple[int, ...]
    ) -> Trial | None:
        """What `trial` gave, if it was made before."""
        return self._trials.get((site, layout, bond_dims))

    def storage_choices(self, site: WeightSite) -> Sequence[StorageChoice]:
        """Precisions and ranks that a weight may have in a file, and what each loses."""
        if site not in self._choices:
            self._choices[site] = storage_choices(site, self.moments)
        return self._choices[site]
