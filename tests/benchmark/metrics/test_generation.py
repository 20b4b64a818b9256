"""Fluency and consistency, by formula and against scikit-learn."""

from __future__ import annotations

from math import log2

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from engram.benchmark.data.tfidf import TfIdf
from engram.benchmark.metrics.generation import consistency, fluency, n_gram_entropy, tokens
from tests.helpers.tiny import TEXT

CORPUS = TEXT.splitlines()


def test_a_text_of_one_word_has_no_entropy():
    assert fluency(["a a a a a a a a"]) == 0


@pytest.mark.parametrize("m", [3, 4, 17])
def test_a_text_without_repetition_has_the_most(m):
    expected = log2(m - 1) / 3 + 2 * log2(m - 2) / 3
    assert n_gram_entropy([f"w{i}" for i in range(m)]) == pytest.approx(expected)


def test_texts_of_fewer_than_three_tokens_are_left_out():
    assert n_gram_entropy(["one", "two"]) is None
    assert fluency(["one two", "a b c"]) == fluency(["a b c"])
    assert fluency(["one two"]) is None


def test_words_are_those_of_the_penn_treebank():
    assert tokens('It can\'t go on. She said: "no".') == [
        "It",
        "ca",
        "n't",
        "go",
        "on",
        ".",
        "She",
        "said",
        ":",
        "``",
        "no",
        "''",
        ".",
    ]


def test_consistency_is_scikit_learns():
    """The vectorizer of today, fitted on a few texts: the vectors' product, both of length one."""
    theirs = TfidfVectorizer().fit(CORPUS)
    ours = TfIdf.fit(CORPUS)
    generated, told = (
        ["Their capital is the city", "of Paris and of Rome."],
        ["The capital is Rome, in", "the city's piano"],
    )
    expected = (
        theirs.transform([" ".join(generated)]) @ theirs.transform([" ".join(told)]).T
    ).toarray()[0, 0]
    assert consistency(generated, told, ours) == pytest.approx(expected)
    assert 0 < expected < 1


def test_consistency_of_the_same_texts_is_1_of_disjoint_ones_0_and_of_unknown_words_nothing():
    fitted = TfIdf.fit(CORPUS)
    assert consistency(CORPUS, CORPUS, fitted) == pytest.approx(1)
    assert consistency(["piano guitar"], ["river bridge"], fitted) == 0
    assert consistency(["xyzzy"], CORPUS, fitted) is None
