"""TF-IDF vectors as scikit-learn makes them by default: lower case, words of two or more letters,
raw counts times idf, L2 norm.

Knows texts and words. Refuses to know which texts are compared: see generation. Source: Meng et al.
2022, arXiv:2202.05262, Sec. 3.4 (consistency of generated text); spelled out here since the
released code needs what scikit-learn no longer has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"(?u)\b\w\w+\b")


@dataclass(frozen=True, eq=False)
class TfIdf:
    """Inverse document frequencies of a vocabulary.

    Args:
        vocabulary: word -> column.
        idf: [columns] float64, ln((1 + documents) / (1 + documents with the word)) + 1.
    """

    vocabulary: Mapping[str, int]
    idf: np.ndarray

    @classmethod
    def fit(cls, texts: Iterable[str]) -> TfIdf:
        """Fit to the words of `texts`, each one document."""
        documents, holding = 0, Counter[str]()
        for text in texts:
            documents += 1
            holding.update(set(words(text)))
        # Sorted, as scikit-learn's columns are, so that vectors can be held against its own.
        vocabulary = {word: column for column, word in enumerate(sorted(holding))}
        counts = np.array([holding[word] for word in vocabulary], dtype=np.float64)
        return cls(vocabulary, np.log((1 + documents) / (1 + counts)) + 1)

    def vector(self, text: str) -> dict[int, float]:
        """Return column -> weight, of length 1; empty without a word of the vocabulary."""
        # raw counts, not their logarithms: the default that the released code relies on
        counts = Counter(self.vocabulary[word] for word in words(text) if word in self.vocabulary)
        # A dict instead of a sparse matrix: a text has few words of the vocabulary, and nothing
        # else here needs SciPy.
        weights = {column: count * float(self.idf[column]) for column, count in counts.items()}
        length = sum(weight**2 for weight in weights.values()) ** 0.5
        return {column: weight / length for column, weight in weights.items()}

    def cosine(self, one: str, other: str) -> float | None:
        """Return the cosine; None where a text has no word of the vocabulary (NaN in the
        released code).
        """
        a, b = self.vector(one), self.vector(other)
        # None, not 0: a text without any known word is no text about something else.
        return sum(weight * b.get(column, 0.0) for column, weight in a.items()) if a and b else None


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
