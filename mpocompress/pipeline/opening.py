"""What a run reads: a checkpoint or an ONNX graph, the user's data, and example inputs."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from mpocompress.errors import BudgetError, DataError, LoadError
from mpocompress.loading import (
    Batches,
    ExampleInputs,
    Source,
    example_inputs,
    input_hint,
    is_onnx,
    load_batches,
    load_source,
    module_from_state,
)
from mpocompress.pipeline.request import Request
from mpocompress.planning import Plan
from mpocompress.surgery import Inventory, find_weights, open_modules

if TYPE_CHECKING:
    from mpocompress.loading.onnx_source import OnnxSource

_NOT_ASKED = "--no-onnx was given, so no ONNX file was written; `mpocompress export` can write it"
_NO_MODULE = (
    "a bare state dict cannot be run, so no ONNX file was written; give its architecture with "
    "--model MODULE:FACTORY"
)
_NO_INPUTS = "the shape of the model's input is not known, so no ONNX file was written"


@dataclass(kw_only=True)
class Opened:
    """A loaded checkpoint as a module, and how it can be called."""

    source: Source
    module: nn.Module
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str | None:
        """What the weights are called if nothing is known of their modules."""
        return "matrix" if self.source.kind == "state_dict" else None

    def inventory(self) -> Inventory:
        """All weights and buffers."""
        return find_weights(open_modules(self.module))


@dataclass(kw_only=True)
class OpenedGraph:
    """A loaded ONNX graph."""

    source: "OnnxSource"
    notes: list[str] = field(default_factory=list)
    kind: str | None = None

    def inventory(self) -> Inventory:
        """All stored tensors."""
        from mpocompress.export.graphs import find_graph_weights

        return find_graph_weights(self.source.model)


def open_model(
    path: str | Path, *, factory: str | None = None, trust_pickle: bool = False
) -> Opened:
    """Load a checkpoint; a bare state dict becomes a module that cannot be called.

    Raises:
        LoadError: see `load_source`.
    """
    source = load_source(path, factory=factory, trust_pickle=trust_pickle)
    module = source.module
    if module is None:
        module = module_from_state(source.state_dict or {})
    return Opened(source=source, module=module, notes=list(source.notes))


def open_any(
    path: str | Path, *, factory: str | None = None, trust_pickle: bool = False
) -> Opened | OpenedGraph:
    """Load a checkpoint or an ONNX graph.

    Raises:
        LoadError: see `load_source` and `load_onnx`.
    """
    if is_onnx(path):
        return open_graph(path, factory)
    return open_model(path, factory=factory, trust_pickle=trust_pickle)


def open_graph(path: str | Path, factory: str | None) -> OpenedGraph:
    """Load an ONNX graph; a factory is refused, because the graph is all there is to build.

    Raises:
        LoadError: there is a factory, or see `load_onnx`.
    """
    from mpocompress.loading.onnx_source import load_onnx

    if factory is not None:
        raise LoadError(
            f"--model {factory} builds a PyTorch module, but {path} brings its own graph. Drop "
            "--model, or give the PyTorch checkpoint."
        )
    source = load_onnx(path)
    return OpenedGraph(source=source, notes=list(source.notes))


def read_batches(opened: Opened, request: Request) -> Batches | None:
    """The user's data.

    Raises:
        DataError: it cannot be given to anything.
    """
    if request.data is None:
        return None
    if opened.source.kind == "state_dict":
        raise DataError(
            f"--data {request.data} is for a model that can be run, and {opened.source.name} is a "
            "bare state dict. Give its architecture with --model MODULE:FACTORY, or drop --data."
        )
    return load_batches(request.data)


def read_plan(request: Request) -> tuple[Plan | None, Request]:
    """The user's plan, and what is asked for besides: its file is written in its precisions.

    Raises:
        PlanError: see `Plan.load`.
        DataError: the request has another precision than a plan that rounds.
    """
    if request.plan is None:
        return None, request
    plan = Plan.load(request.plan)
    if not any(layer.rounds for layer in plan.compressed):
        return plan, request
    if request.quantize != "none":
        raise DataError(
            f"--quantize {request.quantize} rounds cores that are float32, and --plan "
            f"{request.plan} has a precision for each layer. Drop --quantize, or set the "
            "precisions in the plan to float32."
        )
    return plan, replace(request, plan=None, quantize="auto" if request.onnx else "none")


def why_no_onnx(opened: Opened, request: Request) -> str:
    """Why no ONNX file is written of this source, without examples, and what to do about it."""
    if not request.onnx:
        return _NOT_ASKED
    if opened.source.kind == "state_dict":
        return _NO_MODULE
    return f"{_NO_INPUTS}; {input_hint(opened.module)}"


def read_examples(
    opened: Opened, request: Request, batches: Batches | None
) -> ExampleInputs | None:
    """What to trace the model with; None where it cannot be traced, or is not to be.

    Raises:
        BudgetError: a size is asked for of a file that cannot be written.
    """
    examples = None
    if opened.source.kind == "module" and request.onnx:
        examples = example_inputs(opened.source, specs=request.inputs, batches=batches)
    if examples is None and request.max_size is not None:
        raise BudgetError(
            f"--max-size {request.max_size} is the size of the ONNX file: "
            f"{why_no_onnx(opened, request)}."
        )
    return examples
