"""Matrix product operators on torch tensors: no networks, no files."""

from mpocompress.mpo.contract import ContractionPlan, apply_cores, plan_contractions
from mpocompress.mpo.factorize import Factorization, sequential_svd
from mpocompress.mpo.layout import Layout, LayoutLike, as_layout
from mpocompress.mpo.metric import Metric
from mpocompress.mpo.operator import MPO
from mpocompress.mpo.truncate import Cut, Truncation, choose_bond_dim

__all__ = [
    "MPO",
    "ContractionPlan",
    "Cut",
    "Factorization",
    "Layout",
    "LayoutLike",
    "Metric",
    "Truncation",
    "apply_cores",
    "as_layout",
    "choose_bond_dim",
    "plan_contractions",
    "sequential_svd",
]
