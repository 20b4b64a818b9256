"""What is measured of one record, before its edit and after it.

Plain numbers and texts. Refuses to know the model that they come from, and what they score.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge

from engram.checks import Natural, Seed, check_fields
from engram.evaluate.probes import Reading
from engram.files.forms import Overflowing


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured of every record.

    Args:
        answer_tokens: length of the greedy continuation of each probe, attribute prompts excepted;
            a probe whose answer is longer gets two tokens more than its answer. 0: none.
        texts: whether `Record.generation` is continued, sampled from the 5 most probable tokens.
        text_tokens: length of these texts, the prompt included.
        drift_every: held-out text is read with the edit of every Nth record; 0: never.
        seed: of the sampled texts; with a record's id and a text's number it fixes each of them,
            before the edit and after it.
        reference: zsRE's token accuracy as released, through texts (see zsre_as_released), instead
            of token by token.
    Raises:
        SettingError: a negative number.
    """

    answer_tokens: Natural = 5
    texts: bool = False
    text_tokens: Natural = 100
    drift_every: Natural = 10
    seed: Seed = 0
    reference: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Outcome:
    """One record in one phase.

    Attributes:
        readings: one for each probe, in their order.
        texts: sampled, prompts included.
        fluency, consistency: of the texts, see metrics.generation.
        essence: perplexity of the texts about the subject among the record's references.
        essence_published: the same divided by one token too many, as the released code has it (see
            essence). None with an edit of words.
        perplexity: of held-out text, where it was read.
        drift: mean KL(now || unedited) of the next token of held-out text (nats).
    """

    readings: tuple[Reading, ...]
    texts: tuple[str, ...] = ()
    fluency: float | None = None
    consistency: float | None = None
    essence: Overflowing | None = None
    essence_published: Overflowing | None = None
    perplexity: Overflowing | None = None
    drift: Annotated[float, Ge(0)] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """One record by one method.

    Attributes:
        before, after: equal where the edit could not be made, since the model stays as it is.
        seconds: duration of the edit; for records edited in one batch, their share of it.
        size: bytes of the edit.
        error: why the edit could not be made; or that the edited model computes NaN, and then every
            probe counts as failed.
    """

    id: str
    before: Outcome
    after: Outcome
    seconds: Annotated[float, Ge(0)]
    size: Annotated[int, Ge(0)] = 0
    error: str | None = None
