"""Chat models: the tokenizer's own chat template as a frame around a prompt.

Knows tokenizers and their templates. Refuses to know models, facts and tokens: what a frame does is
language_model's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from engram.checks import one_of
from engram.errors import UnsupportedModelError

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel
from engram.model.chat_template import _PLACE, _rendered, _said

Style = Literal["answer", "continue"]


# to which a turn that begins with the prompt is an answer
REQUEST = "State a fact in one short sentence."


def chat_frame(lm: LanguageModel, style: Style = "answer", *, system: str | None = None) -> str:
    """The chat template of a model's tokenizer as a frame: a text with one {}, for
    `lm.asked_through` and `engram.verify`.

    Args:
        style: "answer": the prompt is what the user says, and the model answers. "continue": the
            user asks for a fact, and the model's turn begins with the prompt, so that words follow
            it as in plain text.
        system: the system's message; default: the template's own, if it has any.
    Raises:
        UnsupportedModelError: a tokenizer without a chat template, or a template that does not keep
            what it is given.
        SettingError: another style, or a template that refuses a system message.
    Example:
        >>> with lm.asked_through(engram.chat_frame(lm)):
        ...     lm.next_tokens("The Space Needle is in the city of")
    """
    one_of("style", style, get_args(Style))
    first = [] if system is None else [_said("system", system)]
    if style == "answer":
        text = _rendered(lm.tokenizer, [*first, _said("user", _PLACE)], add_generation_prompt=True)
    else:
        turns = [*first, _said("user", REQUEST), _said("assistant", _PLACE)]
        text = _rendered(lm.tokenizer, turns, continue_final_message=True)
    if text.count(_PLACE) != 1 or "{}" in text:
        raise UnsupportedModelError(
            f"the chat template of {lm.name} makes {text[:80]!r}... of a prompt, in which it stands {text.count(_PLACE)} times "
            f"and '{{}}' {text.count('{}')} times; expected once and not at all. Write a frame by hand: any text with one {{}}"
        )
    return text.replace(_PLACE, "{}")
