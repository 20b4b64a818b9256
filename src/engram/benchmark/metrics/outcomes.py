"""What is measured of one record, before its edit or after it: plain numbers and texts, with
nothing of the model left in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engram.errors import SettingError
from engram.evaluate.probes import Reading


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured of every record.

    Args:
        answer_tokens: tokens of the greedy continuation of each probe but of attribute prompts; an answer of
            more tokens gets as many as it has, and two more. 0: none.
        texts: whether `Record.generation` is continued (sampled from the 5 most probable tokens).
        text_tokens: length of these texts, the prompt included.
        drift_every: held-out text is read with the edit of every how manieth record; 0: never.
        seed: of the sampled texts: with a record's id and a text's number it fixes each of them,
            before as after the edit.
        reference: zsRE's token accuracy as released, through texts (see text_mode), instead of
            token by token.
    Raises:
        SettingError: a negative number.
    """

    answer_tokens: int = 5
    texts: bool = False
    text_tokens: int = 100
    drift_every: int = 10
    seed: int = 0
    reference: bool = False

    def __post_init__(self) -> None:
        for name in ("answer_tokens", "text_tokens", "drift_every"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)}: expected 0 or more")


@dataclass(frozen=True)
class Outcome:
    """One record in one phase.

    Attributes:
        readings: one a probe, in their order.
        texts: sampled, prompts included. fluency, consistency: see metrics.generation.
        essence: perplexity of the texts about the subject among the record's references;
            essence_published: divided by one token too many, as the released code has it (see
                bench.essence). None with an edit of words.
        perplexity: of held-out text; drift: mean KL(now || unedited) of the next token on it
            (nats). Where they were measured.
    """

    readings: tuple[Reading, ...]
    texts: tuple[str, ...] = ()
    fluency: float | None = None
    consistency: float | None = None
    essence: float | None = None
    essence_published: float | None = None
    perplexity: float | None = None
    drift: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, outcome: Mapping[str, Any]) -> Outcome:
        """What `to_dict` gave, also after JSON."""
        given = dict(outcome)
        readings = tuple(Reading(**each) for each in given.pop("readings"))
        return cls(readings=readings, texts=tuple(given.pop("texts")), **given)


@dataclass(frozen=True)
class Measured:
    """One record by one method.

    Attributes:
        before, after: `after` is `before` where the edit could not be made, for the model stays as
            it was.
        seconds: that the edit took; of records edited in one batch, their share of it.
        size: bytes of the edit's numbers.
        error: why the edit could not be made, or what it does to the model where that computes NaN;
            then every probe counts as failed.
    """

    id: str
    before: Outcome
    after: Outcome
    seconds: float
    size: int = 0
    error: str | None = None
