"""The weights of planned layers as they are stored: fitted or truncated, rounded, in a gauge."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mpocompress.api.storage import round_without_data
from mpocompress.errors import MPOCompressError
from mpocompress.mpo import MPO, sequential_svd
from mpocompress.mpo.identity_gauge import Gauge
from mpocompress.mpo.weight import Weight, in_gauge
from mpocompress.planning import Progress
from mpocompress.report.collect import Outcome, measure
from mpocompress.surgery import WeightSite
from mpocompress.tuning import FittedWeight, SitePlan
from mpocompress.tuning.fitting.rounding import Rounded


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredWeights:
    """Weights of compressed sites.

    Attributes:
        weights: in their gauges.
        bounds: on the relative weight errors, of weights that were not fitted.
        rounded: weights that are not stored in float32.
    """

    weights: dict[WeightSite, Weight] = field(default_factory=dict)
    bounds: dict[WeightSite, float] = field(default_factory=dict)
    rounded: dict[WeightSite, Rounded] = field(default_factory=dict)


def stored_weights(
    planned: Sequence[SitePlan],
    fitted: Mapping[WeightSite, FittedWeight],
    *,
    gauges: Mapping[str, Gauge],
    seed: int,
    progress: Progress | None = None,
) -> StoredWeights:
    """Take what was fitted, and truncate the other weights.

    Args:
        planned: what is compressed.
        fitted: what the fit found; empty without data.
        gauges: by the names of the layers.
        seed: of random projections.
        progress: called as `progress(layer, done, total)`.

    Raises:
        MPOCompressError: a weight cannot be stored like this; the layer's name comes first.
    """
    result = StoredWeights()
    for done, entry in enumerate(planned):
        if progress is not None:
            progress(entry.site.name, done, len(planned))
        site = entry.site
        with _naming(site):
            found = fitted.get(site)
            if found is not None and found.rounded is not None:
                result.rounded[site] = found.rounded
                result.weights[site] = found.rounded.weight
                continue
            if found is not None:
                result.weights[site] = in_gauge(found.mpo, gauges[site.name])
                continue
            mpo, bound = _truncated(entry, seed)
            if entry.storage.rounds:
                result.rounded[site] = round_without_data(site, mpo, entry.storage)
                result.weights[site] = result.rounded[site].weight
                continue
            result.bounds[site] = bound
            result.weights[site] = in_gauge(mpo, gauges[site.name]).to(dtype=site.dtype)
    return result


def factorize_site(
    entry: SitePlan, fitted: Mapping[WeightSite, FittedWeight], seed: int
) -> tuple[MPO, Outcome]:
    """The fitted MPO or, without data or where data did not come by, the sequential SVD."""
    site = entry.site
    with _naming(site):
        if site in fitted:
            found = fitted[site]
            error = found.relative_output_error
            return found.mpo, measure(site, found.mpo, relative_output_error=error)
        mpo, bound = _truncated(entry, seed)
        mpo = mpo.to(dtype=site.dtype)
        return mpo, measure(site, mpo, discarded_weight_bound=bound)


def _truncated(entry: SitePlan, seed: int) -> tuple[MPO, float]:
    """The sequential SVD of a weight, and a bound of its relative error."""
    site = entry.site
    found = sequential_svd(
        site.matrix(),
        entry.layout,
        bond_dim=entry.bond_dims,
        generator=torch.Generator(device=site.device).manual_seed(seed),
    )
    return MPO(found.cores, shape=site.shape), found.relative_error


@contextmanager
def _naming(site: WeightSite) -> Iterator[None]:
    """Put the layer's name before what goes wrong inside."""
    try:
        yield
    except MPOCompressError as error:
        raise type(error)(f"layer {site.label}: {error}") from error
