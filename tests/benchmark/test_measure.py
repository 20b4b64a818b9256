"""What a record's readings are made of, against loops that score one answer at a time, without
batches, rows or shared prompts.

The released code pads rows, on the right. Here no padding side can be chosen: rows are padded where
nothing reads them, and positions are counted from the front; so there is nothing to compare but the
numbers.
"""

from __future__ import annotations

from itertools import pairwise, permutations
from math import exp

import pytest
import torch
from torch.nn import functional

import engram
from engram import Fact
from engram.benchmark import batched, phase
from engram.benchmark import written_texts as texts
from engram.benchmark.data.records import Record, References, Snippet
from engram.benchmark.data.tfidf import TfIdf
from engram.benchmark.essence import essence_ids
from engram.benchmark.metrics.outcomes import MeasureConfig
from engram.benchmark.one_by_one import measure_one
from engram.benchmark.zsre_as_released import in_text, steps, with_text_mode
from engram.errors import UnsupportedModelError
from engram.evaluate.probe_rows import AnswerScores, ProbeRows
from engram.evaluate.probes import Probe
from tests.helpers.tiny import TOKENIZERS, tiny_lm

PROMPTS = ("The bridge is in", "A long time ago the river runs through the city of")
ANSWERS = ("the", "a", "in", "it", "an", "he", "on", "ax", "go", "Rome", "Madrid", "Zdeno Chára")
FACT = Fact("bridge", "The {} is in", "Madrid", "Rome")


def quiet(**more):
    return MeasureConfig(**{"answer_tokens": 0, "drift_every": 0} | more)


def record(*probes, **more):
    return Record(
        "7", (FACT,), probes or (Probe("rewrite", FACT.prompt_text, "Madrid", "Rome"),), **more
    )


def brute(lm, prompt, answer):
    """(mean NLL, share of tokens that are the most probable): one forward pass a token, cut as the
    tokenizer cuts the whole text.
    """
    head, whole = (list(lm.tokenizer(text)["input_ids"]) for text in (prompt, f"{prompt} {answer}"))
    assert whole[: len(head)] == head, "choose other words: these merge with the prompt"
    nll, hits = [], []
    for at in range(len(head), len(whole)):
        with torch.no_grad():
            log_p_v = lm.model(torch.tensor([whole[:at]])).logits[0, -1].log_softmax(-1)
        nll.append(-float(log_p_v[whole[at]]))
        hits.append(int(log_p_v.argmax()) == whole[at])
    return sum(nll) / len(nll), sum(hits) / len(hits)


def of_length(lm, count):
    """Return an answer of N tokens."""
    return next(each for each in ANSWERS if len(lm.target_ids(PROMPTS[0], each)) == count)


def edited(lm, **more):
    return engram.rewrite(lm, [FACT], method="ft", **{"epochs": 3} | more)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_readings_are_those_of_a_loop_over_single_answers(family, tokenizer):
    lm = tiny_lm(family, torch.float64, tokenizer)
    answers = [of_length(lm, count) for count in (1, 2, 3)] + ["Madrid", "Zdeno Chára"]
    probes = [
        Probe("rewrite", prompt, *pair) for prompt in PROMPTS for pair in permutations(answers, 2)
    ]
    readings = measure_one(lm, record(*probes), None, quiet())[0].readings
    expected = {
        (prompt, answer): brute(lm, prompt, answer) for prompt in PROMPTS for answer in answers
    }
    for probe, mine in zip(probes, readings, strict=True):
        nll, share = expected[probe.prompt, probe.wanted]
        assert mine.wanted == pytest.approx(nll, rel=1e-10)
        assert mine.unwanted == pytest.approx(expected[probe.prompt, probe.unwanted][0], rel=1e-10)
        assert mine.correct == share


def test_a_token_of_two_that_is_the_most_probable_is_half_the_answer():
    lm = tiny_lm("gpt2")
    answer = of_length(lm, 2)
    rows = ProbeRows(lm, [[Probe("rewrite", PROMPTS[0], answer)]])
    first, second = lm.target_ids(PROMPTS[0], answer)
    for best, share in {
        (first, second): 1.0,
        (first, first): 0.5,
        (second, second): 0.5,
        (second, first): 0.0,
    }.items():
        logits_pv = torch.zeros(2, lm.model.config.vocab_size)
        logits_pv[[0, 1], best] = 5.0
        scores = AnswerScores(rows)
        scores.add(rows.rows, logits_pv)
        assert scores.readings()[0][0].correct == share


# -- edits and what they move ----------------------------------------------------------------------


def test_divergence_at_neighbours_is_in_nats_not_the_released_mean_over_the_vocabulary():
    lm = tiny_lm("gpt2", torch.float64)
    asked = record(
        Probe("neighbourhood", PROMPTS[1], "Rome", "Madrid"),
        Probe("rewrite", PROMPTS[0], "Madrid", "Rome"),
    )
    edit = edited(lm)
    before, base = measure_one(lm, asked, None, quiet())
    after, _ = measure_one(lm, asked, edit, quiet(), base=base)

    def next_token():
        with torch.no_grad():
            return lm.model(torch.tensor([lm.encode(PROMPTS[1]).ids])).logits[0, -1].log_softmax(-1)

    p0_v = next_token()
    with edit.applied(lm):
        p1_v = next_token()
    nats = float((p1_v.exp() * (p1_v - p0_v)).sum())
    assert after.readings[0].kl == pytest.approx(nats, rel=1e-8)
    released = functional.kl_div(
        p0_v, p1_v.exp(), reduction="batchmean"
    )  # of one vector: divided by its length
    assert after.readings[0].kl == pytest.approx(float(released) * len(p0_v), rel=1e-8)
    assert nats > 1e-6
    assert after.readings[1].kl is None
    assert before.readings[0].kl is None


def test_what_is_measured_before_an_edit_is_bit_for_bit_the_same_behind_it():
    lm = tiny_lm("gpt2")
    asked = record(
        *(Probe("rewrite", prompt, "Madrid", "Rome") for prompt in PROMPTS), generation=PROMPTS[:1]
    )
    every = MeasureConfig(answer_tokens=3, texts=True, text_tokens=16)
    before, base = measure_one(lm, asked, None, every, drift=True)
    after, _ = measure_one(lm, asked, edited(lm), every, drift=True, base=base)
    again, _ = measure_one(lm, asked, None, every, drift=True)
    assert again == before
    assert after != before


def test_the_length_of_texts_includes_the_prompt(monkeypatch):
    lm, written = tiny_lm("gpt2"), []

    def spy(lm, writings, *rest):
        out = write(lm, writings, *rest)
        written.extend((len(each.ids), len(new)) for each, new in zip(writings, out, strict=True))
        return out

    write = texts.write
    monkeypatch.setattr(texts, "write", spy)
    asked = record(generation=PROMPTS)
    (made,) = texts.sampled(lm, [asked], MeasureConfig(texts=True, text_tokens=40))
    assert [sum(each) for each in written] == [40, 40]
    assert len({prompt for prompt, _ in written}) == 2
    assert all(text.startswith(prompt) for text, prompt in zip(made, PROMPTS, strict=True))


# -- essence ---------------------------------------------------------------------------------------


def told(*snippets):
    return References(
        {"city": [Snippet(*each) for each in snippets]}, TfIdf.fit(text for _, text in snippets)
    )


def test_essence_is_the_perplexity_of_texts_about_the_subject_as_published_with_a_token_more():
    lm = tiny_lm("gpt2", torch.float64)
    references = told(
        ("bridge", "The bridge is old."),
        ("tower", "The tower is in Paris."),
        ("bridge", "It is in Rome."),
    )
    asked = record(references="city")
    found, _ = measure_one(lm, asked, None, quiet(texts=True), references=references)
    ids = list(lm.tokenizer("The bridge is old. It is in Rome.")["input_ids"])
    nll = 0.0
    for at in range(1, len(ids)):
        with torch.no_grad():
            nll -= float(lm.model(torch.tensor([ids[:at]])).logits[0, -1].log_softmax(-1)[ids[at]])
    assert found.essence == pytest.approx(exp(nll / (len(ids) - 1)))
    assert found.essence_published == pytest.approx(exp(nll / len(ids)))
    assert found.essence == pytest.approx(lm.perplexity("The bridge is old. It is in Rome."))


def test_essence_reads_no_more_than_100_tokens():
    lm = tiny_lm("gpt2")
    ids = essence_ids(
        lm,
        record(references="city"),
        quiet(texts=True),
        told(("bridge", "The bridge is old. " * 60)),
    )
    assert len(ids) == 100


def test_without_texts_about_the_subject_there_is_no_essence():
    lm, asked = tiny_lm("gpt2"), quiet(texts=True)
    references = told(("tower", "The tower is in Paris."))
    assert essence_ids(lm, record(references="city"), asked, references) is None
    assert essence_ids(lm, record(references="river"), asked, references) is None
    assert essence_ids(lm, record(), asked, references) is None
    about = told(("bridge", "The bridge is old."))
    assert essence_ids(lm, record(references="city"), quiet(), about) is None, (
        "texts were not asked for"
    )
    assert essence_ids(tiny_lm("bert"), record(references="city"), asked, about) is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("replays", [True, False], ids=["replayed", "whole"])
def test_many_edits_in_one_batch_have_the_essence_and_the_released_accuracy_of_each_by_itself(
    family, replays, monkeypatch
):
    monkeypatch.setattr(batched, "use_replay", lambda lm, engine: replays)
    monkeypatch.setattr(phase, "_TOKENS", 40)  # rows of one record in several batches
    lm = tiny_lm(family, torch.float64)
    about = told(("bridge", "The bridge is old."))
    asked = quiet(texts=True, reference=True, text_tokens=12)
    records = [
        answers_of_zsre(answer, references=key)
        for answer, key in (("Madrid", "city"), ("日本", None), ("in", "city"))
    ]
    settings = {"layers": [1, 2], "rank": 4, "epochs": 40, "learning_rate": 0.05}
    edits = [
        engram.rewrite(lm, Fact("bridge", "The {} is in", each), "lora", **settings)
        for each in ("Madrid", "Rome", "Paris")
    ]
    assert all(batched.can_batch(lm, edit) for edit in edits)
    found = batched.measure_batched(lm, records, edits, asked, drifts=[False] * 3, references=about)
    for each, edit, (before, after) in zip(records, edits, found, strict=True):
        for edited_by, mine in ((None, before), (edit, after)):
            alone, _ = measure_one(lm, each, edited_by, asked, references=about)
            assert mine.essence == (
                None if each.references is None else pytest.approx(alone.essence, rel=1e-9)
            )
            assert mine.essence_published == (
                None
                if each.references is None
                else pytest.approx(alone.essence_published, rel=1e-9)
            )
            assert [reading.correct for reading in mine.readings] == [
                reading.correct for reading in alone.readings
            ]
    assert found[0][0].essence != pytest.approx(found[0][1].essence, rel=1e-6)
    assert found[0][0].readings[0].correct != found[0][1].readings[0].correct
    silent = batched.measure_batched(
        lm, records, edits, asked, drifts=[False] * 3, references=about, unedited_texts=False
    )
    assert silent[0][0].essence is None
    assert silent[0][1].essence == found[0][1].essence


def test_an_edit_of_words_has_no_essence():
    lm = tiny_lm("gpt2")
    edit = engram.rewrite(lm, [FACT], method="in-context")
    about = told(("bridge", "The bridge is old."))
    found, _ = measure_one(lm, record(references="city"), edit, quiet(texts=True), references=about)
    assert found.essence is None


# -- zsRE through texts ----------------------------------------------------------------------------


def answers_of_zsre(answer, **more):
    return record(
        Probe("rewrite", PROMPTS[0], answer),
        Probe("paraphrase", PROMPTS[1], answer),
        Probe("neighbourhood", "nq question: where is the piano?", "in Madrid"),
        **more,
    )


def as_released(lm, prompt, answer):
    """Share of the answer's tokens, each decoded, after those before it, decoded: as the released
    code has it, one by one.
    """
    ids = lm.tokenizer(f" {answer}")["input_ids"]
    hits = []
    for i in range(len(ids)):
        text, expected = prompt + lm.tokenizer.decode(ids[:i]), lm.tokenizer.decode([ids[i]])
        with torch.no_grad():
            best = int(
                lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits[0, -1].argmax()
            )
        hits.append(best == lm.tokenizer(expected)["input_ids"][0])
    return sum(hits) / len(hits)


def test_the_reference_flag_takes_answers_through_texts_as_released():
    lm = tiny_lm("gpt2")
    edit, shares = edited(lm, epochs=40, learning_rate=0.05), set()
    for answer in ("Madrid", "Madeira", "Trenčín", "日本", "the piano"):
        asked = answers_of_zsre(answer)
        found, _ = measure_one(lm, asked, edit, quiet(reference=True))
        with edit.applied(lm):
            for probe, mine in zip(asked.probes, found.readings, strict=True):
                assert mine.correct == as_released(lm, probe.prompt, probe.wanted)
                shares.add(mine.correct)
    assert len(shares) > 2, "all, none and some of the tokens are right"


def test_two_tokens_by_hand():
    lm = tiny_lm("gpt2")
    answer = of_length(lm, 2)
    asked = record(
        Probe("rewrite", PROMPTS[0], answer), Probe("rewrite", PROMPTS[1], "Madrid", "Rome")
    )
    first, second = lm.target_ids(PROMPTS[0], answer)
    read = steps(lm, asked)
    assert [(step.probe, step.token) for step in read] == [(0, first), (0, second)], (
        "probes with two answers are as ever"
    )
    assert [list(step.ids) for step in read] == [
        lm.encode(PROMPTS[0]).ids,
        [*lm.encode(PROMPTS[0]).ids, first],
    ]
    readings = measure_one(lm, asked, None, quiet())[0].readings
    found = with_text_mode(readings, read, [first, first])
    assert found[0].correct == 0.5
    assert found[1] == readings[1]


def test_a_piece_of_a_letter_is_read_as_the_mark_for_what_cannot_be_read():
    """日 is three bytes, and here three tokens. Decoded, one or two of them are U+FFFD, whose own
    first byte is then expected.
    """
    lm = tiny_lm("gpt2")
    mark = lm.tokenizer("\ufffd")["input_ids"][0]
    space, *pieces = lm.tokenizer(" 日")["input_ids"]
    assert len(pieces) == 3
    found = in_text(lm, "It is", "日")
    assert found == [
        ("It is", space),
        ("It is ", mark),
        ("It is \ufffd", mark),
        ("It is \ufffd", mark),
    ]
    assert [a != b for (a, _), (b, _) in pairwise(found)] == [True, True, False], (
        "two pieces look like one"
    )


def test_start_tokens_are_never_expected():
    lm = tiny_lm("llama", tokenizer="byte-level with BOS")
    start = lm.encode("a").ids[0]
    assert start not in [token for _, token in in_text(lm, "It is", "Madrid")]


def test_only_causal_models_are_asked_through_texts():
    with pytest.raises(
        UnsupportedModelError, match=r"tiny-bert is of kind 'masked'.*reference=True"
    ):
        steps(tiny_lm("bert"), answers_of_zsre("Rome"))
