"""How near the answers of each model are to the dense model's, and the embeddings to search in."""

from pathlib import Path
from typing import Any

import numpy as np
from encoder import embed, load_tokenizer

NEAREST = 10


def write_index(path: Path, rows: np.ndarray) -> None:
    """Embeddings as bytes: a float32 scale to each sentence, then int8 (sentences, 384)."""
    scales = np.abs(rows).max(axis=1, keepdims=True) / 127
    codes = np.rint(rows / scales).astype(np.int8)
    path.write_bytes(scales.astype("<f4").tobytes() + codes.tobytes())


def nearest(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :NEAREST]


def measure(folder: Path, sentences: list[str], held_out: list[str]) -> dict[str, dict[str, Any]]:
    """Embed the sentences and the held-out queries with every model, and compare with dense."""
    import onnxruntime

    tokenizer = load_tokenizer()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found: dict[str, dict[str, Any]] = {}
    dense_queries = dense_nearest = np.empty(0)
    for name in ("dense", "int8", "int4", "compressed"):
        path = folder / f"{name}.onnx"
        if not path.exists():
            continue
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        rows = embed(session, tokenizer, sentences)
        queries = embed(session, tokenizer, held_out)
        answers = nearest(queries, rows)
        if name == "dense":
            dense_queries, dense_nearest = queries, answers
        shared = [len(np.intersect1d(*pair)) for pair in zip(answers, dense_nearest, strict=True)]
        found[name] = {
            "bytes": path.stat().st_size,
            "cosine": float((queries * dense_queries).sum(1).mean()),
            "agreement": float(np.mean(shared)) / NEAREST,
        }
        write_index(folder / f"{name}.index.bin", rows)
    return found
