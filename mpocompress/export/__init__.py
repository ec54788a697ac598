"""Writing models as ONNX files, and checking the files against the models."""

from mpocompress.export.form_choice import LayerForm
from mpocompress.export.graph_stats import GraphStats, graph_stats
from mpocompress.export.inputs import InputSpec
from mpocompress.export.onnx_file import ExportedModel, export_onnx
from mpocompress.export.quantize import QuantizedModel, quantize_cores
from mpocompress.export.verify import ParityResult, verify

__all__ = [
    "ExportedModel",
    "GraphStats",
    "InputSpec",
    "LayerForm",
    "ParityResult",
    "QuantizedModel",
    "export_onnx",
    "graph_stats",
    "quantize_cores",
    "verify",
]
