"""What a model knows is what a plain loop over its logits says, one prompt and one candidate at a
time.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import engram
from engram import Fact, Knowledge, knows, pocket, read_facts
from engram.engine.shared_prompts import shared_logits
from engram.errors import EngramFileError, FactError, NonFiniteError, SettingError
from engram.knowledge.cloze_rows import ClozeRows
from engram.knowledge.knowledge import KnownRecord, Reply
from tests.helpers.damage import check_equal_or_refused, damaged_texts, flipped
from tests.helpers.paths import SHARED
from tests.helpers.tiny import ENCODER_DECODER, FAMILIES, MASKED, STATE_SPACE, tiny_lm

FACTS = [
    Fact(
        "tower",
        "The {} is in the city of",
        "Paris",
        paraphrases=("The tower stands in", "See the tower in"),
        relation="city",
    ),
    Fact(
        "bridge",
        "The {} is in the city of",
        "Rome",
        paraphrases=("The bridge stands in",),
        relation="city",
    ),
    Fact("river", "The {} runs through", "the capital", relation="city"),
    Fact(
        "She",
        "{} plays the",
        "piano",
        paraphrases=("It is said that she plays the",),
        relation="instrument",
    ),
    Fact("He", "{} plays the", "guitar and sings", relation="instrument"),
]
OPTIONAL = SHARED / "data/known_1000.json"


# -- an independent computation: one plain forward for each prompt and candidate -------------------


@torch.no_grad()
def naive_log_probs(lm, prompt: str, text: str) -> tuple[torch.Tensor, list[int]]:
    """[answer's tokens, v] log-probabilities, and the tokens; the answer's earlier tokens are in
    front.
    """
    head = lm.tokenizer(prompt)["input_ids"]
    joint = lm.tokenizer(f"{prompt} {text}")["input_ids"]
    assert joint[: len(head)] == head
    logits = lm.model(torch.tensor([joint])).logits[0]
    return logits[len(head) - 1 : len(joint) - 1].log_softmax(-1), joint[len(head) :]


def naive_rank(scores: list[float], own: int) -> int:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return order.index(own) + 1


def naive_vocabulary(lm, prompt: str, text: str) -> tuple[int, float]:
    log_probs, tokens = naive_log_probs(lm, prompt, text)
    ranks = [naive_rank(row.tolist(), token) for row, token in zip(log_probs, tokens, strict=True)]
    return max(ranks), sum(float(row[token]) for row, token in zip(log_probs, tokens, strict=True))


def naive_candidates(lm, prompt: str, texts: list[str], length: str) -> list[float]:
    scores = []
    for text in texts:
        log_probs, tokens = naive_log_probs(lm, prompt, text)
        each = [float(row[token]) for row, token in zip(log_probs, tokens, strict=True)]
        scores.append(sum(each) / (len(each) if length == "mean" else 1))
    return scores


def objects(relation: str) -> list[str]:
    return sorted({fact.target for fact in FACTS if fact.relation == relation})


@pytest.fixture(params=["byte-level", "byte-level with BOS", "metaspace with BOS"])
def lm(request):
    return tiny_lm("gpt2", torch.float64, request.param)


def test_ranks_in_the_vocabulary_are_those_of_a_loop(lm):
    found = knows(lm, FACTS)
    assert any(len(lm.target_ids(fact.prompt_text, fact.target)) > 1 for fact in FACTS)
    for fact, record in zip(FACTS, found.records, strict=True):
        assert [reply.prompt for reply in record.replies] == [fact.prompt_text, *fact.paraphrases]
        for reply in record.replies:
            rank, log_prob = naive_vocabulary(lm, reply.prompt, fact.target)
            assert reply.rank == rank and reply.log_prob == pytest.approx(log_prob, abs=1e-9)
        assert (record.answer, record.rank, record.log_prob) == (
            record.replies[0].answer,
            record.replies[0].rank,
            record.replies[0].log_prob,
        )


@pytest.mark.parametrize("length", ["sum", "mean"])
def test_ranks_among_a_relations_objects_are_those_of_a_loop(lm, length):
    for fact, record in zip(
        FACTS, knows(lm, FACTS, candidates="relation", length=length).records, strict=True
    ):
        texts = objects(fact.relation)
        for reply in record.replies:
            scores = naive_candidates(lm, reply.prompt, texts, length)
            own = texts.index(fact.target)
            assert reply.rank == naive_rank(scores, own)
            assert reply.answer == texts[max(range(len(texts)), key=scores.__getitem__)]
            assert reply.log_prob == pytest.approx(scores[own], abs=1e-9)


def test_candidates_of_the_callers_are_taken_as_they_are():
    lm, texts = (
        tiny_lm("gpt2", torch.float64),
        ["Rome", "Paris", "London", "the capital of London", "the capital"],
    )
    found = knows(lm, FACTS[:3], candidates=texts)
    assert found.candidates == tuple(texts)
    for fact, record in zip(FACTS[:3], found.records, strict=True):
        for reply in record.replies:
            assert reply.rank == naive_rank(
                naive_candidates(lm, reply.prompt, texts, "sum"), texts.index(fact.target)
            )


@pytest.mark.parametrize("candidates", ["vocabulary", "relation"])
def test_the_mean_is_of_log_probabilities_before_they_are_ranked(candidates):
    lm = tiny_lm("gpt2", torch.float64)
    for fact, record in zip(
        FACTS, knows(lm, FACTS, candidates=candidates, aggregate="mean").records, strict=True
    ):
        prompts = [fact.prompt_text, *fact.paraphrases]
        if candidates == "relation":
            texts = objects(fact.relation)
            each = torch.tensor(
                [naive_candidates(lm, prompt, texts, "sum") for prompt in prompts],
                dtype=torch.float64,
            ).mean(0)
            own = texts.index(fact.target)
            assert (record.rank, record.answer) == (
                naive_rank(each.tolist(), own),
                texts[int(each.argmax())],
            )
            assert record.log_prob == pytest.approx(float(each[own]), abs=1e-9)
        else:
            both = [naive_log_probs(lm, prompt, fact.target) for prompt in prompts]
            means, tokens = torch.stack([rows for rows, _ in both]).mean(0), both[0][1]
            assert record.rank == max(
                naive_rank(row.tolist(), t) for row, t in zip(means, tokens, strict=True)
            )
            assert record.log_prob == pytest.approx(
                sum(float(row[t]) for row, t in zip(means, tokens, strict=True))
            )
        (single,) = knows(lm, [fact], table=FACTS, candidates=candidates).records
        assert [(r.rank, r.answer) for r in record.replies] == [
            (r.rank, r.answer) for r in single.replies
        ]


def test_the_best_prompt_is_the_oracles():
    lm = tiny_lm("gpt2", torch.float64)
    for record in knows(lm, FACTS, aggregate="best").records:
        best = min(record.replies, key=lambda reply: (reply.rank, -reply.log_prob))
        assert (record.rank, record.log_prob, record.answer) == (
            best.rank,
            best.log_prob,
            best.answer,
        )


def test_a_right_answer_of_several_tokens_is_what_greedy_decoding_says():
    lm = tiny_lm("gpt2", torch.float64)
    prompt = "The tower is in"
    ids = lm.encode(prompt).ids
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    tail = tuple(ids[-3:])
    cloze = ClozeRows(lm)
    wrong = (*tail[:2], (tail[2] + 1) % 320)
    (row,), _ = cloze.rows(prompt, [tail])
    assert cloze.logits([row]).argmax(-1).tolist() == list(tail)
    assert cloze.top_answer(wrong, tail) == lm.tokenizer.decode(tail), (
        "white space alone is left as it is"
    )


def test_nothing_is_known_behind_the_first_miss():
    cloze = ClozeRows(tiny_lm("gpt2"))
    decode = cloze.lm.tokenizer.decode
    assert cloze.top_answer((70, 71, 72), (70, 71, 75)) == decode([70, 71, 75])
    assert cloze.top_answer((70, 71, 72), (70, 75, 72)) == decode([70, 75])
    assert cloze.top_answer((70, 71, 72), (75, 71, 72)) == decode([75])


# -- masked and encoder-decoder models -------------------------------------------------------------


@torch.no_grad()
def filled_log_probs(lm, prompt: str, text: str) -> tuple[torch.Tensor, list[int]]:
    """Return what `naive_log_probs` does, from the cloze of this one answer."""
    cloze = lm.cloze(prompt, text)
    ids = torch.tensor([cloze.ids])
    rest = (
        {}
        if cloze.decoder_ids is None
        else {"decoder_input_ids": torch.tensor([cloze.decoder_ids])}
    )
    return lm.model(ids, **rest).logits[0, cloze.read].log_softmax(-1), cloze.answer


@pytest.mark.parametrize("family", [*MASKED, *ENCODER_DECODER, *STATE_SPACE])
def test_every_kind_of_model_is_asked(family):
    lm = tiny_lm(family, torch.float64)
    sizes = set()
    free, among = knows(lm, FACTS), knows(lm, FACTS, candidates="relation", length="mean")
    for fact, one, other in zip(FACTS, free.records, among.records, strict=True):
        texts = objects(fact.relation)
        for reply, of_objects in zip(one.replies, other.replies, strict=True):
            log_probs, tokens = filled_log_probs(lm, reply.prompt, fact.target)
            sizes.add(len(tokens))
            own = [float(row[token]) for row, token in zip(log_probs, tokens, strict=True)]
            assert reply.rank == max(
                naive_rank(row.tolist(), t) for row, t in zip(log_probs, tokens, strict=True)
            )
            assert reply.log_prob == pytest.approx(sum(own), abs=1e-5)
            scores = []
            for text in texts:
                log_probs, tokens = filled_log_probs(lm, reply.prompt, text)
                scores.append(
                    sum(float(row[t]) for row, t in zip(log_probs, tokens, strict=True))
                    / len(tokens)
                )
            assert of_objects.rank == naive_rank(scores, texts.index(fact.target))
            assert of_objects.log_prob == pytest.approx(scores[texts.index(fact.target)], abs=1e-5)
    assert len(sizes) > 1, "objects of one length show little"


def test_rows_are_the_clozes_own():
    for family in ("gpt2", *MASKED, *ENCODER_DECODER):
        lm = tiny_lm(family)
        cloze = ClozeRows(lm)
        for fact in FACTS:
            wanted = lm.cloze(fact.prompt_text, fact.target)
            (row,), _ = cloze.rows(fact.prompt_text, [cloze.tokens(fact.prompt_text, fact.target)])
            assert (row.ids, row.read, row.decoder) == (
                tuple(wanted.ids),
                tuple(wanted.read),
                tuple(wanted.decoder_ids or ()),
            )


def test_a_masked_model_says_all_its_masks():
    cloze = ClozeRows(tiny_lm("bert"))
    decode = cloze.lm.tokenizer.decode
    assert cloze.top_answer((70, 71, 72), (75, 76, 77)) == decode([75, 76, 77]).strip()


# -- what is shared, what is left out --------------------------------------------------------------


def test_one_forward_a_prompt_whatever_the_number_of_one_token_candidates(monkeypatch):
    lm = tiny_lm("gpt2")
    seen = []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda ids, **rest: seen.extend(ids.tolist()) or forward(ids, **rest)
    )
    cloze = ClozeRows(lm)
    answers = [(token,) for token in range(40)]
    rows, where = cloze.rows("The tower is in", answers)
    assert len(rows) == 1 and where == [0] * 40
    knows(lm, [FACTS[0], replace(FACTS[0], subject="tower", target="Rome", relation="other")])
    assert len(seen) == len({tuple(row) for row in seen})


def test_answers_share_their_beginnings():
    cloze = ClozeRows(tiny_lm("gpt2"))
    answers = [(5,), (5, 6), (5, 7), (5, 6, 8), (9, 1), (9, 1, 2, 3)]
    rows, where = cloze.rows("The tower", answers)
    head = tuple(cloze.lm.encode("The tower").ids)
    assert [row.ids[len(head) :] for row in rows] == [(5, 6), (9, 1, 2)]
    for ids, row in zip(answers, where, strict=True):
        assert rows[row].ids[len(head) : len(head) + len(ids) - 1] == ids[:-1]
        assert rows[row].read[: len(ids)] == tuple(range(len(head) - 1, len(head) - 1 + len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_computed_once_gives_what_whole_rows_give(family, monkeypatch):
    lm = tiny_lm(family, torch.float64)
    cloze = ClozeRows(lm)
    answers = [(5,), (6, 7), (8, 9, 10), (6, 11), (12, 13)]
    rows = [
        row
        for prompt in ("The tower is in", "The river runs through the city of", "She plays in")
        for row in cloze.rows(prompt, answers)[0]
    ]
    calls: list[int] = []
    monkeypatch.setattr(
        "engram.knowledge.cloze_rows.shared_logits",
        lambda *args: calls.append(1) or shared_logits(*args),
    )
    shared = cloze.logits(rows)
    assert calls and len(rows) == 9
    monkeypatch.setattr("engram.knowledge.cloze_rows.can_share", lambda lm: False)
    whole = ClozeRows(lm).logits(rows)
    assert len(calls) == 1
    torch.testing.assert_close(
        shared, whole, atol=1e-5, rtol=1e-5
    )  # some families turn to float32 on the way
    monkeypatch.setattr("engram.engine.shared_prompts._CACHED_TOKENS", 12)
    torch.testing.assert_close(cloze.logits(rows), whole, atol=1e-5, rtol=1e-5)


def test_facts_come_back_in_their_order_from_many_blocks(monkeypatch):
    lm = tiny_lm("gpt2", torch.float64)
    whole = {each: knows(lm, FACTS, candidates=each) for each in ("vocabulary", "relation")}
    for module, name in (
        ("knows", "_LOGITS"),
        ("knows", "_SCORES"),
        ("cloze_rows", "_LOGITS"),
        ("knows", "_IN_CACHE"),
    ):
        monkeypatch.setattr(f"engram.knowledge.{module}.{name}", 1)
    for candidates, wanted in whole.items():
        told: list[tuple[str, int, int]] = []
        found = knows(
            lm, FACTS, candidates=candidates, progress=lambda *each, told=told: told.append(each)
        )
        assert [record.fact for record in found.records] == FACTS
        for got, want in zip(found.records, wanted.records, strict=True):
            assert (got.rank, got.answer) == (want.rank, want.answer)
            assert got.log_prob == pytest.approx(want.log_prob, abs=1e-9)
        assert told[-1] == ("prompts", 9, 9) and len(told) == len(FACTS)


@pytest.mark.parametrize("candidates", ["vocabulary", "relation"])
def test_other_right_objects_do_not_stand_in_the_way(candidates):
    """As in LAMA; the river runs through two cities, and saying the one is no mistake about the
    other.
    """
    lm = tiny_lm("gpt2", torch.float64)
    prompt = "The river runs through"
    one_token = [
        i for i in range(256, 320) if lm.target_ids(prompt, lm.tokenizer.decode([i])) == [i]
    ]
    (logits,) = lm.logits_at([lm.encode(prompt).ids], [[len(lm.encode(prompt).ids) - 1]])
    first, second = sorted(one_token, key=lambda i: -logits[0, i])[:2]
    facts = [
        Fact("river", "The {} runs through", lm.tokenizer.decode([i]), relation="city")
        for i in (first, second)
    ]
    alone = knows(
        lm, facts[1], candidates=candidates, table=[facts[1], replace(facts[0], subject="bridge")]
    )
    both = knows(lm, facts[1], candidates=candidates, table=facts)
    assert both.records[0].rank == alone.records[0].rank - 1


def test_without_paraphrases_only_the_prompt_is_asked():
    record = knows(tiny_lm("gpt2"), FACTS[0], paraphrases=False).records[0]
    assert [reply.prompt for reply in record.replies] == [
        FACTS[0].prompt_text
    ] and record.consistency is None


def test_of_equal_tokens_the_first_is_the_better_one():
    """Else a model that knows nothing, with all logits equal, would know everything."""
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.zero_()
    for record in knows(lm, FACTS).records:
        assert record.rank == 1 + max(lm.target_ids(record.fact.prompt_text, record.fact.target))
    found = knows(lm, FACTS, candidates="relation", length="mean")
    assert [record.rank for record in found.records] == [
        1 + objects(f.relation).index(f.target) for f in FACTS
    ]


# -- what is made of it, by hand -------------------------------------------------------------------


def record(relation: str | None, *replies: tuple[str, int]) -> KnownRecord:
    """Return a record from (answer, rank) pairs; the log-probability is minus the rank."""
    told = tuple(
        Reply(f"prompt {i}", answer, rank, -float(rank)) for i, (answer, rank) in enumerate(replies)
    )
    return KnownRecord(
        Fact("a", "{} is", "b", relation=relation),
        told,
        told[0].answer,
        told[0].rank,
        told[0].log_prob,
    )


def knowledge(*records: KnownRecord, **parts: object) -> Knowledge:
    return Knowledge(
        records,
        **{
            "candidates": "vocabulary",
            "aggregate": "first",
            "length": "sum",
            "k": 2,
            "model": "m",
            **parts,
        },
    )  # type: ignore[arg-type]


HAND = knowledge(
    record("one", ("b", 1), ("b", 1), ("c", 3)),  # pairs: bb agree, bc, bc do not
    record("one", ("c", 2), ("c", 4)),  # consistent and wrong
    record("two", ("b", 1), ("b", 1), ("b", 1)),
    record("two", ("x", 4)),  # a single prompt
)


def test_consistency_is_the_share_of_agreeing_pairs():
    assert [each.consistency for each in HAND.records] == [pytest.approx(1 / 3), 1.0, 1.0, None]


def test_scores_are_means_over_facts():
    scores = HAND.scores()
    assert (scores.p_at_1, scores.p_at_k, scores.mrr) == (2 / 4, 3 / 4, (1 + 1 / 2 + 1 + 1 / 4) / 4)
    assert scores.log_prob == -(1 + 2 + 1 + 4) / 4
    assert scores.consistency == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert scores.accuracy == pytest.approx(2 / 3), "of the three facts with several prompts"
    assert scores.both == pytest.approx(1 / 3), "only one of them is said rightly in every way"
    assert HAND.scores("one").p_at_1 == 0.5 and HAND.scores("one").both == 0.0
    assert HAND.known() == [HAND.records[0].fact, HAND.records[2].fact]


def test_the_macro_average_counts_relations_not_facts():
    lopsided = knowledge(*HAND.records[:2], record("two", ("b", 1)))
    assert lopsided.scores().p_at_1 == pytest.approx(2 / 3)
    macro = lopsided.macro()
    assert macro.p_at_1 == (1 / 2 + 1) / 2
    assert macro.consistency == lopsided.scores("one").consistency, (
        "relation two has no pairs to compare"
    )


def test_single_prompts_have_no_consistency():
    scores = knowledge(record(None, ("b", 1))).scores()
    assert (scores.consistency, scores.accuracy, scores.both) == (None, None, None)
    assert "—" in str(knowledge(record(None, ("b", 1))))


def test_intervals_are_the_bootstraps():
    """Against resampling in a plain loop, with the same draws."""
    n, samples = len(HAND.records), 200
    draws = torch.randint(n, (samples, n), generator=torch.Generator().manual_seed(7)).tolist()
    resampled = [knowledge(*(HAND.records[i] for i in rows)) for rows in draws]
    found = HAND.intervals(7, samples=samples, level=0.8)
    tails = torch.tensor([0.1, 0.9], dtype=torch.float64)
    for kind, metric in (
        (k, m)
        for k in ("micro", "macro")
        for m in ("p_at_1", "mrr", "log_prob", "consistency", "both")
    ):
        means = [
            getattr(each.scores() if kind == "micro" else each.macro(), metric)
            for each in resampled
        ]
        wanted = torch.tensor(
            [math.nan if m is None else m for m in means], dtype=torch.float64
        ).nanquantile(tails)
        assert [getattr(end, metric) for end in found[kind]] == pytest.approx(wanted.tolist())
    assert found == HAND.intervals(torch.Generator().manual_seed(7), samples=samples, level=0.8)
    assert found != HAND.intervals(8, samples=samples, level=0.8)


def test_the_bootstrap_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch):
    wanted = HAND.intervals(3, samples=50)
    monkeypatch.setattr("engram.knowledge.knowledge._BATCH", 1)
    assert HAND.intervals(3, samples=50) == wanted


def test_the_table_says_all_of_it():
    lines = HAND.table(samples=20).splitlines()
    assert lines[0] == "m: 4 facts of 2 relations"
    assert lines[3].split() == [
        "relation",
        "facts",
        "prompts",
        "P@1",
        "P@2",
        "MRR",
        "log",
        "p",
        "consistent",
        "both",
    ]
    assert lines[4].split() == [
        "one",
        "2",
        "5",
        "0.500",
        "1.000",
        "0.750",
        "-1.50",
        "0.667",
        "0.000",
    ]
    assert lines[7].split() == [
        "all",
        "facts",
        "4",
        "9",
        "0.500",
        "0.750",
        "0.688",
        "-2.00",
        "0.778",
        "0.333",
    ]
    assert lines[10].split() == [
        "mean",
        "of",
        "relations",
        "0.500",
        "0.750",
        "0.688",
        "-2.00",
        "0.833",
        "0.500",
    ]
    assert len({len(line) for line in lines[3:] if line}) == 1, "columns are aligned"


def test_knowledge_survives_a_file(tmp_path):
    path = tmp_path / "known.json"
    for found in (
        HAND,
        knows(
            tiny_lm("gpt2"),
            FACTS[:3],
            candidates=["Paris", "Rome", "the capital"],
            aggregate="best",
        ),
    ):
        found.save(path)
        assert Knowledge.load(path) == found
    record = json.loads(path.read_text(encoding="utf8"))
    assert record["micro"]["p_at_1"] == found.scores().p_at_1 and set(record["relations"]) == {
        "city"
    }
    assert [each.name for each in tmp_path.iterdir()] == ["known.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 9}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(
        EngramFileError,
        match="format=9, this"
        if "9" in text
        else r"the knowledge file .*x (is damaged|has format=None)",
    ):
        Knowledge.load(tmp_path / "x")


def test_any_value_of_a_file_may_be_wrong(tmp_path):
    path = tmp_path / "known.json"
    HAND.save(path)
    data = path.read_bytes()
    for how, text in damaged_texts(json.loads(data)):
        path.write_text(text, encoding="utf8")
        check_equal_or_refused(lambda: Knowledge.load(path), HAND, path, how)
    for changed in flipped(data, 300):
        path.write_bytes(changed)
        check_equal_or_refused(lambda: Knowledge.load(path), HAND, path, "flipped")


def test_a_file_of_an_older_engram_is_read_with_a_note(tmp_path, caplog):
    path = tmp_path / "known.json"
    path.write_text(json.dumps(HAND.to_dict()), encoding="utf8")
    assert Knowledge.load(path) == HAND
    assert "has no checksum" in caplog.text


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "settings", "error", "message"),
    [
        ([], {}, FactError, "no facts to ask for"),
        (
            FACTS,
            {"candidates": "relations"},
            SettingError,
            r"expected .* or a list \(did you mean 'relation'\?\)",
        ),
        (
            FACTS,
            {"aggregate": "oracle"},
            SettingError,
            "aggregate='oracle': expected 'first', 'best' or 'mean'",
        ),
        (FACTS, {"length": "total"}, SettingError, "length='total': expected"),
        (FACTS, {"k": 0}, SettingError, "k=0: expected at least 1"),
        (
            FACTS,
            {"aggregate": "best", "paraphrases": False},
            SettingError,
            "paraphrases=False leaves them out",
        ),
        (
            FACTS,
            {"candidates": ["Paris"]},
            FactError,
            r"fact 1 .*its object 'Rome' is not among the candidates",
        ),
        (
            FACTS[1],
            {"candidates": "relation", "table": FACTS[:1]},
            FactError,
            "is not among the table's objects of relation 'city'",
        ),
        (
            replace(FACTS[0], relation=None),
            {"candidates": "relation"},
            FactError,
            r"has no relation; candidates='relation' needs",
        ),
        (
            Fact("tower", "The {} " + "is " * 150, "Paris"),
            {},
            FactError,
            "the model takes at most 128",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(facts, settings, error, message):
    with pytest.raises(error, match=message):
        knows(tiny_lm("gpt2"), facts, **settings)


def test_a_prompt_that_is_too_long_only_with_its_answer():
    lm = tiny_lm("gpt2")
    prompt = "The tower" + " is" * 200
    while len(lm.tokenizer(prompt)["input_ids"]) > 127:
        prompt = prompt.rpartition(" ")[0]
    with pytest.raises(FactError, match="the model takes at most 128"):
        ClozeRows(lm).rows(prompt, [(1, 2, 3, 4, 5)])


@pytest.mark.parametrize("candidates", ["vocabulary", "relation"])
def test_nan_is_no_knowledge(candidates):
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        next(lm.model.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        knows(lm, FACTS, candidates=candidates)


def test_a_relation_that_is_not_there():
    with pytest.raises(
        SettingError, match="relation='three' is none of the facts'; they have one, two"
    ):
        HAND.scores("three")
    with pytest.raises(SettingError, match=r"level=2\.0: need"):
        HAND.intervals(level=2)


# -- the bundled model -----------------------------------------------------------------------------


def test_pocket_knows_its_facts_and_not_their_counterfactuals(pocket_lm):
    lm, facts = pocket_lm, read_facts("pocket")[::200]
    assert len(knows(lm, facts).known()) >= len(facts) - 2
    wrong = [
        replace(fact, target=pocket.counterfactual(*pocket.find(fact.subject, fact.relation)))
        for fact in facts
    ]
    assert not knows(lm, wrong, paraphrases=False).known()


@pytest.mark.skipif(not OPTIONAL.exists(), reason="the published known-facts file is not here")
def test_published_facts_rank_as_a_loop_says():
    lm, facts = engram.load("pocket"), read_facts(OPTIONAL)
    lm.model.double()
    asked = facts[::61]
    free, among = knows(lm, asked), knows(lm, asked, candidates="relation", table=facts)
    for fact, one in zip(asked, free.records, strict=True):
        assert one.rank == naive_vocabulary(lm, fact.prompt_text, fact.target)[0]
    for fact, other in zip(asked[::5], among.records[::5], strict=True):
        also = {
            f.target for f in facts if (f.subject, f.relation) == (fact.subject, fact.relation)
        } - {fact.target}
        texts = sorted({f.target for f in facts if f.relation == fact.relation} - also)
        scores = naive_candidates(lm, fact.prompt_text, texts, "sum")
        assert other.rank == naive_rank(scores, texts.index(fact.target))
        assert other.log_prob == pytest.approx(scores[texts.index(fact.target)], abs=1e-8)
