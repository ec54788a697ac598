"""What becomes of every weight: costs, candidate layouts, the plan."""

from mpocompress.planning.layouts import Candidate, candidate_layouts, chain_macs, choose
from mpocompress.planning.plan import CandidateFigures, LayerPlan, Plan
from mpocompress.planning.planner import LayoutChoice, Progress, plan_bond_dim

__all__ = [
    "Candidate",
    "CandidateFigures",
    "LayerPlan",
    "LayoutChoice",
    "Plan",
    "Progress",
    "candidate_layouts",
    "chain_macs",
    "choose",
    "plan_bond_dim",
]
