"""What weights and functions look like to a tensor network: sizes, spectra, entanglement."""

from mpocompress.analysis.cross import CrossInterpolation, cross_interpolation
from mpocompress.analysis.entanglement import Entanglement, LayerEntanglement, entanglement
from mpocompress.analysis.figures import (
    profile_figure,
    spectra_figure,
    state_figure,
    training_figure,
)
from mpocompress.analysis.functions import amplitudes
from mpocompress.analysis.growth import (
    EntropyProfile,
    Growth,
    classify_growth,
    page_entropy_nats,
)
from mpocompress.analysis.inspect import (
    BondFigures,
    EntryFigures,
    Inspection,
    inspect_inventory,
)
from mpocompress.analysis.ising import IsingChain
from mpocompress.analysis.recorder import EntanglementRecorder, Snapshot
from mpocompress.analysis.states import (
    StateEntanglement,
    state_entanglement,
    vector_entanglement,
)
from mpocompress.analysis.variational import EvenState, VariationalState, find_ground_state

__all__ = [
    "BondFigures",
    "CrossInterpolation",
    "Entanglement",
    "EntanglementRecorder",
    "EntropyProfile",
    "EntryFigures",
    "EvenState",
    "Growth",
    "Inspection",
    "IsingChain",
    "LayerEntanglement",
    "Snapshot",
    "StateEntanglement",
    "VariationalState",
    "amplitudes",
    "classify_growth",
    "cross_interpolation",
    "entanglement",
    "find_ground_state",
    "inspect_inventory",
    "page_entropy_nats",
    "profile_figure",
    "spectra_figure",
    "state_entanglement",
    "state_figure",
    "training_figure",
    "vector_entanglement",
]
