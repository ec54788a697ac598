"""Mix dense and tensor layers: turn the widest layer of a network of yours into an MPO, then train.

    python examples/tnn/hybrid.py                    # half a minute; writes hybrid.png

Most weights of a network sit in one or two layers. `tensorize` replaces those that you name, before
training; the rest stays as it is. Here a network of 30-256-256-2 tells benign from malignant
tumours; its middle layer, 88 % of all weights, becomes an MPO at several bond dimensions. Adam
trains everything at once. With more patience try method="dmrg".
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import mpocompress as mpo

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend without a screen


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", type=Path, default=Path("hybrid.png"))
    options = parser.parse_args()

    rows, kinds = load_breast_cancer(return_X_y=True)
    parts = train_test_split(rows, kinds, test_size=0.3, random_state=0, stratify=kinds)
    mean, scale = parts[0].mean(0), parts[0].std(0)
    training, test = (torch.from_numpy((part - mean) / scale).float() for part in parts[:2])
    training_kinds, test_kinds = (torch.from_numpy(part) for part in parts[2:])

    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    models = {"dense": dense}
    for bond_dim in (1, 2, 4, 8):
        models[f"bond {bond_dim}"] = mpo.tensorize(
            dense, include=["2"], layout="16x16,16x16", bond_dim=bond_dim
        )
    sizes, scores = [], []
    for name, model in models.items():
        mpo.train(
            model,
            (training, training_kinds),
            method="adam",
            dense_learning_rate=1e-3,
            epochs=options.epochs,
        )
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        scores.append(accuracy(model, test, test_kinds))
        print(f"{name}: {sizes[-1]:,} parameters, {scores[-1]:.1%} of {len(test)} test rows right")

    figure, axis = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    axis.semilogx(sizes, scores, "o")
    for name, size, score in zip(models, sizes, scores, strict=True):
        axis.annotate(name, (size, score), textcoords="offset points", xytext=(4, 4))
    axis.set(xlabel="parameters", ylabel="accuracy on test rows")
    figure.savefig(options.plot)
    print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
