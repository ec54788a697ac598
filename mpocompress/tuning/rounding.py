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
from mpocompress.mpo.identity_gauge import Gauge, IdentityGauge, fix_identity_gauge
from mpocompress.mpo.integer_fit import round_matrix, round_rows
from mpocompress.mpo.integers import Stored, StoredHalf, StoredIntegers
from mpocompress.mpo.precision import Precision, bits_of
from mpocompress.mpo.weight import Weight, as_mpo

# Ridge of the new fit of the first factor, relative to the mean diagonal of what it meets.
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
    """C with a ridge of its mean diagonal times inputs per row that was seen.

    Feedback moves weights along directions that the sample hardly shows. With few rows these are
    noise: on a sentence encoder and two thousand rows, weights of 1536 inputs moved by more than
    twice their norm, and other sentences saw it.
    """
    ridge = len(input_II) / max(rows, 1) * float(input_II.diagonal().mean())
    return input_II + ridge * torch.eye(len(input_II), dtype=input_II.dtype, device=input_II.device)


def round_weight(
    mpo: MPO,
    storage: Storage,
    *,
    input_II: Tensor | None = None,
) -> Rounded:
    """Round a layer.

    Args:
        mpo: as fitted.
        storage: what to round to.
        input_II: C, definite, float64; None without data.
    """
    bits = bits_of(storage.precision)
    if bits is not None and mpo.layout.num_sites == 1:
        return _round_dense(mpo, bits, storage.block, input_II)
    if bits is not None and mpo.layout.pairs == Layout.svd(*mpo.shape).pairs:
        return _round_factors(mpo, bits, storage, input_II)
    weight: Weight = mpo
    if storage.gauge == "identity":
        weight = fix_identity_gauge(mpo.cores, shape=mpo.shape)
    stored = {
        name: _nearest(tensor, bits, storage.block) for name, tensor in stored_tensors(weight)
    }
    return Rounded(weight=with_stored(weight, stored), stored=stored)


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
    """The layer with the values of what is stored."""
    values = [stored[name].dequantized() for name, _ in stored_tensors(weight)]
    if isinstance(weight, MPO):
        return MPO(values, shape=weight.shape)
    return IdentityGauge(tuple(values[:-1]), weight.pivots, values[-1], weight.layout, weight.shape)


def _nearest(tensor: Tensor, bits: int | None, block: int | None) -> Stored:
    if bits is None:
        return StoredHalf(values=tensor.to(torch.float16))
    # As matrices a core is (left * out * in, right), the last one (left, out * in).
    rows = tensor.shape[0] if tensor.shape[-1] == 1 else tensor.numel() // tensor.shape[-1]
    return round_matrix(tensor.reshape(rows, -1), bits, block, shape=tuple(tensor.shape))


def _round_dense(mpo: MPO, bits: int, block: int | None, input_II: Tensor | None) -> Rounded:
    shape = tuple(mpo.cores[0].shape)
    matrix_OI = mpo.to_dense()
    if matrix_OI.numel() != mpo.cores[0].numel():  # padded: nothing is known of what is beyond
        input_II = None
        matrix_OI = mpo.cores[0][0, :, :, 0]
    stored = round_matrix(matrix_OI, bits, block, shape=shape, gram_YY=input_II)
    return Rounded(weight=MPO((stored.dequantized(),), shape=mpo.shape), stored={"0": stored})


def _round_factors(
    mpo: MPO,
    bits: int,
    storage: Storage,
    input_II: Tensor | None,
) -> Rounded:
    target_OI = mpo.to_dense().double()
    if input_II is None:
        input_II = torch.eye(target_OI.shape[1], dtype=torch.float64, device=target_OI.device)
    gauged: IdentityGauge | None = None
    if storage.gauge == "identity":
        gauged = fix_identity_gauge(mpo.cores, shape=mpo.shape)
        right_RI = _matrix(gauged.last).double()
        shapes = (tuple(gauged.free[0].shape), tuple(gauged.last.shape))
    else:
        left_OR, right_RI = (_matrix(core).double() for core in mpo.cores)
        _, carry_RR = linalg.qr(left_OR)  # so that errors in V count alike
        right_RI = carry_RR @ right_RI
        shapes = tuple(tuple(core.shape) for core in mpo.cores)  # type: ignore[assignment]
    right = round_matrix(
        right_RI,
        bits,
        storage.block,
        shape=shapes[1],
        gram_YY=input_II,
    )
    rounded_RI = right.dequantized().reshape(right_RI.shape).double()
    seen_RI = rounded_RI @ input_II
    gram_RR = seen_RI @ rounded_RI.mT
    eye_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
    ridged_RR = gram_RR + _RIDGE * float(gram_RR.diagonal().mean()) * eye_RR
    fitted_OR = torch.linalg.solve(ridged_RR, seen_RI @ target_OI.mT).mT
    if gauged is None:
        left = round_matrix(fitted_OR, bits, storage.block, shape=shapes[0], gram_YY=gram_RR)
        stored: dict[str, StoredIntegers] = {"0": left, "1": right}
        weight: Weight = MPO((left.dequantized(), right.dequantized()), shape=mpo.shape)
        return Rounded(weight=weight, stored=stored)
    pivots_P = gauged.pivots[0].long()
    is_free_O = torch.ones(len(target_OI), dtype=torch.bool, device=target_OI.device)
    is_free_O[pivots_P] = False
    free_FR = fitted_OR[is_free_O]
    left = round_matrix(free_FR, bits, storage.block, shape=shapes[0], gram_YY=gram_RR)
    weight = IdentityGauge(
        (left.dequantized(),), gauged.pivots, right.dequantized(), gauged.layout, gauged.shape
    )
    return Rounded(weight=weight, stored={"0.free": left, "1": right})


def _matrix(core: Tensor) -> Tensor:
    """A core of the layout ((out, 1), (1, in)) as a matrix."""
    return core.reshape(core.shape[0] * core.shape[1], -1)
