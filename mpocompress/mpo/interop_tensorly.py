"""To and from TensorLy's TT-matrix, the format that we hand factors over in.

TensorLy's factors have our order (left rank, row, column, right rank), so nothing is permuted.
Needs the extra: `pip install "mpocompress[tensorly]"`.
"""

from typing import Any

import torch

from mpocompress.errors import ContractionError, MissingExtraError
from mpocompress.mpo.operator import MPO


def _tensorly() -> Any:
    try:
        import tensorly
    except ImportError:
        raise MissingExtraError(
            'TensorLy is not installed. Run: pip install "mpocompress[tensorly]"'
        ) from None
    return tensorly


def to_tensorly(mpo: MPO) -> Any:
    """A `tensorly.tt_matrix.TTMatrix` of the same factors, as NumPy arrays or torch tensors.

    The factors are torch tensors if TensorLy's backend is "pytorch", else arrays of its backend.
    Padding is not known to TensorLy: the TT-matrix has the padded size.

    Raises:
        MissingExtraError: TensorLy is not installed.
    """
    tl = _tensorly()
    from tensorly.tt_matrix import TTMatrix

    cores = [core.detach() for core in mpo.cores]
    if tl.get_backend() != "pytorch":
        wide = mpo.to(dtype=torch.float32) if mpo.dtype == torch.bfloat16 else mpo  # not in NumPy
        cores = [tl.tensor(core.detach().cpu().numpy()) for core in wide.cores]
    return TTMatrix(cores)


def from_tensorly(tt_matrix: Any) -> MPO:
    """An MPO with the factors of a TensorLy TT-matrix.

    Raises:
        MissingExtraError: TensorLy is not installed.
        ContractionError: the factors are not 4-dimensional or do not form a chain.
    """
    tl = _tensorly()
    factors = getattr(tt_matrix, "factors", tt_matrix)
    if not factors:
        raise ContractionError("the TT-matrix has no factors.")
    return MPO(
        factor.detach() if isinstance(factor, torch.Tensor) else torch.tensor(tl.to_numpy(factor))
        for factor in factors
    )
