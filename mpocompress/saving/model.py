"""Compressed models and graphs to `model.mpo.safetensors`, and from there into a skeleton."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mpocompress.errors import LoadError, SaveError
from mpocompress.layers import MPOLayer
from mpocompress.mpo import MPO
from mpocompress.saving.manifest import LayerRecord, Manifest, layer_records, opened_records
from mpocompress.saving.tensor_file import (
    cores_path,
    read_all_names,
    read_manifest,
    save_tensors,
    weight_of,
)
from mpocompress.surgery import adapter_for, copy_with_replacements, open_modules

_DENSE = {
    "linear": "an nn.Linear",
    "embedding": "an nn.Embedding",
    "conv": "a convolution",
}  # what a kind is called where it is missing


def save_model(
    model: nn.Module, path: str | Path, *, source: Literal["module", "state_dict"] = "module"
) -> None:
    """Write a compressed model's state and manifest to one safetensors file.

    Raises:
        SaveError: a state entry is not a tensor, or the file cannot be written.
    """
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise SaveError(
                f"state entry {name!r} is a {type(tensor).__name__}, not a tensor; it cannot be "
                "saved without a pickle. Remove the module that keeps it, or convert it first."
            )
        if tensor.layout != torch.strided or tensor.dtype == torch.complex128:
            raise SaveError(
                f"state entry {name!r} is {tensor.layout} of {tensor.dtype}, which the file format "
                "does not know. Convert it, or register the buffer with persistent=False."
            )
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        first_name[id(tensor)] = name
        detached = tensor.detach().cpu()
        storage = detached.untyped_storage().data_ptr()
        # The format knows no views: what overlaps another tensor is stored as a copy.
        whole = detached.is_contiguous() and storage not in storages
        storages.add(storage)
        tensors[name] = detached if whole else detached.clone(memory_format=torch.contiguous_format)
    manifest = Manifest(
        source=source,
        layers=tuple(layer_records(model)),
        aliases=aliases,
        opened=tuple(opened_records(model)),
    )
    save_tensors(tensors, manifest, path)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GraphWeight:
    """A compressed weight of an ONNX graph.

    Attributes:
        name: what it is called.
        mpo: the cores.
        stored: what the graph calls the dense tensor.
        stored_shape: of that.
        transposed: whether that is (in, out).
    """

    name: str
    mpo: MPO
    stored: str
    stored_shape: tuple[int, ...]
    transposed: bool


def save_graph_weights(
    weights: Sequence[GraphWeight], others: Mapping[str, Tensor], path: str | Path
) -> None:
    """Write the weights of an ONNX graph to one safetensors file.

    Args:
        weights: the compressed ones.
        others: the other tensors of the graph, by name.
        path: of the file.

    Raises:
        SaveError: the file cannot be written, or cores would have the name of another tensor.
    """
    tensors = dict(others)
    records = []
    for weight in weights:
        record = LayerRecord(
            names=(weight.name,),
            kind="linear",
            shape=weight.mpo.shape,
            layout=weight.mpo.layout.pairs,
            bond_dims=weight.mpo.bond_dims,
            dense_shape=weight.stored_shape,
            transposed=weight.transposed,
            stored=weight.stored,
        )
        records.append(record)
        for name, core in zip(record.core_names(weight.name), weight.mpo.cores, strict=True):
            if name in tensors:
                raise SaveError(
                    f"a core of {weight.name!r} would be called {name!r}, as another tensor of the "
                    f"graph is. Rename one of them, or leave the weight dense with --exclude."
                )
            tensors[name] = core.contiguous()
    save_tensors(tensors, Manifest(source="onnx", layers=tuple(records)), path)


def load_model(path: str | Path, skeleton: nn.Module) -> nn.Module:
    """Load a saved result into a copy of the dense architecture; it stays compressed.

    Args:
        path: the directory, or `model.mpo.safetensors` itself.
        skeleton: a model of the same architecture with any weights; it is not changed. Where the
            result has MPO layers it has dense ones or, as one that was trained from scratch, MPO
            layers, whose layouts and bond dimensions do not matter.

    Returns:
        A copy of the skeleton with MPO layers and the saved state: bit-identical outputs.

    Raises:
        LoadError: no or a foreign file, or a skeleton of another architecture, by name.
    """
    path = cores_path(path)
    manifest = read_manifest(path)
    tensors = read_all_names(path, manifest)
    wanted = {name for record in manifest.opened for name in record.names}
    skeleton = open_modules(skeleton, wanted) if wanted else skeleton
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    replacements: dict[nn.Module, nn.Module] = {}
    for record in manifest.layers:
        for name in record.names:
            _check_skeleton(record, name, modules.get(name))
        found = modules[record.names[0]]
        adapter = adapter_for(found)
        if isinstance(found, MPOLayer):
            replacements[found] = found.with_weight(weight_of(record, tensors))
        elif adapter is not None:
            replacements[found] = adapter.build(found, weight_of(record, tensors))
    model = copy_with_replacements(skeleton, replacements)
    _assign_state(model, tensors, manifest.aliases)
    return model


def _check_skeleton(record: LayerRecord, name: str, module: nn.Module | None) -> None:
    """The module of the skeleton is what was compressed."""
    adapter = None if module is None else adapter_for(module)
    shape: tuple[int, ...] | None = None
    if isinstance(module, MPOLayer) and module.kind == record.kind:
        shape = (module.out_features, module.in_features)
    elif module is not None and adapter is not None and adapter.kind == record.kind:
        shape = tuple(adapter.matrix(module).shape)
    if shape is None:
        found = "nothing" if module is None else f"a {type(module).__name__}"
        wanted = _DENSE.get(record.kind, f"a layer of the kind {record.kind!r}")
        raise LoadError(
            f"layer {name!r} of the saved result is an MPO, but the model given has "
            f"{found} there instead of {wanted}. Give the architecture that was "
            "compressed, or use `mpocompress densify`."
        )
    if shape != record.shape:
        raise LoadError(
            f"layer {name!r} is {record.shape[0]}x{record.shape[1]} in the saved result, "
            f"but {shape[0]}x{shape[1]} in the model given."
        )


def _assign_state(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    """Put the saved tensors in place, one parameter for all names that share it.

    `load_state_dict(assign=True)` would make a parameter of its own for every name and so break
    ties; without `assign` the skeleton's dtype would win over the saved one.
    """
    expected = model.state_dict(keep_vars=True)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        raise LoadError(
            f"the model given does not match the saved result: it has {missing[:3] or 'nothing'} "
            f"more ({len(missing)}) and lacks {unexpected[:3] or 'nothing'} ({len(unexpected)}). "
            "Give the architecture that was compressed."
        )
    made: dict[str, Tensor] = {}
    for name, old in expected.items():
        new = tensors[name]
        if old.shape != new.shape:
            raise LoadError(
                f"{name!r} has shape {tuple(new.shape)} in the saved result, but "
                f"{tuple(old.shape)} in the model given."
            )
        stored = aliases.get(name, name)
        if stored not in made:
            is_parameter = isinstance(old, nn.Parameter)
            made[stored] = nn.Parameter(new, old.requires_grad) if is_parameter else new
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[stored])
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if left:
        raise LoadError(
            f"buffer {left[0]!r} is not part of the saved state and the model given is on the meta "
            "device. Build it on the CPU."
        )
