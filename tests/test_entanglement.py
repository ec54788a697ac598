"""Entanglement of weights against matrices whose entanglement is known, in both metrics."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.analysis import EntanglementRecorder, classify_growth, entanglement
from mpocompress.analysis.entanglement import Entanglement, unfolding_spectra
from mpocompress.errors import (
    ContractionError,
    ConversionError,
    DataError,
    DecompositionError,
    LayoutError,
    NoLayerMatched,
)
from mpocompress.mpo import MPO, Layout
from mpocompress.mpo.metric import Metric
from mpocompress.mpo.spectra import entropy_nats, renyi_entropy_nats
from tests.planted import gaussian, kronecker_of_noise, spectrum_at, swap, with_spectrum
from tests.tolerances import SAMPLING, TOL

EXACT = TOL[torch.float64]["spectrum"]
SINGLE = TOL[torch.float32]["spectrum"]
SIX_SITES = Layout.parse("2x2,2x2,2x2,2x2,2x2,2x2")


def linear(weight, bias=False):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).to(weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def seeded_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32),
        nn.ReLU(),
        mpo.MPOLinear(32, 32, layout="4x4,2x2,4x4", bond_dim=3),
        nn.ReLU(),
        nn.Linear(32, 6),
    )


class TestKnownAnswers:
    def test_kronecker_weights_have_entropy_zero(self):
        layer = linear(kronecker_of_noise(SIX_SITES, seed=3))
        (found,) = entanglement(layer, layout=SIX_SITES, renyi_orders=(0.5, 2, math.inf)).layers
        assert max(found.entropies_nats) < EXACT["atol"]
        for order, values in found.renyi_nats.items():
            # The square root of a weight of eps^2 is eps: Rényi below 1 sees rounding first.
            assert max(values) < (1e-6 if order < 1 else EXACT["atol"]), order
        assert found.growth.verdict == "area-law-like"
        assert found.filling == pytest.approx(0, abs=EXACT["atol"])

    @pytest.mark.parametrize("dim", [2, 3, 8])
    def test_a_maximally_entangled_operator_has_log_d(self, dim):
        layer = linear(swap(dim))
        orders = (0, 0.5, 1, 2, math.inf)
        found = entanglement(layer, layout=[(dim, dim), (dim, dim)], renyi_orders=orders).layer("")
        expected = math.log(dim**2)
        assert found.entropies_nats == (pytest.approx(expected),)
        assert found.effective_bond_dims == (pytest.approx(dim**2),)
        assert found.capacities_nats == (pytest.approx(expected),)
        for order in orders:
            assert found.renyi_nats[order] == (pytest.approx(expected),)

    def test_the_identity_between_out_and_in_has_log_n(self):
        found = entanglement(linear(torch.eye(16).double()), layout="svd").layer("")
        assert found.entropies_nats == (pytest.approx(math.log(16)),)
        assert found.filling == pytest.approx(1)

    def test_a_dense_layer_has_the_spectra_of_its_exact_mpo_and_of_its_unfoldings(self):
        weight = gaussian(24, 16)
        layout = Layout.parse("2x2,3x4,4x2")
        found = entanglement(linear(weight), layout=layout).layer("")
        exact = MPO.from_matrix(weight, layout)
        for bond, values in enumerate(found.schmidt_values):
            ours = torch.tensor(values, dtype=torch.float64)
            assert_close(ours, spectrum_at(weight, layout, bond), **EXACT)
            assert_close(ours, exact.schmidt_values(bond), **EXACT)
        assert found.bond_dims == layout.max_bond_dims()

    @pytest.mark.parametrize("gauge", ["none", "identity"])
    def test_an_mpo_layer_has_the_spectra_of_its_dense_twin(self, gauge):
        chain = MPO.random("4x4,2x2,4x4", 3, generator=torch.Generator().manual_seed(1))
        layer = mpo.MPOLinear.from_mpo(chain, gauge=gauge)
        found = entanglement(layer).layer("")
        assert found.kind == "mpo"
        twin = entanglement(layer.to_linear(), layout="4x4,2x2,4x4").layer("")
        for ours, theirs in zip(found.schmidt_values, twin.schmidt_values, strict=True):
            kept = len(ours)
            assert_close(torch.tensor(ours), torch.tensor(theirs[:kept]), **SINGLE)
        assert max(found.entropies_nats) <= math.log(3)


class TestRenyi:
    def test_a_known_spectrum(self):
        spectrum = torch.tensor([3.0, 2.0, 1.0, 0.0]).sqrt().double()
        p = torch.tensor([1 / 2, 1 / 3, 1 / 6]).double()
        assert renyi_entropy_nats(spectrum, 2) == pytest.approx(-math.log(float((p**2).sum())))
        assert renyi_entropy_nats(spectrum, 0.5) == pytest.approx(2 * math.log(p.sqrt().sum()))
        assert renyi_entropy_nats(spectrum, math.inf) == pytest.approx(math.log(2))
        assert renyi_entropy_nats(spectrum, 0) == pytest.approx(math.log(3))
        assert renyi_entropy_nats(spectrum, 1) == entropy_nats(spectrum)

    def test_it_falls_with_the_order_and_is_continuous_at_one(self):
        spectrum = gaussian(20).abs().sort(descending=True).values
        orders = [0, 0.3, 0.999, 1, 1.001, 2, 10, math.inf]
        values = [renyi_entropy_nats(spectrum, order) for order in orders]
        assert values == sorted(values, reverse=True)
        assert values[2] == pytest.approx(values[3], abs=1e-3)

    def test_near_order_one_it_is_not_rounding(self):
        spectrum = gaussian(20).abs()
        entropy = entropy_nats(spectrum)
        for order in (1 - 1e-12, 1 + 1e-10, 1 + 1e-7):
            assert renyi_entropy_nats(spectrum, order) == pytest.approx(entropy, abs=1e-6)
            flat = renyi_entropy_nats(torch.ones(8), order)
            assert flat == pytest.approx(math.log(8), rel=1e-12)

    def test_scale_does_not_matter_even_where_squares_underflow(self):
        spectrum = torch.tensor([1e-30, 1e-30])
        assert renyi_entropy_nats(spectrum, 2) == pytest.approx(math.log(2))
        assert renyi_entropy_nats(torch.zeros(3), 2) == 0.0

    @pytest.mark.parametrize("order", [-1.0, math.nan])
    def test_impossible_orders_are_refused(self, order):
        with pytest.raises(DecompositionError, match="of a Rényi entropy: it is not negative"):
            renyi_entropy_nats(torch.ones(2), order)


class TestDataMetric:
    def test_isotropic_inputs_change_nothing(self):
        weight = gaussian(16, 16)
        data = math.sqrt(16) * torch.eye(16).double()
        by_data = entanglement(linear(weight), layout="4x4,4x4", metric="data", data=data)
        by_weight = entanglement(linear(weight), layout="4x4,4x4")
        assert by_data.metric == "data"
        # The product with the data is rounded to float32 in no place: the layer is float64.
        assert_close(
            torch.tensor(by_data.layer("").entropies_nats),
            torch.tensor(by_weight.layer("").entropies_nats),
            **SINGLE,
        )

    def test_across_out_and_in_it_is_the_spectrum_of_the_whitened_matrix(self):
        weight, data = gaussian(8, 12), gaussian(500, 12, seed=1) @ gaussian(12, 12, seed=2)
        found = entanglement(
            linear(weight), layout="svd", metric="data", data=data, ridge=0.0
        ).layer("")
        outputs = data @ weight.T / math.sqrt(500)
        assert_close(
            torch.tensor(found.schmidt_values[0][:8], dtype=torch.float64),
            torch.linalg.svdvals(outputs),
            **EXACT,
        )

    def test_directions_without_data_are_not_entangled(self):
        # Inputs of the form (x, 0, ..., 0): of the swap only one state of the second site remains.
        weight = swap(4)
        data = torch.zeros(64, 16).double()
        data[:, 0] = 1.0
        found = entanglement(
            linear(weight), layout="4x4,4x4", metric="data", data=[data], ridge=1e-12
        ).layer("")
        assert found.entropies_nats[0] < 1e-6

    def test_whitening_with_product_moments_keeps_a_kronecker_product(self):
        layout = Layout.parse("2x2,2x2")
        a, b = gaussian(40, 2), gaussian(40, 2, seed=1)
        moments = torch.kron(a.T @ a, b.T @ b)
        white = Metric(moments, ridge=0.0).whiten(kronecker_of_noise(layout, 5))
        (spectrum,) = unfolding_spectra(white, layout)
        assert entropy_nats(spectrum) < EXACT["atol"]

    def test_whitening_has_the_norm_of_the_metric_on_both_sides(self):
        x, g = gaussian(30, 6), gaussian(30, 4, seed=1)
        metric = Metric(x.T @ x, g.T @ g)
        matrix = gaussian(4, 6, seed=2)
        assert_close(float(metric.whiten(matrix).norm()), metric.norm(matrix), **EXACT)
        with pytest.raises(ContractionError, match="does not fit a metric"):
            metric.whiten(matrix.T)

    def test_all_layers_of_a_model_and_its_mode_and_flags_stay(self):
        model = seeded_network()
        data = [torch.randn(64, 24, generator=torch.Generator().manual_seed(k)) for k in range(3)]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = entanglement(model, metric="data", data=data, output_metric=True)
        assert [layer.name for layer in found.layers] == ["0", "2", "4"]
        assert [layer.kind for layer in found.layers] == ["dense", "mpo", "dense"]
        assert all(0 < layer.filling < 1 for layer in found.layers)
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])
        # Seeing the outputs too is another measurement.
        inputs_only = entanglement(model, metric="data", data=data)
        assert inputs_only.layer("0").entropies_nats != found.layer("0").entropies_nats

    def test_arrays_stand_for_tensors(self):
        layer, data = linear(gaussian(8, 12)), gaussian(30, 12)
        found = [
            entanglement(layer, metric="data", data=given)
            for given in (data, data.numpy(), [data.numpy()[:10], data[10:]])
        ]
        entropies = [one.layer("").entropies_nats for one in found]
        assert entropies[0] == entropies[1]
        assert entropies[0] == pytest.approx(entropies[2])

    def test_batches_by_name_without_labels(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(6, 4)

            def forward(self, *, features):
                return self.layer(features)

        features = gaussian(20, 6)  # float64, as from NumPy
        batch = {"features": features, "labels": torch.zeros(20)}
        assert entanglement(Named(), metric="data", data=[batch]).layer("layer").filling > 0


class TestGrowth:
    def test_random_weights_follow_a_volume_law(self):
        layer = linear(gaussian(256, 256))
        growth = entanglement(layer, sites=8).layer("").growth
        assert growth.verdict == "volume-law-like"
        assert growth.exponent == pytest.approx(1, abs=0.15)

    def test_small_bonds_follow_an_area_law(self):
        # A matrix of 2^20 rows: an MPO's spectra never need it whole. The entropies of random cores
        # fluctuate from bond to bond; the mean over ten of them says what does not.
        total = 0.0
        for seed in range(10):
            torch.manual_seed(seed)
            layer = mpo.MPOLinear(2**20, 2**20, bias=False, layout=[(2, 2)] * 20, bond_dim=3)
            growth = entanglement(layer).layer("").growth
            assert growth.verdict == "area-law-like"
            total += growth.exponent
        assert abs(total / 10) < 1 / 3

    def test_exponents_of_exact_laws(self):
        capacities = [1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]
        for exponent, verdict in ((0, "area"), (0.5, "intermediate"), (1, "volume")):
            found = classify_growth([0.3 * c**exponent for c in capacities], capacities)
            assert found.exponent == pytest.approx(exponent)
            assert found.verdict.startswith(verdict)

    def test_what_happens_near_the_ends_does_not_count(self):
        saturated = [1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.0]
        assert classify_growth(saturated, [1, 2, 3, 4, 3, 2, 1]).verdict == "area-law-like"

    @pytest.mark.parametrize("entropies", [[1.0], [1.0, math.nan]])
    def test_what_is_no_profile_is_refused(self, entropies):
        with pytest.raises(DataError, match="and 2 capacities: give one of each"):
            classify_growth(entropies, [1.0, 2.0])

    @pytest.mark.parametrize("capacities", [[], [2.0], [2.0, 2.0]])
    def test_cuts_of_one_size_say_nothing(self, capacities):
        found = classify_growth([1.0] * len(capacities), capacities)
        assert (found.verdict, found.exponent) == ("undetermined", None)


class TestWhichLayers:
    def test_patterns_layouts_and_order(self):
        model = seeded_network()
        found = entanglement(model, layout={"0": "svd", "*": "balanced"}, exclude=["2"])
        assert [layer.name for layer in found.layers] == ["0", "4"]
        assert found.layer("0").layout == ((32, 1), (1, 24))
        assert len(found.layer("4").layout) == 2
        with pytest.raises(KeyError, match="'2'; there are '0', '4'"):
            found.layer("2")

    def test_tied_layers_are_one_weight(self):
        first = mpo.MPOLinear(16, 16, layout="4x4,4x4", bond_dim=2)
        second = mpo.MPOLinear.from_mpo(MPO(list(first.cores)))
        dense = nn.Linear(16, 16)
        other = nn.Linear(16, 16)
        other.weight = dense.weight
        model = nn.Sequential(first, second, dense, other)
        assert [layer.name for layer in entanglement(model).layers] == ["0", "2"]
        assert [layer.name for layer in entanglement(model, include=["3"]).layers] == ["2"]

    def test_the_weakest_come_first_and_the_table_names_all(self):
        found = entanglement(seeded_network())
        fillings = [layer.filling for layer in found.weakest()]
        assert fillings == sorted(fillings)
        assert found.weakest()[0].name == "2"
        lines = str(found).splitlines()
        assert len(lines) == 4
        assert lines[2].startswith("2 ")
        assert "4x4,2x2,4x4" in lines[2]

    def test_json_both_ways(self):
        found = entanglement(seeded_network(), renyi_orders=(0.5, math.inf))
        assert Entanglement.model_validate_json(found.model_dump_json()) == found

    def test_padded_layers_have_the_spectra_of_the_padded_matrix(self):
        layout = Layout((4, 2), (3, 3), pad=True)
        weight = gaussian(7, 8)
        found = entanglement(linear(weight), layout=layout).layer("")
        padded = torch.zeros(8, 9).double()
        padded[:7, :8] = weight
        assert_close(
            torch.tensor(found.schmidt_values[0], dtype=torch.float64),
            spectrum_at(padded, Layout((4, 2), (3, 3)), 0),
            **EXACT,
        )
        layer = mpo.MPOLinear.from_linear(linear(weight), layout=layout)
        assert entanglement(layer).layer("").entropies_nats[0] == pytest.approx(
            found.entropies_nats[0]
        )

    def test_half_precision(self):
        layer = nn.Linear(16, 16).half()
        ours = entanglement(layer, layout="4x4,4x4").layer("").entropies_nats
        wide = entanglement(layer.float(), layout="4x4,4x4").layer("").entropies_nats
        assert ours == pytest.approx(wide, rel=SINGLE["rtol"])


class Reader(nn.Module):
    """A table, recurrence, attention and a head that is tied to the table."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pair = nn.Bilinear(4, 4, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        seen, _ = self.lstm(self.words(tokens))
        seen, _ = self.attention(seen, seen, seen)
        return self.head(seen + self.pair(seen[..., :4], seen[..., 4:]))


def reader():
    torch.manual_seed(0)
    return Reader().double(), torch.randint(20, (16, 7))


def svd_spectrum(rows, weight):
    """Singular values of a weight on rows, up to a factor: those of the layout ((out,1),(1,in))."""
    return torch.linalg.svdvals(rows.reshape(-1, rows.shape[-1]) @ weight.T)


def same_up_to_a_factor(values, expected):
    kept = min(len(values), len(expected))  # the other one goes on with zeros
    ours, expected = torch.tensor(values, dtype=torch.float64)[:kept], expected[:kept]
    assert_close(ours / ours.norm(), expected / expected.norm(), **EXACT)


class TestWeightsOfOtherKinds:
    NAMES = (
        "words",
        "lstm.ih_l0",
        "lstm.hh_l0",
        *(f"attention.{part}_proj" for part in ("q", "k", "v", "out")),
        "pair.inner",
    )

    def test_weights_that_no_layer_is_called_with_are_measured(self):
        model, _ = reader()
        found = entanglement(model, layout="svd")
        assert tuple(layer.name for layer in found.layers) == self.NAMES
        for name, weight in (
            ("lstm.hh_l0", model.lstm.weight_hh_l0),
            ("attention.k_proj", model.attention.in_proj_weight[8:16]),
            ("attention.out_proj", model.attention.out_proj.weight),
            ("pair.inner", model.pair.weight.reshape(32, 4)),
        ):
            (values,) = found.layer(name).schmidt_values
            same_up_to_a_factor(values, torch.linalg.svdvals(weight.detach()))
        (bare,) = entanglement(model.lstm, layout="svd", include=["hh_l0"]).layers
        assert bare.entropies_nats == found.layer("lstm.hh_l0").entropies_nats
        # The model is as it was.
        assert isinstance(model.lstm, nn.LSTM)

    @torch.no_grad()
    def test_as_the_data_sees_them(self):
        model, tokens = reader()
        found = entanglement(model, layout="svd", metric="data", data=tokens, ridge=0.0)
        words = model.words(tokens)
        states, _ = model.lstm(words)
        before = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)
        for name, rows, weight in (
            ("lstm.ih_l0", words, model.lstm.weight_ih_l0),
            ("lstm.hh_l0", before, model.lstm.weight_hh_l0),
            ("attention.v_proj", states, model.attention.in_proj_weight[16:]),
        ):
            (values,) = found.layer(name).schmidt_values
            same_up_to_a_factor(values, svd_spectrum(rows, weight))

    @torch.no_grad()
    def test_a_table_is_weighed_by_its_lookups(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8), nn.Tanh()).double()
        tokens = torch.randint(20, (16, 7))
        (found,) = entanglement(model, layout="svd", metric="data", data=tokens, ridge=0.0).layers
        looked_up = model[0](tokens).reshape(-1, 8)
        same_up_to_a_factor(found.schmidt_values[0], torch.linalg.svdvals(looked_up))

    @torch.no_grad()
    def test_of_a_tied_table_both_uses_count(self):
        model, tokens = reader()
        both = entanglement(model, include=["words"], layout="svd", metric="data", data=tokens)
        alone = copy.deepcopy(model)
        alone.head.weight = nn.Parameter(model.head.weight.clone())
        one = entanglement(alone, include=["words"], layout="svd", metric="data", data=tokens)
        # Rows that are never looked up still give logits.
        assert both.layer("words").entropies_nats[0] != one.layer("words").entropies_nats[0]
        felt = entanglement(model, metric="data", data=tokens, output_metric=True)
        assert len(felt.layers) == len(self.NAMES)

    @pytest.mark.parametrize("metric", ["weight", "data"])
    def test_compressed_layers_have_the_spectra_of_dense_ones(self, metric):
        model, tokens = reader()
        data = tokens if metric == "data" else None
        model.attention.in_proj_bias.data.normal_()  # not in the way of the inputs
        exact = mpo.compress(model, bond_dim=8, layout="svd", include=["*"], if_smaller=False).model
        dense = entanglement(model, layout="svd", metric=metric, data=data)
        cores = entanglement(exact, metric=metric, data=data)
        assert [layer.name for layer in cores.layers] == [layer.name for layer in dense.layers]
        assert {layer.kind for layer in cores.layers} == {"mpo"}
        for ours, theirs in zip(cores.layers, dense.layers, strict=True):
            assert ours.entropies_nats == pytest.approx(theirs.entropies_nats, abs=1e-6)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_compressed_convolutions_too(self, transposed):
        torch.manual_seed(0)
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        model = nn.Sequential(kind(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=2)).double()
        images = torch.randn(5, 4, 8, 8)
        exact = mpo.compress(
            model, bond_dim=36, layout="svd", include=["*"], if_smaller=False
        ).model
        for data in (None, images):
            metric = "weight" if data is None else "data"
            dense = entanglement(model, layout="svd", metric=metric, data=data)
            cores = entanglement(exact, metric=metric, data=data)
            assert [layer.name for layer in cores.layers] == ["0", "2"]
            for ours, theirs in zip(cores.layers, dense.layers, strict=True):
                assert ours.entropies_nats == pytest.approx(theirs.entropies_nats, abs=1e-6)
        with pytest.raises(DataError, match="layer '2': there are no gradients .* in groups"):
            entanglement(model, metric="data", data=images, output_metric=True)

    def test_layers_that_share_cores_are_seen_with_the_inputs_of_all(self):
        torch.manual_seed(0)
        first = mpo.MPOLinear(8, 8, bias=False, layout="svd", bond_dim=8, dtype=torch.float64)
        second = mpo.MPOLinear.from_mpo(MPO(list(first.cores)))
        model = nn.Sequential(first, nn.Tanh(), second)
        data = gaussian(40, 8)
        (found,) = entanglement(model, metric="data", data=data, ridge=0.0).layers
        rows = torch.cat((data, torch.tanh(data @ first.weight.T))).detach()
        same_up_to_a_factor(found.schmidt_values[0], svd_spectrum(rows, first.to_dense()))


class TestRefusals:
    def test_each_names_what_it_saw(self):
        model = seeded_network()
        with pytest.raises(NoLayerMatched, match="include pattern 'encoder' matches no layer"):
            entanglement(model, include=["encoder"])
        with pytest.raises(NoLayerMatched, match="nothing to choose from"):
            entanglement(nn.Sequential(nn.ReLU()))
        with pytest.raises(LayoutError, match=r"layer '0': layout 4x4,4x4"):
            entanglement(model, layout="4x4,4x4")
        with pytest.raises(DataError, match="metric='data' needs data="):
            entanglement(model, metric="data")
        with pytest.raises(DataError, match="in the data metric only"):
            entanglement(model, data=torch.ones(1, 24))
        with pytest.raises(DataError, match="metric 'input': there are 'weight' and 'data'"):
            entanglement(model, metric="input")
        with pytest.raises(DataError, match="there are no batches in it"):
            entanglement(model, metric="data", data=[])
        with pytest.raises(DataError, match="a batch with a str in it"):
            entanglement(model, metric="data", data=["a"])
        with pytest.raises(DataError, match="data 3: give batches"):
            entanglement(model, metric="data", data=3)
        loader = [(torch.ones(3, 24), torch.zeros(3))]
        with pytest.raises(DataError, match=r"argument 1 of shape \(3,\)\).* without labels"):
            entanglement(model, metric="data", data=loader)
        with pytest.raises(DataError, match=r"does not take the first batch .*\(5, 7\)"):
            entanglement(model, metric="data", data=torch.ones(5, 7))
        result = mpo.compress(nn.Sequential(nn.Linear(32, 32)), bond_dim=2)
        with pytest.raises(DataError, match=r"CompressionResult is no nn.Module.* result.model"):
            entanglement(result)

    @pytest.mark.parametrize("name", ["0", "2"])
    def test_nan_weights(self, name):
        model = seeded_network()
        bad = next(p for p in model[int(name)].parameters() if p.ndim > 1)
        bad.data.view(-1)[5] = math.nan
        with pytest.raises(ConversionError, match=rf"layer '{name}': .*NaN or Inf"):
            entanglement(model)

    def test_a_layer_that_no_data_reaches(self):
        model = seeded_network()
        model.spare = nn.Linear(4, 4)
        model.forward = lambda x: model[0](x)
        with pytest.raises(DataError, match="layer '2': the data does not reach it"):
            entanglement(model, metric="data", data=torch.ones(3, 24))


class TestOverTraining:
    def test_a_recorder_follows_the_weights(self):
        torch.manual_seed(0)
        model = nn.Sequential(mpo.MPOLinear(16, 16, layout="4x4,4x4", bond_dim=4))
        recorder = EntanglementRecorder(model, every=5)
        # Towards a Kronecker product, which is not entangled.
        target = kronecker_of_noise(Layout.parse("4x4,4x4"), 2).float()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(400):
            optimizer.zero_grad()
            (model[0].weight - target).square().sum().backward()
            optimizer.step()
            recorder()
        assert recorder.steps == tuple(range(0, 401, 5))
        assert recorder.names == ("0",)
        history = recorder.entropies_nats("0")
        assert history[0][0] > 0.5
        assert history[-1][0] < 1e-3

    def test_how_to_measure_is_an_option_and_arguments_are_ignored(self):
        model = seeded_network()
        recorder = EntanglementRecorder(
            model, every=2, measure=lambda m: entanglement(m, include=["4"], layout="svd")
        )
        for step in range(3):
            recorder(step, {"loss": 1.0})
        assert recorder.steps == (0, 2)
        assert recorder.names == ("4",)
        with pytest.raises(DataError, match="every 0: a snapshot"):
            EntanglementRecorder(model, every=0)


def test_low_rank_data_makes_a_trained_layer_look_less_entangled():
    # The point of the data metric: a random matrix is full of entanglement, what it does to
    # inputs from a small subspace is not.
    weight = with_spectrum(torch.ones(32), 32, 32)
    basis = gaussian(3, 32, seed=4)
    data = gaussian(400, 3, seed=5) @ basis
    by_weight = entanglement(linear(weight), layout="svd").layer("")
    by_data = entanglement(
        linear(weight), layout="svd", metric="data", data=data, ridge=1e-9
    ).layer("")
    assert by_weight.effective_bond_dims[0] == pytest.approx(32)
    assert by_data.effective_bond_dims[0] < 3 * (1 + SAMPLING["rtol"])
