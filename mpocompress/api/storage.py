"""Layers in the precision that a plan gives them: checks, records, and rounding without data."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpocompress.errors import PlanError
from mpocompress.layers import MPOLayer
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.integers import Stored, StoredHalf, StoredIntegers, StoredRows
from mpocompress.mpo.precision import Precision, bits_of
from mpocompress.mpo.weight import Weight, index_bytes
from mpocompress.planning import LayerPlan
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.rounding import (
    Rounded,
    Storage,
    round_table,
    round_weight,
    stored_tensors,
)
from mpocompress.tuning.fitting.storage_choices import may_be_rounded


def storage_of(layer: LayerPlan) -> Storage:
    """How a planned layer is stored."""
    return Storage(
        precision=layer.precision, block=layer.block, tiers=layer.tiers, gauge=layer.gauge
    )


def round_without_data(site: WeightSite, mpo: MPO, storage: Storage) -> Rounded:
    """Round a weight of which no data tells what matters.

    Raises:
        PlanError: the plan has tiers, which are by how often rows are looked up.
    """
    if storage.tiers:
        raise PlanError(
            f"layer {site.label}: tiers are of the rows that data look up most often, and no data "
            "reach it. Give data, or drop the tiers."
        )
    if mpo.layout.num_sites == 1 and site.adapter.looks_up:
        uniform_O = torch.zeros(site.shape[0], device=site.device)
        return round_table(mpo.to_dense(), storage, frequencies_O=uniform_O, metric_II=None)
    return round_weight(mpo, storage)


def check_precision(site: WeightSite, layer: LayerPlan) -> None:
    """Refuse a precision that a weight cannot be written in.

    Raises:
        PlanError: it is not float32, or its layer does not store plain cores.
    """
    if layer.rounds and not may_be_rounded(site):
        raise PlanError(
            f"layer {site.label}: precision {layer.storage!r} is for float32 weights of linear and "
            f"embedding layers; this is a {site.kind} weight in "
            f"{str(site.dtype).removeprefix('torch.')}. Take float32."
        )


def record_stored_(model: nn.Module, rounded: Mapping[WeightSite, Rounded]) -> None:
    """Tell the layers of a compressed model how a file holds them, in place."""
    for site, found in rounded.items():
        for name in site.names:
            module = model.get_submodule(name)
            if isinstance(module, MPOLayer):
                module.stored = dict(found.stored)
                for parameter in module.cores.parameters():
                    parameter.requires_grad_(False)  # trained, they would not be these any more


def stored_bytes(found: Rounded) -> int:
    """Bytes of a layer in a file, without its bias."""
    return sum(stored.num_bytes for stored in found.stored.values()) + index_bytes(found.weight)


def blank(weight: Weight, storage: Storage) -> Rounded:
    """A layer stored like one of these sizes, of no particular values."""
    stored: dict[str, Stored] = {}
    for name, tensor in stored_tensors(weight):
        with tensor.device:
            stored[name] = _blank_like(tensor, weight.layout, storage)
    return Rounded(weight=weight, stored=stored)


def _blank_like(tensor: Tensor, layout: Layout, storage: Storage) -> Stored:
    shape = tuple(tensor.shape)
    if layout.num_sites == 1:
        return _blank_rows(*layout.pairs[0], storage, shape)
    # Free rows (F, R); cores (left * out * in, right), the last one (left, out * in).
    last = len(shape) == 4 and shape[-1] == 1
    rows = shape[0] if last else tensor.numel() // shape[-1]
    columns = tensor.numel() // max(rows, 1)
    return _blank(rows, columns, storage.precision, storage.block, shape)


def _blank_rows(rows: int, columns: int, storage: Storage, shape: tuple[int, ...]) -> Stored:
    parts, left = [], rows
    for count, precision in (*storage.tiers, (rows, storage.precision)):
        count, left = min(count, left), left - min(count, left)
        if count:
            parts.append(_blank(count, columns, precision, storage.block, (count, columns)))
    if len(parts) == 1:
        return _blank(rows, columns, storage.precision, storage.block, shape)
    places = torch.arange(rows, dtype=torch.int32, device="cpu")
    return StoredRows(parts=tuple(parts), places=places, shape=shape)


def _blank(
    rows: int, columns: int, precision: Precision, block: int | None, shape: tuple[int, ...]
) -> StoredIntegers | StoredHalf:
    bits = bits_of(precision)
    if bits is None:
        return StoredHalf(values=torch.zeros(shape, dtype=torch.float16, device="cpu"))
    block = columns if block is None else min(block, columns)
    scales: Tensor = torch.ones((rows, -(-columns // block)), dtype=torch.float16, device="cpu")
    return StoredIntegers(
        values=torch.zeros((rows, columns), dtype=torch.int8, device="cpu"),
        scales=scales,
        bits=bits,
        block=block,
        transposed=False,
        shape=shape,
    )
