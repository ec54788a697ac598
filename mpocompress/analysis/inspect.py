"""What is in a model before anything is changed: sizes, shares and spectra of its weights."""

from math import exp

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mpocompress.mpo import Layout
from mpocompress.mpo.factors import balanced_layout
from mpocompress.mpo.linalg import svd_values, working_dtype
from mpocompress.mpo.spectra import entropy_nats
from mpocompress.mpo.truncate import Truncation, choose_bond_dim
from mpocompress.planning import Progress
from mpocompress.surgery import Inventory, WeightSite, check_finite, select_sites


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BondFigures(_Frozen):
    """One two-site layout of a weight: its spectrum, and what it takes to reach the error.

    Attributes:
        layout: (out, in) of both sites.
        schmidt_values: of the dense weight across the bond; descending, not normalized.
        entropy_nats: entanglement entropy across the bond.
        effective_bond_dim: its exponential.
        bond_dim: smallest one that keeps the relative weight error.
        parameters: of the MPO at that bond dimension.
        ratio: dense parameters over those, > 1 is smaller.
    """

    layout: tuple[tuple[int, int], ...]
    schmidt_values: tuple[float, ...]
    entropy_nats: float
    effective_bond_dim: float
    bond_dim: int
    parameters: int
    ratio: float


class EntryFigures(_Frozen):
    """One weight, other parameter or buffer.

    Attributes:
        name: qualified name.
        also_known_as: other names of the same tensor.
        kind: such as "linear", "embedding", "norm".
        shape: of the tensor.
        parameters: its entries, 0 for a buffer.
        share: of all parameters, in [0, 1].
        convertible: whether it can become an MPO.
        reason: why not, or "".
        bonds: figures per two-site layout; empty unless convertible and selected.
    """

    name: str
    also_known_as: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    parameters: int
    share: float
    convertible: bool
    reason: str
    bonds: tuple[BondFigures, ...] = ()

    @property
    def best(self) -> BondFigures | None:
        """The layout with the highest ratio at the error, if there is any."""
        return max(self.bonds, key=lambda bond: bond.ratio, default=None)


class Inspection(_Frozen):
    """All entries of a model, and the relative weight error that `ratio` is given for."""

    relative_error: float
    parameters: int
    entries: tuple[EntryFigures, ...]


def inspect_inventory(
    inventory: Inventory,
    *,
    relative_error: float,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    kind: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Measure the spectra of all selected weights across the SVD cut and the balanced cut.

    Args:
        inventory: of the model.
        relative_error: relative weight error (Frobenius, not squared) to give ratios for.
        include: patterns of layers to measure; default: all convertible ones.
        exclude: patterns of layers not to measure.
        kind: what to call the convertible weights if their modules are not known.
        progress: called as `progress(layer, done, total)`.

    Raises:
        NoLayerMatched: a pattern that matches nothing.
        ConversionError: NaN or Inf in a weight.
    """
    chosen = (
        {site.name for site in select_sites(inventory, include, exclude)}
        if (inventory.sites or include or exclude)
        else set()
    )
    total = max(1, inventory.parameters)
    entries: list[EntryFigures] = []
    done = 0
    for entry in inventory.entries:
        bonds: tuple[BondFigures, ...] = ()
        is_site = isinstance(entry, WeightSite)
        if isinstance(entry, WeightSite) and entry.name in chosen:
            if progress is not None:
                progress(entry.name, done, len(chosen))
            done += 1
            check_finite(entry)
            bonds = tuple(_bond_figures(entry, relative_error))
        entries.append(
            EntryFigures(
                name=entry.name or "(model)",
                also_known_as=entry.names[1:]
                if isinstance(entry, WeightSite)
                else entry.also_known_as,
                kind=kind if kind and is_site and entry.kind == "linear" else entry.kind,
                shape=entry.shape,
                parameters=entry.parameters,
                share=entry.parameters / total,
                convertible=is_site,
                reason="" if isinstance(entry, WeightSite) else entry.reason,
                bonds=bonds,
            )
        )
    return Inspection(
        relative_error=relative_error, parameters=inventory.parameters, entries=tuple(entries)
    )


def _bond_figures(site: WeightSite, relative_error: float) -> list[BondFigures]:
    weight_OI: Tensor = site.matrix().to(working_dtype(site.dtype))
    layouts = dict.fromkeys([Layout.svd(*site.shape), balanced_layout(*site.shape)])
    figures = []
    for layout in layouts:
        spectrum_S = svd_values(layout.split(weight_OI))
        cut = choose_bond_dim(
            spectrum_S,
            Truncation(cutoff=relative_error**2),
            rank_tolerance=torch.finfo(spectrum_S.dtype).eps,
        )
        parameters = layout.num_parameters((cut.bond_dim,))
        entropy = entropy_nats(spectrum_S)
        figures.append(
            BondFigures(
                layout=layout.pairs,
                schmidt_values=tuple(spectrum_S.tolist()),
                entropy_nats=entropy,
                effective_bond_dim=exp(entropy),
                bond_dim=cut.bond_dim,
                parameters=parameters,
                ratio=site.parameters / parameters,
            )
        )
    return figures
