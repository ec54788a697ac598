"""A ceiling for the bytes of the ONNX file, measured on written files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpocompress.api.budgets import Met
from mpocompress.api.job import Job
from mpocompress.api.storage import blank, record_stored_, storage_of
from mpocompress.errors import BudgetError, NoLayerMatched
from mpocompress.mpo import MPO
from mpocompress.mpo.weight import Weight, in_gauge
from mpocompress.planning import Plan
from mpocompress.planning.search import Measured, approach_ceiling
from mpocompress.surgery import WeightSite, copy_with_replacements
from mpocompress.tuning.fitting.rounding import Rounded, with_stored

OnnxBytes = Callable[[nn.Module], int]
"""Writes the ONNX file of a model and gives its bytes."""

_SIZE_TRIES = 10
_STORAGE_TRIES = 4


def plan_for_size(job: Job, max_size: int, onnx_bytes: OnnxBytes) -> tuple[Plan, Met]:
    """The plan whose ONNX file comes closest to a size from below, measured on written files.

    What a file takes does not depend on the values in it, so those that are tried hold cores of the
    planned shapes with random entries; the model is fitted when the plan is found.

    Raises:
        BudgetError: no plan gives so small a file; the message says which is the smallest.
    """
    sharing = job.sharing()
    whole = job.inventory.parameters
    if not sharing.parts:
        sharing.of_model(whole, f"an ONNX file of {max_size} bytes")  # says why there is nothing
    plans: dict[float, Plan] = {}
    written: dict[tuple[str, ...], int] = {}

    def measure(parameters: float) -> float:
        with job.clock("planning"):
            plan = sharing.of_model(parameters, f"an ONNX file of {max_size} bytes")
        plans[parameters] = plan
        choice = tuple(layer.choice for layer in plan.layers)
        if choice not in written:
            if job.progress is not None:
                job.progress("writing ONNX files to measure them", len(written), _SIZE_TRIES)
            with job.clock("planning"):
                written[choice] = onnx_bytes(hollow(job, plan))
        return written[choice]

    tried = approach_ceiling(
        min(max_size / 4, 0.999 * whole),
        sharing.least,
        whole,
        measure,
        max_size,
        per_number=4.0,
        tries=_SIZE_TRIES,
    )
    fitting = [found for found in tried if found.fits]
    if not fitting and tried[0].size > sharing.least:
        smallest = measure(sharing.least)
        tried.append(Measured(sharing.least, smallest, smallest <= max_size))
        fitting = [tried[-1]] if tried[-1].fits else []
    if fitting and not plans[max(fitting, key=lambda found: found.figure).size].compressed:
        raise NoLayerMatched(
            f"the dense model's ONNX file has {int(fitting[-1].figure)} bytes, within {max_size}: "
            "there is nothing to compress. Allow fewer bytes."
        )
    if not fitting:
        reachable = int(min(found.figure for found in tried))
        raise BudgetError(
            f"an ONNX file of {max_size} bytes cannot be met: with bond dimension 1 everywhere it "
            f"has {reachable}. Allow that many, or force layouts of more sites."
        )
    best = max(fitting, key=lambda found: found.figure)
    plan = plans[best.size]
    settings = {"max_size": max_size, **plan.settings}
    met = Met(
        target="max_size",
        asked=max_size,
        reached=best.figure,
        what="bytes of the ONNX file",
        where="the written file",
        trials=len(written),
    )
    return job.predicted(plan.model_copy(update={"settings": settings})), met


def plan_storage_for_size(job: Job, max_size: int, onnx_bytes: OnnxBytes) -> tuple[Plan, Met]:
    """The plan with a storage precision for each layer whose ONNX file is within a size.

    What a file takes besides the weights that take part (the graph, biases, names) hardly depends
    on the plan, so each written file tells how many bytes are left for the weights. Plans change in
    steps: what does not fit is followed by one that takes at least a step less.

    Raises:
        BudgetError: no plan gives so small a file; the message says which is the smallest.
        NoLayerMatched: the dense model's file is within the size.
    """
    sharing = job.byte_sharing()
    why = f"an ONNX file of {max_size} bytes"
    written: dict[int, int] = {}  # by what the weights of the plan take

    def measure(budget: int) -> int:
        cost = sharing.cost_at(budget)
        if cost not in written:
            if job.progress is not None:
                job.progress("writing ONNX files to measure them", len(written), _STORAGE_TRIES)
            with job.clock("planning"):
                written[cost] = onnx_bytes(hollow(job, sharing.at(budget, why)))
        return cost

    # To begin with, as if a file held nothing else but the other tensors of the model.
    elsewhere = job.inventory.bytes - sum(site.bytes for site in job.inventory.sites)
    budget = max_size - elsewhere
    for _ in range(_STORAGE_TRIES):
        cost = measure(budget)
        rest = max(size - weights for weights, size in written.items())
        budget = max_size - rest
        if written[cost] > max_size:
            budget = min(budget, cost - 1)
        if cost <= sharing.least or sharing.cost_at(budget) in written:
            break
    if all(size > max_size for size in written.values()):
        measure(0)  # the least
    fitting = {weights: size for weights, size in written.items() if size <= max_size}
    if not fitting:
        raise BudgetError(
            f"{why} cannot be met: with each layer as small as it gets it has "
            f"{min(written.values())} where the precisions are chosen. Allow that many, or choose "
            "one for all cores: --max-size with --quantize none, int8 or int4."
        )
    best = max(fitting, key=lambda weights: fitting[weights])
    plan = sharing.at(best, why)
    if not plan.compressed:
        raise NoLayerMatched(
            f"the dense model's ONNX file has {fitting[best]} bytes, within {max_size}: "
            "there is nothing to compress. Allow fewer bytes."
        )
    met = Met(
        target="max_size",
        asked=max_size,
        reached=fitting[best],
        what="bytes of the ONNX file",
        where="the written file",
        trials=len(written),
    )
    settings = {"max_size": max_size, **plan.settings}
    return job.predicted(plan.model_copy(update={"settings": settings})), met


def hollow(job: Job, plan: Plan) -> nn.Module:
    """The compressed model with random cores: the very file, but for its values."""
    by_name = {site.name: site for site in job.inventory.sites}
    generator = torch.Generator().manual_seed(job.seed)
    weights: dict[WeightSite, Any] = {}
    rounded: dict[WeightSite, Rounded] = {}
    for layer in plan.compressed:
        site, layout = by_name[layer.name], layer.sites()
        bonds = (1, *layout.clip(layer.bond_dims or ()), 1)
        cores = [
            torch.randn((bonds[k], *pair, bonds[k + 1]), generator=generator, device="cpu")
            for k, pair in enumerate(layout.pairs)
        ]
        mpo = MPO(cores, shape=site.shape)
        weight: Weight = in_gauge(mpo, layer.gauge).to(dtype=site.dtype, device=site.device)
        if layer.rounds:
            rounded[site] = blank(weight, storage_of(layer))
            weight = with_stored(weight, rounded[site].stored)
        weights[site] = weight
    model = copy_with_replacements(job.opened, weights)
    record_stored_(model, rounded)
    return model
