"""Every error that a caller may want to distinguish.

A message says what was wrong, what was expected and what to do.
"""

from __future__ import annotations


class EngramError(Exception):
    """Root of everything that engram raises on purpose."""


# Also a built-in error where one fits: a caller who knows nothing of engram catches that one.
class FactError(EngramError, ValueError):
    """A subject, prompt or target that cannot be worked with."""


class SettingError(EngramError, ValueError):
    """A setting that a method does not have, or a value outside its range."""


class UnsupportedModelError(EngramError):
    """A model whose parts are not known, or that cannot do what is required."""


class NonFiniteError(EngramError, ArithmeticError):
    """A computation gave NaN or infinity; nothing was changed."""


class BaseMismatchError(EngramError):
    """The weights are not those on which an edit was computed."""


class CanaryError(EngramError):
    """An edit would have damaged the model beyond the limits; it was not applied."""


class EngramFileError(EngramError, ValueError):
    """A file of ours is missing, damaged, or of another format version."""


class MissingExtraError(EngramError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package!r} is not installed. Run: pip install 'engram[{extra}]'")
