"""Type, sizes and text that all pictures share. Touches no global state and no window."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

STYLE: Any = {
    "font.family": "serif",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.unicode_minus": False,
}

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
    western = all(ord(letter) < 0x250 for text in texts for letter in text)
    return FontProperties(family="serif" if western else _families(), size=size, weight=weight)


def layer_ticks(layers: int) -> range:
    """Return the layers that get a number: all of a small model, every fifth of a large one as in
    the paper.
    """
    return range(0, max(1, layers - 6), 5) if layers > 12 else range(layers)


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
