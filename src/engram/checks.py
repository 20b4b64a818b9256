"""TODO checks"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engram.errors import SettingError

if TYPE_CHECKING:
    pass


def position_in(position: int, tokens: int) -> int:
    """A position counted from the text's start, where it may be given from its end.

    Raises:
        SettingError: the text does not have it.
    """
    if not -tokens <= position < tokens:
        raise SettingError(
            f"position={position}: the text has {tokens} tokens, numbered 0 to {tokens - 1} or from -1 down"
        )
    return position % tokens
