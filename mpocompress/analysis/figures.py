"""Pictures of entanglement, as matplotlib figures that nobody else knows of (no pyplot).

matplotlib is imported when a picture is drawn. Save one with `figure.savefig("name.png")`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpocompress.analysis.entanglement import Entanglement
from mpocompress.analysis.recorder import EntanglementRecorder
from mpocompress.analysis.states import StateEntanglement
from mpocompress.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of the report.
_INK, _MUTED, _RULE, _PAPER = "#1c2733", "#5a6774", "#d8dee5", "#ffffff"
_LINES = ("#2c6cb5", "#b8621b", "#1a7f6d", "#b04a79", "#7263c1", "#6b7a1a")

# Small multiples beyond this would be a wall of pictures; the first layers are shown.
MAX_LAYERS = 24
_COLUMNS = 3
# Schmidt values below this share of the largest are the noise of float32 weights.
_FLOOR = 1e-7


def profile_figure(
    found: Entanglement, *, compare: Entanglement | None = None, labels: tuple[str, str] = ("", "")
) -> "Figure":
    """Draw the entropy along every layer, bond by bond, below the largest that is possible.

    Args:
        found: what to draw.
        compare: the same layers measured otherwise (other weights, or the other metric), drawn as a
            second line.
        labels: of both, for the legend.

    Raises:
        DataError: no layer has a bond.
    """
    layers = [layer for layer in found.layers if layer.entropies_nats][:MAX_LAYERS]
    if not layers:
        raise DataError("no layer has a bond, so there is no profile. Choose another layout.")
    names = {layer.name for layer in compare.layers} if compare is not None else set()
    with _defaults():
        figure, panels = _panels(len(layers))
        for axes, layer in zip(panels, layers, strict=True):
            places = range(len(layer.entropies_nats))
            axes.fill_between(places, layer.capacities_nats, color=_RULE, alpha=0.6, linewidth=0)
            axes.plot(
                places,
                layer.capacities_nats,
                color=_MUTED,
                linewidth=1,
                linestyle=":",
                marker="_",
                label="maximum",
            )
            axes.plot(
                places,
                layer.entropies_nats,
                color=_LINES[0],
                marker="o",
                markersize=3.5,
                label=labels[0] or f"{found.metric} metric",
            )
            if compare is not None and layer.name in names:
                other = compare.layer(layer.name)
                axes.plot(
                    range(len(other.entropies_nats)),
                    other.entropies_nats,
                    color=_LINES[1],
                    marker="s",
                    markersize=3.5,
                    label=labels[1] or f"{compare.metric} metric",
                )
            axes.set_title(
                f"layer {layer.name or '(model)'} ({layer.kind}): {layer.growth.verdict}",
                fontsize=8,
                color=_INK,
                parse_math=False,
            )
            axes.set_xticks(list(places))
            axes.set_ylim(0, 1.08 * max(max(layer.capacities_nats), 1e-3))
            _dress(axes, "bond", "entropy (nats)")
        _legend(figure, panels[0])
    return figure


def spectra_figure(found: Entanglement) -> "Figure":
    """Draw the Schmidt values of every layer over the largest, log scale, one line for each bond.

    Raises:
        DataError: no layer has a bond.
    """
    layers = [layer for layer in found.layers if layer.schmidt_values][:MAX_LAYERS]
    if not layers:
        raise DataError("no layer has a bond, so there is no spectrum. Choose another layout.")
    with _defaults():
        figure, panels = _panels(len(layers))
        for axes, layer in zip(panels, layers, strict=True):
            for bond, values in enumerate(layer.schmidt_values):
                largest = values[0] or 1.0
                axes.plot(
                    range(1, len(values) + 1),
                    [max(value / largest, _FLOOR) for value in values],
                    color=_LINES[bond % len(_LINES)],
                    linewidth=1.3,
                    marker="." if len(values) <= 16 else "",
                    label=f"bond {bond}",
                )
            axes.set_yscale("log")
            axes.set_xscale("log")
            axes.set_title(
                f"layer {layer.name or '(model)'}", fontsize=8, color=_INK, parse_math=False
            )
            _dress(axes, "number", "Schmidt value / largest")
        most = max(range(len(layers)), key=lambda place: len(layers[place].schmidt_values))
        _legend(figure, panels[most])
    return figure


def training_figure(recorder: EntanglementRecorder) -> "Figure":
    """Draw the entropy at every bond of every layer over the training steps.

    Raises:
        DataError: no layer has a bond.
    """
    names = [name for name in recorder.names if recorder.entropies_nats(name)[0]][:MAX_LAYERS]
    if not names:
        raise DataError("no layer has a bond, so nothing was recorded. Choose another layout.")
    with _defaults():
        figure, panels = _panels(len(names))
        for axes, name in zip(panels, names, strict=True):
            history = recorder.entropies_nats(name)
            for bond in range(len(history[0])):
                axes.plot(
                    recorder.steps,
                    [entropies[bond] for entropies in history],
                    color=_LINES[bond % len(_LINES)],
                    linewidth=1.5,
                    label=f"bond {bond}",
                )
            axes.set_title(f"layer {name or '(model)'}", fontsize=8, color=_INK, parse_math=False)
            axes.set_ylim(bottom=0)
            _dress(axes, "step", "entropy (nats)")
        most = max(range(len(names)), key=lambda place: len(panels[place].lines))
        _legend(figure, panels[most])
    return figure


def state_figure(states: Mapping[str, StateEntanglement]) -> "Figure":
    """Draw the entropy of states against the cut, with the Haar-random mean above and 0 below.

    Args:
        states: label -> state, all of the same sites.

    Raises:
        DataError: no state, or states of different sites.
    """
    found = list(states.values())
    if not found or len({(state.num_sites, state.local_dim) for state in found}) != 1:
        raise DataError("give one or more states of the same number of sites and local dimension.")
    from matplotlib.figure import Figure

    with _defaults():
        figure = Figure(figsize=(7.0, 4.0), facecolor=_PAPER, layout="constrained")
        axes = figure.add_subplot()
        cuts = range(1, found[0].num_sites)
        axes.plot(cuts, found[0].page_nats, color=_MUTED, linestyle=":", label="Haar-random (Page)")
        axes.axhline(0, color=_MUTED, linestyle="--", linewidth=1, label="product state")
        for place, (label, state) in enumerate(states.items()):
            # In turn wide and thin, the thin ones above, so that of two lines that coincide, as a
            # found state and the exact one, both are seen.
            thin = place % 2
            axes.plot(
                cuts,
                state.entropies_nats,
                color=_LINES[place % len(_LINES)],
                marker="o",
                linewidth=1.2 if thin else 2.4,
                markersize=3 if thin else 6.5,
                zorder=3 if thin else 2,
                label=label,
            )
        _dress(axes, "sites left of the cut", "entropy (nats)")
        # Beside the axes: with many lines there is no free corner.
        axes.legend(
            fontsize=8, frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return figure


def _panels(count: int) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(max(3.3 * columns, 4.5), 2.5 * rows + 0.4), facecolor=_PAPER, layout="constrained"
    )
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _dress(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=8, color=_MUTED)
    axes.set_ylabel(y_label, fontsize=8, color=_MUTED)
    axes.tick_params(colors=_MUTED, labelcolor=_MUTED, labelsize=8, length=2, pad=2)
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), int(figure.get_figwidth() / 1.2)),
        fontsize=8,
        frameon=False,
        labelcolor=_INK,
    )


@contextmanager
def _defaults() -> Iterator[None]:
    """Matplotlib's own defaults, so that nobody's style sheet changes a picture."""
    from matplotlib import rc_context, rcParamsDefault

    with rc_context(
        {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    ):
        yield
