"""Heal the compressed digit classifier with a training loop of your own: ten lines of PyTorch.

Reads what train.py wrote into --out, replaces the two large layers by four-site MPOs fitted to the
training images, and trains `result.model` to give the dense model's logits. No labels are used.
`mpocompress.distill` does the same with a held-out part, early stopping and a choice of the rate.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from evaluate import load_dense
from torch import Tensor, nn
from train import BATCH, accuracy, load_digits, split_by_digit

import mpocompress


def heal(model: nn.Module, dense: nn.Module, images_BI: Tensor, epochs: int, seed: int) -> None:
    """Train in place to give the dense model's logits on these images, (count, 784)."""
    steps = epochs * -(-len(images_BI) // BATCH)
    shuffler = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images_BI), generator=shuffler).split(BATCH):
            with torch.no_grad():
                target_BK = dense(images_BI[batch]).softmax(dim=1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images_BI[batch]), target_BK).backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=here / "out", help="what train.py wrote")
    parser.add_argument("--bond-dim", type=int, default=8)
    parser.add_argument("--sweeps", type=int, default=4, help="of the fit before")
    parser.add_argument("--images", type=int, default=4000, help="how many to fit and train on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the split, as given to train.py")
    options = parser.parse_args()
    if not (options.out / "model.pt").exists():
        parser.error(f"there is no {options.out / 'model.pt'}; run examples/digits/train.py first")

    images, digits = load_digits()
    training, held_out = split_by_digit(digits, options.seed)
    chosen = np.random.default_rng(options.seed).permutation(training)[: options.images]
    images_BI = torch.from_numpy(images[chosen])
    dense = load_dense(options.out / "model.pt")
    result = mpocompress.compress(
        dense,
        bond_dim=options.bond_dim,
        sites=4,
        exclude=["4"],  # the small head
        data=list(images_BI.split(500)),
        sweeps=options.sweeps,
    )

    def right(model: nn.Module) -> str:
        return f"{accuracy(model, images[held_out], digits[held_out]):.1%}"

    print(
        f"{result.report.totals.parameters.layers.ratio:.0f} times fewer parameters in the layers"
    )
    print(f"dense {right(dense)}, compressed {right(result.model)} of the held-out images right")
    heal(result.model, dense, images_BI, options.epochs, options.seed)
    print(f"healed for {options.epochs} epochs: {right(result.model)}")


if __name__ == "__main__":
    main()
