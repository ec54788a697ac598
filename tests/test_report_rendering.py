import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from matplotlib.figure import Figure

from mpocompress.report import CompressionReport
from tests.report_samples import (
    GOLDEN,
    HOSTILE,
    PARITY,
    compressed_layer,
    encoder,
    kept_layer,
    report_of,
)

_VOID = {"meta", "br", "wbr", "img", "link", "input", "hr", "path", "use", "rect"}


class _Page(HTMLParser):
    """Elements, attributes and text of a page; complains if elements are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def encoder_html():
    return encoder().to_html()


def test_page_asks_for_nothing_from_outside(encoder_html):
    page = _Page(encoder_html)
    assert "http" not in encoder_html.replace("http-equiv", "")
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    links = [a[key] for _, a in page.elements for key in ("href", "src", "xlink:href") if key in a]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in encoder_html
    assert set(re.findall(r"url\((.)", encoder_html)) <= {"#"}


def test_page_is_accessible(encoder_html):
    page = _Page(encoder_html)
    assert page.all("html") == [{"lang": "en"}]
    assert all(a["role"] == "img" and a["aria-label"] for a in page.all("svg"))
    assert all(a.get("scope") in {"col", "row"} for a in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', encoder_html)
    assert {url or href for url, href in used} <= set(ids)


def test_page_follows_the_theme_of_the_reader(encoder_html):
    assert "prefers-color-scheme: dark" in encoder_html
    pictures = "".join(re.findall(r"<svg.*?</svg>", encoder_html, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b(?!\")", pictures) == []
    assert "var(--s1)" in pictures


def test_equal_reports_give_equal_bytes_whatever_the_style(encoder_html):
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9}):
        assert encoder().to_html() == encoder_html


def test_large_report_stays_small_and_shows_the_largest_layers():
    layers = [
        compressed_layer(f"layers.{k}.fc.weight", 1000 + k, 512, sites=4 if k % 2 else 2)
        for k in range(40)
    ]
    html = report_of(*layers).to_html()
    assert len(html.encode()) < 1_500_000
    assert html.count("<figure>") == 40

    layers += [compressed_layer(f"more.{k}.weight", 100, 100, 8) for k in range(20)]
    html = report_of(*layers).to_html()
    assert html.count("<figure>") == 48
    assert "Shown are 48 of 60 compressed layers" in html


def test_chains_show_the_entropy_at_every_bond():
    chain = compressed_layer("chain", sites=4) | {"entropies_nats": [0.5, 1.234, 0.75]}
    html = report_of(chain, compressed_layer("pair")).to_html()
    assert "entropy by bond 0.50, 1.23, 0.75" in html
    assert html.count("entropy by bond") == 1  # a single bond has its entropy in the table


def test_long_spectra_are_thinned_out():
    html = report_of(compressed_layer("fc", 8192, 8192, 2048)).to_html()
    assert len(html) < 100_000


def test_hostile_names_stay_text():
    layer = compressed_layer(HOSTILE) | {
        "reason": HOSTILE,
        "also_known_as": [HOSTILE],
        "relative_weight_error": 0.9,
        "relative_output_error": 0.8,
    }
    report = report_of(
        layer,
        kept_layer(HOSTILE + "2", 10**6, HOSTILE),
        source={"name": HOSTILE, "sha256": HOSTILE},
        settings={HOSTILE: HOSTILE},
        files={HOSTILE: 1},
        seconds={HOSTILE: 1.0},
        onnx_note=HOSTILE,
        tool_version=HOSTILE,
    )
    html = report.to_html()
    page = _Page(html)
    assert "<script" not in html
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any(key.startswith("on") for _, a in page.elements for key in a)
    assert "alert(1)" in page.words

    markdown = report.to_markdown()
    outside_code = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", markdown)
    assert not re.search(r"(?<!\\)<(?!/?details|/?summary)", outside_code)
    stream = io.BytesIO()
    report.plot().savefig(stream, format="svg")
    assert b"<script" not in stream.getvalue()


def test_what_became_of_kept_values_is_told_from_facts_and_never_read_from_a_reason():
    said = "its values took up what is lost before it"
    layers = [
        compressed_layer("fc") | {"relative_output_error": 0.1},
        kept_layer("head", 8) | {"changes": ["corrected"], "uncorrected": None},
        kept_layer("tail", 8, "linear") | {"uncorrected": "paths differ"},
        kept_layer("foreign", 8, "other") | {"reason": f"named like {said}"},
    ]
    report = report_of(*layers)
    for text in (report.to_markdown(), _Page(report.to_html()).words):
        assert f"norm is not converted; {said}" in text
        assert "stays as it was: paths differ" in text
        assert "and 1 dense layer what is lost before" in text


def test_only_options_look_like_options():
    html = report_of(compressed_layer("--name") | {"relative_weight_error": 0.9}).to_html()
    assert '<code class="option">--bond-dim</code>' in html
    assert '<code class="option">--name' not in html


def test_first_screen_says_what_happened():
    words = _Page(CompressionReport.load(GOLDEN).to_html()).words
    assert "tiny.pt" in words
    assert "The ONNX file agrees with PyTorch." in words
    assert "2 weight matrices holding" in words
    assert "the bond dimension" in words
    assert words.index("What was done") < words.index("Where the parameters went")
    assert words.index("Where the parameters went") < words.index("Compressed layers")


def test_markdown_has_every_layer_with_its_numbers():
    markdown = CompressionReport.load(GOLDEN).to_markdown()
    assert (
        "| `blocks.0.fc1.weight` | SVD `24x1,1x12` | 24 × 12 | 3 | 288 → 108 | 2.67× | 288 → 108 "
        "| 21.6 % | 7.12 % | 0.82 | 2.3 |" in markdown
    )
    assert "`head.weight`" not in markdown.split("## Kept")[0]
    assert "| `model.onnx` | 6.32 kB |" in markdown
    assert "| versions.torch | 2.13.0 |" in markdown
    for line in markdown.splitlines():
        assert not line.startswith("|") or line.endswith("|")


@pytest.mark.parametrize("render", [CompressionReport.to_html, CompressionReport.to_markdown])
def test_a_single_site_has_no_bonds(render):
    layer = compressed_layer("fc", 4, 6) | {
        "layout": [[4, 6]],
        "bond_dims": [],
        "schmidt_values": [],
        "entropies_nats": [],
        "candidates": [],
    }
    assert "1 site" in render(report_of(layer, kept_layer("b", 4)))


@pytest.mark.parametrize("render", [CompressionReport.to_html, CompressionReport.to_markdown])
def test_a_zero_matrix_can_be_shown(render):
    layer = compressed_layer("fc", 40, 60, 1) | {
        "schmidt_values": [[0.0]],
        "entropies_nats": [0.0],
        "relative_weight_error": 0.0,
    }
    assert "fc" in render(report_of(layer, parity=PARITY))


def test_plot_gives_a_figure_that_pyplot_does_not_know():
    code = (
        "import sys, io\n"
        "from mpocompress.report import CompressionReport\n"
        f"report = CompressionReport.load({str(GOLDEN)!r})\n"
        "report.plot().savefig(io.BytesIO(), format='png'); report.to_html()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_plot_draws_bars_and_one_panel_per_layer():
    figure = encoder(blocks=2).plot()
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 1 + 12
    nothing = report_of(kept_layer("norm", 5)).plot()
    assert len(nothing.axes) == 1
