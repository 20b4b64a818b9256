"""A causal model is asked through frames: the frame is read, the prompt's places stay places, and
leaving the block ends it.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import engram
from engram import Fact
from engram.editors.second_moments.measure import SecondMoment
from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.model.frames import around, framed
from engram.model.language_model import LanguageModel
from tests.helpers.chat_samples import chat_lm
from tests.helpers.naive import naive_log_probs
from tests.helpers.tiny import TOKENIZERS, _wrapped, make_model, tiny_lm

PROMPT = "The tower of Rome is in the city of"
FRONT = "He sings. {}"
PAIRS = [(PROMPT, "Paris"), ("The river runs through", "London and Rome")]


def in_front(prompt: str) -> str:
    return FRONT.replace("{}", prompt)


@pytest.fixture(params=sorted(TOKENIZERS))
def lm(request):
    return tiny_lm("llama", tokenizer=request.param)


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [FRONT, in_front], ids=["template", "function"])
def test_prompts_are_asked_as_if_the_frame_had_been_written_around_them(lm, frame):
    wanted = [naive_log_probs(lm, in_front(prompt), target) for prompt, target in PAIRS]
    probable = lm.next_tokens(in_front(PROMPT))
    with lm.asked_through(frame):
        for got, expected in zip(lm.log_probs(PAIRS), wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert lm.probabilities(PAIRS) == pytest.approx(
            [float(each.sum().exp()) for each in wanted], rel=1e-4
        )
        assert lm.next_tokens(PROMPT) == probable
        assert lm.cloze(PROMPT, "Paris").ids == lm.cloze(in_front(PROMPT), "Paris", frame="{}").ids


def written(lm, text: str, tokens: int) -> str:
    """Return what a model writes after a text, by transformers' own means."""
    ids = torch.tensor([lm.encode(text).ids])
    out = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    read, all_ = (lm.tokenizer.decode(each, skip_special_tokens=True) for each in (ids[0], out[0]))
    assert all_.startswith(read)
    return all_.removeprefix(read)


@pytest.mark.parametrize("frame", [FRONT, in_front], ids=["template", "function"])
def test_generate_returns_the_prompt_and_what_follows_without_the_frame(lm, frame):
    wanted = PROMPT + written(lm, in_front(PROMPT), 6)
    with lm.asked_through(frame):
        assert lm.generate(PROMPT, 6) == wanted


def test_an_answer_in_a_turn_of_its_own_is_set_off_by_a_space():
    lm = chat_lm()
    frame = engram.chat_frame(lm)
    wanted = written(lm, frame.replace("{}", PROMPT), 4)
    assert wanted and not wanted[0].isspace()
    with lm.asked_through(frame):
        assert lm.generate(PROMPT, 4) == f"{PROMPT} {wanted}"


@pytest.mark.parametrize("target", [None, "Paris", "Madrid"])
def test_places_in_the_prompt_are_places_in_the_clozes_text(lm, target):
    bare = lm.cloze(PROMPT, target)
    cloze = lm.cloze(PROMPT, target, frame="She sings: {}")
    assert cloze.text == bare.text and cloze.text.startswith(PROMPT)
    assert cloze.ids == lm.cloze(f"She sings: {PROMPT}", target).ids and len(cloze.offsets) == len(
        cloze.ids
    )
    own = len(lm.encode("She sings:").ids)
    assert all(span == (0, 0) for span in cloze.offsets[:own])
    assert cloze.offsets[-len(PROMPT.split()) :] == bare.offsets[-len(PROMPT.split()) :]


def test_a_trace_through_a_frame_is_that_of_the_framed_text():
    lm = tiny_lm("gpt2")
    wanted = engram.trace(lm, in_front(PROMPT), subject="tower of Rome", samples=2, window=1)
    with lm.asked_through(FRONT):
        got = engram.trace(lm, PROMPT, subject="tower of Rome", samples=2, window=1)
    assert got.tokens == wanted.tokens and got.subject_range == wanted.subject_range
    for site, table in wanted.scores.items():
        torch.testing.assert_close(got.scores[site], table)


def test_what_a_model_knows_is_asked_through_the_frame():
    lm, fact = tiny_lm("gpt2"), Fact("tower of Rome", "The {} is in the city of", "Paris")
    (wanted,) = lm.log_probs([(in_front(PROMPT), "Paris")])
    with lm.asked_through(FRONT):
        (record,) = engram.knows(lm, [fact]).records
    assert record.replies[0].log_prob == pytest.approx(float(wanted.sum()), abs=1e-5)


def test_an_answer_behind_white_space_begins_without_a_space(lm):
    for frame, whole in (
        ("Q: {}\nA:\n", "Q: Where?\nA:\nParis"),
        ("Q: {}\nA:", "Q: Where?\nA: Paris"),
    ):
        for target in ("Paris", " Paris"):
            cloze = lm.cloze("Where?", target, frame=frame)
            assert cloze.ids + cloze.answer[-1:] == lm.encode(whole).ids


def test_white_space_that_is_cut_otherwise_where_the_text_goes_on_leaves_the_answer_whole():
    """GPT-2 reads the two line ends before a word as two tokens, and at the end of a text as
    one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["is\n\n\nParis"] * 9, trainer)
    lm = LanguageModel(make_model("llama"), _wrapped(tokenizer))
    assert len(lm.encode("is\n\n").ids) == 2 and len(lm.encode("is\n\nParis").ids) == 4
    cloze = lm.cloze("is", "Paris", frame="{}\n\n")
    assert cloze.ids == lm.encode("is\n\n").ids and lm.token_strings(cloze.answer) == ["Paris"]


def test_a_start_token_that_the_text_brings_is_not_doubled(lm):
    start = lm.tokenizer.bos_token
    ids = lm.encode(f"{start}{PROMPT}").ids
    assert ids.count(lm.tokenizer.bos_token_id) == 1 and ids[0] == lm.tokenizer.bos_token_id
    assert lm.cloze(PROMPT, frame=f"{start}{{}}").ids == ids


# --- blocks ---------------------------------------------------------------------------------------


def test_leaving_the_block_ends_it_however_it_ends():
    lm = tiny_lm("gpt2")
    before = lm.log_probs(PAIRS)
    with lm.asked_through(FRONT):
        assert lm.cloze_template == FRONT
    assert lm.cloze_template == "{}"
    with pytest.raises(KeyError), lm.asked_through(FRONT):
        raise KeyError
    assert lm.cloze_template == "{}"
    assert all(torch.equal(one, two) for one, two in zip(lm.log_probs(PAIRS), before, strict=True))


@pytest.mark.parametrize("inner", ["It is cold. {}", lambda prompt: f"It is cold. {prompt}"])
@pytest.mark.parametrize("outer", ["She said: {}!", lambda prompt: f"She said: {prompt}!"])
def test_an_outer_blocks_frame_stands_around_an_inner_ones(outer, inner):
    lm = tiny_lm("gpt2")
    wanted = lm.cloze(PROMPT, frame=f"She said: It is cold. {PROMPT}!".replace(PROMPT, "{}"))
    with lm.asked_through(outer), lm.asked_through(inner):
        assert lm.cloze(PROMPT) == wanted
    assert framed(around("a{}b", "c{}d"), "x") == ("acxdb", 2)


def test_the_template_of_a_causal_model_can_be_set_for_good():
    lm = tiny_lm("gpt2")
    lm.cloze_template = "Q: {}\nA:"
    assert lm.cloze("Where?").ids == lm.encode("Q: Where?\nA:").ids
    with lm.asked_through("It is cold. {}"):
        assert lm.cloze_template == "Q: It is cold. {}\nA:"


def test_editors_and_perplexity_do_not_notice():
    lm = tiny_lm("gpt2")
    width = lm.parts.mlp_width(1)
    settings = {
        "layer": 1,
        "contexts": ["{}", "It is cold. {}"],
        "steps": 3,
        "seed": 0,
        "second_moments": {1: SecondMoment.from_matrix(torch.eye(width, dtype=torch.float64))},
    }
    fact = Fact("tower of Rome", "The {} is in the city of", "Paris")
    plain, perplexity = engram.rewrite(lm, fact, **settings), lm.perplexity(PROMPT)
    with lm.asked_through("Q: {}\nA:\n"):
        edit = engram.rewrite(lm, fact, **settings)
        assert lm.perplexity(PROMPT) == perplexity
    (name,) = edit.deltas
    assert torch.equal(edit.deltas[name].dense(), plain.deltas[name].dense())


# --- perplexity behind a text ---------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_perplexity_behind_a_text_scores_the_same_tokens_behind_it(tokenizer):
    lm = tiny_lm("llama", torch.float64, tokenizer)
    text, before = "The bridge is in Rome, and the river runs through London.", "He sings. "
    start = len(lm.tokenizer("").input_ids)
    front, own = lm.encode(before).ids, lm.encode(text).ids[start:]
    first = 0 if start else 1  # behind a start token the first word is predicted too
    with torch.no_grad():
        log_p = lm.model(torch.tensor([front + own])).logits[0].log_softmax(-1)
    scored = [float(log_p[len(front) + i - 1, own[i]]) for i in range(first, len(own))]
    wanted = torch.tensor(-sum(scored) / len(scored), dtype=torch.float64).exp()
    assert lm.perplexity(text, after=before) == pytest.approx(float(wanted), rel=1e-6)


def test_pieces_of_a_size_are_scored_one_by_one():
    lm = tiny_lm("gpt2", torch.float64)
    ids = lm.encode(PROMPT).ids
    pieces = [ids[at : at + 4] for at in range(0, len(ids), 4)]
    pieces = [torch.tensor([piece]) for piece in pieces if len(piece) > 1]
    with torch.no_grad():
        losses = torch.stack([lm.model(piece, labels=piece).loss for piece in pieces]).double()
    counts = torch.tensor([piece.shape[1] - 1 for piece in pieces])
    wanted = ((losses * counts).sum() / counts.sum()).exp()
    assert lm.perplexity(PROMPT, tokens=4) == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(
        FactError, match=r"pieces of 128 tokens after a text of \d+: the model takes 128"
    ):
        lm.perplexity(PROMPT, after="He sings.", tokens=128)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["no place", "{} and {}"])
def test_a_template_has_one_place_for_the_prompt(frame):
    lm = tiny_lm("gpt2")
    with (
        pytest.raises(SettingError, match=r"places for the prompt, expected exactly one '\{\}'"),
        lm.asked_through(frame),
    ):
        raise AssertionError("entered")
    with pytest.raises(SettingError, match="places for the prompt"):
        lm.cloze(PROMPT, frame=frame)


def test_a_function_leaves_the_prompt_as_it_is():
    lm = tiny_lm("gpt2")
    with (
        pytest.raises(SettingError, match="has to stay in it letter by letter"),
        lm.asked_through(str.upper),
    ):
        lm.next_tokens(PROMPT)
    with (
        pytest.raises(
            SettingError, match=r"frame=3: expected a text with one '\{\}', or a function"
        ),
        lm.asked_through(3),
    ):
        raise AssertionError("entered")


def test_a_function_is_no_template():
    lm = tiny_lm("gpt2")
    with (
        lm.asked_through(in_front),
        pytest.raises(SettingError, match="through the function in_front at the moment"),
    ):
        _ = lm.cloze_template


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_with_a_blank_have_no_frames(family):
    lm = tiny_lm(family)
    with pytest.raises(UnsupportedModelError, match="only causal models are asked through a frame"):
        lm.cloze(PROMPT, frame=FRONT)
    with pytest.raises(UnsupportedModelError, match="only causal models"), lm.asked_through(FRONT):
        raise AssertionError("entered")
