"""A two-layer LSTM that reads a digit row by row: 28 steps of 28 pixels, 210,000 parameters."""

from torch import Tensor, nn
from training import Recipe, digits, main

ROWS = PIXELS = 28
HIDDEN = 128
LAYERS = 2
CLASSES = 10


class RowReader(nn.Module):
    """Reads rows of an image from top to bottom; the last hidden state says the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(PIXELS, HIDDEN, num_layers=LAYERS, batch_first=True)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        """Images (batch, 28, 28) to logits (batch, 10)."""
        states, _ = self.lstm(input)
        return self.head(states[:, -1])


def build_model() -> RowReader:
    """The untrained model."""
    return RowReader()


RECIPE = Recipe(
    name="lstm",
    build=build_model,
    data=digits(ROWS, PIXELS),
    steps=800,
    batch=64,
    rate=3e-3,
    metric="accuracy",
    compression_rows=2000,
)

if __name__ == "__main__":
    main(RECIPE)
