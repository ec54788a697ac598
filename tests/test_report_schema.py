import json
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from mpocompress.errors import ReportError
from mpocompress.report import CompressionReport
from mpocompress.report.layer import LayerReport
from mpocompress.report.quantities import Size, Total
from tests.report_samples import GOLDEN, compressed_layer, encoder, golden, kept_layer, report_of


def test_golden_report_loads_and_is_written_back_byte_for_byte():
    report = CompressionReport.load(GOLDEN)
    assert report.to_json() == GOLDEN.read_text(encoding="utf-8")


def test_golden_report_says_what_it_said():
    report = CompressionReport.load(GOLDEN)
    first, second = report.compressed_layers
    assert first.layout == [[24, 1], [1, 12]]
    assert first.also_known_as == ["shared.weight"]
    assert second.bond_dims == [4, 4]
    assert len(report.kept_layers) == 3
    assert report.parity is not None
    assert report.parity.batch_sizes == [1, 3, 8]


def test_load_takes_the_directory_of_a_run():
    assert CompressionReport.load(GOLDEN.parent) == CompressionReport.load(GOLDEN)


def test_round_trip_keeps_everything():
    report = encoder(blocks=1)
    assert CompressionReport.from_json(report.to_json()) == report


def test_facts_on_kept_layers_and_figures_are_stored_only_where_there_are_any():
    moved = kept_layer("head", 8) | {"changes": ["corrected", "healed"], "uncorrected": "paths"}
    figure = {"quantity": "q", "unit": "", "predicted": None, "measured": 0.5}
    report = report_of(
        compressed_layer("fc"),
        kept_layer("norm", 4),
        moved,
        predictions=[figure, figure | {"figure": "output_change"}],
    )
    assert CompressionReport.from_json(report.to_json()) == report
    data = json.loads(report.to_json())
    assert "changes" not in data["layers"][1]
    assert "uncorrected" not in data["layers"][1]
    assert data["layers"][2]["changes"] == ["corrected", "healed"]
    assert [row.get("figure") for row in data["predictions"]] == [None, "output_change"]
    assert "figure" not in data["predictions"][0]
    with pytest.raises(ValidationError, match="are of kept layers, and this is compressed"):
        report_of(compressed_layer("fc") | {"changes": ["healed"]})


def test_json_is_stable_indented_and_keeps_a_spectrum_on_one_line():
    report = report_of(compressed_layer("fc"), settings={"layout": ("a", 1), "text": "[\n 1]"})
    text = report.to_json()
    assert text == report.to_json()
    assert text.startswith('{\n  "format_version": 1,\n')
    assert '"bond_dims": [96],\n' in text
    assert json.loads(text)["settings"] == {"layout": ["a", 1], "text": "[\n 1]"}


def test_report_is_frozen():
    report = report_of(compressed_layer("fc"))
    with pytest.raises(ValidationError, match="frozen"):
        report.tool_version = "2"


def test_missing_file_names_it_and_what_to_give(tmp_path):
    with pytest.raises(ReportError, match=r"nowhere/report\.json does not exist.*directory that"):
        CompressionReport.load(tmp_path / "nowhere" / "report.json")
    with pytest.raises(ReportError, match=r"report\.json does not exist"):
        CompressionReport.load(tmp_path)


def test_file_that_is_not_text(tmp_path):
    file = tmp_path / "report.json"
    file.write_bytes(b"{\xff\xfe}")
    with pytest.raises(ReportError, match=r"report\.json is not a text file in UTF-8 \(byte 1\)"):
        CompressionReport.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON: Expecting value"),
        ('{"format_version": 1', "is not JSON: Expecting"),
        ('{"format_version": 1, "x": NaN}', "is not JSON: NaN is not a JSON number"),
        ("[" * 100_000, "is not JSON of ours: nested too deeply"),
        ("[1, 2]", "not a report of mpocompress: it has no field format_version"),
        ('{"name": "other tool"}', "not a report of mpocompress: it has no field format_version"),
    ],
    ids=["empty", "truncated", "nan", "nested", "list", "foreign"],
)
def test_text_that_is_not_a_report(text, message):
    with pytest.raises(ReportError, match=message):
        CompressionReport.from_json(text)


@pytest.mark.parametrize("version", [2, 0, "1", None, True])
def test_other_format_version_names_both_versions_and_the_release(version):
    data = golden() | {"format_version": version, "tool_version": "9.9"}
    message = rf"format version {version!r}, but this mpocompress reads version 1.*'9\.9'"
    with pytest.raises(ReportError, match=message):
        CompressionReport.from_json(json.dumps(data))


def _without(data, *path):
    *parents, last = path
    for key in parents:
        data = data[key]
    del data[last]


def _set(data, value, *path):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        ("four", ["layers", 1, "bond_dims"], r"field layers\[1\]\.bond_dims: .*found 'four'"),
        ("12", ["layers", 1, "shape", 0], r"field layers\[1\]\.shape\[0\]: .*found '12'"),
        (1, ["layers", 0, "colour"], r"field layers\[0\]\.colour: Extra inputs"),
        ("shrunk", ["layers", 0, "status"], r"field layers\[0\]\.status: .*found 'shrunk'"),
        (-1.0, ["layers", 1, "relative_weight_error"], r"field layers\[1\]\.relative_weight_err"),
        (1.5, ["parity", "argmax_agreement"], r"field parity\.argmax_agreement: .*found 1\.5"),
        ([], ["layers", 1, "schmidt_values"], "schmidt_values has 0 entries, but 2 sites have 1"),
        ([[1, 2]], ["layers", 1, "schmidt_values"], "values of bond 0 do not descend: 1.* then 2"),
        ([[]], ["layers", 1, "schmidt_values"], "schmidt_values of bond 0 are empty"),
        ([3, 3], ["layers", 1, "bond_dims"], "bond_dims has 2 entries, but 2 sites have 1 bonds"),
        (None, ["layers", 1, "layout"], "a compressed layer needs a layout and bond_dims"),
        ([4], ["layers", 0, "bond_dims"], "a kept layer has neither layout nor bond_dims"),
        (1, ["layers", 0, "parameters", "compressed"], "kept, but 480 parameters became 1"),
        (7.0, ["totals", "parameters", "model", "ratio"], r"ratio 7\.0 is not dense / compressed"),
        ("blocks.0.fc1.bias", ["layers", 0, "name"], "'blocks.0.fc1.bias' is listed 2 times"),
        (1e308, ["layers", 1, "relative_weight_error"], "relative_weight_error: .*found 1e"),
        ([1e9], ["layers", 1, "entropies_nats"], r"entropies_nats\[0\]: .*found 1"),
        (10**400, ["files", "model.onnx"], r"files\.model\.onnx: "),
        (10**400, ["totals", "macs", "model", "dense"], r"field totals\.macs\.model\.dense: "),
        (25, ["layers", 2, "parameters", "dense"], "kept, but 25 parameters became 24"),
        (289, ["layers", 1, "parameters", "dense"], r"totals\.parameters\.model\.dense is .* add"),
    ],
)
def test_first_offending_field_is_named(value, path, message):
    data = golden()
    _set(data, value, *path)
    with pytest.raises(ReportError, match=message):
        CompressionReport.from_json(json.dumps(data))


def test_missing_field_is_named(tmp_path):
    data = golden()
    _without(data, "layers", 2, "kind")
    file = tmp_path / "report.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ReportError, match=r"report\.json, field layers\[2\]\.kind: .*required"):
        CompressionReport.load(file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_must_be_finite(value):
    layer = compressed_layer("fc") | {"relative_weight_error": value}
    with pytest.raises(ValidationError, match="finite number"):
        report_of(layer)
    with pytest.raises(ValidationError, match="settings must be plain JSON values"):
        report_of(compressed_layer("fc"), settings={"x": value})


def test_settings_must_be_plain_values():
    with pytest.raises(ValidationError, match=r"settings must be plain JSON values: .*set"):
        report_of(compressed_layer("fc"), settings={"x": {1, 2}})


def test_ratio_is_before_over_after():
    assert Total.of(100, 25).ratio == 4.0
    assert Total.of(0, 0).ratio == 1.0
    assert Size(dense=0, compressed=0).ratio == 1.0
    with pytest.raises(ValidationError, match="nothing compresses to nothing"):
        Total.of(5, 0)


def test_layouts_may_be_tuples_and_a_rounded_entropy_is_zero():
    layer = compressed_layer("fc", 4, 6, bond_dim=2)
    layer |= {"layout": ((4, 1), (1, 6)), "entropies_nats": (-1e-17,)}
    read = LayerReport.model_validate(layer)
    assert read.layout == [[4, 1], [1, 6]]
    assert read.entropies_nats == [0.0]


def test_middle_bond():
    layer = compressed_layer("fc", sites=4) | {"entropies_nats": [0.5, 1.5, 0.7]}
    assert LayerReport.model_validate(layer).middle_entropy_nats == 1.5
    assert LayerReport.model_validate(kept_layer("norm", 4)).middle_entropy_nats is None


def test_reading_a_report_imports_neither_pictures_nor_templates():
    code = (
        "import sys, mpocompress.report\n"
        f"mpocompress.report.CompressionReport.load({str(GOLDEN)!r})\n"
        "print(*{'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
