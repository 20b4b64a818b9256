"""Corpora by name, and the one that the package brings."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from engram.editors.second_moments.corpora import (
    CORPORA,
    Bundled,
    SampledText,
    TextFile,
    Wikipedia,
    as_corpus,
)
from tests.helpers.tiny import tiny_lm

DIGEST = "wikipedia 01c14c0f080f77ffc1fac984d5630ddce4ac7be4db37223f5b78983e0332ca43"


def test_the_default_is_real_text_in_the_package():
    assert as_corpus(None, seed=3) == Wikipedia()


@pytest.mark.parametrize("given", [str, Path])
def test_a_corpus_is_known_by_its_name(given):
    assert as_corpus(given("wikipedia"), 3) == Wikipedia()
    assert as_corpus(given("bundled"), 3) == Bundled(3)
    assert as_corpus(given("sampled"), 3) == SampledText(3)


def test_any_other_name_is_a_file(tmp_path):
    (tmp_path / "text.txt").write_text("a b c")
    assert isinstance(as_corpus(tmp_path / "text.txt", 0), TextFile)
    assert len({corpus(0).digest() for corpus in CORPORA.values()}) == 3


def test_wikipedia_is_the_same_text_everywhere():
    assert Wikipedia().digest() == DIGEST


def test_documents_are_some_sentences_long_and_begin_anywhere():
    lm = tiny_lm("gpt2")
    texts = list(Wikipedia().documents(lm, 0))
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[1] >= 100 and lengths[len(lengths) // 2] < 130 and lengths[-1] < 250
    assert len(set(texts)) == len(texts) > 1000
    assert list(Wikipedia().documents(lm, 700)) == texts[700:]


@pytest.mark.parametrize(
    "subject",
    [
        *("Danielle Darrieux", "Eiffel Tower", "Space Needle", "Big Ben", "Windows 95", "Vienna"),
        *("Michel Rocard", "LeBron James", "Jim Brown", "London", "BBC One", "Jean Davy"),
    ],
)
def test_no_subject_of_counterfact_or_its_neighbours_is_mentioned(subject):
    text = "\n".join(Wikipedia().documents(tiny_lm("gpt2"), 0))
    assert not re.search(rf"\b{subject}\b", text, re.IGNORECASE)


def test_its_licence_is_beside_it():
    notice = (files("engram.editors.second_moments") / "wikipedia.NOTICE").read_text()
    assert "Creative Commons Attribution-ShareAlike 4.0" in notice and "T-REx" in notice
    sentences = int(re.search(r"holds ([\d,]+) sentences", notice)[1].replace(",", ""))
    assert f"{sentences:,} sentences" in (Wikipedia.__doc__ or "")
