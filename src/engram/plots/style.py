"""What all pictures share: type, sizes, text that matplotlib takes literally. Touches no global state and no window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.font_manager import FontProperties

STYLE: Any = {"font.family": "serif", "font.size": 7, "axes.titlesize": 7, "axes.unicode_minus": False}


def plain(text: str) -> str:
    """Text that matplotlib takes literally, and that stays on one line."""
    return text.replace("\n", "\\n").replace("$", r"\$")


def font(texts: Iterable[str]) -> FontProperties:
    """Serif, or the sans-serif that has more letters where a text has other than Western ones."""
    western = all(ord(letter) < 0x250 for text in texts for letter in text)
    return FontProperties(family="serif" if western else "sans-serif", size=7)


def layer_ticks(layers: int) -> range:
    """Layers that get a number: all of a small model's, every fifth of a large one's as in the paper."""
    return range(0, max(1, layers - 6), 5) if layers > 12 else range(layers)
