"""An ONNX file above 2 GB goes in, and a verified one of a few MB comes out.

Writes a network of MatMul, Add and Relu with external data (`--gigabytes`, 2.3 by default), runs
the command line on it, and prints sizes, times, parity and the largest resident memory. Weights are
read one at a time; what takes memory is the parity check, for which ONNX Runtime runs the dense
graph. Needs twice the size on disk while it runs: the dense reference is written, too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from common import environment
from onnx import TensorProto, helper

WIDTH = 8192


def write_model(path: Path, layers: int, *, seed: int = 0) -> int:
    """Write the file and its data, one matrix at a time; bytes of both."""
    generator = np.random.default_rng(seed)
    nodes, tensors = [], []
    value = "x"
    with path.with_name(f"{path.name}.data").open("wb") as data:
        for layer in range(layers):
            weight = generator.standard_normal((WIDTH, WIDTH), dtype=np.float32)
            weight /= np.sqrt(WIDTH / 2)
            tensor = TensorProto(
                name=f"layer{layer}.kernel", data_type=TensorProto.FLOAT, dims=weight.shape
            )
            tensor.data_location = TensorProto.EXTERNAL
            entries = {
                "location": f"{path.name}.data",
                "offset": data.tell(),
                "length": weight.nbytes,
            }
            for key, entry in entries.items():
                tensor.external_data.add(key=key, value=str(entry))
            weight.tofile(data)
            bias = helper.make_tensor(
                f"layer{layer}.bias", TensorProto.FLOAT, [WIDTH], np.zeros(WIDTH, np.float32)
            )
            tensors += [tensor, bias]
            nodes += [
                helper.make_node("MatMul", [value, tensor.name], [f"m{layer}"]),
                helper.make_node("Add", [f"m{layer}", bias.name], [f"a{layer}"]),
                helper.make_node("Relu", [f"a{layer}"], [f"r{layer}"]),
            ]
            value = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", WIDTH])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return sum(file.stat().st_size for file in path.parent.iterdir())


def main() -> None:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.3)
    parser.add_argument("--bond-dim", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    layers = int(np.ceil(options.gigabytes * 1e9 / (4 * WIDTH**2)))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        size = write_model(folder / "in" / "large.onnx", layers)
        print(f"{layers} layers of {WIDTH}x{WIDTH}: {size} bytes", file=sys.stderr)
        command = [
            *(sys.executable, "-m", "mpocompress", str(folder / "in" / "large.onnx")),
            *("--bond-dim", str(options.bond_dim), "--layout", "svd"),
            *("-o", str(folder / "out"), "--json"),
        ]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads(done.stdout)
        peak = int(done.stderr.rpartition("peak:")[2])
        result = {
            "source_bytes": size,
            "files": report["files"],
            "seconds": seconds,
            "stages": report["seconds"],
            "peak_resident_bytes": peak,
            "parity": report["parity"],
            "environment": environment(["onnx", "onnxruntime", "torch"], seed=0),
        }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


# Runs a command and adds the largest resident memory of it to what it says on stderr.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(f"peak:{peak}", file=sys.stderr)
sys.exit(code)
"""


if __name__ == "__main__":
    main()
