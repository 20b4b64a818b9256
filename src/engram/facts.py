"""A fact as an editor sees it, and where its subject is in a tokenised text.

Knows strings and character offsets. Refuses to know models: whoever has a tokenizer passes its
offsets in.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engram.checks import briefly, check_fields
from engram.errors import FactError
from engram.files.json_records import writable

Occurrence = Literal["first", "last", "all"]


@dataclass(frozen=True)
class Fact:
    """One association (subject, relation, object), and what should and should not move with it.

    Args:
        subject: e.g. "Space Needle".
        prompt: the relation as text with one `{}` for the subject and the object next, e.g. "The {}
            is located in the city of".
        target: the object that the model shall state, e.g. "Paris"; its leading space is added if
            it is missing.
        target_true: the object before the edit; without it the model's own answer is taken where
            one is needed.
        paraphrases: other full texts after which `target` is expected.
        neighbours: (full text, answer) pairs that an edit shall leave alone.
        relation: a name shared by facts that have the same objects to choose from, e.g. "city" or
            "P159".
    Raises:
        FactError: a part that is no text or empty, a prompt without exactly one `{}`, or a target
            equal to `target_true`.
    Example:
        >>> tower = engram.Fact("Space Needle", "The {} is located in the city of", "Paris")
        >>> tower.prompt_text
        'The Space Needle is located in the city of'
    """

    subject: str
    prompt: str
    target: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    relation: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.neighbours, tuple):  # of pairs that may be lists, as JSON gives them
            object.__setattr__(self, "neighbours", list(self.neighbours))
        check_fields(self, FactError)  # lists become tuples: with a list in it, it had no hash
        if not self.subject.strip():
            raise FactError(
                f"subject={briefly(self.subject)} is empty; give the words that name the subject"
            )
        pairs = [text for pair in self.neighbours for text in pair]
        texts = [self.subject, self.prompt, self.target, *self.paraphrases, *pairs]
        texts += [text for text in (self.target_true, self.relation) if text is not None]
        if not writable("".join(texts)):  # at once: facts come in tens of thousands
            strange = next(text for text in texts if not writable(text))
            raise FactError(f"{briefly(strange)} is no text that a file can hold; write it again")
        if self.prompt.count("{}") != 1:
            raise FactError(
                f"prompt={briefly(self.prompt)} has {self.prompt.count('{}')} places for the "
                "subject, expected exactly one '{}', as in 'The {} is located in the city of'"
            )
        if not self.target.strip():
            raise FactError(
                f"target={briefly(self.target)} is empty; give the object the model shall say, "
                "such as 'Paris'"
            )
        if self.target_true is not None and self.target_true.strip() == self.target.strip():
            raise FactError(
                f"target={briefly(self.target)} equals target_true: there is nothing to rewrite"
            )

    @property
    def prompt_text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_start(self) -> int:
        """Character at which the subject begins in `prompt_text`."""
        return self.prompt.index("{}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """Build a fact from what `to_dict` gave."""
        return cls(**record)


def sample_facts(facts: Sequence[Fact], limit: int | None, seed: int = 0) -> list[Fact]:
    """Return `limit` facts drawn at random; all of them, in their order, if there are no more.

    A file's first facts are often of one relation: a draw says more about the file.

    Example:
        >>> from engram.facts import sample_facts
        >>> len(sample_facts(engram.read_facts("pocket"), 20, seed=1))
        20
    """
    if limit is None or limit >= len(facts):
        return list(facts)
    return random.Random(seed).sample(facts, limit)


def subject_starts(text: str, subject: str, occurrence: Occurrence = "first") -> list[int]:
    """Return the characters at which `subject` begins in `text`: the first place, the last, or all.

    Raises:
        FactError: `subject` is empty or is not in `text` letter by letter.
    Example:
        >>> from engram.facts import subject_starts
        >>> subject_starts("Rome, in Rome", "Rome", "all")
        [0, 9]
    """
    if not subject.strip():
        raise FactError(
            f"subject={briefly(subject)} is empty; give the words of the prompt that name the "
            "subject"
        )
    # Every place, overlapping ones too, which `str.count` and `re.finditer` pass over.
    starts = [at for at in range(len(text)) if text.startswith(subject, at)]
    if not starts:
        near = text.lower().find(subject.lower())
        hint = f"; did you mean {text[near : near + len(subject)]!r}?" if near >= 0 else "."
        raise FactError(
            f"subject {briefly(subject)} is not in the prompt {briefly(text, 200)}{hint} It has to "
            "stand there letter by letter."
        )
    return {"first": starts[:1], "last": starts[-1:], "all": starts}[occurrence]


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return the tokens [first, last + 1) that hold any of the characters [start, end).

    Args:
        offsets: (start, end) characters of each token, as a fast tokenizer reports them; specials
            are (0, 0).
    Raises:
        FactError: no token holds any of these characters.
    Source: Meng et al. 2022, released code: a token that only partly overlaps counts whole.
    Example:
        "The Space Needle is", whose subject is the characters 4 to 16:

        token     The    _Space   _Need    le        _is
        offsets   0:3    3:9      9:14     14:16     16:19

        >>> from engram.facts import token_span
        >>> token_span([(0, 3), (3, 9), (9, 14), (14, 16), (16, 19)], 4, 16)
        (1, 4)
    """
    # `b > a` leaves specials out: their (0, 0) would be inside a span that begins at 0.
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside:
        raise FactError(
            f"the tokenizer keeps none of the characters {start}:{end}; the subject is lost on the "
            "way to tokens"
        )
    return inside[0], inside[-1] + 1
