"""Round a fitted layer to the precision that it is stored in, in the metric of its outputs.

A dense weight (a layout of one site) is rounded with feedback, see `round_matrix`.
Of two factors the second is rounded first, in the metric that the first one gives it; then the
first is fitted again to what became of the second, and rounded in turn. Cores of other layouts are
rounded to the nearest, one by one.
"""

# Shape suffixes: O out, I in, R bond, F free rows of the first core, P pivot rows.

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpocompress.mpo import MPO, Layout, linalg
from mpocompress.mpo.cholesky import ridge_on, solve_ridged
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge
from mpocompress.mpo.integer_fit import round_matrix, round_rows
from mpocompress.mpo.integers import Stored, StoredHalf
from mpocompress.mpo.precision import Precision, bits_of
from mpocompress.mpo.weight import Weight, as_mpo, in_gauge

# Ridge of the new fit of the first factor, a share of the diagonal of what it meets.
_RIDGE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How a layer is stored.

    Attributes:
        precision: of its numbers.
        block: columns that share a scale; None for all of a row.
        tiers: of a table: how many of the most frequent rows are stored in another precision, most
            frequent first; the others are in `precision`.
        gauge: of the cores.
    """

    precision: Precision = "float32"
    block: int | None = None
    tiers: tuple[tuple[int, Precision], ...] = ()
    gauge: Gauge = "none"

    @property
    def rounds(self) -> bool:
        """Whether anything is stored otherwise than in float32."""
        return self.precision != "float32" or bool(self.tiers)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rounded:
    """A layer as it is stored.

    Attributes:
        weight: with the values that the file stands for, float32.
        stored: by name of the parameter below the layer's `cores`, such as "0" or "0.free".
    """

    weight: Weight
    stored: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def mpo(self) -> MPO:
        """The values as an ordinary chain."""
        return as_mpo(self.weight)


def shrunk(input_II: Tensor, rows: int) -> Tensor:
    """C with a ridge: inputs per row that was seen, as a share of its diagonal (see `ridge_on`).

    Feedback moves weights along directions that the sample hardly shows. With few rows these are
    noise: on a sentence encoder and two thousand rows, weights of 1536 inputs moved by more than
    twice their norm, and other sentences saw it.
    """
    ridge_I = ridge_on(input_II.diagonal(), len(input_II) / max(rows, 1))
    return input_II + ridge_I.diag()


def round_weight(
    weight: Weight,
    storage: Storage,
    *,
    input_II: Tensor | None = None,
    either_side: bool = False,
) -> Rounded:
    """Round a layer.

    Args:
        weight: as fitted; put into the gauge of the storage if it is in none.
        storage: what to round to.
        input_II: C, definite, float64; None without data.
        either_side: of layouts that are not dense, round each core along its rows or its columns,
            whichever loses less; the number of scales may then differ. Two factors are rounded so
            where that loses less than with feedback, as for inputs in very different units.
    """
    bits = bits_of(storage.precision)
    if storage.gauge == "identity" and weight.layout.num_sites > 1:
        weight = in_gauge(weight, "identity")
    if bits is not None and weight.layout.num_sites == 1:
        return _round_dense(as_mpo(weight), bits, storage.block, input_II)
    options = []
    if bits is not None and weight.layout.pairs == Layout.svd(*weight.shape).pairs:
        options.append(_round_factors(weight, bits, storage.block, input_II))
    if bits is not None and either_side:
        options.append(_round_either_side(weight, bits, storage.block, input_II))
    if not options:
        options.append(
            {
                name: _nearest(tensor, bits, storage.block)
                for name, tensor in stored_tensors(weight)
                if tensor.numel()
            }
        )
    found = [Rounded(weight=with_stored(weight, stored), stored=stored) for stored in options]
    if len(found) == 1:
        return found[0]
    exact_OI = weight.to_dense().double()
    return min(found, key=lambda one: _lost(exact_OI, one.weight, input_II))


def round_table(
    table_OI: Tensor,
    storage: Storage,
    *,
    frequencies_O: Tensor,
    metric_II: Tensor | None,
) -> Rounded:
    """Round a dense table, frequent rows to their own precision.

    Args:
        table_OI: the table.
        storage: what to round to.
        frequencies_O: by which rows are ordered; of equal ones the first comes first.
        metric_II: of the columns, definite, float64; None if all count alike.
    """
    order_O = torch.sort(frequencies_O, descending=True, stable=True).indices
    groups: list[tuple[Tensor, int | None]] = []
    start = 0
    for count, precision in (*storage.tiers, (len(order_O), storage.precision)):
        rows_O = order_O[start : start + count]
        start += count
        if len(rows_O):
            # In the order of the table: neighbours in the file are neighbours in the vocabulary.
            groups.append((rows_O.sort().values, bits_of(precision)))
    shape = (1, *table_OI.shape, 1)
    stored: Stored
    if len(groups) == 1 and groups[0][1] is not None:
        stored = round_matrix(table_OI, groups[0][1], storage.block, shape=shape, gram_YY=metric_II)
    elif len(groups) == 1:
        stored = StoredHalf(values=table_OI.to(torch.float16).reshape(shape))
    else:
        stored = round_rows(table_OI, groups, storage.block, shape=shape, gram_YY=metric_II)
    return Rounded(weight=MPO((stored.dequantized(),)), stored={"0": stored})


def stored_tensors(weight: Weight) -> list[tuple[str, Tensor]]:
    """The tensors that a layer stores, by the parameter's name below its `cores`."""
    if isinstance(weight, MPO):
        return [(str(site), core) for site, core in enumerate(weight.cores)]
    found = [(f"{site}.free", free_FR) for site, free_FR in enumerate(weight.free)]
    return [*found, (str(len(weight.free)), weight.last)]


def with_stored(weight: Weight, stored: Mapping[str, Stored]) -> Weight:
    """The layer with the values of what is stored; what has no entries is not stored."""
    values = {name: found.dequantized() for name, found in stored.items()}
    return with_values(weight, {**dict(stored_tensors(weight)), **values})


def with_values(weight: Weight, tensors: Mapping[str, Tensor]) -> Weight:
    """The layer with other values in what it stores, by the names of `stored_tensors`."""
    values = [tensors[name] for name, _ in stored_tensors(weight)]
    if isinstance(weight, MPO):
        return MPO(values, shape=weight.shape)
    return IdentityGauge(tuple(values[:-1]), weight.pivots, values[-1], weight.layout, weight.shape)


def _nearest(tensor: Tensor, bits: int | None, block: int | None) -> Stored:
    if bits is None:
        return StoredHalf(values=tensor.to(torch.float16))
    return round_matrix(_matrix(tensor), bits, block, shape=tuple(tensor.shape))


def _matrix(tensor: Tensor) -> Tensor:
    """A core as (left * out * in, right), the last one as (left, out * in); free rows as such."""
    rows = tensor.shape[0] if tensor.shape[-1] == 1 else tensor.numel() // tensor.shape[-1]
    return tensor.reshape(rows, -1)


def _round_either_side(
    weight: Weight, bits: int, block: int | None, input_II: Tensor | None
) -> dict[str, Stored]:
    """Each core to the nearest, along the side that loses less of the outputs of the exact ones."""
    exact_OI = weight.to_dense().double()
    tensors = dict(stored_tensors(weight))
    stored: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        matrix, shape = _matrix(tensor), tuple(tensor.shape)
        options = [
            round_matrix(matrix, bits, block, shape=shape),
            round_matrix(matrix.mT, bits, block, shape=shape, transposed=True),
        ]
        errors = []
        for option in options:
            changed = with_values(weight, {**tensors, name: option.dequantized().to(tensor)})
            errors.append(_lost(exact_OI, changed, input_II))
        stored[name] = options[errors[1] < errors[0]]
    return stored


def _lost(exact_OI: Tensor, weight: Weight, input_II: Tensor | None) -> float:
    """Squared error of the outputs."""
    lost_OI = exact_OI - weight.to_dense().double()
    seen_OI = lost_OI if input_II is None else lost_OI @ input_II
    return float((seen_OI * lost_OI).sum())


def _round_dense(mpo: MPO, bits: int, block: int | None, input_II: Tensor | None) -> Rounded:
    shape = tuple(mpo.cores[0].shape)
    matrix_OI = mpo.to_dense()
    if matrix_OI.numel() != mpo.cores[0].numel():  # padded: nothing is known of what is beyond
        input_II = None
        matrix_OI = mpo.cores[0][0, :, :, 0]
    stored = round_matrix(matrix_OI, bits, block, shape=shape, gram_YY=input_II)
    return Rounded(weight=MPO((stored.dequantized(),), shape=mpo.shape), stored={"0": stored})


def _round_factors(
    weight: Weight, bits: int, block: int | None, input_II: Tensor | None
) -> dict[str, Stored]:
    """W = U V: V with feedback in the metric C, U fitted to the rounded V, and rounded in turn.

    In the identity gauge U has the identity in the rows of the pivots, and only its other rows are
    stored and fitted.
    """
    target_OI = weight.to_dense().double()
    if input_II is None:
        input_II = torch.eye(target_OI.shape[1], dtype=torch.float64, device=target_OI.device)
    (first_name, first), (second_name, second) = stored_tensors(weight)
    bond = second.shape[0]
    right_RI = second.reshape(bond, -1).double()
    if isinstance(weight, IdentityGauge):
        is_free_O = torch.ones(len(target_OI), dtype=torch.bool, device=target_OI.device)
        is_free_O[weight.pivots[0].long()] = False
        target_FI = target_OI[is_free_O]
    else:
        _, carry_RR = linalg.qr(first.reshape(-1, bond).double())  # so that errors in V count alike
        right_RI, target_FI = carry_RR @ right_RI, target_OI
    right = round_matrix(right_RI, bits, block, shape=tuple(second.shape), gram_YY=input_II)
    rounded_RI = right.dequantized().reshape(right_RI.shape).double()
    seen_RI = rounded_RI @ input_II
    gram_RR = seen_RI @ rounded_RI.mT
    left_FR = solve_ridged(target_FI @ seen_RI.mT, gram_RR, _RIDGE)
    stored: dict[str, Stored] = {}
    if len(left_FR):
        shape = tuple(first.shape)
        stored[first_name] = round_matrix(left_FR, bits, block, shape=shape, gram_YY=gram_RR)
    stored[second_name] = right
    return stored
