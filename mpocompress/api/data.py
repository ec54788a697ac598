"""The user's batches as the model takes them."""

from typing import Any

from torch import nn

from mpocompress.loading import Batch, as_batches


def calls_of(data: Any, model: nn.Module) -> list[Batch]:
    """The batches of the user's data in the model's dtype and on its device."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    batches = as_batches(data)
    if parameter is None:
        return list(batches)
    return [batch.to(parameter.device) for batch in batches.cast(parameter.dtype)]
