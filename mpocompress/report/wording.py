"""Numbers and names as the report writes them, the same in Markdown and in HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpocompress.mpo import Layout
from mpocompress.report.layer import Candidate, Change, LayerReport

_CHANGES: dict[Change, str] = {
    "corrected": "its values took up what is lost before it",
    "healed": "its values were trained along when the model was healed",
    "swept": "its values were trained along in sweeps on the loss",
}

# Ratios this close to 1 are called unchanged: a bias more or less is not a difference.
_UNCHANGED = 0.005
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Code:
    """A name or an option, to be set in the typeface of code."""

    text: str


@dataclass(frozen=True, slots=True)
class Option(Code):
    """An option of the command line, which no line may break."""


Sentence = tuple[str | Code, ...]
"""Text with code in it; the pieces are joined as they are."""

Tone = Literal["good", "same", "bad"]
"""How a statement is coloured."""


def visible(text: str) -> str:
    """Make control characters visible, so that a name can neither hide nor break a line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def as_sentence(text: str) -> str:
    """Begin with a capital letter and end with a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def reason_text(layer: LayerReport) -> str:
    """Why a layer is what it is, and what became of its values where it was kept."""
    more = [_CHANGES[change] for change in layer.changes]
    if layer.uncorrected is not None:
        stays = "it was to take up what is lost before it and stays as it was"
        more.insert(0, f"{stays}: {layer.uncorrected}")
    return "; ".join([layer.reason.rstrip("."), *more]) if more else layer.reason


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """Write "1 layer", "36 layers"."""
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"


def _three_digits(value: float) -> str:
    """About three significant digits, at most two decimals: 1.86, 28.4, 803."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{min(max(decimals, 0), 2)}f}"


def _without_zeros(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


def count_words(number: int) -> str:
    """A count in words: 1.86 million, 66.1 thousand, 9,402."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**4, "thousand")):
        if number >= size:
            unit = 1000 if word == "thousand" else size
            return f"{_without_zeros(_three_digits(number / unit))} {word}"
    return f"{number:,}"


def count_short(number: int) -> str:
    """A count with a unit letter: 1.86 M, 66.1 k, 9,402."""
    for size, unit, letter in (
        (10**9, 10**9, "G"),
        (10**6, 10**6, "M"),
        (10**4, 10**3, "k"),
    ):
        if number >= size:
            return f"{_without_zeros(_three_digits(number / unit))} {letter}"
    return f"{number:,}"


def byte_size(number: int) -> str:
    """Bytes in decimal units: 7.45 MB."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{_three_digits(number / size)} {unit}"
    return f"{number} bytes"


def times(ratio: float) -> str:
    """A ratio with three significant digits: 28.4×."""
    return f"{_three_digits(ratio)}×"


def is_unchanged(ratio: float) -> bool:
    """Whether a ratio is 1 as far as a reader cares."""
    return abs(ratio - 1) < _UNCHANGED


def change(ratio: float, *, smaller: str, larger: str, same: str) -> str:
    """Say a compression ratio in words: "28.4× smaller", "1.6× larger", "same"."""
    if is_unchanged(ratio):
        return same
    if ratio == 0:
        return "none before"
    return f"{times(ratio)} {smaller}" if ratio > 1 else f"{times(1 / ratio)} {larger}"


def percent(share: float) -> str:
    """A share as a percentage, never rounded to 0 or 100 unless it is that."""
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    number = 100 * share
    if number < 0.1:
        return "below 0.1 %"
    if 99.9 < number < 100:
        return "over 99.9 %"
    return f"{number:.1f} %" if number < 10 or number > 99 else f"{number:.0f} %"


def relative_error(error: float | None) -> str:
    """A relative error: in percent down to 0.01 %, below that as a power of ten."""
    if error is None:
        return "–"
    if error >= 1e-4:
        return f"{_three_digits(100 * error)} %"
    return scientific(error)


def scientific(value: float) -> str:
    """A small number with two digits: 3.1×10⁻⁶; from 0.01 on without a power of ten: 0.032."""
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    ten = "10" + str(int(power)).translate(_SUPERSCRIPTS)
    return ten if mantissa == "1.0" else f"{mantissa}×{ten}"


def seconds(value: float) -> str:
    """Wall time: 0.32 s, 41 s, 3 min 5 s."""
    if value >= 60:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def layout_text(layout: Sequence[Sequence[int]]) -> str:
    """A layout as `--layout` takes it: out x in per site."""
    return ",".join(f"{out}x{in_}" for out, in_ in layout)


def layout_name(layout: Sequence[Sequence[int]]) -> str:
    """What to call a layout: SVD, or by its number of sites."""
    if is_svd(layout):
        return "SVD"
    return plural(len(layout), "site")


def is_svd(layout: Sequence[Sequence[int]]) -> bool:
    """Whether a layout, of a layer that has one, is ((out, 1), (1, in)): the truncated SVD."""
    return bool(layout) and Layout.from_pairs(layout).is_svd


def bond_dims_text(bond_dims: Sequence[int]) -> str:
    """Bond dimensions from left to right; a single site has none."""
    return ", ".join(str(dim) for dim in bond_dims) or "none"


def stored_as(candidate: Candidate) -> str:
    """Precision and bytes of a candidate; nothing where only its parameters count."""
    if candidate.precision is None or candidate.bytes is None:
        return ""
    return f"{candidate.precision}, {candidate.bytes:,} bytes"


def shape_text(shape: Sequence[int]) -> str:
    """A shape: 1024 × 784."""
    return " × ".join(str(size) for size in shape) or "scalar"


def entropy_text(layer: LayerReport) -> str:
    """Entanglement entropy at the middle bond, in nats."""
    entropy = layer.middle_entropy_nats
    return "–" if entropy is None else f"{entropy:.2f}"


def entropy_profile_text(layer: LayerReport) -> str:
    """Entanglement entropies along the chain, in nats: "0.95, 1.60, 0.91"; "" with one bond."""
    entropies = layer.entropies_nats or []
    return ", ".join(f"{entropy:.2f}" for entropy in entropies) if len(entropies) > 1 else ""


def effective_bond_dim_text(layer: LayerReport) -> str:
    """Effective bond dimension at the middle bond: exp of the entropy in nats."""
    entropy = layer.middle_entropy_nats
    return "–" if entropy is None else f"{math.exp(entropy):.1f}"


def enumeration(words: Sequence[str]) -> str:
    """Join words: "1, 7 and 32"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
