"""ONNX graphs that somebody else wrote: their weights, their data, and cores in their place."""

from mpocompress.export.graphs.biases import Bias, bias_of
from mpocompress.export.graphs.calibrate import input_moments
from mpocompress.export.graphs.find import GraphSite, find_graph_weights, graph_sites
from mpocompress.export.graphs.model import OnnxModel
from mpocompress.export.graphs.parity import compare_graphs, raise_if_failed, tolerance_of
from mpocompress.export.graphs.rewrite import with_cores, with_matrices
from mpocompress.export.graphs.sessions import Feed, GraphInputs
from mpocompress.export.graphs.tensors import (
    external_files,
    flaw,
    named_files,
    read_array,
    tensors_of,
    to_torch,
)
from mpocompress.export.graphs.write import write_graph

__all__ = [
    "Bias",
    "Feed",
    "GraphInputs",
    "GraphSite",
    "OnnxModel",
    "bias_of",
    "compare_graphs",
    "external_files",
    "find_graph_weights",
    "flaw",
    "graph_sites",
    "input_moments",
    "named_files",
    "raise_if_failed",
    "read_array",
    "tensors_of",
    "to_torch",
    "tolerance_of",
    "with_cores",
    "with_matrices",
    "write_graph",
]
