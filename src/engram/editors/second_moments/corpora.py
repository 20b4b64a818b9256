"""The text on which second moments are measured: one that the package brings, a file, a data set,
given texts, or samples of the model itself.

A corpus yields documents in an order that never changes, and names them by a digest, which becomes
part of a cache key. Knows text only.
"""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from engram import pocket
from engram.checks import Count, Seed, check_fields
from engram.errors import EngramError, EngramFileError, MissingExtraError
from engram.files.names import read_text
from engram.model.generation import sample_texts
from engram.model.language_model import LanguageModel

_LARGEST = 1 << 34  # bytes of a text file, which is read whole


@runtime_checkable  # so that an argument can be checked
class Corpus(Protocol):
    """What second moments need from a corpus."""

    def digest(self) -> str:
        """Return a name of the documents: equal digests, equal documents (for one model, where the
        model samples them).
        """

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        """Yield the documents from number `start` on."""


@dataclass(frozen=True)
class Texts:
    """Given texts, each a document."""

    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        check_fields(self)

    def digest(self) -> str:
        return "texts " + _sha256("\0".join(self.texts).encode())

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        return iter(self.texts[start:])


class TextFile:
    """A UTF-8 text file: each paragraph is a document, or each line where no line is blank.

    Raises:
        EngramError: no such file, or no text in it.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            text = read_text(path, limit=_LARGEST).strip()
        except (OSError, EngramFileError) as error:
            raise EngramError(
                f"corpus {str(path)!r} cannot be read as a text file: {error}"
            ) from error
        # one paragraph of running text carries context over line breaks; lists have none
        pieces = text.split("\n\n") if "\n\n" in text else text.splitlines()
        self._documents = [piece.strip() for piece in pieces if piece.strip()]
        self._digest = _sha256(text.encode())
        if not self._documents:
            raise EngramError(f"corpus {str(path)!r} holds no text")

    def digest(self) -> str:
        return f"file {self._digest}"

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        return iter(self._documents[start:])


@dataclass(frozen=True)
class DataSet:
    """A Hugging Face data set, in an order shuffled as the published statistics are.

    Args:
        name: on the hub, or a folder; e.g. DataSet("wikimedia/wikipedia", "20231101.en").
        config, split: which part of it.
        field: the field that holds the text.
        seed: of the order; the released code uses 1.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    seed: Seed = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def digest(self) -> str:
        part = f"{self.name} {self.config} {self.split} {self.field} {self.seed}"
        return f"data set {part} {self._rows._fingerprint}"

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        for index in shuffled(len(self._rows), self.seed)[start:]:
            yield self._rows[index][self.field]

    @cached_property
    def _rows(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise MissingExtraError("datasets", "data") from error
        try:
            rows = load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # of the hub, the files or the network: no common class
            raise EngramError(f"data set {self.name!r} cannot be loaded: {error}") from error
        if self.field not in rows.column_names:
            raise EngramError(
                f"data set {self.name!r} has no field {self.field!r}; it has "
                f"{', '.join(rows.column_names)}"
            )
        return rows


@dataclass(frozen=True)
class SampledText:
    """Text sampled from the model's whole distribution: no download, and ordinary text by the
    model's own measure.
    """

    seed: Seed = 0
    tokens: Count = 100  # tokens of a document
    rows_per_batch: Count = 64

    def __post_init__(self) -> None:
        check_fields(self)

    def digest(self) -> str:
        return f"sampled {self.seed} {self.tokens} {self.rows_per_batch}"

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        """Yield documents without end. Every batch has its own seed, so any can be the first."""
        length = min(self.tokens, lm.max_tokens - 1)
        number = start // self.rows_per_batch
        while True:
            # no batch shares its seed with one of another corpus seed (up to 2^24 batches, and
            # seeds below 2^39)
            generator = torch.Generator().manual_seed(((self.seed << 24) + number) % 2**63)
            texts = sample_texts(lm, self.rows_per_batch, length, generator)
            # a pass that resumes within a batch samples all of it and skips the beginning
            yield from (
                texts[start % self.rows_per_batch :]
                if number == start // self.rows_per_batch
                else texts
            )
            number += 1


@dataclass(frozen=True)
class Bundled:
    """The sentences of the bundled fact table, shuffled: plain statements about the world, without
    a download.
    """

    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def digest(self) -> str:
        return f"bundled {_sha256_of_sentences(self.seed)}"

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        return islice(pocket.sentences(self.seed), start, None)


@dataclass(frozen=True)
class Wikipedia:
    """5,142 sentences of Wikipedia that the package brings, joined to documents of about 100 words.

    None mentions a subject of CounterFact, neither of a record nor of its neighbours: neighbours
    that had been in C would be spared because of that. tools/select_wikipedia.py chose them; their
    licence is in wikipedia.NOTICE.
    """

    def digest(self) -> str:
        return f"wikipedia {_sha256(chr(10).join(wikipedia_documents()).encode())}"

    def documents(self, lm: LanguageModel, start: int) -> Iterator[str]:
        return iter(wikipedia_documents()[start:])


# Corpora by name; each takes the seed of what is drawn for it.
CORPORA: Mapping[str, Callable[[int], Corpus]] = {
    "wikipedia": lambda seed: Wikipedia(),
    "bundled": Bundled,
    "sampled": SampledText,
}
DEFAULT = "wikipedia"  # of models whose preset names no other


def as_corpus(given: Corpus | str | Path | Sequence[str] | None, seed: int) -> Corpus:
    """Return a corpus: a name of `CORPORA`, a path of a text file, or a list of texts; None means
    the default.
    """
    if given is None:
        given = DEFAULT
    if isinstance(given, str | Path) and (named := CORPORA.get(str(given))) is not None:
        return named(seed)
    if isinstance(given, str | Path):
        return TextFile(given)
    if isinstance(given, Sequence):
        return Texts(tuple(given))
    return given


def shuffled(count: int, seed: int) -> list[int]:
    """Return 0..count-1 in the order of the released code."""
    indices = list(range(count))
    random.Random(seed).shuffle(indices)
    return indices


@cache
def wikipedia_documents() -> tuple[str, ...]:
    """Return the documents of `Wikipedia`."""
    packed = (files(__package__) / "wikipedia.txt.gz").read_bytes()
    return tuple(gzip.decompress(packed).decode().split("\n"))


@cache
def _sha256_of_sentences(seed: int) -> str:
    return _sha256("\0".join(pocket.sentences(seed)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
