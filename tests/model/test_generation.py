"""Continuations that are written together are those that `generate` writes one by one."""

from __future__ import annotations

import engram
from engram.model.generation import continuations

PROMPTS = ["The Eiffel Tower is in the city of", "The Colosseum is in", "Danube", "He plays the"]


def one_by_one(lm: engram.LanguageModel, tokens: int) -> list[str]:
    return [lm.generate(prompt, tokens).removeprefix(prompt) for prompt in PROMPTS]


def test_continuations_are_those_of_one_prompt_at_a_time(pocket_lm: engram.LanguageModel) -> None:
    texts = continuations(pocket_lm, PROMPTS, 12)
    assert texts == one_by_one(pocket_lm, 12)
    assert all(texts)


def test_a_frame_is_read_and_not_returned(pocket_lm: engram.LanguageModel) -> None:
    with pocket_lm.asked_through("The piano is an instrument. {}"):
        assert continuations(pocket_lm, PROMPTS, 6) == one_by_one(pocket_lm, 6)


def test_a_text_ends_where_the_model_ends_it(pocket_lm: engram.LanguageModel) -> None:
    config = pocket_lm.model.generation_config
    before, third = config.eos_token_id, pocket_lm.encode(pocket_lm.generate(PROMPTS[0], 3)).ids[-1]
    try:
        config.eos_token_id = [before, third]
        assert continuations(pocket_lm, PROMPTS, 12) == one_by_one(pocket_lm, 12)
    finally:
        config.eos_token_id = before


def test_a_prompt_that_fills_the_context_has_no_continuation(
    pocket_lm: engram.LanguageModel,
) -> None:
    full = " the" * pocket_lm.max_tokens
    assert continuations(pocket_lm, [full, PROMPTS[0]], 4) == ["", one_by_one(pocket_lm, 4)[0]]
