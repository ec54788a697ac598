"""What is found in a model, what is left dense and why, and that the numbers add up."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from mpocompress.errors import ConversionError
from mpocompress.layers import MPOLinear
from mpocompress.surgery import (
    KeptEntry,
    WeightSite,
    adapter_for,
    check_finite,
    find_weights,
    tied_names,
)


def small_transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


class TiedHead(nn.Module):
    """A language model's embedding and output head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


class TiedPair(nn.Module):
    """Two Linears with one weight and a bias each, and one Linear used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.shared = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"again": self.shared})

    def forward(self, x):
        return self.block["again"](self.shared(self.second(self.first(x))))


class Mixed(nn.Module):
    """All kinds of registered state, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.blocks = nn.ModuleDict({"a": nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4))})
        self.rnn = nn.LSTM(4, 4)
        self.free = nn.ParameterList([nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.ones(3))])
        self.norm = nn.RMSNorm(4)
        self.out = nn.Linear(4, 3)
        self.register_buffer("mask", torch.ones(5))
        self.register_buffer("cache", torch.ones(7), persistent=False)


def reasons(model: nn.Module) -> dict[str, str]:
    return dict(find_weights(model).refused)


@pytest.mark.parametrize(
    "model",
    [
        small_transformer(),
        TiedHead(),
        TiedPair(),
        Mixed(),
        nn.Linear(3, 4),
        nn.Sequential(MPOLinear(16, 16, bond_dim=2), nn.Linear(16, 4).to(torch.bfloat16)),
        nn.Sequential(),
        parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.Linear(3, 4, device="meta"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_parameter_and_buffer_is_accounted_for_once(model):
    inventory = find_weights(model)
    buffers = list(model.buffers())
    assert inventory.parameters == sum(p.numel() for p in model.parameters())
    assert inventory.bytes == sum(
        t.numel() * t.element_size() for t in (*model.parameters(), *buffers)
    )
    kept_buffers = [entry for entry in inventory.kept if entry.is_buffer]
    assert sum(entry.numel for entry in kept_buffers) == sum(b.numel() for b in buffers)
    assert all(entry.parameters == 0 for entry in kept_buffers)
    names = [entry.name for entry in inventory.entries]
    assert len(names) == len(set(names))


def test_entries_come_in_the_order_of_the_model():
    entries = find_weights(Mixed()).entries
    assert [(e.name, e.kind, e.parameters) for e in entries] == [
        ("mask", "buffer", 0),
        ("cache", "buffer", 0),
        ("table", "embedding", 40),
        ("blocks.a.0", "conv", 48),
        ("blocks.a.0.bias", "bias", 4),
        ("blocks.a.1.weight", "norm", 4),
        ("blocks.a.1.bias", "norm", 4),
        ("blocks.a.1.running_mean", "buffer", 0),
        ("blocks.a.1.running_var", "buffer", 0),
        ("blocks.a.1.num_batches_tracked", "buffer", 0),
        ("rnn.weight_ih_l0", "recurrent", 64),
        ("rnn.weight_hh_l0", "recurrent", 64),
        ("rnn.bias_ih_l0", "bias", 16),
        ("rnn.bias_hh_l0", "bias", 16),
        ("free.0", "matrix", 16),
        ("free.1", "other", 3),
        ("norm.weight", "norm", 4),
        ("out", "linear", 12),
        ("out.bias", "bias", 3),
    ]
    by_name = {entry.name: entry for entry in entries}
    assert by_name["mask"].persistent
    assert not by_name["cache"].persistent
    assert by_name["out.bias"].reason == "biases are vectors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_site_knows_its_weight(dtype):
    model = nn.Sequential(nn.ReLU(), nn.Linear(5, 7, dtype=dtype))
    (site,) = find_weights(model).sites
    assert (site.name, site.names, site.kind) == ("1", ("1",), "linear")
    assert (site.shape, site.dtype, site.parameters) == ((7, 5), dtype, 35)
    assert site.bytes == 35 * dtype.itemsize
    assert site.device == torch.device("cpu")
    assert site.modules == (model[1],)
    assert torch.equal(site.matrix(), model[1].weight)
    assert not site.matrix().requires_grad


def test_the_model_itself_may_be_the_linear():
    inventory = find_weights(nn.Linear(3, 4))
    assert [entry.name for entry in inventory.entries] == ["", "bias"]
    assert inventory.sites[0].label == "(the model itself)"


def test_shared_modules_and_tied_pairs_are_one_site():
    model = TiedPair()
    inventory = find_weights(model)
    tied, shared = inventory.sites
    assert tied.names == ("first", "second")
    assert tied.modules == (model.first, model.second)
    assert shared.names == ("shared", "block.again")
    assert shared.modules == (model.shared,)
    biases = {entry.name: entry.also_known_as for entry in inventory.kept}
    assert biases == {"first.bias": (), "second.bias": (), "shared.bias": ("block.again.bias",)}
    assert tied_names(model) == (
        ("first.weight", "second.weight"),
        ("shared.weight", "block.again.weight"),
        ("shared.bias", "block.again.bias"),
    )


def test_a_head_tied_to_an_embedding_is_one_site():
    inventory = find_weights(TiedHead())
    assert [(site.name, site.kind) for site in inventory.sites] == [
        ("embedding", "embedding"),
        ("body", "linear"),
    ]
    assert inventory.sites[0].names == ("embedding", "head")
    assert inventory.parameters == sum(p.numel() for p in TiedHead().parameters())


def test_a_head_tied_to_a_table_that_must_stay_dense_names_it():
    model = TiedHead()
    model.embedding.max_norm = 1.0
    inventory = find_weights(model)
    assert [site.name for site in inventory.sites] == ["body"]
    assert "'embedding', of which: max_norm rescales" in inventory.refused["head"]
    table = inventory.kept[0]
    assert (table.name, table.also_known_as) == ("embedding.weight", ("head.weight",))
    assert "max_norm rescales its rows" in table.reason


def test_a_weight_that_two_layers_read_in_opposite_directions_stays_dense():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Conv1D(4, 4)})
    model["b"].weight = model["a"].weight
    assert "reads it transposed" in reasons(model)["a"]
    assert "reads it transposed" in reasons(model)["b"]


def test_a_weight_in_a_parameter_list_or_under_another_name_stays_dense():
    model = nn.Module()
    model.lin, model.alias = nn.Linear(3, 3), nn.Linear(4, 4)
    model.group = nn.ParameterList([model.lin.weight])
    model.direct = model.alias.weight
    found = reasons(model)
    assert "'group.0' of ParameterList" in found["lin"]
    assert "'direct' of Module" in found["alias"]


def test_a_weight_in_a_plain_container_stays_dense():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.decayed = {"params": [model[1].weight]}
    inventory = find_weights(model)
    assert [site.name for site in inventory.sites] == ["0"]
    assert "held by decayed['params'][0] of Sequential" in inventory.refused["1"]


def test_parts_that_are_read_without_being_called_stay_dense():
    model = small_transformer()
    inventory = find_weights(model)
    # The decoder layer has no fast path: it calls its two linears, and they are converted.
    assert [site.name for site in inventory.sites] == [
        "decoder.layers.0.linear1",
        "decoder.layers.0.linear2",
    ]
    for part in ("linear1", "linear2"):
        assert "fast path reads the weight" in inventory.refused[f"encoder.layers.0.{part}"]
    for part in ("encoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"):
        assert "reads its weights" in inventory.refused[part]
        assert f"nn.MultiheadAttention '{part}'" in inventory.refused[f"{part}.out_proj"]
    kinds = {entry.name: entry.kind for entry in inventory.kept}
    assert kinds["encoder.layers.0.self_attn.in_proj_weight"] == "attention"
    assert kinds["encoder.layers.0.self_attn.out_proj.weight"] == "attention"
    assert kinds["encoder.layers.0.self_attn.in_proj_bias"] == "bias"
    assert kinds["encoder.layers.0.linear1.weight"] == "linear"


def test_a_layer_that_an_encoder_layer_shares_with_another_place_stays_dense():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleList([encoder.linear1, encoder])
    inventory = find_weights(model)
    assert inventory.sites == ()
    assert "fast path" in inventory.refused["0"]


def test_what_a_subclass_adds_to_an_encoder_layer_is_converted():
    class Adapted(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(8, 2, 16)
            self.adapter = nn.Linear(8, 8)

    assert [site.name for site in find_weights(Adapted()).sites] == ["adapter"]


class Renamed(nn.Linear):
    """A subclass that only has another constructor."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    def extra_repr(self) -> str:
        return "square"


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Inherited(OwnForward):
    pass


class OwnCall(nn.Linear):
    def __call__(self, *args):
        return super().__call__(*args) * 2


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(()))


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("calls", torch.zeros(()))


class Adorned(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.act = nn.ReLU()


class WithMethod(nn.Linear):
    def norm(self):
        return self.weight.norm()


def replaced_forward() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.forward = lambda x: x
    return linear


def sparse_weight() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse())
    return linear


class Packed(torch.Tensor):
    """A tensor subclass around another tensor, as quantization libraries have them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = [arg.inner if isinstance(arg, Packed) else arg for arg in args]
        return Packed(func(*inner, **(kwargs or {})))


def subclass_weight() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(Packed(torch.zeros(3, 3)))
    return linear


def integer_weight() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return linear


def hooked(register: str) -> nn.Module:
    linear = nn.Linear(3, 3)
    getattr(linear, register)(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(3, 3), "OwnForward has its own forward"),
        (lambda: Inherited(3, 3), "Inherited has its own forward"),
        (lambda: OwnCall(3, 3), "OwnCall has its own __call__"),
        (lambda: WithMethod(3, 3), "WithMethod has its own norm"),
        (Scaled, "state beside weight and bias: scale"),
        (Counting, "state beside weight and bias: calls"),
        (Adorned, "state beside weight and bias: act"),
        (replaced_forward, "its forward was replaced on the instance"),
        (
            lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3),
            "without calling the layer",
        ),
        (lambda: nn.LazyLinear(3), "not yet initialized; run one batch"),
        (lambda: nn.Linear(3, 3, device="meta"), "meta device"),
        (lambda: nn.Linear(3, 0), "its weight is empty, 0x3"),
        (lambda: nn.Linear(0, 3), "its weight is empty, 3x0"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), "its weight is torch.complex64"),
        (lambda: nn.Linear(3, 3).to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
        (integer_weight, "its weight is torch.int8"),
        (sparse_weight, "layout torch.sparse_coo"),
        (subclass_weight, "its weight is a Packed"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "weight is parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "weight is parametrized"),
        (
            lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=1),
            "torch.nn.utils.prune.remove",
        ),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "remove_spectral_norm"),
        (lambda: hooked("register_forward_hook"), "it has a forward hook"),
        (lambda: hooked("register_forward_pre_hook"), "it has a forward pre-hook"),
        (lambda: hooked("register_full_backward_hook"), "it has a backward hook"),
        (lambda: hooked("register_full_backward_pre_hook"), "it has a backward pre-hook"),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_left_dense_with_the_reason(make, reason):
    inventory = find_weights(nn.ModuleDict({"part": make(), "plain": nn.Linear(2, 2)}))
    assert [site.name for site in inventory.sites] == ["plain"]
    assert reason in inventory.refused["part"]
    for entry in inventory.kept:
        if entry.name.startswith("part.") and entry.kind == "linear":
            assert reason in entry.reason


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_the_old_weight_norm_is_left_dense():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    assert "remove_weight_norm" in reasons(model)["0"]
    assert {e.name: e.kind for e in find_weights(model).kept} == {
        "0.bias": "bias",
        "0.weight_g": "linear",
        "0.weight_v": "linear",
    }


@pytest.mark.parametrize("module", [Renamed(4), nn.Linear(4, 4, bias=False)])
def test_safe_modules_are_found(module):
    assert [site.modules[0] for site in find_weights(nn.Sequential(module)).sites] == [module]


def test_hooks_on_saving_and_loading_do_not_matter():
    linear = nn.Linear(3, 3)
    linear.register_state_dict_post_hook(lambda *_: None)
    linear.register_load_state_dict_post_hook(lambda *_: None)
    assert len(find_weights(linear).sites) == 1


def test_an_initialized_lazy_linear_is_an_ordinary_one():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 2))
    assert find_weights(model).sites[0].shape == (3, 2)


def test_lazy_modules_count_as_empty():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv1d(3, 1), nn.LazyBatchNorm1d())
    inventory = find_weights(model)
    assert (inventory.parameters, inventory.bytes) == (0, model[2].num_batches_tracked.itemsize)


def test_one_refused_member_keeps_its_whole_tie_group():
    model = TiedPair()
    model.second.register_forward_hook(lambda *_: None)
    inventory = find_weights(model)
    assert [site.name for site in inventory.sites] == ["shared"]
    assert (
        "shares its weight with 'second', of which: it has a forward hook"
        in (inventory.refused["first"])
    )
    weight = next(entry for entry in inventory.kept if entry.name == "first.weight")
    assert weight.also_known_as == ("second.weight",)


def test_converted_layers_are_kept_as_they_are():
    model = nn.Sequential(MPOLinear(16, 16, bond_dim=2))
    inventory = find_weights(model)
    assert inventory.sites == ()
    assert {entry.name: entry.kind for entry in inventory.kept} == {
        "0.cores.0": "mpo",
        "0.cores.1": "mpo",
        "0.bias": "bias",
    }
    assert "matrix product operator already" in inventory.kept[1].reason


def test_packed_quantized_modules_are_listed_by_name():
    # As `torch.ao.nn.quantized` does: weight and bias are methods, and no parameter list has them.
    class PackedLinear(nn.Module):
        def __init__(self, weight, bias) -> None:
            super().__init__()
            self._packed_params = (weight, bias)

        def weight(self):
            return self._packed_params[0]

        def bias(self):
            return self._packed_params[1]

    packed = PackedLinear(torch.ones(4, 3, dtype=torch.int8), torch.zeros(4))
    inventory = find_weights(nn.Sequential(packed, nn.Linear(4, 4)))
    assert inventory.refused["0"] == "it is quantized already"
    weight, bias = inventory.kept[:2]
    assert (weight.name, weight.kind, weight.shape, weight.bytes) == (
        "0.weight",
        "quantized",
        (4, 3),
        12,
    )
    assert (bias.name, bias.kind, bias.bytes) == ("0.bias", "bias", 16)
    assert weight.is_buffer
    assert inventory.parameters == 20


def test_finding_changes_nothing():
    model = TiedPair()
    before = copy.deepcopy(model.state_dict())
    find_weights(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_layer_and_place(value, dtype):
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype))
    with torch.no_grad():
        model[0].weight[2, 1] = model[0].weight[3, 0] = value
    (site,) = find_weights(model).sites
    with pytest.raises(
        ConversionError,
        match=rf"layer '0': 2 of 12 weights .* the first is {value} at row 2, column 1\. Repair",
    ):
        check_finite(site)


def test_nan_is_found_in_a_matrix_of_several_blocks():
    weight = torch.zeros(5, 1 << 20)
    weight[4, 7] = torch.nan
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight)
    (site,) = find_weights(linear).sites
    with pytest.raises(ConversionError, match=r"1 of 5242880 .* at row 4, column 7"):
        check_finite(site)


def test_a_finite_weight_passes():
    for site in find_weights(TiedPair()).sites:
        check_finite(site)


def test_sites_are_keys_and_entries_are_of_two_types():
    inventory = find_weights(TiedPair())
    assert len({site: None for site in inventory.sites}) == 2
    assert all(isinstance(entry, WeightSite | KeptEntry) for entry in inventory.entries)
    assert adapter_for(nn.Linear(2, 2)) is inventory.sites[0].adapter
    assert adapter_for(nn.PReLU(2)) is None
