"""The digit classifier 784-1024-1024-10, shared by train.py and evaluate.py."""

import torch
from torch import nn

PIXELS = 28 * 28
HIDDEN = 1024
CLASSES = 10


def build_classifier(seed: int = 0) -> nn.Sequential:
    """Build the untrained classifier: two large layers, which get compressed, and a small head.

    It is made of `torch.nn` parts only, so a saved module opens without running foreign code.

    Args:
        seed: Seed of the initial weights. The caller's random state is left as it was.

    Returns:
        A float32 module that maps images (batch, 784), scaled to [0, 1], to logits (batch, 10).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(PIXELS, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, CLASSES),
        )
