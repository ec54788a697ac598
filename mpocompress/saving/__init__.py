"""Results on disk: cores, untouched parameters and buffers, and a manifest; never a pickle.

`model.mpo.safetensors` holds the state of the compressed model under its own names (cores as
`<layer>.cores.<site>`; in the identity gauge `.free` rows and `.pivots` of all but the last), each
tensor once. Its metadata holds a JSON manifest: layouts, bond
dimensions, and which names share a tensor. What a state cannot tell, the architecture, comes from a
skeleton when the result is loaded.
"""

from mpocompress.saving.dense_state import densify_state, save_state
from mpocompress.saving.model import GraphWeight, load_model, save_graph_weights, save_model
from mpocompress.saving.staging import (
    CORES_FILE,
    ONNX_DATA_FILE,
    ONNX_FILE,
    check_output_file,
    staged_output,
)
from mpocompress.saving.tensor_file import read_manifest

__all__ = [
    "CORES_FILE",
    "ONNX_DATA_FILE",
    "ONNX_FILE",
    "GraphWeight",
    "check_output_file",
    "densify_state",
    "load_model",
    "read_manifest",
    "save_graph_weights",
    "save_model",
    "save_state",
    "staged_output",
]
