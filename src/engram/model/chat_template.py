"""The chat template of a tokenizer: conversations rendered as text.

Knows tokenizers and their templates. Refuses to know models and what is done with the text (see
chat and cloze).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from engram.errors import SettingError, UnsupportedModelError

# rendered in the prompt's place: no template trims, escapes or doubles it
PLACEHOLDER = "PLACE-OF-THE-PROMPT"


def answers_spaced(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes a space before the model's answer, as Llama 2's
    "[/INST] Paris" does.
    """
    if not tokenizer.chat_template:
        return False
    # Rendered and looked at: templates are programs, and no field says what they write.
    turns = [turn("user", "?"), turn("assistant", PLACEHOLDER)]
    text = render(tokenizer, turns, continue_final_message=True)
    return text.removesuffix(PLACEHOLDER).endswith(" ")


def turn(role: str, content: str) -> dict[str, str]:
    """Return one message of a conversation."""
    return {"role": role, "content": content}


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **settings: Any) -> str:
    """Return a conversation as the template writes it.

    Args:
        settings: passed on to `apply_chat_template`.
    Raises:
        UnsupportedModelError: no chat template; SettingError: the template refuses these turns.
    """
    if not tokenizer.chat_template:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'this model'} has no chat "
            "template, so the model is asked in plain text; leave the chat out, or set "
            "tokenizer.chat_template where the model was trained with one"
        )
    from jinja2 import TemplateError  # not at the top: an import only chats need

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **settings))
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in turns)
        raise SettingError(
            f"the chat template refuses a conversation of {roles}: {error}"
        ) from error
