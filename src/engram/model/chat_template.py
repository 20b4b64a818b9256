"""TODO model.chat_template"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from engram.errors import SettingError, UnsupportedModelError

if TYPE_CHECKING:
    pass


# rendered in the prompt's place: no template trims, escapes or doubles it
_PLACE = "PLACE-OF-THE-PROMPT"


def answers_spaced(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes a space before what the model says, as Llama 2's "[/INST]
    Paris" does.
    """
    if not tokenizer.chat_template:
        return False
    turns = [_said("user", "?"), _said("assistant", _PLACE)]
    return (
        _rendered(tokenizer, turns, continue_final_message=True).removesuffix(_PLACE).endswith(" ")
    )


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any
) -> str:
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
        raise SettingError(
            f"the chat template refuses a conversation of {roles}: {error}"
        ) from error
