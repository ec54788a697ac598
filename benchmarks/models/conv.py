"""A convolutional net for 28 x 28 digits: five layers of 3 x 3, batch norm, 280,000 parameters."""

from itertools import pairwise

from torch import nn
from training import Recipe, digits, main

CHANNELS = (1, 32, 64, 64, 128, 128)
HALVED_AFTER = (1, 3)  # numbers of the layers that a pooling follows
CLASSES = 10


def build_model() -> nn.Sequential:
    """The untrained net: images (batch, 1, 28, 28) to logits (batch, 10)."""
    layers: list[nn.Module] = []
    for number, (channels_in, channels_out) in enumerate(pairwise(CHANNELS), start=1):
        layers += [
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        ]
        if number in HALVED_AFTER:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], CLASSES)
    )


RECIPE = Recipe(
    name="conv",
    build=build_model,
    data=digits(1, 28, 28),
    steps=400,
    batch=64,
    rate=3e-3,
    metric="accuracy",
    compression_rows=1000,
)

if __name__ == "__main__":
    main(RECIPE)
