"""What becomes of every weight: costs, candidate layouts, the plan."""

from mpocompress.planning.layout_rules import LayoutChoice
from mpocompress.planning.layouts import Candidate, candidate_layouts, chain_macs, choose
from mpocompress.planning.options import PlanOptions
from mpocompress.planning.plan import CandidateFigures, LayerPlan, Plan
from mpocompress.planning.planner import Progress, plan_bond_dim
from mpocompress.planning.ratio import Of, plan_ratio

__all__ = [
    "Candidate",
    "CandidateFigures",
    "LayerPlan",
    "LayoutChoice",
    "Of",
    "Plan",
    "PlanOptions",
    "Progress",
    "candidate_layouts",
    "chain_macs",
    "choose",
    "plan_bond_dim",
    "plan_ratio",
]
