"""A fact is checked when it is made, and its subject is found by characters, never by guessing
pieces.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import EngramError, Fact
from engram.errors import FactError
from engram.facts import sample_facts, subject_starts, token_span
from tests.helpers.tiny import TOKENIZERS


def test_prompt_text_puts_the_subject_in_its_place():
    fact = Fact("Space Needle", "The {} is located in the city of", "Paris")
    assert fact.prompt_text == "The Space Needle is located in the city of"
    assert fact.prompt_text[fact.subject_start :].startswith("Space Needle")


def test_braces_in_a_subject_are_just_letters():
    assert Fact("{x}", "a {} b", "c").prompt_text == "a {x} b"


def test_a_fact_survives_a_round_trip_through_a_dict():
    fact = Fact("a", "{} is", "b", "c", ("p",), (("q", "r"),))
    assert Fact.from_dict(fact.to_dict()) == fact


def test_lists_become_tuples():
    for neighbours in ([["q", "r"]], (["q", "r"],), [("q", "r")]):
        fact = Fact("a", "{} is", "b", "c", ["p"], neighbours)
        assert fact == Fact("a", "{} is", "b", "c", ("p",), (("q", "r"),))
        assert len({fact}) == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("", "{} is", "b"), "subject='' is empty"),
        (("a", "no place", "b"), "0 places for the subject, expected exactly one"),
        (("a", "{} and {}", "b"), "2 places for the subject"),
        (("a", "{} is", " "), "target=' ' is empty"),
        (("a", "{} is", "b", " b"), "equals target_true"),
        ((3, "{} is", "b"), "subject=3: expected a text"),
        ((None, "{} is", "b"), "subject=None: expected a text"),
        (("a", b"{} is", "b"), "prompt=b'{} is': expected a text"),
        (("a", "{} is", ["b"]), "target=.*'b'.*: expected a text"),
        (("a", "{} is", float("nan")), "target=nan: expected a text"),
        (("a", "{} is", "\ud800"), "is no text that a file can hold"),
        (("a", "{} is", "b", None, (), (("q", "\udcff"),)), "is no text that a file can hold"),
        (("a", "{} is", "b", True), "target_true=True: expected a text"),
        (("a", "{} is", "b", "c", "texts"), "paraphrases='texts': expected a list"),
        (("a", "{} is", "b", "c", (1,)), r"paraphrases\[0\]=1: expected a text"),
        (("a", "{} is", "b", "c", None), "paraphrases=None: expected a list"),
        (("a", "{} is", "b", "c", (), ("pq",)), r"neighbours\[0\]='pq': expected a list"),
        (("a", "{} is", "b", "c", (), (("q",),)), r"neighbours\[0\]"),
        (("a", "{} is", "b", "c", (), 3), "neighbours=3: expected a list"),
        (("a", "{} is", "b", "c", (), (), 3), "relation=3: expected a text"),
    ],
)
def test_a_fact_that_cannot_be_meant_is_refused(parts, message):
    with pytest.raises(FactError, match=message):
        Fact(*parts)


def test_occurrences_are_first_last_or_all():
    assert subject_starts("Rome is Rome", "Rome") == [0]
    assert subject_starts("Rome is Rome", "Rome", "last") == [8]
    assert subject_starts("Rome is Rome", "Rome", "all") == [0, 8]


def test_a_subject_in_other_letters_gets_a_hint():
    with pytest.raises(EngramError, match=r"did you mean 'space needle'\?"):
        subject_starts("the space needle is", "Space Needle")


def test_a_token_that_only_partly_overlaps_counts_whole():
    offsets = [(0, 3), (3, 9), (9, 16), (16, 19)]  # "The", " Space", " Needle", " is"
    assert token_span(offsets, 4, 16) == (1, 3)
    assert token_span(offsets, 4, 8) == (1, 2)


def test_special_tokens_are_nobody():
    with pytest.raises(FactError, match="subject is lost"):
        token_span([(0, 0)], 0, 4)


words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp", "Cn")),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@settings(max_examples=60, deadline=None)
@given(before=words, subject=words, after=words)
def test_the_span_holds_the_subject_and_no_word_more_under_every_tokenizer(
    kind, before, subject, after
):
    tokenizer = TOKENIZERS[kind]()
    text = f"{before} {subject} {after}"
    start = len(before) + 1
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    first, end = token_span(offsets, start, start + len(subject))
    covered = {c for a, b in offsets[first:end] for c in range(a, b)}
    seen = {c for a, b in offsets for c in range(a, b)}
    assert set(range(start, start + len(subject))) & seen <= covered
    assert min(covered) >= start - 1 - len(before)  # never past the word in front
    for a, b in (offsets[first], offsets[end - 1]):
        assert a < start + len(subject) and b > start


def test_a_sample_follows_its_seed_and_is_all_facts_where_there_are_no_more():
    facts = [Fact(f"Tower {i}", "The {} is in the city of", "Paris") for i in range(20)]
    sample = sample_facts(facts, 5, seed=3)
    assert len(set(sample)) == 5 and set(sample) <= set(facts)
    assert sample == sample_facts(facts, 5, seed=3) != sample_facts(facts, 5, seed=4)
    assert sample_facts(facts, None) == sample_facts(facts, 20) == facts
