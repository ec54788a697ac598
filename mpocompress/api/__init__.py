"""The Python API: thin functions that compose the rooms."""

from mpocompress.api.compression import check_belongs, compress, plan
from mpocompress.api.drop_budget import EvalFn
from mpocompress.api.files import densify, load, save, save_dense, with_files, write_report
from mpocompress.api.result import Clock, CompressionResult
from mpocompress.api.size_budget import OnnxBytes
from mpocompress.api.tensorization import tensorize
from mpocompress.api.training import train
from mpocompress.api.tune import distill, sweep

__all__ = [
    "Clock",
    "CompressionResult",
    "EvalFn",
    "OnnxBytes",
    "check_belongs",
    "compress",
    "densify",
    "distill",
    "load",
    "plan",
    "save",
    "save_dense",
    "sweep",
    "tensorize",
    "train",
    "with_files",
    "write_report",
]
