"""How a layer is spelled in ONNX: as a chain of products, or as cores that make W at the load.

*Chain*: the input meets one core after the other. Small in the file and in memory; its speed is a
property of the layout. *Dense*: the file holds the same cores, but the graph multiplies them to W
first. ONNX Runtime folds what depends on stored tensors only, once, when a session starts; from
then on the layer is an ordinary MatMul at the speed of the dense layer, with its memory and what
ONNX Runtime keeps of the folding (sentence encoder: 269 MB against 130 MB dense). Where nothing is
folded (another runtime, or a limit on the size of folded tensors) the graph computes the same, with
W rebuilt in every run.
"""

# Shape suffixes: M outputs done, N inputs done, O out, I in, R bond.

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from mpocompress.errors import ExportError
from mpocompress.layers import MPOLinear
from mpocompress.layers.gauged_cores import GaugedCores
from mpocompress.layers.recurrent import layers_of_recurrences

Form = Literal["chain", "dense"]
FormChoice = Literal["auto", "chain", "dense"]


class DenseAtLoad(nn.Module):
    """An `MPOLinear` in the form whose graph makes W of the cores before it meets the input.

    Args:
        layer: its parameters and buffers are shared, under the same names.
    """

    cores: nn.ParameterList | GaugedCores
    bias: nn.Parameter | None

    def __init__(self, layer: MPOLinear) -> None:
        super().__init__()
        self.cores = layer.cores
        self.register_parameter("bias", layer.bias)
        self.out_features, self.in_features = layer.out_features, layer.in_features

    @property
    def _transposed(self) -> Tensor:
        return transposed_matrix(list(self.cores), (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """W (out, in), for models that read it, if only its dtype."""
        return self._transposed.mT

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear uses
        """Apply the layer: (..., in_features) to (..., out_features)."""
        output = input @ self._transposed
        return output if self.bias is None else output + self.bias


def transposed_matrix(cores: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """W^T (in, out) from the cores, by products on tensors of rank 4 at most.

    Args:
        cores: the chain.
        shape: (out, in) of the matrix; what the sites have beyond it is padding.
    """
    first = cores[0]
    outs, ins, bond = first.shape[1], first.shape[2], first.shape[3]
    state = first.reshape(outs, ins, bond).permute(1, 0, 2)  # (N, M, R)
    for core in cores[1:]:
        _, out, in_, right = core.shape
        core_RX = core.permute(0, 2, 1, 3).reshape(bond, -1)  # R, then I, O, R
        product = state.reshape(-1, bond) @ core_RX
        # (N, M, I, O*R) to (N*I, M*O, R)
        product = product.reshape(ins, outs, in_, out * right).permute(0, 2, 1, 3)
        ins, outs, bond = ins * in_, outs * out, right
        state = product.reshape(ins, outs, bond)
    return state.reshape(ins, outs)[: shape[1], : shape[0]]


def linear_layers(model: nn.Module) -> dict[str, MPOLinear]:
    """The MPO layers of vectors, by their first name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MPOLinear)}


def layers_of(model: nn.Module) -> dict[str, MPOLinear]:
    """The layers that have a form: not those of recurrences, whose operators take dense weights."""
    recurrent = layers_of_recurrences(model)
    found = linear_layers(model)
    return {name: layer for name, layer in found.items() if id(layer) not in recurrent}


def set_forms_(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """Spell the layers of a model in these forms, in place; the others stay chains.

    Args:
        model: a copy for the export; a layer is replaced under all of its names.
        forms: by first name of the layer.

    Returns:
        The model; what takes its place where it is itself such a layer.
    """
    layers = layers_of(model)
    dense: dict[int, nn.Module] = {
        id(layers[name]): DenseAtLoad(layers[name]) for name in forms if forms[name] == "dense"
    }
    for parent in tuple(model.modules()):
        for name, child in tuple(parent.named_children()):
            if id(child) in dense:
                setattr(parent, name, dense[id(child)])
    return dense.get(id(model), model)


def check_form(form: object) -> None:
    """Refuse what is no form.

    Raises:
        ExportError: neither "auto", "chain", "dense" nor a dict from layer to "chain" or "dense".
    """
    given = set(form.values()) if isinstance(form, Mapping) else {form}
    allowed = get_args(Form) if isinstance(form, Mapping) else get_args(FormChoice)
    if not given <= set(allowed):
        wrong = next(iter(given - set(allowed)))
        raise ExportError(f"form {wrong!r}: a layer is exported as one of {', '.join(allowed)}.")
