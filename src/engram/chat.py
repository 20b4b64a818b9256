"""Chat models: the tokenizer's own chat template as a frame around a prompt.

Knows tokenizers and their templates. Refuses to know models, facts and tokens: what a frame does is language_model's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from engram.errors import SettingError, UnsupportedModelError

if TYPE_CHECKING:
    from engram.language_model import LanguageModel

Style = Literal["answer", "continue"]
REQUEST = "State a fact in one short sentence."  # to which a turn that begins with the prompt is an answer
_PLACE = "PLACE-OF-THE-PROMPT"  # rendered in the prompt's place: no template trims, escapes or doubles it


def chat_frame(lm: LanguageModel, style: Style = "answer", *, system: str | None = None) -> str:
    """The chat template of a model's tokenizer as a frame: a text with one {}, for `lm.asked_through` and `engram.verify`.

    Args:
        style: "answer": the prompt is what the user says, and the model answers. "continue": the user asks for a fact, and
            the model's turn begins with the prompt, so that words follow it as in plain text.
        system: the system's message; default: the template's own, if it has any.
    Raises:
        UnsupportedModelError: a tokenizer without a chat template, or a template that does not keep what it is given.
        SettingError: another style, or a template that refuses a system message.
    Example:
        >>> with lm.asked_through(engram.chat_frame(lm)):
        ...     lm.next_tokens("The Space Needle is in the city of")
    """
    if style not in get_args(Style):
        raise SettingError(f"style={style!r}: expected 'answer' or 'continue'")
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


def chat_contexts(
    lm: LanguageModel, *, seed: int = 0, styles: Sequence[Style] = ("continue",), system: str | None = None
) -> tuple[str, ...]:
    """Contexts for `engram.rewrite(..., contexts=...)` half of which are in the chat's frames, so that an edit holds there too.

    As many as ROME samples by default, and one more a style: the bare "{}", the bare frames, and then the sampled texts, every
    other one plain and the rest in the frames in turn.

    Args:
        seed: of the sampled texts, see `sample_contexts`.
        styles, system: see `chat_frame`. An edit that shall be written into weights is asked for words that follow its prompt;
            "continue" is the style in which they do.
    """
    from engram.editors.contexts import sample_contexts

    frames = [chat_frame(lm, style, system=system) for style in styles]
    bare, *sampled = sample_contexts(lm, seed=seed)
    mixed = [
        context if i % 2 or not frames else frames[i // 2 % len(frames)].replace("{}", context)
        for i, context in enumerate(sampled)
    ]
    return (bare, *frames, *mixed)


def answers_spaced(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes a space before what the model says, as Llama 2's "[/INST] Paris" does."""
    if not tokenizer.chat_template:
        return False
    turns = [_said("user", "?"), _said("assistant", _PLACE)]
    return _rendered(tokenizer, turns, continue_final_message=True).removesuffix(_PLACE).endswith(" ")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'this model'} has no chat template, so the model is asked in "
            "plain text; leave the chat out, or set tokenizer.chat_template where the model was trained with one"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise SettingError(f"the chat template refuses a conversation of {roles}: {error}") from error
