"""What a weight meets when a forward pass calls it again, as ALBERT and hand-written cells do.

A weight is fitted where it is called first, with what the compressed prefix gives there. Nobody
knows yet what that will give at later calls; what the dense model gives there is known, and has to
do. Rows of later calls are pooled with those of the first: x is the input on both sides of them,
W x their target, so that they ask the fit to keep W where they are, and for no correction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mpocompress.surgery import WeightSite
from mpocompress.tuning.statistics.gradients import LayerMoments
from mpocompress.tuning.statistics.layer_rows import adapter_of
from mpocompress.tuning.statistics.moments import CrossMoment, RowCounts
from mpocompress.tuning.statistics.upstream import Moments


@dataclass(frozen=True, slots=True)
class LaterCalls:
    """Inputs of a weight in the dense model after its first call in a forward pass.

    They may be from a part of the data: each row at a first call stands for as many later ones as
    it did there.

    Attributes:
        inputs: of x with itself; without rows for a table.
        counts: of rows that were looked up; without any for all else.
        first_rows: rows at the first calls of the same passes.
    """

    inputs: CrossMoment
    counts: RowCounts
    first_rows: int

    @property
    def rows(self) -> int:
        """That were seen."""
        return self.inputs.rows + self.counts.rows

    def tensors(self) -> list[Tensor]:
        """What tells it from another one, beside the numbers of rows."""
        found = [self.counts.frequencies()] if self.counts.rows else []
        return [*found, *(self.inputs.mean(centered=False) if self.inputs.rows else ())]

    def pooled(self, moments: Moments) -> Moments:
        """Moments at the first call, and with them those of the later calls that belong to it."""
        later = self.inputs.scaled_to(self._rows_beside(moments.inputs.rows))
        inputs = CrossMoment.sum_of([moments.inputs, later])
        cross, residual = moments.cross, moments.residual
        if cross is moments.inputs:
            cross = inputs
        elif cross is not None:
            cross = CrossMoment.sum_of([cross, later])
        if residual is not None:
            residual = CrossMoment.sum_of([residual])
            residual.merge_zeros(later)
        return Moments(inputs=inputs, cross=cross, residual=residual)

    def pooled_counts(self, counts: RowCounts) -> RowCounts:
        """Lookups at the first call, and with them the later ones that belong to it."""
        total = RowCounts()
        total.merge(counts)
        total.merge(self.counts.scaled_to(self._rows_beside(counts.rows)))
        return total

    def _rows_beside(self, first_rows: int) -> int:
        return round(first_rows * self.rows / self.first_rows)


def later_calls(
    sites: Iterable[WeightSite], moments: Mapping[nn.Module, LayerMoments]
) -> dict[WeightSite, LaterCalls]:
    """Of those weights that are called more than once in a forward pass.

    Output layers that are tied to a table are no calls of it; their use is a `HeadUse`.

    Args:
        sites: weights.
        moments: of their modules, from `take_statistics`.
    """
    found = {}
    for site in sites:
        tables = [module for module in site.modules if adapter_of(module).looks_up]
        seen = [moments[module] for module in tables or site.modules if module in moments]
        parts = [moment.later_inputs for moment in seen if moment.later_inputs.rows]
        inputs = parts[0] if len(parts) == 1 else CrossMoment.sum_of(parts)
        counts = RowCounts()
        for moment in seen:
            counts.merge(moment.later_counts)
        rows = sum(moment.inputs.rows + moment.counts.rows for moment in seen)
        later = LaterCalls(inputs, counts, rows - inputs.rows - counts.rows)
        if later.rows and later.first_rows:
            found[site] = later
    return found
