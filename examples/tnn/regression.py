"""Learn a noisy function of ten numbers: scikit-learn's estimator, sweeps against Adam.

    python examples/tnn/regression.py                # a minute; writes regression.png

Friedman's first function, 10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4, hides in ten inputs,
five of which say nothing; noise of variance 1 is added. `MPORegressor` standardizes, builds a
network whose hidden layers are matrix product operators, and trains it: by DMRG-like sweeps, one
core at a time, or by Adam on all cores at once. Both see the data as often.
"""

import argparse
from pathlib import Path

import matplotlib
from sklearn.datasets import make_friedman1
from sklearn.linear_model import LinearRegression

import mpocompress as mpo

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend without a screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--plot", type=Path, default=Path("regression.png"))
    options = parser.parse_args()

    inputs, targets = make_friedman1(options.rows + 500, noise=1.0, random_state=0)
    training, test = slice(None, options.rows), slice(options.rows, None)
    linear = LinearRegression().fit(inputs[training], targets[training])
    print(f"linear model: R^2 {linear.score(inputs[test], targets[test]):.3f}")

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method in ("dmrg", "adam"):
        model = mpo.MPORegressor(
            hidden_layer_sizes=(64, 64),
            bond_dim=4,
            method=method,
            epochs=options.epochs,
            random_state=0,
        ).fit(inputs[training], targets[training])
        numbers = sum(parameter.numel() for parameter in model.network_.parameters())
        found = model.score(inputs[test], targets[test])
        print(f"{method}: R^2 {found:.3f} with {numbers:,} parameters")
        history = model.history_.history
        left.plot([record.epoch for record in history], [r.score for r in history], label=method)
        right.plot(targets[test], model.predict(inputs[test]), ".", label=method, alpha=0.5)
    left.set(xlabel="epoch", ylabel="R^2 on held-out rows", ylim=(0, 1))
    left.legend()
    right.axline((15, 15), slope=1, color="grey")
    right.set(xlabel="test target", ylabel="prediction")
    figure.savefig(options.plot)
    print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
