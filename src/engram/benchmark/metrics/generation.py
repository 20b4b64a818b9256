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
    """Return GE: the mean over texts of `n_gram_entropy` (bits), None where no text has one.

    It is low where a text repeats itself.

    Example:
        >>> from engram.benchmark.metrics.generation import n_gram_entropy
        >>> n_gram_entropy("the bridge the bridge the bridge".split())  # doctest: +ELLIPSIS
        0.99...
        >>> n_gram_entropy("a long bridge over the river".split())  # doctest: +ELLIPSIS
        2.10...
    """
    # Of the whole text, the prompt included, as released.
    entropies = [n_gram_entropy(tokens(text)) for text in texts]
    given = [value for value in entropies if value is not None]
    return fmean(given) if given else None


def n_gram_entropy(words: Sequence[str]) -> float | None:
    """Return H_2 / 3 + 2 H_3 / 3 in bits, with H_n the entropy of the n-grams.

    None for fewer than 3 tokens (NaN in the released code).
    """
    if len(words) < 3:
        return None
    # For m different words H_2 is log2(m - 1), so GE grows with the length of a text and is
    # comparable among texts of one length only: 100 tokens, see MeasureConfig.
    two = entropy(list(pairwise(words)))
    three = entropy(list(zip(words, words[1:], words[2:], strict=False)))
    # The released weights, a mean of two weighted entropies: trigrams count twice. Published tables
    # have it times 100, so 626 is 6.26 bits.
    return (2 / 3 * two + 4 / 3 * three) / 2


def entropy(events: Sequence[Any]) -> float:
    """Return the entropy of the events' frequencies, in bits."""
    counts = Counter(events).values()
    total = sum(counts)
    return -sum(count / total * log2(count / total) for count in counts)


def consistency(texts: Sequence[str], references: Sequence[str], tfidf: TfIdf) -> float | None:
    """Return RS: the TF-IDF cosine of all texts joined and all reference texts joined."""
    # Joined, as released: one cosine a record, not the mean of ten.
    return tfidf.cosine(" ".join(texts), " ".join(references))


def tokens(text: str) -> list[str]:
    """Split a text as NLTK's `word_tokenize` does.

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
    """Return Punkt with its English tables if they are installed, else without.

    The difference shows at abbreviations only.
    """
    _words()
    # NLTK 3.9 and later read the tables from another file (punkt_tab) than the one that older
    # versions downloaded; without either, splitting still works.
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer

    try:
        return PunktTokenizer("english")
    except LookupError:
        return PunktSentenceTokenizer()
