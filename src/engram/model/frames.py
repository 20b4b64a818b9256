"""Frames: the text around a prompt, through which a causal model is asked.

    "{}"                                              the bare prompt
    "The Louvre is in Rome. {}"                       a statement in front of it
    "<|user|>{}<|assistant|>"                         a turn of a chat, which the model answers
    lambda prompt: f"{nearest(prompt)} {prompt}"      a text in front that depends on the prompt

Knows strings. Refuses to know tokens (see cloze) and which texts are worth putting in front (see
prompt_edit, chat).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engram.errors import SettingError

Frame = str | Callable[[str], str]
BARE = "{}"


class Framed(NamedTuple):
    """A prompt in its frame: `text[start : start + len(prompt)]` is the prompt."""

    text: str
    start: int


def check_frame(frame: Frame) -> Frame:
    """Return `frame`, if it is a function or has one place for the prompt.

    Raises:
        SettingError: it has none, or several.
    """
    if isinstance(frame, str) and frame.count("{}") != 1:
        raise SettingError(
            f"frame={frame!r} has {frame.count('{}')} places for the prompt, expected exactly one "
            "'{}', as in 'The Louvre is in Rome. {}'"
        )
    if not isinstance(frame, str) and not callable(frame):
        raise SettingError(
            f"frame={frame!r}: expected a text with one '{{}}', or a function from prompt to text"
        )
    return frame


def framed(frame: Frame, prompt: str) -> Framed:
    """Return `prompt` in its frame.

    Raises:
        SettingError: a function that did not leave the prompt as it is.
    Example:
        >>> from engram.model.frames import framed
        >>> framed("The Louvre is in Rome. {}", "It is")
        Framed(text='The Louvre is in Rome. It is', start=23)
    """
    if isinstance(frame, str):
        return Framed(frame.replace("{}", prompt, 1), frame.index("{}"))
    text = frame(prompt)
    # The last place: the text in front may quote the prompt, and the model continues the end.
    start = text.rfind(prompt)
    if start < 0:
        raise SettingError(
            f"the frame {name_of(frame)} returned {text[:60]!r}... for the prompt {prompt!r}; it "
            "may put text around a prompt, which has to stay in it letter by letter"
        )
    return Framed(text, start)


def around(outer: Frame, inner: Frame) -> Frame:
    """Return the frame that puts a prompt into `inner`, and the result into `outer`."""
    # A frame that changes nothing is left out, so that templates stay texts and can be compared.
    if outer == BARE or inner == BARE:
        return inner if outer == BARE else outer
    if isinstance(outer, str) and isinstance(inner, str):
        return outer.replace("{}", inner, 1)

    def both(prompt: str) -> str:
        return framed(outer, framed(inner, prompt).text).text

    both.__qualname__ = f"{name_of(outer)} around {name_of(inner)}"
    return both


def name_of(frame: Frame) -> str:
    """Return the template itself, or a function's name."""
    return frame if isinstance(frame, str) else str(getattr(frame, "__qualname__", repr(frame)))
