"""Words of pictures, before anything is drawn: this module does not import matplotlib."""

from __future__ import annotations


def shorten(text: str, letters: int) -> str:
    """Return a text shortened to a number of letters, by "…" in its middle.

    Example:
        >>> from engram.plots.words import shorten
        >>> shorten("The Space Needle is in", 11)
        'The S…is in'
    """
    if len(text) <= letters:
        return text
    front = (letters - 1) // 2
    return f"{text[:front]}…{text[len(text) - (letters - 1 - front) :]}"
