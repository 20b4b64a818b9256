"""Kept are the records whose true object a model says, by a rule that has a name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.data.records import Dataset, Record
from engram.benchmark.known_records import known_records
from engram.errors import FactError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def lm(pocket_lm):
    return pocket_lm


def dataset(*facts: Fact) -> Dataset:
    return Dataset(
        "some", "counterfact", tuple(Record.from_fact(str(n), fact) for n, fact in enumerate(facts))
    )


def city(subject: str, true: str, prompt: str = "The {} is in the city of") -> Fact:
    return Fact(subject, prompt, "Nowhere", true, relation="city")


def ids(found: Dataset) -> list[str]:
    return [record.id for record in found.records]


def said_alone(lm: LanguageModel, fact: Fact) -> bool:
    """Greedy decoding of one fact, by whole forwards."""
    cloze = lm.cloze(fact.prompt_text, fact.target_true)
    found = list(lm.cloze(fact.prompt_text).ids)
    with torch.no_grad():
        for _ in cloze.answer:
            found.append(int(lm.model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[-len(cloze.answer) :] == cloze.answer


def test_greedy_keeps_what_the_model_says_in_their_order(lm):
    some = dataset(
        city("Space Needle", "Seattle"), city("Space Needle", "Boston"), city("Louvre", "Paris")
    )
    assert ids(known_records(lm, some)) == ["0", "2"]


def test_greedy_in_a_batch_is_greedy_one_by_one(lm):
    mixed = pocket_benchmark().records[:12]
    wrong = [
        replace(
            r,
            id=f"{r.id}, wrong",
            facts=(replace(r.facts[0], target="Z", target_true=r.facts[0].target),),
        )
        for r in mixed
    ]
    some = Dataset("some", "counterfact", (*mixed, *wrong))
    alone = [record.id for record in some.records if said_alone(lm, record.facts[0])]
    assert 0 < len(alone) < len(some.records)
    assert ids(known_records(lm, some)) == alone


def test_a_word_that_only_begins_like_the_object_is_not_the_object(lm):
    assert lm.generate("The Louvre is in the city of", max_new_tokens=1).endswith("Paris")
    with pytest.raises(FactError, match="says the true object of none of the 1 records of 'some'"):
        known_records(lm, dataset(city("Louvre", "Par")))


def test_the_looser_rule_asks_only_among_the_objects_of_the_relation(lm):
    asked = "The {} is a tower in"
    some = dataset(
        city("Space Needle", "Seattle", asked),
        city("Louvre", "Paris"),
        city("Tower Bridge", "London"),
    )
    prompt = some.records[0].facts[0].prompt_text
    log_p = {
        place: float(lm.log_probs([(prompt, place)])[0].mean())
        for place in ("Seattle", "Paris", "London")
    }
    assert max(log_p, key=log_p.get) == "Seattle"
    assert "0" in ids(known_records(lm, some, "relation"))
    assert "0" not in ids(known_records(lm, some, "greedy"))


def test_the_looser_rule_is_the_most_probable_true_object_in_a_loop_however_it_is_batched(
    lm, monkeypatch
):
    facts = [
        city("Old Mill", "Rio de Janeiro"),
        city("Louvre", "Paris"),
        city("Grand Canal", "Boston", "The {} was at war with"),
        city("House of Lords", "the United States", "{} was born in"),
        city("Garden", "New York City"),
        city("Harbour", "San Francisco", "He wrote about the {} in"),
    ]
    names = [fact.target_true for fact in facts]
    best: dict[str, list[str]] = {"mean": [], "sum": []}
    for n, fact in enumerate(facts):
        log_p = lm.log_probs([(fact.prompt_text, name) for name in names])
        for way, found in best.items():
            if (
                names[int(torch.stack([getattr(each, way)() for each in log_p]).argmax())]
                == fact.target_true
            ):
                found.append(str(n))
    assert best["mean"] != best["sum"], "else the test does not tell them apart"
    for at_once in (1, 4, 256):
        monkeypatch.setattr("engram.benchmark.known_records._AT_ONCE", at_once)
        assert ids(known_records(lm, dataset(*facts), "relation")) == best["mean"]


def test_another_true_object_of_the_subject_does_not_stand_against_it(lm):
    some = dataset(
        city("Louvre", "Paris"), city("Louvre", "London"), city("Space Needle", "Boston")
    )
    assert ids(known_records(lm, some, "relation"))[:2] == ["0", "1"]


def test_a_record_of_several_facts_is_known_if_all_are(lm):
    good, bad = city("Louvre", "Paris"), city("Space Needle", "Boston")
    better = city("Space Needle", "Seattle")
    probes = Record.from_fact("0", good).probes
    pairs = [(good, bad), (good, better), (bad, good)]
    some = Dataset(
        "some", "mquake", tuple(Record(str(n), pair, probes) for n, pair in enumerate(pairs))
    )
    assert ids(known_records(lm, some)) == ["1"]


def test_it_stops_at_the_limit_and_tells_how_far_it_is(lm):
    told = []
    some = Dataset("some", "counterfact", pocket_benchmark().records[:300])
    kept = known_records(lm, some, limit=5, progress=lambda *at: told.append(at))
    assert kept.records == some.records[:5]
    assert told == [("records", 256, 300)]


def test_texts_and_name_stay(lm):
    whole = pocket_benchmark()
    kept = known_records(lm, replace(whole, records=whole.records[:4]), limit=3)
    assert (kept.name, kept.form, kept.references) == (whole.name, whole.form, whole.references)


def test_mistakes_are_told(lm):
    some = dataset(city("Louvre", "Paris"))
    with pytest.raises(SettingError, match="rule='loose': expected 'greedy' or 'relation'"):
        known_records(lm, some, "loose")
    with pytest.raises(SettingError, match="limit=0: expected 1 or more"):
        known_records(lm, some, limit=0)
    with pytest.raises(FactError, match=r"record '0' \('Louvre'\) has no true object"):
        known_records(lm, dataset(Fact("Louvre", "{} is in", "Rome")))
    with pytest.raises(FactError, match="relation"):
        known_records(lm, dataset(Fact("Louvre", "{} is in", "Rome", "Paris")), "relation")
