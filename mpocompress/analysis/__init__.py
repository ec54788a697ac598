"""What the weights of a model look like to a tensor network."""

from mpocompress.analysis.inspect import (
    BondFigures,
    EntryFigures,
    Inspection,
    inspect_inventory,
)

__all__ = ["BondFigures", "EntryFigures", "Inspection", "inspect_inventory"]
