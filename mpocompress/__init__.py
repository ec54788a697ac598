"""mpocompress: turn trained dense networks into compact tensor networks.

    import mpocompress as mpo
    result = mpo.compress(model, bond_dim=16)
    mpo.save(result, "out/")

Names are resolved on first use, so that importing the package, or asking the command line for help,
does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpocompress._version import __version__

if TYPE_CHECKING:
    from mpocompress import analysis
    from mpocompress.api import (
        CompressionResult,
        compress,
        densify,
        distill,
        load,
        plan,
        save,
        sweep,
        tensorize,
        train,
    )
    from mpocompress.errors import MPOCompressError
    from mpocompress.estimators import MPOClassifier, MPORegressor
    from mpocompress.export import export_onnx, verify
    from mpocompress.layers import MPOLinear, TensorContractionLayer, TensorRegressionLayer
    from mpocompress.mpo import MPO, Layout
    from mpocompress.planning import Plan
    from mpocompress.report import CompressionReport

_HOME = {
    "CompressionReport": "mpocompress.report",
    "CompressionResult": "mpocompress.api",
    "Layout": "mpocompress.mpo",
    "MPO": "mpocompress.mpo",
    "MPOClassifier": "mpocompress.estimators",
    "MPOCompressError": "mpocompress.errors",
    "MPOLinear": "mpocompress.layers",
    "MPORegressor": "mpocompress.estimators",
    "Plan": "mpocompress.planning",
    "compress": "mpocompress.api",
    "densify": "mpocompress.api",
    "distill": "mpocompress.api",
    "export_onnx": "mpocompress.export",
    "load": "mpocompress.api",
    "plan": "mpocompress.api",
    "save": "mpocompress.api",
    "TensorContractionLayer": "mpocompress.layers",
    "TensorRegressionLayer": "mpocompress.layers",
    "sweep": "mpocompress.api",
    "tensorize": "mpocompress.api",
    "train": "mpocompress.api",
    "verify": "mpocompress.export",
}

# Rooms that are used by their own name, as in `mpo.analysis.entanglement(model)`.
_ROOMS = frozenset({"analysis"})

__all__ = [
    "MPO",
    "CompressionReport",
    "CompressionResult",
    "Layout",
    "MPOClassifier",
    "MPOCompressError",
    "MPOLinear",
    "MPORegressor",
    "Plan",
    "TensorContractionLayer",
    "TensorRegressionLayer",
    "__version__",
    "analysis",
    "compress",
    "densify",
    "distill",
    "export_onnx",
    "load",
    "plan",
    "save",
    "sweep",
    "tensorize",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
