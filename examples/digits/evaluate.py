"""Check the compressed digit classifier on images that training never saw.

Looks into --out, where train.py and `mpocompress` have written, and compares three models on every
held-out image: the dense one in PyTorch, the compressed one in PyTorch (loaded again from its
safetensors), and the compressed one as an ONNX file in ONNX Runtime. The dense model is exported to
ONNX too, to compare like with like in size.

Exit code 3 if ONNX Runtime and PyTorch disagree: in a predicted digit, or in a logit by 1e-4.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from classifier import build_classifier
from torch import nn

import mpocompress

BATCH = 128  # the last batch is smaller, so that two batch sizes are seen
LOGITS_TOLERANCE = 1e-4
CHECK_FAILED = 3


def load_dense(path: Path) -> nn.Module:
    """Open the trained module; only torch.nn parts are allowed in the file, so no code runs."""
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        model = torch.load(path, weights_only=True)
    return model.eval()


def torch_logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the logits (count, 10) that PyTorch computes."""
    with torch.no_grad():
        batches = torch.from_numpy(images).split(BATCH)
        return torch.cat([model(batch) for batch in batches]).numpy()


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits (count, 10) that ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    starts = range(0, len(images), BATCH)
    return np.concatenate(
        [session.run(None, {name: images[start : start + BATCH]})[0] for start in starts]
    )


def onnx_bytes(path: Path) -> int:
    """Return the size of an ONNX file, with the weights that it may keep beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def dense_onnx_bytes(model: nn.Module, images: np.ndarray) -> int:
    """Return how large the dense model is as an ONNX file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "dense.onnx"
        mpocompress.export_onnx(model, path, torch.from_numpy(images[:2]))
        return onnx_bytes(path)


def evaluate(out: Path, compressed: Path) -> dict[str, float]:
    """Measure everything that `main` prints; accuracies and agreement are shares in [0, 1]."""
    with np.load(out / "heldout.npz") as held_out:
        images, digits = held_out["input"], held_out["labels"]
    dense_model = load_dense(out / "model.pt")
    small_model = mpocompress.load(compressed, model=build_classifier()).eval()
    dense = torch_logits(dense_model, images)
    small = torch_logits(small_model, images)
    runtime = onnx_logits(compressed / "model.onnx", images)
    dense_bytes = dense_onnx_bytes(dense_model, images)
    small_bytes = onnx_bytes(compressed / "model.onnx")
    return {
        "images": len(images),
        "dense_accuracy": float((dense.argmax(axis=1) == digits).mean()),
        "onnx_accuracy": float((runtime.argmax(axis=1) == digits).mean()),
        "agreement_with_dense": float((runtime.argmax(axis=1) == dense.argmax(axis=1)).mean()),
        "agreement_with_pytorch": float((runtime.argmax(axis=1) == small.argmax(axis=1)).mean()),
        "max_logit_difference": float(np.abs(runtime - small).max()),
        "dense_parameters": sum(p.numel() for p in dense_model.parameters()),
        "compressed_parameters": sum(p.numel() for p in small_model.parameters()),
        "dense_onnx_bytes": dense_bytes,
        "compressed_onnx_bytes": small_bytes,
        "onnx_ratio": dense_bytes / small_bytes,
    }


def agrees(facts: dict[str, float]) -> bool:
    """Say whether ONNX Runtime and PyTorch give the same digits and, to 1e-4, the same logits."""
    return (
        facts["agreement_with_pytorch"] == 1.0 and facts["max_logit_difference"] <= LOGITS_TOLERANCE
    )


def table(facts: dict[str, float]) -> str:
    """Lay the facts out for a reader."""
    parameter_ratio = facts["dense_parameters"] / facts["compressed_parameters"]
    rows = [
        (f"{facts['images']:,} held-out images", "dense", "compressed", ""),
        (
            "digits right",
            f"{facts['dense_accuracy']:.1%}",
            f"{facts['onnx_accuracy']:.1%}",
            f"same digit as dense: {facts['agreement_with_dense']:.1%}",
        ),
        (
            "ONNX file",
            f"{facts['dense_onnx_bytes'] / 1e3:,.0f} kB",
            f"{facts['compressed_onnx_bytes'] / 1e3:,.0f} kB",
            f"{facts['onnx_ratio']:.1f} times smaller",
        ),
        (
            "parameters",
            f"{facts['dense_parameters']:,}",
            f"{facts['compressed_parameters']:,}",
            f"{parameter_ratio:.1f} times fewer",
        ),
    ]
    lines = [
        f"{name:<24}{dense:>12}{small:>12}  {note}".rstrip() for name, dense, small, note in rows
    ]
    verdict = "agree" if agrees(facts) else "DISAGREE"
    lines.append(
        f"ONNX Runtime and PyTorch {verdict}: "
        f"{facts['agreement_with_pytorch']:.1%} of the digits are the same, "
        f"logits differ by at most {facts['max_logit_difference']:.1e}"
    )
    return "\n".join(lines)


def main() -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=here / "out", help="what train.py wrote")
    parser.add_argument("--compressed", type=Path, help="default: model-mpo in --out")
    parser.add_argument("--json", action="store_true", help="print one object, not a table")
    options = parser.parse_args()
    compressed = options.compressed or options.out / "model-mpo"
    for needed in (
        options.out / "model.pt",
        options.out / "heldout.npz",
        compressed / "model.onnx",
    ):
        if not needed.exists():
            parser.error(f"there is no {needed}; run examples/quickstart.sh first")

    facts = evaluate(options.out, compressed)
    print(json.dumps(facts, indent=2) if options.json else table(facts))
    return 0 if agrees(facts) else CHECK_FAILED


if __name__ == "__main__":
    sys.exit(main())
