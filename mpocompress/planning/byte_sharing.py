"""All plans of a model that share a number of bytes among its weights."""

from collections.abc import Sequence

from mpocompress.errors import NoLayerMatched
from mpocompress.mpo.identity_gauge import stored_parameters
from mpocompress.planning.entries import keep_entry, why_kept
from mpocompress.planning.layouts import chain_macs
from mpocompress.planning.plan import CandidateFigures, LayerPlan, Plan
from mpocompress.planning.planner import Progress
from mpocompress.planning.storage_choice import (
    StorageChoice,
    StorageChoices,
    allocate_bytes,
    lower_hull,
)
from mpocompress.surgery import Inventory, WeightSite, check_finite, select_sites
from mpocompress.surgery.match import as_patterns


class ByteSharing:
    """The selected weights with the ways to store them.

    Args:
        inventory: of the model.
        choices: of each weight.
        include: patterns of layers to compress; default: all.
        exclude: patterns of layers to keep.
        output_energy: sum of the squares of the model's outputs on the data that the losses are
            from; None if they are on another scale.
        progress: called once before each layer.

    Raises:
        NoLayerMatched: a pattern matches nothing, or no weight can be stored otherwise.
        ConversionError: NaN or Inf in a selected weight.
    """

    def __init__(
        self,
        inventory: Inventory,
        choices: StorageChoices,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        output_energy: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.inventory = inventory
        self.settings = {
            "include": list(as_patterns(include)),
            "exclude": list(as_patterns(exclude)),
            "quantize": "auto",
        }
        self._energy = output_energy
        self._kept: dict[WeightSite, LayerPlan] = {}
        self._hulls: dict[WeightSite, list[StorageChoice]] = {}
        selected = {site.name for site in select_sites(inventory, include, exclude)}
        for done, site in enumerate(inventory.sites):
            if progress is not None:
                progress(site.name, done, len(inventory.sites))
            # Rounded, tables lose little even where it is not known which rows matter.
            if (kept := why_kept(site, selected, include, True)) is not None:
                self._kept[site] = keep_entry(site, kept, selected=site.name in selected)
                continue
            check_finite(site)
            hull = lower_hull(choices(site))
            if not hull:
                why = f"a {site.kind} weight in {str(site.dtype).removeprefix('torch.')}"
                self._kept[site] = keep_entry(site, f"{why} is stored as it is")
                continue
            self._hulls[site] = hull
        if not self._hulls:
            raise NoLayerMatched(
                "no selected weight can be stored in another precision: that is for float32 "
                "weights of linear, embedding and attention layers."
            )

    @property
    def least(self) -> int:
        """Bytes of all weights that take part, each as small as it gets, and of their graph."""
        return sum(hull[0].cost for hull in self._hulls.values())

    @property
    def most(self) -> int:
        """Bytes of all weights that take part, in float32."""
        return sum(hull[-1].cost for hull in self._hulls.values())

    def cost_at(self, budget: int) -> int:
        """Bytes that the weights take, with the graph around them, in the plan `at` a budget."""
        chosen = allocate_bytes(list(self._hulls.values()), budget)
        return sum(choice.cost for choice in chosen)

    def at(self, budget: int, why: str) -> Plan:
        """The plan whose weights take no more than so many bytes, or the smallest one.

        Args:
            budget: bytes of the weights that take part, with those of the graph around them.
            why: for the reason of each entry, such as "an ONNX file of 7 MB".
        """
        chosen = allocate_bytes(list(self._hulls.values()), budget)
        entries = dict(self._kept)
        for (site, hull), choice in zip(self._hulls.items(), chosen, strict=True):
            entries[site] = self._entry(site, hull, choice, why)
        rows = tuple(entries[site] for site in self.inventory.sites)
        return Plan(settings=dict(self.settings), layers=rows)

    def _entry(
        self, site: WeightSite, hull: Sequence[StorageChoice], choice: StorageChoice, why: str
    ) -> LayerPlan:
        candidates = tuple(self._figures(found, found is choice) for found in hull)
        if choice.precision == "float32" and choice.layout.num_sites == 1:
            kept = keep_entry(site, "in float32: there are bytes enough")
            return kept.model_copy(update={"candidates": candidates})
        return LayerPlan(
            name=site.name,
            also_known_as=tuple(site.names[1:]),
            kind=site.kind,
            shape=site.shape,
            action="compress",
            reason=f"storage from {why}, by what an error here does to the model's output",
            layout=choice.layout.pairs,
            bond_dims=choice.bond_dims,
            gauge=choice.gauge,
            precision=choice.precision,
            block=choice.block,
            tiers=choice.tiers,
            candidates=candidates,
        )

    def _figures(self, choice: StorageChoice, chosen: bool) -> CandidateFigures:
        return CandidateFigures(
            layout=choice.layout.pairs,
            bond_dims=choice.bond_dims,
            parameters=stored_parameters(choice.layout, choice.bond_dims, choice.gauge),
            macs=chain_macs(choice.layout, choice.bond_dims),
            chosen=chosen,
            gauge=choice.gauge,
            precision=choice.precision,
            block=choice.block,
            tiers=choice.tiers,
            bytes=choice.bytes,
            loss=None if not self._energy else choice.loss / self._energy,
        )
