"""Pictures of a report, drawn with matplotlib and without pyplot.

Each picture is one function that draws on given axes; `overview_figure` puts them together for
`CompressionReport.plot`, and `to_svg` makes the fragments that the HTML page holds. In a fragment
each colour of `PALETTE` is a CSS variable of the same name, so that the page's theme decides, and
text takes the page's typeface.
"""

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any, Literal

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mpocompress.report.groups import (
    MAX_COMPRESSED_GROUPS,
    MAX_KEPT_GROUPS,
    Group,
    parameter_groups,
)
from mpocompress.report.layer import LayerReport
from mpocompress.report.schema import CompressionReport
from mpocompress.report.wording import Code, count_short, visible

PALETTE = {
    "ink": "#1c2733",
    "muted": "#5a6774",
    "rule": "#d8dee5",
    "paper": "#ffffff",
    "s1": "#2c6cb5",
    "s2": "#b8621b",
    "s3": "#1a7f6d",
    "s4": "#b04a79",
    "s5": "#7263c1",
    "s6": "#6b7a1a",
    "k1": "#6b7783",
    "k2": "#8b97a3",
    "k3": "#b4bdc6",
}
"""Every colour of the pictures: s for what was compressed, k for what was kept."""

# Small multiples beyond this would be a wall of pictures; the largest layers are shown.
MAX_SPECTRA = 48
# Schmidt values below this share of the largest are below the noise of float32 weights.
_SPECTRUM_FLOOR = 1e-6
# Of `overview_figure`; the row in inches.
_COLUMNS = 4
_ROW_HEIGHT = 1.9
# Points of a line on some 200 pixels.
_MAX_POINTS = 64
_CHAR_WIDTH = 0.56  # of the font size, DejaVu Sans and its like

_IDS = re.compile(r'\bid="([^"]+)"|url\(#([^)]+)\)|href="#([^"]+)"')


def group_colours(groups: Sequence[Group]) -> list[str]:
    """The name in `PALETTE` for each group, in order within its status."""
    counts = {"compressed": 0, "kept": 0}
    limits = {"compressed": MAX_COMPRESSED_GROUPS, "kept": MAX_KEPT_GROUPS}
    names = []
    for group in groups:
        letter = "s" if group.status == "compressed" else "k"
        names.append(f"{letter}{counts[group.status] % limits[group.status] + 1}")
        counts[group.status] += 1
    return names


def parameters_figure(groups: Sequence[Group], *, width: float, font_size: float) -> Figure:
    """Draw where the parameters went: one bar before, one after, on one scale.

    Args:
        groups: what `parameter_groups` gives.
        width: in inches.
        font_size: in points.
    """
    with default_style():
        figure = Figure(figsize=(width, 1.9))
        draw_parameters(figure.add_axes((0, 0, 1, 1)), groups, width, font_size)
    return figure


def spectrum_figure(layer: LayerReport, *, lowest: float, width: float, height: float) -> Figure:
    """Draw the Schmidt spectra of one layer; width and height in inches."""
    with default_style():
        figure = Figure(figsize=(width, height))
        left, bottom = 0.4 / width, 0.3 / height
        axes = figure.add_axes((left, bottom, 0.96 - left, 0.95 - bottom))
        draw_spectrum(axes, layer, lowest)
    return figure


def overview_figure(report: CompressionReport) -> Figure:
    """Draw both pictures of a report on one figure, which nobody else knows of."""
    groups = parameter_groups(report)
    shown = layers_with_spectra(report)
    rows = math.ceil(len(shown) / _COLUMNS)
    # All in inches from the top: the height grows with the rows, the margins do not.
    width, bars, legend, gap = 11.0, 1.9, 0.2 + 0.2 * len(groups), 0.6
    spectra = gap + _ROW_HEIGHT * rows if rows else 0.0
    height = bars + legend + spectra
    with default_style():
        figure = Figure(figsize=(width, height), facecolor=PALETTE["paper"])
        axes = figure.add_axes((0.03, 1 - bars / height, 0.94, bars / height))
        draw_parameters(axes, groups, 0.94 * width, 9)
        _add_legend(figure, groups, top=1 - (bars + 0.05) / height)
        if rows:
            figure.text(
                0.03,
                (spectra - 0.25) / height,
                "Schmidt values over the largest, by bond",
                fontsize=10,
                color=PALETTE["ink"],
            )
        lowest = lowest_share(shown)
        cell = 0.97 / _COLUMNS
        for place, layer in enumerate(shown):
            row, column = divmod(place, _COLUMNS)
            bottom = spectra - gap - _ROW_HEIGHT * (row + 1) + 0.35
            size = (0.8 * cell, (_ROW_HEIGHT - 0.65) / height)
            axes = figure.add_axes((0.045 + cell * column, bottom / height, *size))
            draw_spectrum(axes, layer, lowest)
            axes.set_title(_clip_left(visible(layer.name), 38), fontsize=8, parse_math=False)
    return figure


def layers_with_spectra(report: CompressionReport) -> list[LayerReport]:
    """Compressed layers whose spectra are drawn: the largest with known ones, in model order."""
    known = [layer for layer in report.compressed_layers if layer.schmidt_values]
    if len(known) <= MAX_SPECTRA:
        return known
    largest = sorted(known, key=lambda layer: -layer.parameters.dense)[:MAX_SPECTRA]
    names = {layer.name for layer in largest}
    return [layer for layer in known if layer.name in names]


def lowest_share(layers: Sequence[LayerReport]) -> float:
    """The decade at which the axes of all spectra end: the smallest Schmidt value over the largest.

    One for all layers, so that their slopes can be compared by eye.
    """
    shares = [
        max(min((s for s in values if s > 0), default=1.0) / (values[0] or 1.0), _SPECTRUM_FLOOR)
        for layer in layers
        for values in layer.schmidt_values or []
    ]
    return min(0.1, 10.0 ** math.floor(math.log10(min(shares, default=0.1)) + 1e-9))


def draw_parameters(axes: Axes, groups: Sequence[Group], width: float, font_size: float) -> None:
    """Two stacked bars on one scale, each group's part before flowing into its part after."""
    before = sum(group.dense for group in groups)
    after = sum(group.compressed for group in groups)
    scale = max(before, after, 1)
    axes.set_xlim(-0.001 * scale, 1.001 * scale)
    axes.set_ylim(0, 10)
    axes.set_axis_off()
    upper, lower, height = 6.3, 1.8, 2.3
    left_before = left_after = 0
    for group, colour in zip(groups, group_colours(groups), strict=True):
        fill = PALETTE[colour]
        right_before, right_after = left_before + group.dense, left_after + group.compressed
        band = [
            (left_before, upper),
            (right_before, upper),
            (right_after, lower + height),
            (left_after, lower + height),
        ]
        axes.add_patch(Polygon(band, facecolor=fill, alpha=0.22, linewidth=0))
        for left, size, bottom in (
            (left_before, group.dense, upper),
            (left_after, group.compressed, lower),
        ):
            axes.add_patch(
                Rectangle(
                    (left, bottom),
                    size,
                    height,
                    facecolor=fill,
                    edgecolor=PALETTE["paper"],
                    linewidth=0.8 if size > 0.004 * scale else 0,
                )
            )
        room = width * 72 * group.dense / scale - font_size
        label = _fitting_label(group.label, room / (_CHAR_WIDTH * font_size))
        if label:
            axes.text(
                left_before + group.dense / 2,
                upper + height / 2,
                label,
                # Light greys cannot carry the colour of the paper.
                color=PALETTE["ink" if colour in ("k2", "k3") else "paper"],
                fontsize=font_size,
                ha="center",
                va="center_baseline",
                parse_math=False,
            )
        left_before, left_after = right_before, right_after
    caption: dict[str, Any] = {"color": PALETTE["ink"], "fontsize": font_size, "ha": "left"}
    axes.text(0, upper + height + 0.4, f"Before: {count_short(before)} parameters", **caption)
    axes.text(0, lower - 0.4, f"After: {count_short(after)} parameters", va="top", **caption)


def draw_spectrum(axes: Axes, layer: LayerReport, lowest: float) -> None:
    """Schmidt values over the largest, log scale, one line per bond; a dot ends what is kept."""
    longest = 1
    for bond, values in enumerate(layer.schmidt_values or []):
        largest = values[0] or 1.0
        places = _spread(len(values))
        colour = PALETTE[f"s{bond % MAX_COMPRESSED_GROUPS + 1}"]
        kept = min((layer.bond_dims or [])[bond], len(values))
        axes.plot(
            [place + 1 for place in places],
            [max(values[place] / largest, lowest) for place in places],
            color=colour,
            linewidth=1.5,
        )
        axes.plot(
            [kept], [max(values[kept - 1] / largest, lowest)], "o", color=colour, markersize=3.2
        )
        longest = max(longest, len(values))
    axes.set_yscale("log")
    axes.set_ylim(lowest * 0.8, 1.5)
    axes.set_xlim(1 - 0.02 * longest, longest + 0.04 * longest)
    decades = round(-math.log10(lowest))
    step = max(1, math.ceil(decades / 3))
    ticks = [10.0**-power for power in range(0, decades + 1, step)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _decade(value)))
    axes.xaxis.set_major_locator(FixedLocator(sorted({1, (longest + 1) // 2, longest})))
    style_axes(axes, font_size=8, grid="y")


def style_axes(axes: Axes, *, font_size: float, grid: Literal["both", "x", "y"]) -> None:
    """Quiet ticks, rules and spines, for pictures with axes."""
    axes.tick_params(
        colors=PALETTE["muted"], labelcolor=PALETTE["muted"], labelsize=font_size, length=2, pad=2
    )
    axes.set_facecolor("none")
    axes.grid(axis=grid, color=PALETTE["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALETTE["rule"])


def to_svg(figure: Figure, *, alt: str, key: str) -> str:
    """Write a figure as an SVG element for the inside of an HTML page.

    Args:
        figure: what to write.
        alt: what a screen reader says.
        key: unique within the page; it keeps the ids of two pictures apart.

    Returns:
        The element; the same bytes for the same figure. The text in it is escaped.
    """
    stream = io.StringIO()
    with default_style(), rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = stream.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    # What the page must not inherit: a style for all elements, and links to vocabularies.
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", body, flags=re.S
    )
    body = body.replace("xlink:href", "href")
    body = _IDS.sub(lambda found: _prefixed(found, key), body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", body)
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r">\s+<", "><", body).strip()
    width, height = (round(72 * inches, 2) for inches in figure.get_size_inches())
    return (
        f'<svg class="{escape(key.split("-")[0])}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(alt)}">{body}'
    )


def _add_legend(figure: Figure, groups: Sequence[Group], *, top: float) -> None:
    names = [
        f"{_clip_left(_label_text(group.label), 70)}: {group.dense:,} → {group.compressed:,}"
        for group in groups
    ]
    handles = [Rectangle((0, 0), 1, 1, facecolor=PALETTE[name]) for name in group_colours(groups)]
    legend = figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.03, top),
        borderpad=0,
        borderaxespad=0,
        frameon=False,
        fontsize=8,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def default_style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, so that nobody's style sheet changes a report."""
    return rc_context(
        {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    )


def _prefixed(found: re.Match[str], key: str) -> str:
    own, url, href = found.groups()
    if own is not None:
        return f'id="{key}-{own}"'
    return f"url(#{key}-{url})" if url is not None else f'href="#{key}-{href}"'


def _fitting_label(label: str | Code, characters: float) -> str:
    """As many trailing parts of a dotted name as fit, but not only one of many; or nothing."""
    if isinstance(label, str):
        return label if len(label) <= characters else ""
    parts = visible(label.text).removesuffix(".weight").split(".")
    for start in range(max(1, len(parts) - 1)):
        text = ".".join(parts[start:])
        if len(text) <= characters and parts[start] != "*":
            return text
    return ""


def _label_text(label: str | Code) -> str:
    return visible(label.text) if isinstance(label, Code) else label


def _clip_left(text: str, limit: int) -> str:
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _spread(count: int) -> list[int]:
    """At most `_MAX_POINTS` positions, evenly spread, with both ends."""
    if count <= _MAX_POINTS:
        return list(range(count))
    step = (count - 1) / (_MAX_POINTS - 1)
    return sorted({round(step * point) for point in range(_MAX_POINTS)})


def _decade(value: float) -> str:
    power = round(math.log10(value))
    return f"{value:g}" if power > -4 else f"1e{power}"
