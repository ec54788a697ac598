"""Reports to test with: the golden one, and made-up ones of any size. Needs no model."""

import json
import math
from pathlib import Path
from typing import Any

from mpocompress.report import CompressionReport

GOLDEN = Path(__file__).parent / "golden" / "v1" / "report.json"
HOSTILE = '</svg></code><script src="https://evil.example/x.js">alert(1)</script>|`a`\n$\\frac{1}$'


def golden() -> dict[str, Any]:
    """The golden report as data, to be changed before it is read."""
    data: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return data


def compressed_layer(
    name: str, out: int = 1536, in_: int = 384, bond_dim: int = 96, *, sites: int = 2
) -> dict[str, Any]:
    """A compressed layer with a made-up, exponentially falling spectrum."""
    layout = [[out, 1], [1, in_]] if sites == 2 else [[out, 1], *[[1, 1]] * (sites - 2), [1, in_]]
    spectrum = [math.exp(-k / 20) for k in range(bond_dim)]
    total = sum(s * s for s in spectrum)
    entropy = -sum(s * s / total * math.log(s * s / total) for s in spectrum)
    stored = bond_dim * (out + in_) + (sites - 2) * bond_dim**2
    candidate = {
        "layout": layout,
        "bond_dims": [bond_dim] * (sites - 1),
        "parameters": stored,
        "macs": stored,
        "relative_weight_error": 0.12,
        "chosen": True,
    }
    return {
        "name": name,
        "kind": "linear",
        "status": "compressed",
        "reason": "least weight error of the layouts within the bond dimension",
        "shape": [out, in_],
        "layout": layout,
        "bond_dims": [bond_dim] * (sites - 1),
        "parameters": {"dense": out * in_, "compressed": stored},
        "macs": {"dense": out * in_, "compressed": stored},
        "relative_weight_error": 0.12,
        "entropies_nats": [entropy] * (sites - 1),
        "schmidt_values": [spectrum] * (sites - 1),
        "discarded_weight_bound": 0.12,
        "candidates": [candidate],
    }


def kept_layer(name: str, size: int, kind: str = "norm", *, macs: int = 0) -> dict[str, Any]:
    """A weight that was kept."""
    return {
        "name": name,
        "kind": kind,
        "status": "kept",
        "reason": f"{kind} is not converted",
        "shape": [size],
        "parameters": {"dense": size, "compressed": size},
        "macs": {"dense": macs, "compressed": macs},
    }


def report_of(*layers: dict[str, Any], **changes: Any) -> CompressionReport:
    """A report of these layers, in float32, with its totals added up."""
    compressed = [layer for layer in layers if layer["status"] == "compressed"]

    def total(quantity: str, of: list[dict[str, Any]], unit: int = 1) -> dict[str, Any]:
        dense = unit * sum(layer[quantity]["dense"] for layer in of)
        after = unit * sum(layer[quantity]["compressed"] for layer in of)
        return {"dense": dense, "compressed": after, "ratio": dense / after if after else 1.0}

    def scope(quantity: str, unit: int = 1) -> dict[str, Any]:
        return {
            "model": total(quantity, list(layers), unit),
            "layers": total(quantity, compressed, unit),
        }

    data: dict[str, Any] = {
        "tool_version": "0.1.0",
        "source": {"name": "sample.pt"},
        "totals": {
            "parameters": scope("parameters"),
            "bytes": scope("parameters", 4),
            "macs": scope("macs"),
        },
        "layers": list(layers),
    }
    return CompressionReport.model_validate(data | changes)


def encoder(blocks: int = 6) -> CompressionReport:
    """A transformer encoder: six matrices a block compressed, embeddings and norms kept."""
    layers = [kept_layer("embeddings.word.weight", 30522 * 384, "embedding")]
    for block in range(blocks):
        for matrix in ("query", "key", "value", "output"):
            layers.append(compressed_layer(f"layer.{block}.attention.{matrix}.weight", 384, 384))
        layers.append(compressed_layer(f"layer.{block}.up.weight", 1536, 384))
        layers.append(compressed_layer(f"layer.{block}.down.weight", 384, 1536, sites=3))
        layers.extend(kept_layer(f"layer.{block}.norm{k}.weight", 384) for k in (1, 2))
    return report_of(*layers)


PARITY: dict[str, Any] = {
    "max_abs_difference": 3.1e-6,
    "max_relative_difference": 2.4e-6,
    "tolerance": 1e-4,
    "batch_sizes": [1, 3, 8],
    "argmax_agreement": 1.0,
    "passed": True,
    "outputs": ["logits"],
}
