"""What errors at a layer do to the model's output, read from gradients of the dense model.

An error E x at a layer's output changes the model's output f by J E x to first order, with J the
Jacobian from here to the end. Averaged over random directions v ~ N(0, 1) at the output,
|v . J E x|^2 is |J E x|^2; so with g the gradient of v . f at the layer's output, G = E[g g^T] is
the metric in which errors at this layer hurt the model (the Gauss-Newton metric of the change of
f). A distillation loss would not do: its gradient at the dense model is zero.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode
from mpocompress.layers.opened import layers_called
from mpocompress.mpo import linalg
from mpocompress.tuning.lockstep import Call, floating_outputs, version_of
from mpocompress.tuning.objectives import is_of_changes_in_place, is_of_function_transforms
from mpocompress.tuning.padding import keep_mask, real_indices, real_rows
from mpocompress.tuning.ruled_out import without_infinite
from mpocompress.tuning.statistics.layer_rows import (
    adapter_of,
    row_pieces,
    table_rows,
    use_of,
)
from mpocompress.tuning.statistics.moments import MAX_FEATURES, CrossMoment, RowCounts
from mpocompress.tuning.statistics.tables import HeadUse

# Rows for each feature of the widest layer, and share of all batches, after which more data is not
# worth its time: moments choose bond dimensions and weigh outputs, the fit itself sees all data.
# For a sentence encoder at half of its parameters and 21 rows for each feature, all of them gain
# .0014 of the cosine over 8, and 4 cost .0028.
_ROWS_PER_FEATURE = 8
_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """What the dense model shows of a layer on data: x x^T and g g^T, summed over the same rows.

    Attributes:
        inputs: of the layer's inputs x.
        gradients: of the gradients g at its outputs.
        counts: of the rows that were looked up, for a table; it has no other inputs.
        later_inputs: those of `inputs` that came after the first call of the layer, or of another
            one that uses the same weight alike, in the same forward pass.
        later_counts: likewise.
    """

    inputs: CrossMoment = field(default_factory=CrossMoment)
    gradients: CrossMoment = field(default_factory=CrossMoment)
    counts: RowCounts = field(default_factory=RowCounts)
    later_inputs: CrossMoment = field(default_factory=CrossMoment)
    later_counts: RowCounts = field(default_factory=RowCounts)

    @property
    def output_metric(self) -> Tensor | None:
        """G = E[g g^T] (out, out), float64; None for more than 8192 outputs."""
        return self.gradients.mean(centered=False)[0] if self.gradients.rows else None

    def head_use(self) -> HeadUse | None:
        """As an output layer that is tied to a table; None if the data does not reach it."""
        if not self.inputs.rows:
            return None
        metric_OO = self.output_metric
        return HeadUse(
            self.inputs.mean(centered=False)[0],
            None if metric_OO is None else metric_OO.diagonal().clone(),
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the dense model shows on data.

    Attributes:
        layers: moments of each layer that the data reaches.
        output_energy: sum of the squares of all floating outputs on the same batches, padding not
            counted: what a loss that is predicted from these moments is a share of.
        calls: these batches, in the order of the data.
    """

    layers: dict[nn.Module, LayerMoments]
    output_energy: float
    calls: tuple[Call, ...]


def take_statistics(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calls: Sequence[Call],
    *,
    seed: int = 0,
    all_data: bool = False,
    inputs_of: Collection[nn.Module] | None = None,
) -> Statistics:
    """Second moments of inputs and of gradients at the outputs, for every layer that data reaches.

    One forward and one backward pass of the dense model per batch; no gradient of any weight is
    formed. Padding counts neither in the output nor in the layers. Batches come in random order,
    until a quarter of them was seen, and every layer has seen eight rows for each of its features.

    Args:
        model: dense; its `requires_grad` flags and mode are restored.
        layers: modules that are called with one tensor and whose output is a single tensor.
        calls: batches.
        seed: of the random directions and of the order of the batches.
        all_data: go on to the last batch.
        inputs_of: layers whose inputs are wanted; of others they are only counted. Default: all.

    Raises:
        DataError: the model has no floating output, NaN in its outputs, gradients that are not
            finite, or layers are called inside of transforms of torch.func.
    """
    try:
        return _statistics(model, layers, calls, seed, all_data, inputs_of)
    except RuntimeError as error:
        if is_of_function_transforms(error):
            raise DataError(
                f"forward of {type(model).__name__} calls layers inside of transforms of "
                "torch.func, such as vmap or grad, where their inputs and gradients cannot be "
                "seen. Call the layers on whole batches, or compress without data."
            ) from error
        if not is_of_changes_in_place(error):
            raise
    # As x += layer(x) does, which runs but cannot be trained: what gradients need is copied.
    # (torch's allow_mutation_on_saved_tensors does not see changes through views.)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda copied: copied):
        return _statistics(model, layers, calls, seed, all_data, inputs_of)


def _statistics(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calls: Sequence[Call],
    seed: int,
    all_data: bool,
    inputs_of: Collection[nn.Module] | None,
) -> Statistics:
    wanted = set(layers if inputs_of is None else inputs_of)
    moments = {layer: LayerMoments() for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    energy, no_gradients = 0.0, set[nn.Module]()
    keep: list[Tensor | None] = [None]
    latest: list[tuple[Tensor, int, CrossMoment]] = []
    called = set[tuple[int, bool]]()  # in the forward pass at hand
    in_forward = False
    seen: list[int] = []

    def moment_of(layer: nn.Module, value: Tensor) -> CrossMoment:
        """Of one batch of inputs; formed once for layers that are called with the same tensor."""
        plain = adapter_of(layer).takes_rows
        # A model may change a tensor in place between two layers that read it.
        if plain and latest and latest[0][0] is value and latest[0][1] == version_of(value):
            return latest[0][2]
        moment = moments[layer].inputs.empty_like()
        for (rows,) in row_pieces(layer, (value.detach(),), keep[0]):
            moment.add(rows, rows)
        if plain:
            latest[:] = [(value, version_of(value), moment)]
        return moment

    def watch(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            no_gradients.add(layer)
        values = (*args, *kwargs.values())
        adapter = adapter_of(layer)
        is_later = use_of(layer) in called
        called.add(use_of(layer))
        # A backward pass may compute again what it needs; these are no calls.
        if in_forward and len(values) == 1 and isinstance(values[0], Tensor):
            if adapter.looks_up:
                indices = real_indices(values[0], keep[0])
                entries = table_rows(layer)
                moments[layer].counts.add(indices, entries)
                if is_later:
                    moments[layer].later_counts.add(indices, entries)
            else:
                if layer in wanted:
                    moments[layer].inputs.merge(moment_of(layer, values[0]))
                else:
                    for (rows,) in row_pieces(layer, (values[0].detach(),), keep[0]):
                        moments[layer].inputs.count(rows)
                if is_later:
                    moments[layer].later_inputs.merge(moment_of(layer, values[0]))
        if not output.requires_grad:
            # No leaf, which a model may not change in place.
            output = output.detach().requires_grad_().clone()
        watched = values[0] if adapter.watches_input else output
        outputs = adapter.output_rows(layer, watched.detach())
        if outputs is None or outputs.shape[-1] > MAX_FEATURES:
            return output

        def collect(gradient: Tensor) -> None:
            at_matrix = adapter.output_rows(layer, gradient.detach())
            if at_matrix is not None:
                rows = real_rows(at_matrix, keep[0])
                moments[layer].gradients.add(rows, rows)

        if watched.requires_grad:
            watched.register_hook(collect)
        return output

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
    try:
        with _frozen(model), layers_called(model), torch.enable_grad():
            order = torch.randperm(len(calls), generator=generator, device="cpu").tolist()
            for done, index in enumerate(order):
                if not all_data and done >= _SHARE * len(calls) and _enough(moments):
                    break
                call = calls[index]
                seen.append(index)
                keep[0] = keep_mask(call.kwargs)
                called.clear()
                in_forward = True
                rows = _output_rows(model(*call.args, **call.kwargs), keep[0])
                in_forward = False
                energy += sum(map(linalg.weight_of, rows))
                loss = _random_projection(rows, generator)
                if not loss.requires_grad:
                    continue  # no layer of ours was reached, or forward runs without gradients
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        latest.clear()
    reached = {
        layer: moment
        for layer, moment in moments.items()
        if moment.inputs.rows or moment.counts.rows
    }
    if no_gradients:
        warnings.warn(
            f"forward of {type(model).__name__} runs {len(no_gradients)} of {len(layers)} layers "
            "under torch.no_grad() or inference_mode(): without gradients it is not known which of "
            "their outputs matter, and all count the same.",
            stacklevel=2,
        )
    return Statistics(reached, energy, tuple(calls[index] for index in sorted(seen)))


def _enough(moments: Mapping[nn.Module, LayerMoments]) -> bool:
    """Whether every layer that was reached has seen rows enough for its moments.

    Tables never have: how often a rare row is looked up is in all of the data only.
    """
    if any(moment.counts.rows for moment in moments.values()):
        return False
    reached = [moment.inputs for moment in moments.values() if moment.inputs.rows]
    reached += [moment.gradients for moment in moments.values() if moment.gradients.rows]
    return bool(reached) and all(
        moment.rows >= _ROWS_PER_FEATURE * moment.features for moment in reached
    )


def _output_rows(outputs: Any, keep: Tensor | None) -> list[Tensor]:
    """Rows of all floating outputs, without padding and what is infinite."""
    found = [
        without_infinite(real_rows(output, keep) if output.ndim >= 2 else output.reshape(-1, 1))
        for output in floating_outputs(outputs)
    ]
    if not found:
        raise DataError("the model has no floating output to take gradients of.")
    count = sum(int(rows.detach().isnan().sum()) for rows in found)
    if count:
        total = sum(rows.numel() for rows in found)
        raise DataError(
            f"{count} of {total} outputs of the dense model on a batch are NaN, so that nothing "
            "can be said of what an error does to them. Check the data and the model."
        )
    return found


def _random_projection(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Sum of v * f over all outputs, v standard normal."""
    total = outputs[0].new_zeros(())
    for rows in outputs:
        directions = torch.randn(rows.shape, generator=generator, dtype=torch.float32, device="cpu")
        total = total + (rows * directions.to(rows)).sum()
    return total


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of parameters; both restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluation_mode(model):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
