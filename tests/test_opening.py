"""Opened modules beyond the laws of `test_kinds`: options, states, masks, and what is refused."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.errors import BudgetError, ContractionError, DataError, NoLayerMatched
from mpocompress.layers.attention import OpenAttention, OpenEncoderLayer
from mpocompress.layers.opened import layers_called
from mpocompress.layers.recurrent import OpenRecurrent
from mpocompress.surgery import find_weights, open_modules, opened_names
from tests.planted import gaussian
from tests.tolerances import TOL

EXACT = TOL[torch.float64]["apply"]


def seeded(make):
    torch.manual_seed(0)
    return make().double().eval()


def test_recurrent_weights_are_small_in_the_file_and_no_faster():
    model = nn.Sequential(nn.LSTM(32, 64, batch_first=True))
    result = mpo.compress(model, bond_dim=4, layout="svd")
    rows = {layer.name: layer for layer in result.report.compressed_layers}
    assert {layer.kind for layer in rows.values()} == {"recurrent"}
    assert rows["0.ih_l0"].macs.compressed == rows["0.ih_l0"].macs.dense == 4 * 64 * 32
    assert rows["0.hh_l0"].parameters.compressed < rows["0.hh_l0"].parameters.dense / 8
    assert result.plan.layers[0].macs == 4 * 64 * 32
    for options in ({"bond_dim": 4}, {"bond_dim": 4, "layout": "svd"}, {"ratio": 4}):
        with pytest.raises((NoLayerMatched, BudgetError), match="a recurrent operator reads it"):
            mpo.compress(model, objective="macs", **options)


@pytest.mark.onnx
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (nn.LSTM, {"num_layers": 2}),
        (nn.LSTM, {"bidirectional": True, "bias": False}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {"num_layers": 2, "bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    ],
    ids=str,
)
def test_graphs_of_recurrent_layers_take_any_length(tmp_path, cls, options, batch_first):
    import onnxruntime

    torch.manual_seed(0)
    dense = cls(8, 16, batch_first=batch_first, **options).eval()
    small = mpo.compress(dense, bond_dim=3, layout="svd").model
    for model in (dense, small):
        path = tmp_path / "m.onnx"
        exported = mpo.export_onnx(model, path, torch.randn(3, 7, 8))
        assert exported.inputs[0].shape == ("batch", "sequence", 8)
        mpo.verify(path, model).raise_if_failed()
        session = onnxruntime.InferenceSession(path)
        assert {node.name for node in session.get_inputs()} == {"input"}
        for sizes in ((1, 1), (2, 13)):
            x = torch.randn(*sizes, 8)
            found = session.run(None, {"input": x.numpy()})
            with torch.no_grad():
                output, states = model(x)
            wanted = [output, *(states if isinstance(states, tuple) else (states,))]
            for ours, theirs in zip(found, wanted, strict=True):
                assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.onnx
@pytest.mark.parametrize("form", ["dense", "auto"])
def test_recurrent_weights_have_no_form(tmp_path, form):
    model = nn.Sequential(nn.LSTM(32, 64, batch_first=True))
    small = mpo.compress(model, bond_dim=4, layout="svd").model
    exported = mpo.export_onnx(small, tmp_path / "m.onnx", torch.randn(2, 5, 32), form=form)
    assert exported.forms == {}
    mpo.verify(exported.path, small).raise_if_failed()


class HalfStep(nn.TransformerEncoderLayer):
    """A subclass stays as it is; its attention is opened."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x) * 0.5


@pytest.mark.filterwarnings("ignore")  # of nested tensors
def test_subclasses_of_encoder_layers_take_opened_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(HalfStep(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(3, 7, 32)
    options = {"bond_dim": 32, "layout": "svd", "if_smaller": False}
    for given in ({}, {"data": [x]}):
        small = mpo.compress(model, **options, **given).model
        assert isinstance(small.layers[0].self_attn, OpenAttention)
        mask = torch.arange(7)[None] >= torch.tensor([7, 5, 2])[:, None]
        for options_of_call in ({}, {"src_key_padding_mask": mask}):
            keep = ~mask if options_of_call else torch.ones_like(mask)
            found, wanted = (net(x, **options_of_call)[keep] for net in (small, model))
            assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_models_may_flatten_and_read_what_was_opened():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(24, 16, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.pair = nn.Bilinear(16, 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.rnn.flatten_parameters()
            y = self.rnn(x)[0]
            y = self.attention(y, y, y)[0][:, -1]
            penalty = self.rnn.weight_hh_l0.square().mean() + self.pair.weight.square().mean()
            return self.pair(y, y) + penalty + self.attention.in_proj_weight.square().mean()

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(8, 5, 24)
    for given in ({}, {"data": [x]}):
        small = mpo.compress(model, bond_dim=24, layout="svd", if_smaller=False, **given).model
        assert isinstance(small.rnn, OpenRecurrent)
        assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)
        with pytest.raises(AttributeError, match="weight_hh_l1"):
            _ = small.rnn.weight_hh_l1


def test_the_copy_shares_all_weights_and_the_model_is_untouched():
    model = seeded(lambda: nn.Sequential(nn.LSTM(4, 3), nn.ReLU()))
    model[0].extra = "kept"
    opened = open_modules(model)
    assert type(model[0]) is nn.LSTM
    assert opened[0].ih_l0.weight is model[0].weight_ih_l0
    assert opened[0].hh_l0.bias is model[0].bias_hh_l0
    attention = nn.MultiheadAttention(4, 2)
    one = open_modules(attention)
    assert one.q_proj.weight.data_ptr() == attention.in_proj_weight.data_ptr()
    assert one.v_proj.weight._base is not None or one.v_proj.weight.storage_offset() == 32
    assert sum(p.numel() for p in one.parameters()) == sum(
        p.numel() for p in attention.parameters()
    )
    plain = nn.Sequential(nn.Linear(3, 3))
    assert open_modules(plain) is plain
    assert open_modules(model, only=["1"]) is model


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_by_kernel_and_by_their_layers(cls, options):
    dense = seeded(lambda: cls(5, 4, **options))
    opened = open_modules(dense)
    x = gaussian(6, 3, 5)
    directions = (2 if options.get("bidirectional") else 1) * options.get("num_layers", 1)
    state = gaussian(directions, 3, 4, seed=1)
    hx = (state, gaussian(directions, 3, 4, seed=2)) if cls is nn.LSTM else state
    for given in (None, hx):
        wanted = dense(x, given)
        assert_close(opened(x, given), wanted, **EXACT)
        with layers_called(opened):
            assert_close(opened(x, given), wanted, **EXACT)
    single = dense(x[:, 0])
    assert_close(opened(x[:, 0]), single, **EXACT)
    with layers_called(opened):
        assert_close(opened(x[:, 0]), single, **EXACT)
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 2]))
    assert_close(opened(packed)[0].data, dense(packed)[0].data, **EXACT)
    with layers_called(opened), pytest.raises(DataError, match="packed sequences"):
        opened(packed)
    again = copy.deepcopy(opened)
    assert_close(again(x), dense(x), **EXACT)


def test_calls_of_a_recurrent_layer_may_be_under_way_at_once(monkeypatch):
    """While one call is in the kernel, another thread's comes and goes."""
    model = seeded(lambda: nn.LSTM(6, 4))
    opened = open_modules(model)
    inputs = [gaussian(5, 3, 6, seed=seed) for seed in range(2)]
    kernel, found, inside = nn.LSTM.forward, {}, []

    def call(number):
        found[number] = opened(inputs[number])[0]

    def forward(shell, *given):
        if not inside:
            inside.append(shell)
            other = threading.Thread(target=call, args=(1,))
            other.start()
            other.join()
        return kernel(shell, *given)

    expected = [model(x)[0] for x in inputs]
    monkeypatch.setattr(nn.LSTM, "forward", forward)
    call(0)
    assert len(inside) == 1
    for number in range(2):
        assert torch.equal(found[number], expected[number])
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again(inputs[0])[0], expected[0])


def test_relu_and_projections():
    x = gaussian(5, 2, 6)
    for make in (
        lambda: nn.RNN(6, 4, nonlinearity="relu"),
        lambda: nn.LSTM(6, 5, proj_size=3, num_layers=2, bidirectional=True),
    ):
        dense = seeded(make)
        opened = open_modules(dense)
        assert_close(opened(x), dense(x), **EXACT)
        with layers_called(opened):
            assert_close(opened(x), dense(x), **EXACT)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_masks(batch_first, need_weights):
    dense = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first))
    opened = open_modules(dense)
    assert isinstance(opened, OpenAttention)
    x = gaussian(3, 5, 8) if batch_first else gaussian(5, 3, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for masks in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": gaussian(5, 5, seed=3), "key_padding_mask": padding.double() * -9.0},
        {"attn_mask": gaussian(6, 5, 5, seed=4)},
    ):
        for average in (True, False):
            options = {"need_weights": need_weights, "average_attn_weights": average, **masks}
            assert_close(opened(x, x, x, **options), dense(x, x, x, **options), **EXACT)
    one = x[0] if batch_first else x[:, 0]
    assert_close(opened(one, one, one), dense(one, one, one), **EXACT)
    with pytest.raises(ContractionError, match="goes with an attn_mask"):
        opened(x, x, x, is_causal=True)


def test_encoder_layers_in_training_and_with_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).double().eval()
    opened = open_modules(dense)
    assert all(isinstance(layer, OpenEncoderLayer) for layer in opened.layers)
    assert type(dense.layers[0]) is nn.TransformerEncoderLayer
    x = gaussian(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 2:] = True
    with torch.no_grad():  # where torch would take its fast path
        found, wanted = (m(x, src_key_padding_mask=padding) for m in (opened, dense))
    assert_close(found[~padding], wanted[~padding], **EXACT)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert_close(opened(x, mask=mask), dense(x, mask=mask), **EXACT)
    assert_close(opened.train()(x), dense.train()(x), **EXACT)


def test_modules_of_which_nothing_is_compressed_stay_as_they_are():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.attention = nn.LSTM(16, 16), nn.MultiheadAttention(16, 2)
            self.head = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.rnn(x)[0]
            return self.head(self.attention(x, x, x)[0])

    dense = seeded(Both)
    result = mpo.compress(dense, bond_dim=2, include=["head"])
    assert type(result.model.rnn) is nn.LSTM
    assert type(result.model.attention) is nn.MultiheadAttention
    kept = {layer.name: layer.reason for layer in result.report.kept_layers}
    assert kept["rnn.ih_l0"] == "not selected by the include and exclude patterns"
    assert result.report.totals.parameters.model.dense == sum(p.numel() for p in dense.parameters())
    partly = mpo.compress(dense, ratio=2, of="layers", include=["rnn.*"], data=[gaussian(5, 4, 16)])
    assert isinstance(partly.model.rnn, OpenRecurrent)
    assert type(partly.model.attention) is nn.MultiheadAttention
    assert set(opened_names(partly.model)) == {"rnn"}


class Shared(nn.Module):
    """An LSTM whose weight somebody else uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4)
        self.again = self.rnn.weight_ih_l0


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query: Tensor) -> Tensor:
        return query


def hooked() -> nn.Module:
    rnn = nn.GRU(4, 4)
    rnn.register_forward_hook(lambda *_: None)
    return rnn


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k, bias_v or add_zero_attn"),
        (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn"),
        (lambda: OwnAttention(4, 2), "has its own forward"),
        (hooked, "forward hook"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), "parametri"),
        (Shared, "without calling a layer"),
        (lambda: nn.LSTMCell(4, 4), "without calling a layer"),
    ],
)
def test_what_cannot_be_opened_says_why(make, reason):
    model = make()
    opened = open_modules(model)
    assert opened is model
    inventory = find_weights(opened)
    assert not inventory.sites
    reasons = [entry.reason for entry in inventory.kept if len(entry.shape) == 2]
    assert reasons
    assert any(reason in text for text in reasons), reasons


def test_experts_that_compute_something_else_are_left_alone():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert open_modules(experts) is not experts
    experts._apply_gate = None  # an attribute of the instance is no gate
    assert open_modules(experts) is not experts

    class Scaled(MixtralExperts):
        def forward(self, *args: Tensor) -> Tensor:
            return 2 * super().forward(*args)

    experts.__class__ = Scaled
    assert open_modules(experts) is experts
    (entry, _) = find_weights(experts).kept
    assert "compute something else" in entry.reason
