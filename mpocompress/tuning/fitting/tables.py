"""Fit a table whose rows are looked up: frequent rows count more, and so do directions that matter.

The cost is that of `statistics.tables`. For low rank its minimum is closed form; the inputs are row
numbers, so nothing upstream can spoil them.
"""

# Shape suffixes: O rows of the table, I columns, R bond.

import torch
from torch import Tensor

from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.fit import fit
from mpocompress.mpo.lookup import column_basis
from mpocompress.mpo.metric import Metric

# Tables up to this size can have a dense metric on their rows, for layouts that are swept.
_MAX_SWEPT_ROWS = 4096


def fit_table(
    table_OI: Tensor,
    layout: Layout,
    bond_dims: tuple[int, ...],
    weights_O: Tensor,
    metric_II: Tensor | None,
    *,
    round_trips: int,
) -> tuple[MPO, float]:
    """The MPO of a table, in float64, and its relative error in the metric (not squared).

    Layouts other than ((out, 1), (1, in)) are swept; tables of more than 4096 rows then with all
    rows alike, as a dense metric of the rows would be needed.
    """
    shape = (table_OI.shape[0], table_OI.shape[1])
    if layout.is_svd and not layout.pad:
        left_OR, right_RI, error = column_basis(table_OI, weights_O, metric_II, bond_dims[0])
        cores = (left_OR[None, :, None, :], right_RI[:, None, :, None])
        return MPO(cores, shape=shape), error
    metric_II = torch.eye(shape[1], dtype=torch.float64) if metric_II is None else metric_II
    rows_OO = torch.diag(weights_O) if shape[0] <= _MAX_SWEPT_ROWS else None
    metric = Metric(metric_II.to(table_OI.device), rows_OO, ridge=0.0, output_ridge=0.0)
    result = fit(table_OI.double(), metric, layout, bond_dims, round_trips=round_trips)
    return MPO(result.cores, shape=shape), result.relative_error


def table_error(table_OI: Tensor, mpo: MPO, weights_O: Tensor, metric_II: Tensor | None) -> float:
    """Relative error of a table in its metric (not squared)."""
    table_OI = table_OI.double()
    lost_OI = table_OI - mpo.to_dense().to(table_OI)

    def norm(rows_OI: Tensor) -> float:
        seen_OI = rows_OI if metric_II is None else rows_OI @ metric_II
        return float(weights_O.to(rows_OI) @ (seen_OI * rows_OI).sum(1))

    whole = norm(table_OI)
    return float((norm(lost_OI) / whole) ** 0.5) if whole > 0 else 0.0
