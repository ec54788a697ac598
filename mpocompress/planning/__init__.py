"""What becomes of every weight: costs, candidate layouts, the plan."""

from mpocompress.planning.layout_rules import LayoutChoice
from mpocompress.planning.layouts import Candidate, candidate_layouts, chain_macs, choose
from mpocompress.planning.objective import Latency, Objective, ObjectiveName
from mpocompress.planning.options import PlanOptions
from mpocompress.planning.parts import Gains
from mpocompress.planning.plan import CandidateFigures, LayerPlan, Plan
from mpocompress.planning.planner import Progress, plan_bond_dim
from mpocompress.planning.prediction import Predicted, predicted_totals, with_predictions
from mpocompress.planning.ratio import Of, plan_ratio
from mpocompress.planning.sharing import Sharing
from mpocompress.planning.trials import PlanTrials, Trial, Trials

__all__ = [
    "Candidate",
    "CandidateFigures",
    "Gains",
    "Latency",
    "LayerPlan",
    "LayoutChoice",
    "Objective",
    "ObjectiveName",
    "Of",
    "Plan",
    "PlanOptions",
    "PlanTrials",
    "Predicted",
    "Progress",
    "Sharing",
    "Trial",
    "Trials",
    "candidate_layouts",
    "chain_macs",
    "choose",
    "plan_bond_dim",
    "plan_ratio",
    "predicted_totals",
    "with_predictions",
]
