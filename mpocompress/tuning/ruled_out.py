"""Entries of outputs that are infinite, as the -Inf of answers that are ruled out.

They are the same whatever a layer before them gives, so no error shows in them: they count neither
in a difference nor in the size of the outputs.
"""

import torch
from torch import Tensor

from mpocompress.errors import OutputsDifferError


def without_infinite(values: Tensor) -> Tensor:
    """The same values with 0 in the place of what is infinite."""
    infinite = values.detach().isinf()
    return values.masked_fill(infinite, 0) if bool(infinite.any()) else values


def both_without_infinite(ours: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of two models with 0 in the place of what is infinite in both.

    Args:
        ours: of the compressed model.
        dense: of the dense model, of the same shape.

    Raises:
        OutputsDifferError: an entry is infinite in one of them, and not the same in the other.
    """
    found = ours.detach()
    infinite = found.isinf() | dense.isinf()
    if not bool(infinite.any()):
        return ours, dense
    if not torch.equal(found[infinite], dense[infinite].to(found)):
        raise OutputsDifferError(
            "some entries of an output are infinite in one of the dense and the compressed model "
            "alone: which answers are ruled out depends on values. Let the model return what it "
            "decides by."
        )
    return ours.masked_fill(infinite, 0), dense.masked_fill(infinite, 0)
