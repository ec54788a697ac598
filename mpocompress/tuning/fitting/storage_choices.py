"""What each way to store a weight costs: in bytes, and in the model's outputs.

The loss of an error E is predicted as for bond dimensions (see `statistics.sensitivity`):
E[tr(G E C E^T)] a row, times the rows that were seen. E is that of the rounding that will be done,
on some of the rows of a dense weight, whose errors are alike, and on whole factors.
"""

# Shape suffixes: O out features or rows of a table, I columns, R bond.

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.fit import fit
from mpocompress.mpo.integer_fit import column_metric, round_matrix
from mpocompress.mpo.integers import BITS, place_bytes
from mpocompress.mpo.metric import Metric
from mpocompress.mpo.precision import Precision, matrix_bytes
from mpocompress.mpo.weight import Weight, index_bytes
from mpocompress.planning.storage_choice import StorageChoice
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.rounding import Storage, round_weight, shrunk, stored_tensors
from mpocompress.tuning.statistics.gradients import LayerMoments
from mpocompress.tuning.statistics.layer_rows import adapter_of
from mpocompress.tuning.statistics.moments import RowCounts
from mpocompress.tuning.statistics.sensitivity import lookups_of, moments_of, tied_heads
from mpocompress.tuning.statistics.shrinkage import RIDGE, shrunk_metric
from mpocompress.tuning.statistics.tables import table_weights

# Blocks of columns are worth their scales at 4 bits, now and then at 3; on a sentence encoder, 2
# bits in blocks were never better than some layers at 2 bits by rows and some at 3.
_DENSE: tuple[tuple[int, int | None], ...] = (
    *((bits, None) for bits in BITS),
    (3, 32),
    (4, 64),
    (4, 32),
)
# Bond dimensions of two factors, as shares of the largest, and the bits of their entries.
_SHARES = (0.2, 0.4)
_FACTOR_BITS = (4,)
# Rows of a dense weight, and of a table, whose errors stand for those of all.
_ROWS = 96
_SAMPLE = 2048
# Sweeps of a rounding that is only done to know its error: more of them change all errors alike.
_SWEEPS = 1
# Exchange rates of loss for bytes at which a table is cut into tiers, in steps of a factor 2.
_RATES = 48


def storage_choices(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments] | None
) -> list[StorageChoice]:
    """All ways to store a weight, with their bytes and losses.

    Args:
        site: the weight; all modules that share it count.
        moments: of its modules, from `take_statistics`; None without data: all errors of entries
            count alike, relative to the size of the weight.

    Returns:
        Without any if the weight is not float32, or stored by a layer that takes some layouts only.
    """
    if not may_be_rounded(site):
        return []
    if any(adapter_of(module).looks_up for module in site.modules):
        return list(_of_table(site, moments))
    return list(_of_matrix(site, moments))


def may_be_rounded(site: WeightSite) -> bool:
    """Whether a weight is float32, and in layers that take a dense matrix for their cores."""
    plain = site.adapter.looks_up or site.layouts() is None
    return site.dtype == torch.float32 and plain


def smoothed_frequencies(counts: RowCounts) -> Tensor:
    """Share of each row of a table among lookups to come, float64, adding up to 1.

    Rows that were not seen share what Good and Turing give them all together: as much as was seen
    of rows that came once.
    """
    seen_O = counts.frequencies() * counts.rows
    once = float((seen_O.round() == 1).sum())
    missing_O = seen_O == 0
    unseen = int(missing_O.sum())
    share = min(max(once, 0.5) / counts.rows, 0.5) if unseen else 0.0
    return torch.where(missing_O, share / max(unseen, 1), (1 - share) * seen_O / counts.rows)


def _of_matrix(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments] | None
) -> Iterator[StorageChoice]:
    weight_OI = site.matrix().double()
    metric, scale = _metric(site, moments)
    input_II = None if metric is None else shrunk(metric.ridged_input_II, int(scale))
    output_OO = None if metric is None else metric.ridged_output_OO
    dense = Layout.from_pairs([site.shape])
    yield StorageChoice(layout=dense, bytes=4 * weight_OI.numel(), loss=0.0)

    def loss(values_OI: Tensor) -> float:
        lost_OI = weight_OI - values_OI.double()
        if metric is None or input_II is None:
            return scale * float(torch.sum(lost_OI**2))
        seen_OI = lost_OI @ input_II
        if output_OO is not None:
            seen_OI = output_OO @ seen_OI
        return scale * float(torch.sum(seen_OI * lost_OI))

    half = loss(weight_OI.half())
    yield StorageChoice(layout=dense, precision="float16", bytes=2 * weight_OI.numel(), loss=half)
    columns = None if input_II is None else column_metric(input_II)
    each = 1.0 if output_OO is None else float(output_OO.diagonal().mean())
    some_XI = weight_OI[:: max(1, len(weight_OI) // _ROWS)]
    for bits, block in _DENSE:
        found = round_matrix(
            some_XI,
            bits,
            block,
            shape=tuple(some_XI.shape),
            gram_YY=columns,
            sweeps=_SWEEPS,
        )
        lost_XI = some_XI - found.dequantized().double()
        seen_XI = lost_XI if input_II is None else lost_XI @ input_II
        error = float(torch.sum(seen_XI * lost_XI)) * len(weight_OI) / len(some_XI)
        precision: Precision = _named(bits)
        yield StorageChoice(
            layout=dense,
            precision=precision,
            block=block,
            bytes=matrix_bytes(*site.shape, precision, block),
            loss=each * scale * error,
        )
    if metric is None:
        return
    layout = Layout.svd(*site.shape)
    for share in _SHARES:
        bonds = (max(1, round(share * min(site.shape))),)
        fitted = MPO(fit(weight_OI, metric, layout, bonds).cores, shape=site.shape)
        for bits in _FACTOR_BITS:
            storage = Storage(precision=_named(bits), gauge="identity")
            rounded = round_weight(fitted, storage, input_II=input_II)
            yield StorageChoice(
                layout=layout,
                bond_dims=bonds,
                gauge="identity",
                precision=storage.precision,
                bytes=_bytes_of(rounded.weight, storage),
                loss=loss(rounded.mpo.to_dense()),
            )


def _bytes_of(weight: Weight, storage: Storage) -> int:
    found = index_bytes(weight)
    for _, tensor in stored_tensors(weight):
        rows = tensor.shape[0]  # free rows (F, R), or the last core (R, 1, in, 1)
        columns = tensor.numel() // max(rows, 1)
        found += matrix_bytes(rows, columns, storage.precision, storage.block)
    return found


def _metric(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments] | None
) -> tuple[Metric | None, float]:
    """The metric of a layer's errors and what a unit of it costs."""
    seen = None if moments is None else moments_of(site, moments)
    if seen is not None:
        inputs, gradients, centered = seen
        input_II = inputs.mean(centered=centered)[0]
        output_OO = gradients.mean(centered=False)[0]
        if bool(input_II.any()) and bool(output_OO.any()):
            metric = shrunk_metric(input_II, inputs.rows, output_OO, least=RIDGE)
            return metric, inputs.rows / (1 + metric.ridge)
    size = float(torch.sum(site.matrix().double() ** 2))
    return None, site.parameters / size if size > 0 else 1.0


def _of_table(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments] | None
) -> Iterator[StorageChoice]:
    table_OI = site.matrix()
    rows, columns = site.shape
    dense = Layout.from_pairs([site.shape])
    size = float(torch.sum(table_OI.double() ** 2))
    weights_O = torch.full((rows,), site.parameters / size / rows if size > 0 else 1.0)
    weights_O, metric_II = weights_O.double() * rows, None
    seen = None if moments is None else lookups_of(site, moments)
    if seen is not None and moments is not None:
        counts, output_II = seen
        weights_O, metric_II = table_weights(
            smoothed_frequencies(counts), output_II, ridge=0.0, heads=tied_heads(site, moments)
        )
        weights_O = weights_O * counts.rows
    yield StorageChoice(layout=dense, bytes=4 * rows * columns, loss=0.0)
    levels: list[tuple[Precision, float, float]] = []  # bytes and mean loss of a row of weight 1
    step = max(1, rows // _SAMPLE)
    sample_OI = table_OI[::step][:_SAMPLE]
    for precision in ("float16", *map(_named, BITS)):
        found_OI = _rounded_rows(sample_OI, precision, metric_II)
        lost_OI = sample_OI.double() - found_OI.double()
        seen_OI = lost_OI if metric_II is None else lost_OI @ metric_II
        error = float((seen_OI * lost_OI).sum(1).mean())
        levels.append((precision, matrix_bytes(1, columns, precision, None), error))
    for precision, each, error in levels:
        yield StorageChoice(
            layout=dense,
            precision=precision,
            bytes=round(rows * each),
            loss=error * float(weights_O.sum()),
        )
    if seen is not None:
        yield from _tiers(dense, weights_O.sort(descending=True).values, levels)


def _tiers(
    dense: Layout, weights_O: Tensor, levels: Sequence[tuple[Precision, float, float]]
) -> Iterator[StorageChoice]:
    """Rows by weight, each in the precision with the least loss plus price, at many prices."""
    rows = len(weights_O)
    bytes_L = weights_O.new_tensor([level[1] for level in levels])
    errors_L = weights_O.new_tensor([level[2] for level in levels])
    top = float(weights_O[0] * errors_L.max())
    known: set[tuple[tuple[int, Precision], ...]] = set()
    for power in range(_RATES):
        price = top * 2.0**-power
        chosen_O = (weights_O[:, None] * errors_L + price * bytes_L).argmin(1)
        tiers: list[tuple[int, Precision]] = []
        for level, (precision, _, _) in sorted(enumerate(levels), key=lambda item: -item[1][1]):
            count = int((chosen_O == level).sum())
            if count:
                tiers.append((count, precision))
        if len(tiers) < 2 or tuple(tiers) in known:
            continue
        known.add(tuple(tiers))
        yield StorageChoice(
            layout=dense,
            precision=tiers[-1][1],
            tiers=tuple(tiers[:-1]),
            bytes=round(float(bytes_L[chosen_O].sum())) + place_bytes(rows),
            loss=float((weights_O * errors_L[chosen_O]).sum()),
        )


def _rounded_rows(rows_OI: Tensor, precision: Precision, metric_II: Tensor | None) -> Tensor:
    if precision == "float16":
        return rows_OI.half().float()
    bits = int(precision.removeprefix("int"))
    shape = (rows_OI.shape[0], rows_OI.shape[1])
    return round_matrix(rows_OI, bits, None, shape=shape, gram_YY=metric_II).dequantized()


def _named(bits: int) -> Precision:
    names: dict[int, Precision] = {
        2: "int2",
        3: "int3",
        4: "int4",
        5: "int5",
        6: "int6",
        8: "int8",
    }
    return names[bits]
