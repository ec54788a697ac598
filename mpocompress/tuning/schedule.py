"""Learning rates over a training run."""

import math

_WARM_UP_STEPS, _WARM_UP_SHARE = 20, 0.05


def warm_cosine(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 20 steps or 5 %, then a cosine that ends just above zero."""
    warm_up = min(_WARM_UP_STEPS, max(1, round(_WARM_UP_SHARE * steps)))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * cosine((step - warm_up) / (steps - warm_up))


def cosine(share: float) -> float:
    """Half a cosine: 1 where `share` of a run is 0, 0 where it is 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
