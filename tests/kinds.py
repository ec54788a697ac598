"""One small model for each kind of weight, with batches whose structure a fit can use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.pytorch_utils import Conv1D

from tests.planted import gaussian


@dataclass(frozen=True)
class Kind:
    """A model with one interesting weight or more.

    Attributes:
        make: the model, float32, in evaluation mode, the same for every call.
        batches: forward arguments for this dtype.
        bond_dim: at which a fit on data is held against truncation.
        include: patterns of the weights in question.
        gain: the error of the fit is at most so many times that of the truncation.
    """

    make: Callable[[], nn.Module]
    batches: Callable[[torch.dtype], list[Any]]
    bond_dim: int = 3
    include: tuple[str, ...] = ("*",)
    gain: float = 0.8


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make().eval()

    return build


def vectors(size: int, *, leading: tuple[int, ...] = (12,), count: int = 4, scale: float = 0.02):
    """Batches of vectors close to a subspace of 3 dimensions, with a mean."""

    def batches(dtype: torch.dtype) -> list[Tensor]:
        basis = gaussian(3, size, seed=1)
        found = []
        for number in range(count):
            flat = gaussian(*leading, 3, seed=10 + number) @ basis + 0.5
            flat = flat + scale * gaussian(*leading, size, seed=20 + number)
            found.append(flat.to(dtype))
        return found

    return batches


def images(channels: int, *size: int, count: int = 4, rows: int = 6):
    """Batches of smooth images whose channels are mixtures of two."""

    def batches(dtype: torch.dtype) -> list[Tensor]:
        mix = gaussian(channels, 2, seed=2)
        found = []
        for number in range(count):
            x = gaussian(rows, 2, *size, seed=30 + number)
            for axis in range(len(size)):
                x = x.cumsum(2 + axis) / 2
            x = torch.einsum("cd,nd...->nc...", mix, x)
            found.append((x + 0.02 * gaussian(*x.shape, seed=40 + number)).to(dtype))
        return found

    return batches


def tokens(vocabulary: int, *, count: int = 4, shape: tuple[int, int] = (6, 5)):
    """Batches of word numbers; a few words make most of them."""

    def batches(_dtype: torch.dtype) -> list[Tensor]:
        weights = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64) ** 2
        generator = torch.Generator().manual_seed(3)
        return [
            torch.multinomial(
                weights, shape[0] * shape[1], replacement=True, generator=generator
            ).reshape(shape)
            for _ in range(count)
        ]

    return batches


class Words(nn.Module):
    """Words to vectors to numbers; perhaps back to words with the same table."""

    def __init__(self, *, tied: bool, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16, padding_idx=padding_idx)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(ids))))


class Bags(nn.Module):
    """Bags of words to vectors to numbers for each word; perhaps with the same table."""

    def __init__(self, *, tied: bool, mode: str, padding_idx: int | None = None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 16, mode=mode, padding_idx=padding_idx)
        self.head = nn.Linear(16, 40)
        if tied:
            self.head.weight = self.bag.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(ids)))


class Pair(nn.Module):
    """A bilinear form of a vector with a function of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(6, 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(torch.tanh(x[..., :6]), x)


class Attends(nn.Module):
    """Attention to the same sequence, and to another one with keys and values of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(12, 3, batch_first=True)
        self.other = nn.MultiheadAttention(12, 2, kdim=8, vdim=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1)
        found, weights = self.other(x, x[..., :8], x[..., 8:])
        return found.transpose(0, 1) * weights.square().sum(-1, keepdim=True)


class Mixture(nn.Module):
    """A router and fused experts, as in transformers' mixtures."""

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=12, intermediate_size=10, num_local_experts=3, num_experts_per_tok=2
        )
        config._experts_implementation = "eager"
        self.block = MixtralSparseMoeBlock(config)
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))


KINDS: dict[str, Kind] = {
    "Conv1D of transformers": Kind(
        seeded(lambda: nn.Sequential(Conv1D(18, 12), nn.Tanh(), Conv1D(5, 18))),
        vectors(12, leading=(6, 4)),
    ),
    "embedding": Kind(
        seeded(lambda: Words(tied=False, padding_idx=2)), tokens(40), include=("table",)
    ),
    "embedding tied with the head": Kind(
        seeded(lambda: Words(tied=True)), tokens(40), bond_dim=8, include=("table",)
    ),
    "embedding bag": Kind(
        seeded(lambda: Bags(tied=False, mode="mean", padding_idx=2)), tokens(40), include=("bag.*",)
    ),
    "embedding bag of maxima": Kind(
        seeded(lambda: Bags(tied=False, mode="max")), tokens(40), include=("bag.*",)
    ),
    "embedding bag tied with the head": Kind(
        seeded(lambda: Bags(tied=True, mode="sum")), tokens(40), bond_dim=8, include=("bag.*",)
    ),
    "conv1d": Kind(
        seeded(
            lambda: nn.Conv1d(8, 12, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        ),
        images(8, 11),
    ),
    "conv2d": Kind(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(6, 12, (3, 5), padding="same"), nn.ReLU(), nn.Conv2d(12, 8, 3, stride=2)
            )
        ),
        images(6, 9, 9),
    ),
    "conv2d in groups": Kind(
        seeded(lambda: nn.Conv2d(12, 12, 3, padding=1, groups=2)), images(12, 7, 6)
    ),
    "conv3d": Kind(seeded(lambda: nn.Conv3d(4, 8, 3, padding=1, bias=False)), images(4, 4, 5, 4)),
    "transposed conv1d": Kind(
        seeded(lambda: nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1, output_padding=1)),
        images(8, 7),
    ),
    "transposed conv2d": Kind(
        seeded(lambda: nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, groups=2)),
        images(12, 5, 4),
        gain=0.9,
    ),
    "lstm": Kind(
        seeded(lambda: nn.LSTM(12, 10, num_layers=2, batch_first=True, bidirectional=True)),
        vectors(12, leading=(6, 7)),
    ),
    "lstm with a projection": Kind(
        seeded(lambda: nn.LSTM(12, 10, proj_size=5, bias=False, batch_first=True)),
        vectors(12, leading=(6, 7)),
    ),
    "gru": Kind(seeded(lambda: nn.GRU(12, 10, batch_first=True)), vectors(12, leading=(6, 7))),
    "rnn": Kind(seeded(lambda: nn.RNN(12, 10, batch_first=True)), vectors(12, leading=(6, 7))),
    "attention": Kind(seeded(Attends), vectors(12, leading=(6, 7))),
    "encoder layers": Kind(
        seeded(lambda: encoder(activation="gelu")), vectors(12, leading=(6, 7)), bond_dim=4
    ),
    "encoder layers, norm first": Kind(
        seeded(lambda: encoder(norm_first=True)), vectors(12, leading=(6, 7)), bond_dim=4
    ),
    "bilinear": Kind(seeded(Pair), vectors(12)),
    "fused experts": Kind(seeded(Mixture), vectors(12, leading=(6, 7)), bond_dim=4),
}
