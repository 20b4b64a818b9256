"""Type, sizes and text that all pictures share. Touches no global state and no window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import TextPath

from engram.plots.words import shorten

STYLE: Any = {
    "font.family": "serif",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.unicode_minus": False,
}

_SIGNS = "→…–×"  # of ours, which the serif font has
_MANY_LETTERS = (  # for letters that matplotlib's own fonts lack, where one of them is installed
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans",
    "Arial Unicode MS",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "WenQuanYi Zen Hei",
)


def plain(text: str) -> str:
    """Return text that matplotlib takes literally, on one line.

    A character that no font at hand can draw is written as its escape, such as \\u4e2d.
    """
    # matplotlib warns of a letter without a picture and fails on half a formula between dollars
    escaped = (
        letter if ord(letter) in _drawable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return "".join(escaped).replace("$", r"\$")


def font(texts: Iterable[str], size: float = 7, weight: str = "normal") -> FontProperties:
    """Return a serif font, or the sans-serif with more letters where a text needs them."""
    western = all(ord(letter) < 0x250 or letter in _SIGNS for text in texts for letter in text)
    return FontProperties(family="serif" if western else _families(), size=size, weight=weight)


def fitted(text: str, inches: float, size: float = 7) -> str:
    """Return a text in `plain` words, shortened in its middle until it is no wider than that."""
    letters = len(text)
    while letters > 8:
        shown = plain(shorten(text, letters))
        width = width_of(shown, size)
        if width <= inches:
            return shown
        # at least one letter less; the width says about how many
        letters = max(8, min(letters - 1, int(1.05 * letters * inches / width)))
    return plain(shorten(text, letters))


def width_of(text: str, size: float = 7) -> float:
    """Return how many inches wide a text in `plain` words is."""
    return float(TextPath((0, 0), text, size, font([text], size)).get_extents().width) / 72


def add_heading(figure: Figure, lines: Sequence[str], warning: str = "") -> None:
    """Write lines above everything else, and a warning below it; the figure grows by them.

    Each line is shortened to the figure's width.
    """
    width, height = figure.get_size_inches()
    size = float(rcParams["font.size"])  # of this kind of picture
    lines = [line for line in lines if line]
    figure.set_size_inches(width, height + size / 50 * (len(lines) + bool(warning)))
    if lines:
        text = "\n".join(fitted(line, width - 0.3, size) for line in lines)
        figure.suptitle(text, fontproperties=font(lines, size))
    if warning:
        text = fitted(warning, width - 0.3, size)
        bold = font([warning], size, "bold")
        figure.supxlabel(text, color="#b00020", fontproperties=bold)


def layer_ticks(layers: int) -> range:
    """Return the layers that get a number: all of a small model, every fifth of a large one as in
    the paper.
    """
    if layers > 12:
        return range(0, max(1, layers - 6), 5)
    # "10" and "11" beside each other have no room where names of tokens are wide
    return range(0, layers, 1 if layers <= 10 else 2)


# reading a font's table takes long, and fonts do not come and go while a process runs
@cache
def _families() -> list[str]:
    installed = {entry.name for entry in fontManager.ttflist}
    return ["sans-serif", *(name for name in _MANY_LETTERS if name in installed)]


@cache
def _drawable() -> frozenset[int]:
    """Return the code points that `font` can draw; control characters cannot be drawn."""
    faces = [FT2Font(findfont(FontProperties(family=[name]))) for name in _families()]
    return frozenset(
        code for face in faces for code in face.get_charmap() if chr(code).isprintable()
    )
