"""The picture of what each layer would lose at other sizes, and where the plan put it."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from mpocompress.report.figures import PALETTE, default_style, group_colours, style_axes
from mpocompress.report.groups import Group
from mpocompress.report.layer import Candidate, LayerReport

# Below this change of the outputs, which nobody would see, the axis ends.
_LEAST_CHANGE = 1e-5
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def layers_with_curves(groups: Sequence[Group]) -> list[tuple[LayerReport, str]]:
    """Compressed layers whose loss is predicted at two sizes or more, with their group's colour."""
    return [
        (layer, colour)
        for group, colour in zip(groups, group_colours(groups), strict=True)
        for layer in group.layers
        if len(curve_of(layer)) >= 2
    ]


def curve_of(layer: LayerReport) -> list[Candidate]:
    """The layer's candidates with a predicted change of the outputs, smallest first."""
    known = [found for found in layer.candidates if found.output_change is not None]
    return sorted(known, key=_size)


def tradeoff_figure(
    layers: Sequence[tuple[LayerReport, str]], *, width: float, height: float, font_size: float
) -> Figure:
    """Draw the curves of `layers_with_curves` on one pair of axes.

    Args:
        layers: with the names of their colours in `PALETTE`.
        width: in inches.
        height: likewise.
        font_size: in points.
    """
    with default_style():
        figure = Figure(figsize=(width, height))
        left, bottom = 0.75 / width, 0.55 / height
        axes = figure.add_axes((left, bottom, 0.98 - left, 0.96 - bottom))
        _draw(axes, layers, font_size)
    return figure


def _draw(axes: Axes, layers: Sequence[tuple[LayerReport, str]], font_size: float) -> None:
    shares, changes = [1.0], [_LEAST_CHANGE]
    for layer, colour in layers:
        points = [(_share(layer, found), _change(found), found.chosen) for found in curve_of(layer)]
        shares += [share for share, _, _ in points]
        changes += [change for _, change, _ in points]
        axes.plot(
            [share for share, _, _ in points],
            [change for _, change, _ in points],
            color=PALETTE[colour],
            linewidth=1.0,
            alpha=0.55,
        )
        for share, change, chosen in points:
            if chosen:
                axes.plot([share], [change], "o", color=PALETTE[colour], markersize=4.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(shares) * 0.93, max(shares) * 1.07)
    least = min((change for change in changes if change > _LEAST_CHANGE), default=_LEAST_CHANGE)
    axes.set_ylim(0.8 * least, 1.3 * max(changes))
    ticks = [share for share in _SHARES if share >= min(shares)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_major_locator(LogLocator(base=10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda change, _: f"{100 * change:g} %"))
    text: dict[str, Any] = {"color": PALETTE["muted"], "fontsize": font_size}
    axes.set_xlabel("size of the layer, share of the dense one", **text)
    axes.set_ylabel("predicted change of the outputs", **text)
    style_axes(axes, font_size=font_size, grid="both")


def _size(found: Candidate) -> float:
    """Bytes where precisions differ, else numbers."""
    return found.parameters if found.bytes is None else found.bytes


def _share(layer: LayerReport, found: Candidate) -> float:
    # Where bytes are known, the model is float32: only such models are rounded.
    dense = layer.parameters.dense * (1 if found.bytes is None else 4)
    return _size(found) / dense


def _change(found: Candidate) -> float:
    return max(found.output_change or 0.0, _LEAST_CHANGE)
