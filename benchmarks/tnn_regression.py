"""Claim: a tensor network trained from the start keeps 95 % of the dense R^2 at 5 times and more.

Beside it: a dense network, a small one of as many parameters in all, TensorLy-Torch's layers of the
same shape, hybrids. Datasets: Friedman's three functions with 10,000 noisy rows; "waves", a known
function of 32 inputs with noise; and, for the record, scikit-learn's tiny "diabetes".

    python benchmarks/tnn_regression.py --datasets friedman1 --seeds 0 1
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn import datasets
from tnn_methods import Problem, main

ROWS, TEST_SHARE, BOND_DIM = 10_000, 0.2, 4
SECOND = "16x16,16x16"
# Noise: a tenth of each function's own spread, or Friedman's usual 1 for the first.
FRIEDMAN = {
    1: (partial(datasets.make_friedman1, n_features=10), 1.0, "16x2,16x5"),
    2: (datasets.make_friedman2, 37.0, "16x2,16x2"),
    3: (datasets.make_friedman3, 0.03, "16x2,16x2"),
}


def problem(
    name: str, inputs: np.ndarray, targets: np.ndarray, first: str, seed: int, epochs: int
) -> Problem:
    """Inputs and targets standardized by the training rows."""
    order = np.random.default_rng(seed).permutation(len(inputs))
    held = round(TEST_SHARE * len(inputs))
    train, test = order[held:], order[:held]
    mean, scale = inputs[train].mean(0), inputs[train].std(0)
    inputs = (inputs - mean) / scale
    targets = (targets - targets[train].mean()) / targets[train].std()
    parts = (inputs[train], targets[train], inputs[test], targets[test])
    return Problem(
        name,
        *(torch.from_numpy(part).float() for part in parts),
        outputs=1,
        layouts=(first, SECOND),
        bond_dim=BOND_DIM,
        epochs=epochs,
        tuning_epochs=4,
    )


def friedman(number: int, seed: int) -> Problem:
    make, noise, layout = FRIEDMAN[number]
    inputs, targets = make(n_samples=ROWS, noise=noise, random_state=seed)
    return problem(f"friedman{number}", inputs, targets, layout, seed, 12)


def waves(seed: int) -> Problem:
    """sin of one direction plus the product of two others, noise a tenth of the spread."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(3, 32)) / 32**0.5
    inputs = rng.normal(size=(ROWS, 32))
    a, b, c = (inputs @ direction for direction in directions)
    clean = np.sin(2 * a) + b * c
    return problem(
        "waves", inputs, clean + 0.1 * clean.std() * rng.normal(size=ROWS), "16x4,16x8", seed, 12
    )


def diabetes(seed: int) -> Problem:
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    return problem("diabetes", inputs, targets, "16x2,16x5", seed, 20)


DATASETS: dict[str, Callable[[int], Problem]] = {
    **{f"friedman{number}": partial(friedman, number) for number in FRIEDMAN},
    "waves": waves,
    "diabetes": diabetes,
}

if __name__ == "__main__":
    main((__doc__ or "").splitlines()[0], DATASETS, "tnn_regression.json")
