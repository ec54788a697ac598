"""The three files that the page compares: dense float32, dynamic int8, and the compressed one."""

from pathlib import Path

from encoder import SentenceEncoder, Tokens

import mpocompress as mpo

LAYERS = ["transformer.encoder.*"]
TABLE_BLOCK = 64


def write_dense(model: SentenceEncoder, example: Tokens, path: Path) -> None:
    """Write the encoder as it is, in float32."""
    mpo.export_onnx(model, path, example, output_names=["embedding"])


def write_int8(dense: Path, path: Path) -> None:
    """What one call of onnxruntime gives: weights by channel, activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(dense, path, per_channel=True, weight_type=QuantType.QInt8)


def write_int4(dense: Path, path: Path) -> None:
    """All weights as 4-bit integers, by onnxruntime alone; for comparison, not on the page."""
    _quantize_blocks(dense, path, ("MatMul", "Gather"), 32)


def write_compressed(
    model: SentenceEncoder,
    example: Tokens,
    path: Path,
    *,
    ratio: float,
    data: list[Tokens],
    steps: int,
    seed: int,
) -> None:
    """Write the encoder with its 36 linear layers as tensor networks of 4-bit cores.

    The table of word embeddings, which is half of the dense file, stays a table: 4-bit integers in
    blocks lose less there than any factorization of the same size, and onnxruntime has an operator
    that looks up rows in them.

    Args:
        model: the dense encoder.
        example: a batch.
        path: the ONNX file to write.
        ratio: how many times fewer parameters the linear layers get, before they become integers.
        data: batches to fit the layers on; with none, weights are truncated and rounded.
        steps: of healing, the training against the dense model.
        seed: of everything random.
    """
    result = mpo.compress(
        model,
        ratio=ratio,
        of="layers",
        layout="svd",
        include=LAYERS,
        gauge="identity",
        data=data or None,
        distill=steps,
        seed=seed,
    )
    cores = path.with_suffix(".cores.onnx")
    stored = mpo.export.quantize_cores(result.model, "int4", data or None)
    mpo.export_onnx(result.model, cores, example, quantize=stored, output_names=["embedding"])
    found = mpo.verify(cores, stored.model, [example], tolerance=1e-3)
    if not found.passed:
        raise SystemExit(f"error: the exported file differs from the model:\n{found}")
    _quantize_blocks(cores, path, ("Gather",), TABLE_BLOCK)
    cores.unlink()


def _quantize_blocks(source: Path, path: Path, kinds: tuple[str, ...], block: int) -> None:
    """Symmetric 4-bit integers, one scale to a block of a row."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), block_size=block, is_symmetric=True, op_types_to_quantize=kinds
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))
