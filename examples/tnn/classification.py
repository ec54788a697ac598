"""Read handwritten digits with a tensor neural network that grows, trained on labels alone.

    python examples/tnn/classification.py            # a minute; writes classification.png

1. Two hidden layers of 256 neurons, each a matrix product operator of two sites. As dense matrices
   they would hold 82,000 weights; they begin with bond dimension 1: 768 numbers.
2. DMRG-like sweeps go through the cores, there and back. In the first half two neighbouring cores
   are merged, take gradient steps, and are split again: there the bonds grow, up to 4.
3. The entanglement entropy at each layer's bond says how much the two halves of the layer came to
   know of each other. It is at most ln 4 = 1.39 nats, the dotted line.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import mpocompress as mpo

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend without a screen

BOND_DIM = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot", type=Path, default=Path("classification.png"))
    options = parser.parse_args()

    # 1,797 images of 8x8 pixels; the last 360 are only looked at in the end.
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    images = torch.from_numpy(pixels[order] / 16).float()
    labels = torch.from_numpy(digits[order])
    training, test = slice(None, -360), slice(-360, None)

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # the start of the dense head
    start = {"bond_dim": 1, "gain": 2**0.5, "generator": generator}
    model = nn.Sequential(
        mpo.MPOLinear(64, 256, layout="16x8,16x8", **start),
        nn.ReLU(),
        mpo.MPOLinear(256, 256, layout="16x16,16x16", **start),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    result = mpo.train(
        model,
        (images[training], labels[training]),
        sites="grow",
        bond_dim=BOND_DIM,
        epochs=options.epochs,
        batch_size=32,
        progress=True,
    )

    with torch.no_grad():
        right = (model(images[test]).argmax(1) == labels[test]).float().mean()
    cores = sum(core.numel() for layer in (model[0], model[2]) for core in layer.cores)
    dense = 64 * 256 + 256 * 256
    print(f"hidden layers: {cores:,} parameters, {dense / cores:.0f} times fewer than dense")
    print(f"{right:.1%} of 360 test images right")

    epochs = [record.epoch for record in result.history]
    figure, (left, middle, last) = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    left.plot(epochs, [record.score for record in result.history], "o-")
    left.set(xlabel="epoch", ylabel="accuracy on held-out rows")
    for layer, name in (("0", "first layer"), ("2", "second layer")):
        middle.plot(epochs, [record.bond_dims[layer][0] for record in result.history], label=name)
        entropies = [record.entropies_nats[layer][0] for record in result.history]
        last.plot(epochs, entropies, label=name)
    middle.set(xlabel="epoch", ylabel="bond dimension")
    last.axhline(float(np.log(BOND_DIM)), color="grey", linestyle=":")
    last.set(xlabel="epoch", ylabel="entanglement entropy in nats")
    last.legend()
    figure.savefig(options.plot)
    print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
