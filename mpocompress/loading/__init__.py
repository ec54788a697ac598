from mpocompress.loading.bare_state import module_from_state
from mpocompress.loading.batches import Batch, Batches, as_batch, as_batches, load_batches
from mpocompress.loading.example_inputs import (
    ExampleInputs,
    InputSpec,
    example_inputs,
    parse_input_spec,
)
from mpocompress.loading.input_hints import input_hint
from mpocompress.loading.source import Source, is_onnx, load_source

__all__ = [
    "Batch",
    "Batches",
    "ExampleInputs",
    "InputSpec",
    "Source",
    "as_batch",
    "as_batches",
    "example_inputs",
    "input_hint",
    "is_onnx",
    "load_batches",
    "load_source",
    "module_from_state",
    "parse_input_spec",
]
