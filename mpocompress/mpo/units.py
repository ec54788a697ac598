"""Units in which a fit is worked on, so that squares neither overflow nor vanish in float32.

The objective is the product of G, C and the square of the target: of gradients around 1e10, or of
weights around 1e-20, float32 holds it no more. As the fit is the same in any units, the largest
entries are then brought near 1, by powers of two, which round nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import frexp

from torch import Tensor

from mpocompress.mpo.algebra import scale_cores
from mpocompress.mpo.cores import Cores
from mpocompress.mpo.metric import Metric
from mpocompress.mpo.operator import MPO
from mpocompress.mpo.sweep import LocalUpdate, Observer, SweepRecord

# Between 2^-24 and 2^24, where most entries are, the product of four of them and a sum over all
# entries of a matrix stay within the 2^126 of float32.
_FAR = 24


@dataclass(frozen=True, slots=True)
class Units:
    """Powers of two that the target, C and G are multiples of; 1 for what is of a moderate size."""

    target: float
    inputs: float
    outputs: float

    @classmethod
    def of(cls, target_OI: Tensor, metric: Metric) -> "Units | None":
        """Those of a problem; None if all are 1."""
        output_OO = metric.output_OO
        units = cls(
            _unit(target_OI),
            _unit(metric.input_II.diagonal()),
            1.0 if output_OO is None else _unit(output_OO.diagonal()),
        )
        return None if units == cls(1.0, 1.0, 1.0) else units

    @property
    def objective(self) -> float:
        """That of squared distances."""
        return self.target**2 * self.inputs * self.outputs

    def scaled(self, metric: Metric) -> Metric:
        """The metric in these units."""
        output_OO = metric.output_OO
        return Metric(
            metric.input_II / self.inputs,
            None if output_OO is None else output_OO / self.outputs,
            metric.ridge,
            metric.output_ridge,
        )

    def scaled_start(self, start: MPO | Sequence[Tensor] | None) -> Cores | None:
        """The start of a fit in these units."""
        if start is None:
            return None
        cores = start.cores if isinstance(start, MPO) else tuple(start)
        return scale_cores(cores, 1 / self.target, 0)

    def restored(self, mpo: MPO) -> MPO:
        """What was found, in the units that it was asked for in."""
        cores = scale_cores(mpo.cores, self.target, mpo.center[0])
        return MPO(cores, shape=mpo.shape, center=mpo.center)

    def restored_record(self, record: SweepRecord) -> SweepRecord:
        """A sweep, likewise."""
        return replace(
            record,
            objective=record.objective * self.objective,
            truncation=record.truncation * self.objective,
        )

    def restored_for(self, observer: Observer | None) -> Observer | None:
        """An observer that is shown each local update likewise."""
        if observer is None:
            return None

        def observe(update: LocalUpdate) -> None:
            restored = replace(
                update,
                cores=scale_cores(update.cores, self.target, update.sites[0]),
                objective=update.objective * self.objective,
                gain=update.gain * self.objective,
                truncation=update.truncation * self.objective,
            )
            observer(restored)

        return observe


def _unit(tensor: Tensor) -> float:
    """A power of two near the largest entry; 1 if that is neither large nor small, or 0."""
    largest = float(tensor.detach().abs().max())
    exponent = frexp(largest)[1]
    return 2.0**exponent if largest > 0 and abs(exponent) > _FAR else 1.0
