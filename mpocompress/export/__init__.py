"""Writing models as ONNX files, and checking the files against the models."""

from mpocompress.export.graph_stats import GraphStats, graph_stats
from mpocompress.export.inputs import InputSpec
from mpocompress.export.onnx_file import ExportedModel, export_onnx
from mpocompress.export.verify import ParityResult, verify

__all__ = [
    "ExportedModel",
    "GraphStats",
    "InputSpec",
    "ParityResult",
    "export_onnx",
    "graph_stats",
    "verify",
]
