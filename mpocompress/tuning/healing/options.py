"""How a model is healed."""

import math
from dataclasses import dataclass
from typing import Literal

from mpocompress.errors import DataError
from mpocompress.scalars import as_count, as_number, as_seed, put_plain
from mpocompress.tuning.healing.loss import OutputLoss, check_output_loss
from mpocompress.tuning.minibatches import check_batch_size, check_held_out


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillOptions:
    """How a model is healed.

    Attributes:
        blockwise_steps: optimizer steps block by block, before those of the whole model; nothing
            happens where the model has no repeated blocks that can be called by themselves.
        output_loss: "auto", "kl", "mse" or "cosine", see `loss.output_loss`; with quantities for
            labels "auto" is "mse".
        hidden_weight: weight of the blocks' normalized errors beside the output's loss.
        learning_rate: peak of the schedule (warm-up over 20 steps, or a third of fewer than 60,
            then a cosine), or "auto": 1e-4, 3e-4, 1e-3, 3e-3 and 1e-2 are tried in this order, up
            to the first that is worse than the one before, each in a small copy of the schedule,
            5 % of the steps (20 to 100) that do not count as such; see
            `learning_rates.peak_from_trials` for the choice.
        batch_size: rows of a minibatch, see `minibatches.TrainingData`.
        accumulate: minibatches in a step, whose mean gradient, by rows, it follows. Where batches
            are sorted by length, as sentences often are, four of 8 rows cost what one of 32 does,
            and their gradient is less that of one length.
        held_out: share of the data that is not trained on; of batches that are cut into rows, 64
            rows at least, or a third of fewer than 192.
        evaluate_every: steps between evaluations; None for 25 evaluations in all.
        patience: a phase ends after so many evaluations without a better one; None: never. The
            loss may rise at first and fall below its start when the rate decays, so that giving up
            early is no default.
        clip_norm: largest norm of the gradient of all parameters.
        seed: of the held-out part, the order of the data, and what the model draws at random.
    """

    blockwise_steps: int = 0
    output_loss: OutputLoss = "auto"
    hidden_weight: float = 1.0
    learning_rate: float | Literal["auto"] = "auto"
    batch_size: int | None = None
    accumulate: int = 1
    held_out: float = 0.1
    evaluate_every: int | None = None
    patience: int | None = None
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_output_loss(self.output_loss)
        found: dict[str, object] = {
            "blockwise_steps": as_count("blockwise_steps", self.blockwise_steps, 0, DataError),
            "accumulate": as_count("accumulate", self.accumulate, 1, DataError),
            "batch_size": check_batch_size(self.batch_size),
            "held_out": check_held_out(self.held_out),
            "hidden_weight": as_number(self.hidden_weight),
            "clip_norm": as_number(self.clip_norm),
            "seed": as_seed(self.seed),
        }
        for name in ("evaluate_every", "patience"):
            if (value := getattr(self, name)) is not None:
                found[name] = as_count(name, value, 1, DataError)
        rate = self.learning_rate
        if rate != "auto":
            found["learning_rate"] = as_number(rate)
            if not 0 < as_number(rate) < math.inf:
                raise DataError(
                    f"learning_rate {rate!r}: give a positive number or 'auto'. Try 1e-3, or 1e-4 "
                    "for a large pretrained model."
                )
        if not 0 <= as_number(self.hidden_weight) < math.inf:
            raise DataError(f"hidden_weight {self.hidden_weight!r}: a weight is 0 or more.")
        if not as_number(self.clip_norm) > 0:
            raise DataError(f"clip_norm {self.clip_norm!r}: a norm to clip at is above 0.")
        put_plain(self, found)
