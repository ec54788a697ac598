import pytest

from mpocompress.report import wording
from mpocompress.report.cautions import cautions
from mpocompress.report.groups import kept_groups, parameter_groups
from mpocompress.report.narrative import facts, headline, settings_rows, what_was_done
from mpocompress.report.verdicts import onnx_verdict, quality_verdict
from mpocompress.report.wording import Code
from tests.report_samples import PARITY, compressed_layer, encoder, kept_layer, report_of


def _plain(sentence):
    return "".join(part.text if isinstance(part, Code) else part for part in sentence)


def _cautions(report):
    return [_plain(caution) for caution in cautions(report)]


def test_headline_says_how_much_smaller_the_model_is():
    assert headline(report_of(compressed_layer("fc", 1000, 1000, 50))) == (
        "10.0× smaller: from 1 million to 100 thousand parameters."
    )
    assert headline(report_of(kept_layer("norm", 512))) == (
        "Nothing was compressed: all 512 parameters were kept."
    )
    small = compressed_layer("fc", 100, 100, 40)
    assert "About as large as before" in headline(report_of(small, kept_layer("e", 10**7)))
    large = compressed_layer("fc", 100, 100, 100)
    assert headline(report_of(large)).startswith("2.00× larger")


def test_facts_tell_the_model_from_its_compressed_layers_and_name_the_onnx_file():
    report = report_of(
        compressed_layer("fc", 1000, 1000, 50),
        kept_layer("e", 10**6, "embedding"),
        files={"model.onnx": 500_000, "model.onnx.data": 4_000_000, "model.mpo.safetensors": 9},
    )
    parameters, stored, macs = facts(report)
    assert parameters.value == "1.82× fewer"
    assert parameters.of_layers == "10.0× fewer"
    assert stored.detail == "8.00 MB → 4.40 MB of weights; the ONNX file is 4.50 MB"
    assert macs.value == "10.0× fewer"


def test_more_multiply_adds_are_not_hidden():
    layer = compressed_layer("fc", 100, 100, 10)
    layer["layout"] = [[10, 10], [10, 10]]
    layer["macs"]["compressed"] = 30_000
    report = report_of(layer)
    assert facts(report)[2].value == "3.00× more"
    assert facts(report)[2].tone == "bad"
    (caution,) = _cautions(report)
    assert "3.00× as many multiply-adds as before" in caution
    assert "--layout svd" in caution

    beside = _cautions(report_of(layer, compressed_layer("other", 1000, 1000, 50)))
    assert any("1 of 2 compressed layers does more multiply-adds" in text for text in beside)


def test_svd_with_more_multiply_adds_is_told_to_lower_the_bond_dimension():
    (larger, bonds) = sorted(_cautions(report_of(compressed_layer("fc", 100, 100, 80))))
    assert "--layout" not in larger + bonds
    assert "smaller --bond-dim" in larger
    assert "fc did not become smaller" in bonds + larger


def test_multiply_adds_where_there_were_none_before():
    layer = compressed_layer("embedding") | {"macs": {"dense": 0, "compressed": 500}}
    report = report_of(layer)
    assert facts(report)[2].value == "none before"
    assert facts(report)[2].tone == "bad"
    assert "1 of 1" not in _cautions(report)[0]


def test_convolutions_are_said_not_to_be_counted():
    report = report_of(compressed_layer("fc"), kept_layer("conv.weight", 9, "conv"))
    assert facts(report)[2].detail.endswith("per input row, convolutions not counted")


def test_large_weight_error_asks_to_measure_and_names_the_remedies():
    layer = compressed_layer("fc") | {"relative_weight_error": 0.82}
    (caution,) = _cautions(report_of(layer, compressed_layer("other")))
    assert "above 30 % in 1 of 2 compressed layers, the largest 82.0 % in layer fc" in caution
    assert "--bond-dim" in caution
    assert "--exclude" in caution
    assert "healing" in caution


def test_errors_of_outputs_count_where_they_are_known_and_those_of_weights_do_not():
    layer = compressed_layer("fc") | {"relative_weight_error": 0.82, "relative_output_error": 0.07}
    settings = {"rows_of_data": 1000}
    assert _cautions(report_of(layer, settings=settings)) == []
    worse = compressed_layer("up") | {"relative_output_error": 0.35}
    (caution,) = _cautions(report_of(layer, worse, settings=settings))
    assert caution.startswith(
        "Outputs of layers moved a lot: the relative output error is above 30 % in 1 of 2 "
        "compressed layers, the largest 35.0 % in layer up."
    )
    change = {"quantity": "", "unit": "", "predicted": 0.2, "measured": 0.04, "note": "on rows"}
    change["figure"] = "output_change"
    assert _cautions(report_of(layer, worse, settings=settings, predictions=[change])) == []


def test_kept_weights_that_dominate_are_named():
    report = report_of(
        compressed_layer("fc", 1000, 1000, 50), kept_layer("words", 10**6, "embedding")
    )
    (caution,) = _cautions(report)
    assert caution.startswith(
        "91 % of all remaining parameters sit in words, which was kept (embedding is not"
    )


def test_nothing_to_warn_of_gives_no_warning():
    assert _cautions(report_of(compressed_layer("fc"))) == []


def test_quality_is_only_claimed_where_it_was_measured():
    unknown = quality_verdict(report_of(compressed_layer("fc")))
    assert unknown is not None
    assert unknown.title == "How well the model still does its job was not measured."
    measured = quality_verdict(
        report_of(compressed_layer("fc") | {"relative_output_error": 0.0721})
    )
    assert measured is not None
    assert "7.21 % (median)" in _plain(measured.text)
    assert quality_verdict(report_of(kept_layer("norm", 3))) is None


def test_after_healing_the_answers_are_spoken_of():
    layer = compressed_layer("fc") | {"relative_weight_error": 0.82}
    healing = {"steps": 60, "held_out_loss": {"before": 0.49, "after": 0.3601}}
    change = {"quantity": "", "unit": "", "predicted": 0.2, "measured": 0.167}
    report = report_of(
        layer,
        settings={"rows_of_data": 100, "distill": healing},
        predictions=[change | {"figure": "output_change", "note": "measured on rows fitted on"}],
    )
    found = quality_verdict(report)
    assert found is not None
    text = _plain(found.text)
    assert text.startswith(
        "The outputs of the whole model differ by 16.7 %, measured on rows fitted on. "
    )
    assert (
        "healing, 60 steps) brought the loss on rows held out from it from 0.49 to 0.3601." in text
    )
    healing["held_out_loss"]["after"] = 0.49
    found = quality_verdict(report_of(layer, settings={"distill": healing}))
    assert found is not None
    assert "did not lower the loss on rows held out from it, 0.49, so" in _plain(found.text)
    change |= {"figure": "output_change", "measured": 0.41, "note": "measured on rows fitted on"}
    (caution,) = _cautions(
        report_of(layer, settings={"rows_of_data": 100, "distill": healing}, predictions=[change])
    )
    assert caution.startswith(
        "Outputs of the model moved a lot: the relative change is 41.0 %, measured on rows fitted "
    )
    assert caution.endswith("more steps of healing on more data win back more of what was lost.")


def test_layers_that_the_data_did_not_reach_are_named():
    reached = compressed_layer("fc") | {"relative_output_error": 0.07}
    report = report_of(reached, compressed_layer("unused"), settings={"rows_of_data": 100})
    (caution,) = _cautions(report)
    assert caution.startswith("The data did not reach 1 of 2 compressed layers, the first being")


def test_few_rows_of_data_are_warned_of():
    layer = compressed_layer("fc") | {"relative_output_error": 0.07}
    largest = max(layer["bond_dims"])
    (caution,) = _cautions(report_of(layer, settings={"fewest_rows_at_a_layer": largest - 1}))
    assert caution.startswith(f"Data are few: a layer saw only {largest - 1} rows")
    assert _cautions(report_of(layer, settings={"fewest_rows_at_a_layer": largest})) == []


def test_onnx_verdicts():
    layer = compressed_layer("fc")
    agrees = onnx_verdict(report_of(layer, parity=PARITY))
    assert (agrees.tone, agrees.title) == ("good", "The ONNX file agrees with PyTorch.")
    assert "on batches of 1, 3 and 8 rows: largest difference 3.1×10⁻⁶" in _plain(agrees.text)
    assert "tolerance 10⁻⁴" in _plain(agrees.text)
    assert "same class for 100 % of the rows" in _plain(agrees.text)

    differs = onnx_verdict(report_of(layer, parity=PARITY | {"passed": False}))
    assert (differs.tone, differs.title.endswith("do not use it.")) == ("bad", True)

    missing = onnx_verdict(report_of(layer, onnx_note="give --model MODULE:FACTORY"))
    assert missing.title == "There is no ONNX file."
    assert _plain(missing.text) == "Give --model MODULE:FACTORY."

    unchecked = onnx_verdict(report_of(layer, files={"model.onnx": 5}))
    assert unchecked.title == "The ONNX file was not checked."
    assert onnx_verdict(report_of(layer)).title == "There is no ONNX file."


def test_what_was_done_is_two_sentences_of_plain_words():
    first, second = (_plain(part) for part in what_was_done(encoder()))
    assert first.startswith("36 weight matrices holding")
    assert "at most 96 values, the bond dimension" in first
    assert "Everything else (13 tensors, listed below) is exactly as it was." in second
    (nothing,) = what_was_done(report_of(kept_layer("norm", 3)))
    assert "smaller --bond-dim" in _plain(nothing)


def test_layers_that_differ_in_numbers_only_are_one_group():
    report = encoder()
    groups = parameter_groups(report)
    labels = [group.label for group in groups]
    assert Code("layer.*.up.weight") in labels
    assert Code("embeddings.word.weight") in labels
    assert labels[-1] == "12 normalization weights"
    assert sum(group.dense for group in groups) == report.totals.parameters.model.dense
    assert sum(group.compressed for group in groups) == report.totals.parameters.model.compressed


def test_many_groups_are_folded():
    layers = [compressed_layer(f"{'abcdefghij'[k]}.weight", 100 + k, 100, 9) for k in range(10)]
    layers += [kept_layer(f"{'abcdefghij'[k]}.bias", 5000, "bias") for k in range(10)]
    groups = parameter_groups(report_of(*layers))
    assert [group.label for group in groups if group.status == "compressed"][-1] == (
        "5 more compressed layers"
    )
    assert [group.label for group in groups if group.status == "kept"][-1] == "8 biases"
    assert len(groups) == 9


def test_version_numbers_inside_a_word_are_no_layer_numbers():
    report = report_of(compressed_layer("fc1.weight"), compressed_layer("fc2.weight"))
    assert [group.label for group in parameter_groups(report)] == [
        Code("fc1.weight"),
        Code("fc2.weight"),
    ]


def test_kept_weights_are_grouped_by_kind_with_their_share():
    groups = kept_groups(encoder())
    assert [group.title for group in groups] == ["1 embedding table", "12 normalization weights"]
    assert groups[0].reason == "embedding is not converted"
    assert groups[0].share > 0.5


def test_settings_are_flattened():
    settings = {"bond_dim": 16, "include": [], "flag": True, "versions": {"torch": "2"}, "x": None}
    assert settings_rows(settings) == (
        ("bond_dim", "16"),
        ("include", "none"),
        ("flag", "yes"),
        ("versions.torch", "2"),
        ("x", "none"),
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9_999, "9,999"), (66_144, "66.1 thousand"), (1_863_690, "1.86 million")],
)
def test_counts_in_words(value, text):
    assert wording.count_words(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (3.14e-7, "3.1×10⁻⁷"),
        (0.00012, "0.01 %"),
        (0.5, "50.0 %"),
        (1.2, "120 %"),
    ],
)
def test_relative_errors(value, text):
    assert wording.relative_error(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.9999, "over 99.9 %"), (0.52, "52 %"), (0.0, "0 %"), (1e-5, "below 0.1 %")],
)
def test_shares_are_not_rounded_to_all_or_nothing(share, text):
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 bytes"), (296_000, "296 kB"), (7_454_760, "7.45 MB")]
)
def test_bytes(size, text):
    assert wording.byte_size(size) == text


def test_control_characters_are_made_visible():
    assert wording.visible("a\nb\x00\u202ec") == "a\\nb\\x00\\u202ec"
