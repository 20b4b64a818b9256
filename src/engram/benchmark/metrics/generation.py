"""Scores of generated text: fluency (n-gram entropy) and consistency (TF-IDF similarity with
reference texts).

Knows texts. Refuses to know how they were generated. Source: Meng et al. 2022, arXiv:2202.05262,
Sec. 3.4 and released code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import log2
from statistics import fmean
from typing import Any

from engram.benchmark.data.tfidf import TfIdf
from engram.errors import EngramError


def fluency(texts: Sequence[str]) -> float | None:
    """GE: mean over texts of a third of the entropy (bits) of their bigrams and two thirds of that
    of their trigrams.

    Texts of fewer than 3 tokens have none and are left out; None where no text has one.
    """
    found = [entropy for text in texts if (entropy := n_gram_entropy(tokens(text))) is not None]
    return fmean(found) if found else None


def n_gram_entropy(words: Sequence[str]) -> float | None:
    """mean(2/3 H_2, 4/3 H_3) in bits; None for fewer than 3 tokens (NaN in the released code)."""
    if len(words) < 3:
        return None
    two = entropy(list(pairwise(words)))
    three = entropy(list(zip(words, words[1:], words[2:], strict=False)))
    return (2 / 3 * two + 4 / 3 * three) / 2


def entropy(events: Sequence[Any]) -> float:
    """Of the events' frequencies, in bits."""
    counts = Counter(events).values()
    total = sum(counts)
    return -sum(count / total * log2(count / total) for count in counts)


def consistency(texts: Sequence[str], references: Sequence[str], tfidf: TfIdf) -> float | None:
    """RS: cosine of the TF-IDF vectors of all texts joined and of all reference texts joined."""
    return tfidf.cosine(" ".join(texts), " ".join(references))


def tokens(text: str) -> list[str]:
    """NLTK's `word_tokenize`.

    Raises:
        EngramError: NLTK is not installed.
    """
    return [
        token for sentence in _sentences().tokenize(text) for token in _words().tokenize(sentence)
    ]


@cache
def _words() -> Any:
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
    except ImportError as error:
        raise EngramError("fluency needs NLTK's tokenizer: pip install 'engram[eval]'") from error
    return NLTKWordTokenizer()


@cache
def _sentences() -> Any:
    """Punkt with its English tables where they are installed, else without tables (the same but for
    abbreviations).
    """
    _words()
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer

    try:
        return PunktTokenizer("english")
    except LookupError:
        return PunktSentenceTokenizer()
