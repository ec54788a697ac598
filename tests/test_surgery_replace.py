"""Copies with other layers inside: values, ties, modes, memory, and what is refused."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from mpocompress.errors import ConversionError, LayoutError
from mpocompress.layers import MPOLinear
from mpocompress.mpo import MPO, Layout
from mpocompress.surgery import WeightSite, copy_with_replacements, find_weights, tied_names
from tests.tolerances import TOL


def exact(site: WeightSite) -> MPO:
    """The weight at maximal bond dimension: outputs stay equal."""
    out, in_ = site.shape
    return MPO.from_matrix(site.matrix(), Layout((out, 1), (1, in_)))


def converted(model: nn.Module) -> nn.Module:
    return copy_with_replacements(model, {site: exact(site) for site in find_weights(model).sites})


def storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Uncopied(nn.Parameter):
    """A weight that must not be copied."""

    def __deepcopy__(self, memo):
        raise AssertionError("a dense weight was copied")


class Residual(nn.Module):
    """A Linear as a child, in a plain list, in a dict and as a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.steps = [self.lin, torch.tanh]
        self.table = {"again": (self.lin,)}
        self.call = self.lin.forward

    def forward(self, x):
        return x + self.steps[1](self.steps[0](x)) + self.table["again"][0](x) + self.call(x)


class TiedPair(nn.Module):
    """Two Linears with one weight, one of them frozen in its bias, and a shared bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.third = nn.Linear(6, 6)
        self.third.bias = self.first.bias
        self.norm = nn.LayerNorm(6)
        self.norm.bias = self.first.bias

    def forward(self, x):
        return self.norm(self.third(self.second(self.first(x))))


CASES = {
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), (2, 6)),
    "root": (lambda: nn.Linear(6, 8), (2, 5, 6)),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False)), (2, 6)),
    "plain containers": (Residual, (2, 6)),
    "ties": (TiedPair, (2, 6)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True),
        (2, 4, 6),
    ),
    "no linear": (lambda: nn.Sequential(nn.Conv1d(6, 4, 1), nn.BatchNorm1d(4)), (2, 6, 5)),
    "shared block": (
        lambda: nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh())] * 3),
        (2, 6),
    ),
}


@pytest.mark.parametrize("make", [case[0] for case in CASES.values()], ids=list(CASES))
def test_the_original_is_untouched_and_nothing_is_shared(make):
    model = make()
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    modules = list(model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ties = tied_names(model)
    copied = converted(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(model.modules()) == modules
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
    assert tied_names(model) == ties
    assert not storages(model) & storages(copied)
    assert not set(map(id, model.modules())) & set(map(id, copied.modules()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=list(CASES))
def test_outputs_are_equal_at_maximal_bond_dimension(make, shape, training):
    model = make().double().train(training)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    copied = converted(model)
    assert_close(copied(x), model(x), **TOL[torch.float64]["apply"])
    with torch.no_grad():
        assert_close(copied.eval()(x), model.eval()(x), **TOL[torch.float64]["apply"])


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_still_runs_on_its_fast_path(training):
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).double().train(training)
    copied = converted(model)
    assert isinstance(copied.decoder.layers[0].linear1, MPOLinear)
    assert type(copied.encoder.layers[0].linear1) is nn.Linear
    x, y = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_close(copied(x, y), model(x, y), **TOL[torch.float64]["apply"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
        Residual,
        lambda: nn.Sequential(*[nn.Linear(6, 6)] * 2),
        lambda: nn.Linear(6, 6),
    ],
)
def test_replaced_weights_are_never_copied(make):
    model = make()
    weights = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = weights.setdefault(id(module), Uncopied(module.weight.data))
    with pytest.raises(AssertionError, match="dense weight was copied"):
        copy.deepcopy(model)
    assert converted(model)(torch.ones(2, 6)).shape == (2, 6)


def test_a_layer_that_is_not_replaced_is_copied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    site = find_weights(model).sites[0]
    copied = copy_with_replacements(model, {site: exact(site)})
    assert isinstance(copied[0], MPOLinear)
    assert type(copied[1]) is nn.Linear
    assert torch.equal(copied[1].weight, model[1].weight)


def test_no_replacement_is_a_plain_copy():
    model = TiedPair()
    copied = copy_with_replacements(model, {})
    assert tied_names(copied) == tied_names(model)
    assert not storages(model) & storages(copied)


def test_ties_survive():
    copied = converted(TiedPair())
    assert all(isinstance(getattr(copied, name), MPOLinear) for name in ("first", "second"))
    assert set(tied_names(copied)) == {
        ("first.cores.0", "second.cores.0"),
        ("first.cores.1", "second.cores.1"),
        ("first.bias", "third.bias", "norm.bias"),
    }
    assert copied.first is not copied.second
    assert copied.second.bias is not copied.first.bias
    cores = sum(core.numel() for core in copied.first.cores)
    assert sum(p.numel() for p in copied.parameters()) == 2 * cores + 3 * 6
    copied(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())


def test_ties_between_kept_layers_survive():
    model = nn.ModuleDict({"table": nn.Embedding(9, 6, max_norm=1.0), "body": nn.Linear(6, 6)})
    model["head"] = nn.Linear(6, 9)
    model["head"].weight = model["table"].weight
    copied = converted(model)
    assert copied["head"].weight is copied["table"].weight
    assert isinstance(copied["body"], MPOLinear)


def test_a_module_in_several_places_stays_one_module():
    copied = converted(Residual())
    assert isinstance(copied.lin, MPOLinear)
    assert copied.steps[0] is copied.lin
    assert copied.table["again"][0] is copied.lin
    assert copied.call.__self__ is copied.lin


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_bias_are_kept(dtype):
    model = nn.Sequential(nn.Linear(6, 8, dtype=dtype))
    (site,) = find_weights(model).sites
    for mpo in (exact(site), exact(site).to(dtype=torch.float64)):
        layer = copy_with_replacements(model, {site: mpo})[0]
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert torch.equal(layer.bias, model[0].bias)
        assert_close(layer.to_dense(), model[0].weight.data, **TOL[dtype]["dense"])


def test_modes_and_frozen_parameters_are_kept():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[0].eval()
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    copied = converted(model)
    assert [layer.training for layer in copied] == [False, True, True, True]
    assert all(layer.cores.training == layer.training for layer in copied)
    for old, new in zip(model, copied, strict=True):
        assert {core.requires_grad for core in new.cores} == {old.weight.requires_grad}
        assert new.bias.requires_grad == old.bias.requires_grad


def test_plain_attributes_of_a_replaced_layer_are_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].init_scale = 0.5
    model[0].friends = [model[1]]
    model[0].statistics = torch.ones(3)
    copied = converted(model)
    assert copied[0].init_scale == 0.5
    assert copied[0].friends == [copied[1]]
    assert torch.equal(copied[0].statistics, torch.ones(3))
    assert copied[0].statistics is not model[0].statistics


def test_a_single_core_shares_nothing_with_the_weight_or_the_mpo():
    model = nn.Sequential(nn.Linear(4, 4))
    (site,) = find_weights(model).sites
    mpo = MPO.from_matrix(site.matrix(), Layout((4,), (4,)))
    first, second = (copy_with_replacements(model, {site: mpo}) for _ in range(2))
    owned = [storages(model), storages(first), storages(second)]
    owned.append({core.untyped_storage().data_ptr() for core in mpo.cores} - storages(model))
    assert len(set().union(*owned)) == sum(map(len, owned))


def test_gradients_are_not_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model(torch.randn(2, 4)).sum().backward()
    gradient = model[1].weight.grad.clone()
    copied = converted(model)
    assert all(p.grad is None and p.is_leaf for p in copied.parameters())
    assert torch.equal(model[1].weight.grad, gradient)


class Remembering(nn.Module):
    """Keeps results that have a gradient history: deepcopy alone refuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(2, 4))
        self.history = []

    def forward(self, x):
        self.last = self.lin(x)
        self.history.append(self.last * 2)
        return self.last


def test_remembered_results_are_copied_as_values():
    model = Remembering()
    model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    copied = converted(model)
    assert copied.last.grad_fn is None
    assert torch.equal(copied.last, model.last)
    assert torch.equal(copied.history[0], model.history[0])
    assert model.last.grad_fn is not None
    assert not storages(model) & storages(copied)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_old_weight_norm_and_spectral_norm_work_in_the_copy():
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    ).eval()
    x = torch.randn(2, 4)
    expected = model(x)
    copied = converted(model)
    assert isinstance(copied[2], MPOLinear)
    assert_close(copied(x), expected, **TOL[torch.float32]["apply"])
    copied.train()(x).sum().backward()
    assert copied[0].weight_g.grad is not None
    assert model[0].weight_g.grad is None


def test_lazy_and_meta_modules_are_copied():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    copied = converted(model)
    assert isinstance(copied[1], MPOLinear)
    assert type(copied[0]) is nn.LazyLinear
    assert copied[2].weight.is_meta


def test_bert_is_converted():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    model = BertModel(config).double().eval()
    inventory = find_weights(model)
    assert len(inventory.sites) == 2 * 6 + 1 + 3
    assert inventory.parameters == sum(p.numel() for p in model.parameters())
    tokens = torch.arange(12).reshape(2, 6)
    expected = model(tokens, output_hidden_states=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = converted(model)
    found = copied(tokens, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        assert_close(found[name], expected[name], **TOL[torch.float64]["apply"])
    assert isinstance(copied.encoder.layer[1].attention.self.query, MPOLinear)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not storages(model) & storages(copied)


# -- other ways to say what comes in place


def test_a_function_makes_the_layer_of_every_tied_module():
    model = TiedPair()
    sites = find_weights(model).sites
    copied = copy_with_replacements(
        model, {site: lambda old: MPOLinear.from_linear(old, layout="svd") for site in sites}
    )
    assert ("first.cores.0", "second.cores.0") in tied_names(copied)
    assert ("first.bias", "third.bias", "norm.bias") in tied_names(copied)


def test_a_given_layer_is_used_as_it_is():
    model = Residual().eval()
    layer = MPOLinear(6, 6, layout="svd", bond_dim=2)
    with torch.no_grad():
        layer.bias.fill_(3.0)
    copied = copy_with_replacements(model, {model.lin: layer})
    assert copied.lin is layer
    assert copied.steps[0] is layer
    assert torch.equal(copied.lin.bias, torch.full((6,), 3.0))
    assert not layer.training


def test_and_back_to_dense():
    model = TiedPair().double()
    compressed = converted(model)
    back = copy_with_replacements(compressed, {compressed.third: compressed.third.to_linear()})
    assert type(back.third) is nn.Linear
    assert back.third.bias is back.first.bias
    x = torch.randn(2, 6, dtype=torch.float64)
    assert_close(back(x), model(x), **TOL[torch.float64]["apply"])


# -- refusals


def test_keys_must_be_of_this_model_once_and_not_nested():
    model, other = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
    (site,), (foreign,) = find_weights(model).sites, find_weights(other).sites
    mpo = exact(site)
    with pytest.raises(ConversionError, match="layer '0' is not part of this model"):
        copy_with_replacements(model, {foreign: mpo})
    with pytest.raises(ConversionError, match="layer '0' is replaced twice"):
        copy_with_replacements(model, {site: mpo, find_weights(model).sites[0]: mpo})
    with pytest.raises(ConversionError, match="Linear is replaced, and so is the Sequential"):
        copy_with_replacements(model, {model: nn.ReLU(), model[0]: nn.ReLU()})


def test_values_must_fit_the_layer():
    model = TiedPair()
    tied = find_weights(model).sites[0]
    mpo = MPO.random(Layout((2, 3), (2, 2)), 2)
    with pytest.raises(ConversionError, match=r"layer 'first' .* \(6, 6\), .* shape \(6, 4\)"):
        copy_with_replacements(model, {tied: mpo})
    with pytest.raises(ConversionError, match=r"'first' has a weight that 2 modules share"):
        copy_with_replacements(model, {tied: nn.Identity()})
    with pytest.raises(ConversionError, match="module Linear: an MPO replaces a site"):
        copy_with_replacements(model, {model.third: exact(find_weights(model).sites[1])})


def test_an_error_while_building_names_the_layer():
    model = TiedPair()
    site = find_weights(model).sites[1]
    with pytest.raises(ConversionError, match="layer 'third': ") as caught:
        copy_with_replacements(
            model, {site: lambda old: MPOLinear.from_linear(old, layout=Layout((5,), (6,)))}
        )
    assert isinstance(caught.value.__cause__, LayoutError)


class Holder:
    """An object of a foreign class, like an optimizer, that holds a parameter."""

    def __init__(self, parameter) -> None:
        self.parameter = parameter


def test_half_a_tie_is_refused():
    model = TiedPair()
    with pytest.raises(
        ConversionError,
        match=r"layer 'first' is replaced, but its parameter 'weight' is also used by 'weight' of "
        r"Linear 'second'",
    ):
        copy_with_replacements(model, {model.first: MPOLinear.from_linear(model.first)})


def test_a_weight_held_by_a_foreign_object_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.optimizer = Holder(model[0].weight)
    with pytest.raises(ConversionError, match="used by attribute 'optimizer' of Sequential"):
        converted(model)


def test_a_model_that_cannot_be_copied_names_the_attribute():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
    model[1][0].lock = threading.Lock()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError, match=r"attribute 'lock' \(lock\) of ReLU '1\.0': cannot"):
        converted(model)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Refusing(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("one of a kind")


class Stubborn(nn.Module):
    """Copies itself without regard for the memo."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def __deepcopy__(self, memo):
        return Stubborn()


class Shallow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3))

    def __deepcopy__(self, memo):
        return self


def test_a_copy_that_is_none_is_refused():
    with pytest.raises(ConversionError, match="Refusing '1': one of a kind"):
        converted(nn.Sequential(nn.Linear(4, 4), Refusing()))
    with pytest.raises(ConversionError, match=r"layer '0\.lin' was not replaced in the copy"):
        converted(nn.Sequential(Stubborn()))
    with pytest.raises(ConversionError, match=r"'1\.table' of the copy shares its memory with"):
        converted(nn.Sequential(nn.Linear(4, 4), Shallow()))


def test_a_given_layer_must_not_share_memory():
    model = nn.Sequential(nn.Linear(4, 4))
    layer = MPOLinear.from_mpo(exact(find_weights(model).sites[0]), model[0].bias)
    with pytest.raises(ConversionError, match=r"'0\.bias' of the copy shares its memory"):
        copy_with_replacements(model, {model[0]: layer})


def test_functions_that_hold_a_layer_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].peek = lambda x: model[0](x)
    with pytest.raises(
        ConversionError, match=r"'peek' of ReLU '1' is a function that refers to \(the model itself"
    ):
        converted(model)
    del model[1].peek
    model[1].before = [weakref.ref(model[0])]
    with pytest.raises(ConversionError, match=r"'before\[0\]' of ReLU '1' is a ReferenceType"):
        converted(model)
    del model[1].before
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    copied = converted(model)
    copied(torch.ones(1, 4))
    assert len(seen) == 1


def test_hooks_elsewhere_stay_where_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(2, 4)
    assert_close(converted(model)(x), model(x), **TOL[torch.float32]["apply"])
