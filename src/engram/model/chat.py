"""Chat models: the tokenizer's own chat template as a frame around a prompt.

Knows templates. Refuses to know facts and tokens: what a frame does is language_model's business.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from engram.checks import checked_call
from engram.errors import SettingError, UnsupportedModelError
from engram.model.chat_template import PLACEHOLDER, render, turn
from engram.model.language_model import LanguageModel

Style = Literal["answer", "continue"]

# a turn that begins with the prompt is an answer to it
REQUEST = "State a fact in one short sentence."
_FACTS = "PLACE-OF-THE-FACTS"


class ChatFront(NamedTuple):
    """A chat in which facts are stated first: `before` them, and `after` them up to the prompt."""

    before: str
    after: str


def chat_with_facts(lm: LanguageModel, wording: str) -> ChatFront:
    """Return the chat in which the model reads facts, and its turn then begins with the prompt.

    They are the system's message; the user's where the template refuses a system message or leaves
    it out.

    Args:
        wording: how they are stated, with {} for the facts.
    Raises:
        UnsupportedModelError: no chat template, or one that does not keep what it is given.
    """
    stated, answer = wording.replace("{}", _FACTS), turn("assistant", PLACEHOLDER)
    for turns in (
        [turn("system", stated), turn("user", REQUEST)],
        [turn("user", f"{stated} {REQUEST}")],
    ):
        try:
            text = render(lm.tokenizer, [*turns, answer], continue_final_message=True)
        except SettingError:
            continue
        front, _, rest = text.partition(PLACEHOLDER)
        if not rest and front.count(_FACTS) == 1:
            return ChatFront(*front.split(_FACTS))
    raise UnsupportedModelError(
        f"the chat template of {lm.name} does not keep the facts that it is given, or ends with "
        'something else than the prompt; make the edit with frame="plain"'
    )


@checked_call
def chat_frame(lm: LanguageModel, style: Style = "answer", *, system: str | None = None) -> str:
    """Return the chat template of a model's tokenizer as a frame: a text with one {}.

    It is meant for `lm.asked_through` and `engram.verify`.

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
        >>> lm.tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
        >>> engram.chat_frame(lm)
        'Q: {} A:'
        >>> lm.tokenizer.chat_template = None
    """
    turns = [] if system is None else [turn("system", system)]
    if style == "answer":
        turns += [turn("user", PLACEHOLDER)]
        text = render(lm.tokenizer, turns, add_generation_prompt=True)
    else:
        turns += [turn("user", REQUEST), turn("assistant", PLACEHOLDER)]
        text = render(lm.tokenizer, turns, continue_final_message=True)
    # A brace pair of the template itself would be a second place for the prompt.
    if text.count(PLACEHOLDER) != 1 or "{}" in text:
        raise UnsupportedModelError(
            f"the chat template of {lm.name} makes {text[:80]!r}... of a prompt, in which it "
            f"occurs {text.count(PLACEHOLDER)} times and '{{}}' {text.count('{}')} times; "
            "expected once and not at all. Write a frame by hand: any text with one {}"
        )
    return text.replace(PLACEHOLDER, "{}")
