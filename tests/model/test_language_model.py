"""Text in, probabilities out: equal to what transformers says, whichever way rows are batched."""

from __future__ import annotations

import pytest
import torch

import engram
from engram import EngramError
from engram.errors import FactError, UnsupportedModelError
from engram.model.language_model import LanguageModel
from tests.helpers.naive import naive_log_probs
from tests.helpers.tiny import TOKENIZERS, make_model, tiny_folder, tiny_lm

PAIRS = [
    ("The tower is in the city of", "Paris"),
    ("He plays", "the piano and sings"),
    ("The tower is in", " Rome"),
    ("A", "b"),
]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "gemma2"])
def test_log_probs_are_those_of_one_forward_a_pair(family):
    lm = tiny_lm(family)
    for got, (prompt, target) in zip(lm.log_probs(PAIRS), PAIRS, strict=True):
        torch.testing.assert_close(got, naive_log_probs(lm, prompt, target), atol=1e-5, rtol=1e-5)


def test_small_batches_change_nothing(monkeypatch):
    lm = tiny_lm("gpt2")
    whole = lm.log_probs(PAIRS)
    monkeypatch.setattr("engram.model.language_model._TOKENS_PER_BATCH", 1)
    for one, all_ in zip(lm.log_probs(PAIRS), whole, strict=True):
        torch.testing.assert_close(one, all_, atol=1e-5, rtol=1e-5)


def test_probabilities_multiply_over_a_targets_tokens():
    lm = tiny_lm("gpt2")
    (log_p,) = lm.log_probs(PAIRS[1:2])
    assert len(log_p) > 1
    assert lm.probabilities(PAIRS[1:2])[0] == pytest.approx(float(log_p.sum().exp()))


def test_next_tokens_are_the_most_probable_ones():
    lm = tiny_lm("gpt2")
    (top, p), *rest = lm.next_tokens("The tower is in", k=3)
    logits = lm.model(torch.tensor([lm.encode("The tower is in").ids])).logits[0, -1]
    assert top == lm.tokenizer.decode([int(logits.argmax())])
    assert p == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)
    assert p >= rest[0][1] >= rest[1][1]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_target_tokens_continue_the_prompts_tokens(kind):
    lm = LanguageModel(make_model("llama"), TOKENIZERS[kind]())
    for prompt, target in PAIRS:
        joint = lm.encode(f"{prompt} {target.strip()}").ids
        assert lm.encode(prompt).ids + lm.target_ids(prompt, target) == joint


def test_a_leading_space_is_added_once():
    lm = tiny_lm("gpt2")
    assert lm.target_ids("in", "Paris") == lm.target_ids("in", " Paris")


def test_an_empty_target_is_refused():
    with pytest.raises(FactError, match="target='' is empty"):
        tiny_lm("gpt2").target_ids("in", "")


def test_a_text_longer_than_the_model_takes_is_refused():
    lm = tiny_lm("gpt2")
    with pytest.raises(FactError, match=f"takes at most {lm.max_tokens}"):
        lm.encode("word " * 1000)


def test_perplexity_is_that_of_one_forward():
    lm = tiny_lm("gpt2")
    text = "The tower is in the city of Paris and he plays the piano."
    ids = torch.tensor([lm.encode(text).ids])
    assert lm.perplexity(text) == pytest.approx(
        lm.model(ids, labels=ids).loss.exp().item(), rel=1e-5
    )


def test_perplexity_of_a_long_text_is_taken_piece_by_piece():
    lm = tiny_lm("gpt2")
    assert lm.perplexity("The tower is in the city. " * 60) > 1


def test_generate_continues_the_prompt_greedily_and_touches_no_global_seed():
    lm = tiny_lm("gpt2")
    state = torch.random.get_rng_state()
    text = lm.generate("The tower is in", max_new_tokens=5)
    assert text.startswith("The tower is in")
    assert text == lm.generate("The tower is in", max_new_tokens=5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_load_reads_a_folder(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    lm = engram.load(folder)
    assert lm.n_layers == len(lm.parts.blocks)
    assert str(folder) in repr(lm)


def test_load_takes_a_dtype(tmp_path):
    assert engram.load(tiny_folder(tmp_path, "gpt2"), dtype="bfloat16").dtype == torch.bfloat16


def test_an_unknown_model_gets_a_clear_error(tmp_path):
    with pytest.raises(
        EngramError, match=r"(?s)no causal language model found as .*Expected 'pocket', a folder"
    ):
        engram.load(tmp_path / "nothing")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModelError, match="Slow is a slow tokenizer"):
        LanguageModel(make_model("gpt2"), Slow())
