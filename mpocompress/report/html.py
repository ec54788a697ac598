"""A report as one HTML page that needs nothing else: no network, no scripts, pictures inside."""

from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mpocompress.report import cautions, expectations, narrative, verdicts, wording
from mpocompress.report.figures import (
    group_colours,
    layers_with_spectra,
    lowest_share,
    parameters_figure,
    spectrum_figure,
    to_svg,
)
from mpocompress.report.glossary import GLOSSARY
from mpocompress.report.groups import Group, kept_groups, parameter_groups
from mpocompress.report.layer import LayerReport
from mpocompress.report.schema import CompressionReport
from mpocompress.report.tradeoffs import layers_with_curves, tradeoff_figure


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spectrum:
    name: str
    svg: Markup
    entropies: str


def render_html(report: CompressionReport) -> str:
    """Render a report as one self-contained page; equal reports give equal bytes."""
    groups = parameter_groups(report)
    with_spectra = layers_with_spectra(report)
    lowest = lowest_share(with_spectra)
    compressed = report.compressed_layers
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            headline=narrative.headline(report),
            facts=narrative.facts(report),
            done=narrative.what_was_done(report),
            verdicts=[
                verdict
                for verdict in (verdicts.onnx_verdict(report), verdicts.quality_verdict(report))
                if verdict is not None
            ],
            cautions=cautions.cautions(report),
            picture_wide=_parameters_svg(report, groups, "wide", width=10.4, font_size=9.0),
            picture_narrow=_parameters_svg(report, groups, "narrow", width=4.4, font_size=9.5),
            groups=list(zip(groups, group_colours(groups), strict=True)),
            compressed=compressed,
            budget=expectations.budget_sentence(report),
            expected_columns=expectations.COLUMNS,
            expected=expectations.comparison_rows(report),
            show_output_error=any(layer.relative_output_error is not None for layer in compressed),
            tradeoffs=_tradeoffs(groups),
            spectra=[_spectrum(layer, place, lowest) for place, layer in enumerate(with_spectra)],
            most_bonds=max((len(layer.bond_dims or []) for layer in with_spectra), default=0),
            kept=kept_groups(report),
            settings=narrative.settings_rows(report.settings),
            glossary=GLOSSARY,
        )
    )


def _parameters_svg(
    report: CompressionReport,
    groups: tuple[Group, ...],
    key: str,
    *,
    width: float,
    font_size: float,
) -> Markup:
    figure = parameters_figure(groups, width=width, font_size=font_size)
    total = report.totals.parameters.model
    alt = (
        f"Two bars on one scale: {total.dense:,} parameters before, {total.compressed:,} after. "
        "The list that follows gives the parts."
    )
    return Markup(to_svg(figure, alt=alt, key=key))  # matplotlib escapes its text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tradeoffs:
    wide: Markup
    narrow: Markup
    colours: list[tuple[Group, str]]


def _tradeoffs(groups: tuple[Group, ...]) -> _Tradeoffs | None:
    """The curves of loss over size, in two sizes of picture; None where none is known."""
    layers = layers_with_curves(groups)
    if not layers:
        return None
    alt = (
        f"Predicted change of the outputs over the size of {wording.plural(len(layers), 'layer')}, "
        "one line each, with a dot at what was chosen. The tables that follow give the numbers."
    )
    wide, narrow = (
        Markup(to_svg(tradeoff_figure(layers, **size), alt=alt, key=key))
        for key, size in (
            ("wide-tradeoffs", {"width": 10.4, "height": 3.4, "font_size": 9.0}),
            ("narrow-tradeoffs", {"width": 4.6, "height": 3.2, "font_size": 9.5}),
        )
    )
    drawn = {colour for _, colour in layers}
    colours = zip(groups, group_colours(groups), strict=True)
    return _Tradeoffs(wide=wide, narrow=narrow, colours=[c for c in colours if c[1] in drawn])


def _spectrum(layer: LayerReport, place: int, lowest: float) -> _Spectrum:
    figure = spectrum_figure(layer, lowest=lowest, width=2.9, height=1.7)
    ends = [
        f"bond {bond}: {len(values)} values, the last kept {kept:.2g} of the first"
        for bond, values in enumerate(layer.schmidt_values or [])
        for kept in [
            values[min((layer.bond_dims or [])[bond], len(values)) - 1] / (values[0] or 1.0)
        ]
    ]
    alt = f"Schmidt values of {wording.visible(layer.name)}. {'; '.join(ends)}."
    svg = to_svg(figure, alt=alt, key=f"spectrum-{place}")
    entropies = wording.entropy_profile_text(layer)
    return _Spectrum(name=layer.name, svg=Markup(svg), entropies=entropies)  # as above


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mpocompress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        name=_name,
        sentence=_sentence,
        visible=wording.visible,
        as_sentence=wording.as_sentence,
        count="{:,}".format,
        bytes=wording.byte_size,
        times=wording.times,
        percent=wording.percent,
        error=wording.relative_error,
        seconds=wording.seconds,
        layout=_layout,
        layout_name=wording.layout_name,
        bonds=wording.bond_dims_text,
        shape=wording.shape_text,
        group_label=_group_label,
        entropy=wording.entropy_text,
        effective=wording.effective_bond_dim_text,
        plural=wording.plural,
        reason=wording.reason_text,
    )
    return environment


def _name(text: str) -> Markup:
    """A name in code that may break after dots and underscores."""
    safe = str(escape(wording.visible(text)))
    for mark in "._":
        safe = safe.replace(mark, f"{mark}<wbr>")
    return Markup(f"<code>{safe}</code>")  # escaped above


def _group_label(group: Group) -> Markup:
    if isinstance(group.label, str):
        return escape(group.label)
    count = len(group.layers)
    return Markup("{}{}").format(f"{count:,} × " if count > 1 else "", _name(group.label.text))


def _layout(layout: list[list[int]]) -> Markup:
    """A layout in code, allowed to break between sites."""
    sites = wording.layout_text(layout).replace(",", ",<wbr>")
    return Markup(f"<code>{sites}</code>")  # digits only


def _sentence(pieces: wording.Sentence) -> Markup:
    return Markup("").join(_piece(piece) for piece in pieces)


def _piece(piece: str | wording.Code) -> Markup:
    if isinstance(piece, wording.Option):
        return Markup('<code class="option">{}</code>').format(piece.text)
    if isinstance(piece, wording.Code):
        return _name(piece.text)
    return escape(wording.visible(piece))
