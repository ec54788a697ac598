"""A causal transformer that predicts characters: four blocks of width 192, 1.8 million parameters.

Trained on the paragraphs of the `fortunes` package; a tenth of them is held out.
"""

import string

import torch
from torch import Tensor, nn
from training import Data, Recipe, main

ALPHABET = string.printable[:95] + "\n"  # a new line ends a paragraph
UNKNOWN = ALPHABET.index("?")
WINDOW = 128
LONGEST_PERIOD = 10_000.0  # over 2 pi, in characters
WIDTH = 192
HEADS = 4
BLOCKS = 4
HELD_OUT = 0.1
SCORED_WINDOWS = 500


class Attention(nn.Module):
    """Each position attends to itself and to those before it, by rotary positions."""

    cosines: Tensor  # (128, width of a head / 2)
    sines: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        pairs = WIDTH // HEADS // 2
        frequencies = LONGEST_PERIOD ** -(torch.arange(pairs) / pairs)
        angles = torch.arange(WINDOW)[:, None] * frequencies
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.reshape(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.queries_keys_values(x).chunk(3, dim=-1)
        )
        q, k = self._turned(q), self._turned(k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, WIDTH))

    def _turned(self, x: Tensor) -> Tensor:
        cosines, sines = self.cosines[: x.shape[2]], self.sines[: x.shape[2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)


class Block(nn.Module):
    """Attention, then a feed-forward net, each behind a norm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.feed_forward_norm = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(nn.functional.gelu(self.widen(self.feed_forward_norm(x))))


class CharacterModel(nn.Module):
    """Characters by their numbers to logits of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(ALPHABET), bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Numbers (batch, length up to 128) to logits (batch, length, 96)."""
        x = self.characters(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build_model() -> CharacterModel:
    """The untrained model."""
    return CharacterModel()


def encode(text: str) -> Tensor:
    """Numbers of characters; what the alphabet lacks becomes a question mark."""
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([numbers.get(character, UNKNOWN) for character in text])


def text_windows(seed: int) -> Data:
    """Windows of 128 characters, each with the characters that follow as targets."""
    from sentences import read_sentences, split_sentences

    paragraphs = read_sentences()
    held_out = int(HELD_OUT * len(paragraphs))
    parts = split_sentences(paragraphs, [len(paragraphs) - held_out, held_out], seed)
    windows, held_windows = (_cut("\n".join(part)) for part in parts)
    held_windows = held_windows[:SCORED_WINDOWS]
    return Data(
        argument="tokens",
        inputs_N=windows[:, :-1],
        targets_N=windows[:, 1:],
        held_inputs_N=held_windows[:, :-1],
        held_targets_N=held_windows[:, 1:],
    )


def _cut(text: str) -> Tensor:
    """Windows (N, 129), of which neighbours share one character."""
    return encode(text).unfold(0, WINDOW + 1, WINDOW)


RECIPE = Recipe(
    name="causal",
    build=build_model,
    data=text_windows,
    steps=2200,
    batch=4,
    rate=2e-3,
    metric="perplexity",
    compression_rows=1500,
)

if __name__ == "__main__":
    main(RECIPE)
