"""Tiny models whose tokenizers have a chat template, of the kinds that are about."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch

from engram.model.language_model import LanguageModel
from tests.helpers.tiny import TOKENIZERS, make_model

# name -> (special tokens, template)
TEMPLATES: dict[str, tuple[list[str], str]] = {
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
        "endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama 3": (
        ["<|head|>", "<|body|>", "<|eot|>"],
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|body|>\n\n{{ m['content'] "
        "| trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|body|>\n\n{% endif %}",
    ),
    "mistral": (
        ["[INST]", "[/INST]"],
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ "
        "raise_exception('no system here') }}"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% else %} {{ m['content'] "
        "}}{{ eos_token }}{% endif %}"
        "{% endfor %}",
    ),
    "tight": (  # nothing between the last special token and the answer
        ["<user>", "<bot>"],
        "{% for m in messages %}{% if m['role'] == 'user' %}<user>{% else %}<bot>{% endif %}{{ "
        "m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}",
    ),
}


@cache
def chat_lm(
    template: str = "chatml", tokenizer: str = "byte-level", family: str = "llama"
) -> LanguageModel:
    """Return a tiny model with that template; special tokens are new rows of its embedding. Shared:
    leave its template alone.
    """
    specials, text = TEMPLATES[template]
    made = deepcopy(TOKENIZERS[tokenizer]())
    made.add_special_tokens({"extra_special_tokens": specials})
    made.chat_template = text
    model = make_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(made), mean_resizing=False)
    return LanguageModel(model, made, name=f"tiny-{template}")
