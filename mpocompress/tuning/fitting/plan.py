"""What is asked of a fit to data, and what it gives, layer by layer."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from mpocompress.errors import DataError
from mpocompress.mpo import MPO, Layout
from mpocompress.scalars import as_count, put_plain
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.rounding import Rounded, Storage
from mpocompress.tuning.statistics.shrinkage import RIDGE

OutputMetric = Literal["auto", "exact", "sites"]

# Some minutes on one core. 1024 x 1024 has 2.1e9, 768 x 3072 9.1e9, a sentence encoder 1.6e10.
_EXACT_MACS = 1e10


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """How layers are fitted.

    Attributes:
        ridge: shrinks the input moment, as a share of its diagonal, at least so much, see
            `shrinkage.shrinkage_ridge`. Without it directions that the data hardly shows would be
            free, and other data would show them.
        sweeps: at most so many passes over the sites of a layer, for layouts without a closed
            form; 0 keeps the start of the fit.
        repair_streams: let a layer that feeds a residual stream correct the stream's error.
        output_metric: of layouts that are swept: "exact" as given, or "sites", its product over the
            sites. The former needs conjugate gradients, which take some four times as long, and is
            worth it: a digit classifier in four sites, 130 times smaller, has 93 instead of 84 %
            one-shot, and 95 instead of 93 after 60 steps of healing. "auto" is "exact" unless all
            layers together are so large that it would take long, see `exact_takes_long`.
    """

    ridge: float = RIDGE
    sweeps: int = 16
    repair_streams: bool = True
    output_metric: OutputMetric = "auto"

    def __post_init__(self) -> None:
        put_plain(self, {"sweeps": as_count("sweeps", self.sweeps, 0, DataError)})
        if self.output_metric not in get_args(OutputMetric):
            raise DataError(
                f"output_metric {self.output_metric!r} is none of "
                f"{', '.join(get_args(OutputMetric))}."
            )


def exact_takes_long(shapes: Iterable[tuple[int, int]]) -> bool:
    """Whether sweeps in the whole output metric of matrices (out, in) take many minutes.

    They make hundreds of products with it, of out * in * (out + in) multiply-adds each.
    """
    return sum(out * in_ * (out + in_) for out, in_ in shapes) > _EXACT_MACS


def output_error(moment_II: Tensor, target_OI: Tensor, mpo: MPO) -> float:
    """sqrt(E|T x - W x|^2 / E|T x|^2) for E[x xᵀ] (in, in), in float32; 0 where nothing comes in.

    Not in the metric of the fit, which has a ridge and weighs the outputs.
    """
    lost_OI = target_OI - mpo.to_dense().to(target_OI)
    # Relative to their largest entries, of which float32 need not hold the products.
    moment_II = (moment_II / moment_II.diagonal().max()).float()
    size = target_OI.abs().max()
    lost, whole = (
        float(torch.sum(matrix_OI @ moment_II * matrix_OI))
        for matrix_OI in ((lost_OI / size).float(), (target_OI / size).float())
    )
    return sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedWeight:
    """A fitted layer.

    Attributes:
        mpo: in the weight's dtype.
        bias: (out,) in the bias's dtype, with the mean of the error taken out; None to keep the
            layer's own bias, or none.
        relative_output_error: of the MPO against its target, on the inputs that it was fitted on:
            every output counts the same, and so does every row, of later calls, too, if those were
            fitted; no ridge. Of tables in the metric of their fit.
        rows: of activations that were seen, at all calls that were fitted.
        rounded: as it is stored, if not in float32; `mpo` has the same values.
    """

    mpo: MPO
    bias: Tensor | None
    relative_output_error: float
    rows: int
    rounded: Rounded | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePlan:
    """A weight, its sites, the bond dimensions to fit it with, and how it is stored.

    Attributes:
        stays_dense: nothing is asked for but a correction for what is lost before it; the layout is
            the single site (out, in).
    """

    site: WeightSite
    layout: Layout
    bond_dims: tuple[int, ...]
    storage: Storage = field(default_factory=Storage)
    stays_dense: bool = False


def with_output_metric(options: FitOptions, plans: Iterable[SitePlan]) -> FitOptions:
    """The options with what "auto" is for these plans; others as they are."""
    if options.output_metric != "auto":
        return options
    swept = [plan.site.shape for plan in plans if not (plan.stays_dense or plan.layout.is_svd)]
    return replace(options, output_metric="sites" if exact_takes_long(swept) else "exact")
