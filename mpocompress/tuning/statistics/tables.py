"""What rows and columns of a table are worth: how often looked up, and in which directions.

With f the share of each row among all lookups and G what an error of a looked-up row does to the
model's output (see `gradients`), replacing the table T by T^ costs sum_o f_o e_o G e_o^T.
"""

# Shape suffixes: O rows of the table, I columns, R bond.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocompress.mpo.lookup import weighted_gram

_COLUMN_RIDGE = 1e-2


@dataclass(frozen=True, slots=True)
class HeadUse:
    """What is known of an output layer whose matrix is the table, from the dense model.

    Attributes:
        input_II: E[x x^T] of its inputs.
        gradients_O: E[g^2] of the gradient at each of its outputs; None for too many outputs.
    """

    input_II: Tensor
    gradients_O: Tensor | None


def table_weights(
    frequencies_O: Tensor,
    metric_II: Tensor | None,
    *,
    ridge: float,
    heads: Sequence[HeadUse] = (),
) -> tuple[Tensor, Tensor | None]:
    """Weights of rows and a definite metric of columns, as the fit and its forecast take them.

    An output layer that is tied to the table uses every row o with the weight E[g_o^2] and the
    metric E[x x^T]. The sum of both uses is no product of weights and a metric; the product that
    has its two traces is taken.

    Args:
        frequencies_O: share of each row among the lookups.
        metric_II: G, or None.
        ridge: of the frequencies, relative to their mean: rows that the data did not show.
        heads: output layers that are tied to the table.
    """
    weights_O = frequencies_O + ridge * float(frequencies_O.mean())
    if metric_II is None or not bool(metric_II.any()):
        return weights_O, None
    total_II = metric_II.double().clone()
    total_O = weights_O * float(total_II.diagonal().sum())
    for head in heads:
        input_II, gradients_O = head.input_II.to(total_II), head.gradients_O
        if gradients_O is None:  # on the scale of the lookups, every row the same
            uses_O = torch.full_like(weights_O, 1.0 / len(weights_O))
            uses_O = uses_O * float(total_II.diagonal().sum() / input_II.diagonal().sum())
        else:
            uses_O = gradients_O.to(weights_O)
        total_II = total_II + float(uses_O.sum()) * input_II
        total_O = total_O + uses_O * float(input_II.diagonal().sum())
    scale = float(total_II.diagonal().mean())
    total_II.diagonal().add_(_COLUMN_RIDGE * scale)
    return total_O / float(total_II.diagonal().sum()), total_II


def table_gains(table_OI: Tensor, weights_O: Tensor, metric_II: Tensor | None) -> Tensor:
    """What each further bond dimension of the low rank is worth: (min(out, in),), descending."""
    factor_II = None if metric_II is None else torch.linalg.cholesky(metric_II)
    gram_II = weighted_gram(table_OI, weights_O, factor_II)
    values_I = torch.linalg.eigvalsh(gram_II).clamp_min(0).flip(0)
    return values_I[: min(table_OI.shape)]
