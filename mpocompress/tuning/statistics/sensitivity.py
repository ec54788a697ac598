"""How much each further bond dimension of a layer lowers the loss, predicted at the dense model.

Replacing W by W^ changes the model's output by E[tr(G E C E^T)] a row, E = W - W^, to second order
(see `gradients`). For the layout ((out, 1), (1, in)) the best E at rank r loses the squared
singular values of Fg^T W Fc beyond the r-th, with C = Fc Fc^T and G = Fg Fg^T: those values are
what each rank is worth. Times the rows that were seen, they are on one scale for all layers.
"""

# Shape suffixes: O out features, I in features, R bond.

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mpocompress.mpo import linalg
from mpocompress.surgery import WeightSite
from mpocompress.tuning.statistics.gradients import LayerMoments
from mpocompress.tuning.statistics.layer_rows import adapter_of, use_of
from mpocompress.tuning.statistics.moments import CrossMoment, RowCounts
from mpocompress.tuning.statistics.shrinkage import RIDGE, shrunk_metric
from mpocompress.tuning.statistics.tables import HeadUse, table_gains, table_weights


def gain_of_bonds(
    site: WeightSite,
    moments: Mapping[nn.Module, LayerMoments],
    *,
    ridge: float = RIDGE,
) -> Tensor | None:
    """Squared singular values (min(out, in),) float64, descending, of the whitened weight.

    Args:
        site: the weight; all modules that share it count.
        moments: of its modules, from `take_statistics`.
        ridge: of the input moment, as in the fit.

    Returns:
        None if the data reaches none of its modules, or excites or matters nowhere.
    """
    if any(adapter_of(module).looks_up for module in site.modules):
        return _gain_of_table(site, moments, ridge)
    found = moments_of(site, moments)
    if found is None:
        return None
    inputs, gradients, centered = found
    input_II = inputs.mean(centered=centered)[0]
    output_OO = gradients.mean(centered=False)[0]
    if not (bool(input_II.any()) and bool(output_OO.any())):
        return None
    metric = shrunk_metric(input_II, inputs.rows, output_OO, least=ridge)
    whitened_OI = metric.input_factor.apply(site.matrix().to(input_II))
    if metric.output_factor is not None:
        whitened_OI = metric.output_factor.apply(whitened_OI.mT).mT
    weights_R = linalg.value_weights(whitened_OI)
    gains_R = torch.zeros(min(site.shape), dtype=torch.float64, device=weights_R.device)
    gains_R[: len(weights_R)] = weights_R  # singular moments have fewer directions
    return inputs.rows * gains_R / (1 + metric.ridge)  # so that shrinking keeps the mean squares


def tied_heads(site: WeightSite, moments: Mapping[nn.Module, LayerMoments]) -> tuple[HeadUse, ...]:
    """How output layers use a table that they are tied to; nothing for weights that are none."""
    if not any(adapter_of(module).looks_up for module in site.modules):
        return ()
    found = [
        moments[module].head_use()
        for module in site.modules
        if module in moments and not adapter_of(module).looks_up
    ]
    return tuple(use for use in found if use is not None)


class OutputMetrics(Mapping[nn.Module, Tensor]):
    """G (out, out) of every module; one for all that share a weight and use it alike.

    Each is made when it is asked for: all of them together take more memory than the model.

    Args:
        moments: of the modules, from `take_statistics`.
    """

    def __init__(self, moments: Mapping[nn.Module, LayerMoments]) -> None:
        groups: dict[tuple[int, bool], list[CrossMoment]] = defaultdict(list)
        self._gradients: dict[nn.Module, list[CrossMoment]] = {}
        for module, moment in moments.items():
            if moment.gradients.rows:
                group = groups[use_of(module)]
                group.append(moment.gradients)
                self._gradients[module] = group

    def __getitem__(self, module: nn.Module) -> Tensor:
        """G of a module, float64."""
        gradients = self._gradients[module]
        total = gradients[0] if len(gradients) == 1 else CrossMoment.sum_of(gradients)
        return total.mean(centered=False)[0]

    def __iter__(self) -> Iterator[nn.Module]:
        """The modules."""
        return iter(self._gradients)

    def __len__(self) -> int:
        """How many modules there are."""
        return len(self._gradients)

    def __contains__(self, module: object) -> bool:
        """Whether a module has one; it is not made."""
        return module in self._gradients


def lookups_of(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments]
) -> tuple[RowCounts, Tensor] | None:
    """How often rows of a table were looked up, and G (columns, columns) where they went.

    Output layers that are tied to the table have gradients of another size; they are no lookups.

    Returns:
        None without lookups, or where no gradient came back.
    """
    seen = [moments[module] for module in site.modules if module in moments]
    seen = [moment for moment in seen if moment.counts.rows and moment.gradients.rows]
    if not seen:
        return None
    counts = RowCounts()
    for moment in seen:
        counts.merge(moment.counts)
    output_II = CrossMoment.sum_of([moment.gradients for moment in seen]).mean(centered=False)[0]
    return (counts, output_II) if bool(output_II.any()) else None


def _gain_of_table(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments], ridge: float
) -> Tensor | None:
    """The same for a table: by its lookups, weighed as its fit weighs them."""
    seen = lookups_of(site, moments)
    if seen is None:
        return None
    counts, output_II = seen
    heads = tied_heads(site, moments)
    weights_O, metric_II = table_weights(counts.frequencies(), output_II, ridge=ridge, heads=heads)
    return counts.rows * table_gains(site.matrix(), weights_O, metric_II)


def output_error_curve(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments]
) -> Tensor | None:
    """Least relative output error of a layer at each bond dimension of ((out, 1), (1, in)).

    On the inputs that the dense model has on the data, outputs without the bias.

    Args:
        site: the weight; all modules that share it count.
        moments: of its modules, from `take_statistics`.

    Returns:
        (min(out, in) + 1,) float64 on the CPU, entry r at bond dimension r, descending to 0; None
        if the data reaches none of its modules, or excites nothing, and for tables.
    """
    if any(adapter_of(module).looks_up for module in site.modules):
        return None
    found = moments_of(site, moments)
    if found is None:
        return None
    inputs, _, centered = found
    weight_OI = site.matrix()
    input_II = inputs.mean(centered=centered)[0]
    whole_II = inputs.mean(centered=False)[0]
    if not bool(input_II.any()):
        return None
    weight_OI = weight_OI.to(whole_II)
    norm = float(torch.sum(weight_OI @ whole_II * weight_OI))
    if norm <= 0:
        return None
    metric = shrunk_metric(input_II, inputs.rows, least=RIDGE)
    whitened_OI = metric.input_factor.apply(weight_OI)
    squares = linalg.value_weights(whitened_OI).cpu() / (1 + metric.ridge)
    lost_D = torch.zeros(min(site.shape) + 1, dtype=torch.float64, device="cpu")
    lost_D[: len(squares)] = squares.flip(0).cumsum(0).flip(0)
    return (lost_D / norm).sqrt()


def moments_of(
    site: WeightSite, moments: Mapping[nn.Module, LayerMoments]
) -> tuple[CrossMoment, CrossMoment, bool] | None:
    """Of inputs and of gradients, and whether the mean is taken up by a bias."""
    seen = [moments[module] for module in site.modules if module in moments]
    seen = [moment for moment in seen if moment.inputs.rows and moment.gradients.rows]
    if not seen:
        return None
    inputs = CrossMoment.sum_of([moment.inputs for moment in seen])
    gradients = CrossMoment.sum_of([moment.gradients for moment in seen])
    centered = all(adapter_of(module).has_offset(module) for module in site.modules)
    return inputs, gradients, centered
