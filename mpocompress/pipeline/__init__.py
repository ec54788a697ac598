"""One command's worth of work: from a checkpoint to a verified result directory."""

from mpocompress.pipeline.conversion import Conversion, convert, plan_model
from mpocompress.pipeline.onnx_files import checked, file_metadata, quantize_batches
from mpocompress.pipeline.opening import Opened, OpenedGraph, open_any, open_model
from mpocompress.pipeline.request import Request
from mpocompress.pipeline.run_state import state_folder

__all__ = [
    "Conversion",
    "Opened",
    "OpenedGraph",
    "Request",
    "checked",
    "convert",
    "file_metadata",
    "open_any",
    "open_model",
    "plan_model",
    "quantize_batches",
    "state_folder",
]
