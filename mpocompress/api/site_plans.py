"""A plan's rows as what is asked of the fits of a model's weights."""

from collections.abc import Mapping

from mpocompress.api.storage import storage_of
from mpocompress.planning import Plan
from mpocompress.surgery import WeightSite
from mpocompress.tuning import SitePlan


def site_plans(plan: Plan, by_name: Mapping[str, WeightSite]) -> list[SitePlan]:
    """What is asked of each weight that is compressed, in the plan's order."""
    return [
        SitePlan(
            site=by_name[layer.name],
            layout=layer.sites(),
            bond_dims=layer.sites().clip(layer.bond_dims or ()),
            storage=storage_of(layer),
        )
        for layer in plan.compressed
    ]


def correctable(plan: Plan, by_name: Mapping[str, WeightSite]) -> list[WeightSite]:
    """Weights that stay dense, and may be corrected for what is lost before them."""
    return [
        by_name[layer.name]
        for layer in plan.layers
        if layer.action == "keep" and layer.corrects and layer.name in by_name
    ]
