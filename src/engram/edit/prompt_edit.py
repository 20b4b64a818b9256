"""PromptEdit: an edit that is a text in front of the prompt; no weight changes.

Knows facts, the text that states each of them, which of them a prompt is about, and how much text a
model has room for. Refuses to know how the text is worded: editors/in_context.py does. The other
kind of edit is edit.Edit.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engram.checks import check_fields, checked
from engram.edit import folder_format
from engram.edit.applied import How
from engram.edit.forms import ModelForm, Unsigned
from engram.edit.recipe import as_dict, check_changes_weights, library_versions, plain, staying
from engram.errors import EngramError, EngramFileError, FactError
from engram.facts import Fact
from engram.model.chat import chat_with_facts
from engram.model.frames import BARE, framed
from engram.model.sentence_vectors import Encoder, encoder_of, nearest

if TYPE_CHECKING:
    from engram.edit.delta import Delta
    from engram.model.language_model import LanguageModel

_RECORDED = ("method", "settings", "opening", "base", "seed", "versions", "diagnostics", "receipt")


@dataclass(frozen=True)
class Wording:
    """What an in-context edit says about one fact.

    Attributes:
        statement: the fact itself.
        demonstrations: examples that are shown before it, the most helpful first.
    """

    statement: str
    demonstrations: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptEdit:
    """An edit by text in front of every prompt; a value like `Edit`, with the same interface where
    both can have it.

    A prompt that names subjects of the edit gets those facts in front of it; any other gets the
    nearest facts by cosine of sentence vectors, or nothing. What the model has no room for is left
    out: demonstrations first, beginning with the last one, then the least relevant facts. The
    most relevant fact comes directly before the prompt.

    Args:
        facts: what the edit makes true, at least one.
        method: name of the editor.
        settings: "most": facts put in front at most; "otherwise": "nearest" or "nothing" for a
            prompt that names no subject; "reserve": tokens left free for an answer; "encoder": see
            `sentence_vectors.encoder_of`; "frame": "plain", or "chat" for facts that are stated in
            a chat, worded as "wording" says, in which the model's turn begins with the prompt;
            and the editor's own.
        wordings: what is said about each fact.
        opening: text between the last statement and the prompt.
        base: {"model", "model_type"} of the model it was made for; it fits every causal model.
        seed, versions, diagnostics, receipt: as of `Edit`.
        encoder: the function, where settings["encoder"] is no name; it is not kept in files.
    Raises:
        EngramError: no facts, or not one wording a fact.
    """

    facts: tuple[Fact, ...]
    method: str
    settings: dict[str, Any]
    wordings: tuple[Wording, ...]
    opening: str
    base: dict[str, Any]
    seed: Unsigned | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] | None = None
    encoder: Encoder | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))
        object.__setattr__(self, "wordings", tuple(self.wordings))
        if not self.facts or len(self.wordings) != len(self.facts):
            raise EngramError(
                f"an in-context edit needs facts and a wording for each; got {len(self.facts)} and "
                f"{len(self.wordings)}"
            )
        for name in ("settings", "base", "versions", "diagnostics", "receipt"):
            object.__setattr__(self, name, plain(name, getattr(self, name)))
        check_fields(self, EngramError)
        checked("base", self.base, ModelForm, EngramError)

    def __repr__(self) -> str:
        return f"PromptEdit({len(self.facts)} facts, {self.method!r}, no weights)"

    @property
    def rank(self) -> int:
        """The largest rank of a change: 0, since no weight changes."""
        return 0

    @property
    def changes_weights(self) -> bool:
        """Whether weights change: False; of an `Edit` it is True."""
        return False

    @property
    def deltas(self) -> dict[str, Delta]:
        """The changes of weights: none."""
        return {}

    def with_receipt(self, receipt: Any) -> PromptEdit:
        """Return the same edit with `receipt`: a dict, or an object that has `to_dict()`."""
        return replace(self, receipt=as_dict(receipt))

    def without(self, *facts: Fact | int) -> PromptEdit:
        """Return the edit without these facts, each a fact of this edit or its index.

        Raises:
            FactError: a fact that is not in the edit, or none would stay.
        """
        rest = staying(self.facts, facts)
        if len(rest) == len(self.facts):
            return self
        left, wordings = tuple(self.facts[i] for i in rest), tuple(self.wordings[i] for i in rest)
        return replace(self, facts=left, wordings=wordings, diagnostics={}, receipt=None)

    @contextmanager
    def applied(
        self, lm: LanguageModel, *, how: How = "auto", force: bool = False
    ) -> Iterator[LanguageModel]:
        """Put the edit in front of each prompt to `lm` for the length of the block, see
        `LanguageModel.asked_through`.

        Args:
            how, force: as of `Edit.applied`; a text has only one way to be applied, "auto", and
                fits every causal model.
        Raises:
            EngramError: another `how`: there are no weights to write into.
        """
        if how != "auto":
            check_changes_weights(self)
        # The frame is made before it is in force: the room for it is counted with the outer one.
        with lm.asked_through(self.frame(lm)):
            yield lm

    def frame(self, lm: LanguageModel) -> Callable[[str], str]:
        """Return the function that puts in front of a prompt what the edit says about it, for
        `lm.asked_through`.

        The room is what the model takes, with the frame that is in force now, less the tokens that
        are reserved for the answer.

        Raises (the function):
            FactError: not even the most relevant fact fits.
        """
        outside, relevant, placed = lm.frame, self._relevant(lm), self._placed(lm)
        room = lm.max_tokens - int(self.settings["reserve"])

        def in_front(prompt: str) -> str:
            # The outer frame's tokens count, but it is put around by `asked_through`, not here.
            def whole(front: str) -> str:
                return framed(outside, placed(front) + prompt).text

            return placed(self._fitting(lm, relevant(prompt), whole, room)) + prompt

        in_front.__qualname__ = f"{self.method} edit of {len(self.facts)} facts"
        return in_front

    def _placed(self, lm: LanguageModel) -> Callable[[str], str]:
        """Return the function from what the edit says to the text before the prompt.

        An outer frame, such as a chat's, has a place for the prompt already: inside it the facts
        are right before the prompt, and no second chat begins.
        """
        # Edits of an engram that knew no frame have no such entry.
        if self.settings.get("frame", "plain") == "plain" or lm.frame != BARE:
            return lambda front: front
        chat = chat_with_facts(lm, self.settings.get("wording", "{}"))
        return lambda front: f"{chat.before}{front.strip()}{chat.after}" if front else ""

    def preamble(self, lm: LanguageModel, text: str, tokens: int) -> str:
        """Return what comes in front of `text`, in at most `tokens` tokens.

        Raises:
            FactError: not even the most relevant fact fits.
        """
        return self._fitting(lm, self._relevant(lm)(text), lambda front: front, tokens)

    def _relevant(self, lm: LanguageModel) -> Callable[[str], list[int]]:
        """Return a function from a prompt to the facts it is about, most relevant first."""
        most = int(self.settings["most"])

        # vectors of all facts are computed at the first prompt that names no subject, and once
        @cache
        def vectors() -> Any:
            return encode([fact.prompt_text for fact in self.facts])

        def encode(texts: list[str]) -> Any:
            return encoder_of(lm, self.encoder or self.settings["encoder"])(texts)

        # One prompt is asked many times, once per answer that is compared.
        @cache
        def relevant(prompt: str) -> list[int]:
            named = [i for i, fact in enumerate(self.facts) if _names(prompt, fact.subject)]
            if named:  # the longest name is the most specific one; of facts about it, the latest
                return sorted(named, key=lambda i: (-len(self.facts[i].subject), -i))[:most]
            if self.settings["otherwise"] == "nothing":
                return []
            # With one fact there is nothing to compare, so no sentence has to be encoded.
            return nearest(encode([prompt])[0], vectors(), most) if len(self.facts) > 1 else [0]

        return relevant

    def _fitting(
        self, lm: LanguageModel, chosen: Sequence[int], whole: Callable[[str], str], room: int
    ) -> str:
        """Return the text in front: as many parts as fit, so that `whole(text)` has at most `room`
        tokens.

        Statements come before demonstrations in `parts`, so that demonstrations are left out first;
        a bisection finds the count, since more parts never make fewer tokens. In the text the most
        relevant statement is the last one:

            parts       statement 1, statement 2, demonstration 1, demonstration 2
            all fit     demo 1, demo 2, statement 2, statement 1, opening + prompt
            three fit   demo 1, statement 2, statement 1, opening + prompt
            one fits    statement 1, opening + prompt
        """
        if not chosen:
            return ""
        statements = [self.wordings[i].statement for i in chosen]
        parts = [*statements, *self.wordings[chosen[0]].demonstrations]

        def front(count: int) -> str:
            stated, examples = statements[:count], parts[len(statements) : count]
            return "".join([*examples, *reversed(stated), self.opening])

        # The whole text is tokenised: tokens of parts do not add up where parts merge at a seam.
        def too_long(count: int) -> bool:
            return len(lm.tokenizer(whole(front(count)), verbose=False)["input_ids"]) > room

        count = bisect_left(range(1, len(parts) + 1), True, key=too_long)
        if not count:
            raise FactError(
                f"no room for {statements[0]!r} in front of the prompt: {room} tokens of "
                f"{lm.max_tokens} are for both of them. "
                "Ask a shorter prompt, or make the edit with a smaller reserve="
            )
        return front(count)

    def rounding_cost(self, lm: LanguageModel) -> dict[str, float]:
        """Return nothing: no weight is rounded."""
        return {}

    def to_peft(self, folder: str | Path) -> NoReturn:
        """Raise EngramError: there are no weights to export."""
        self._refuse()

    def to_gguf(self, path: str | Path, *, base: str | Path | None = None) -> NoReturn:
        """Raise EngramError: there are no weights to export."""
        self._refuse()

    def to_checkpoint(
        self, source: Any, folder: str | Path, *, force: bool = False, dtype: str | None = None
    ) -> NoReturn:
        """Raise EngramError: there are no weights to write."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        check_changes_weights(self)
        raise AssertionError("an in-context edit changes no weights")

    def save(self, folder: str | Path) -> Path:
        """Write the edit as a folder, whole or not at all. See `folder_format.save`."""
        return folder_format.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> PromptEdit:
        """Read what `save` wrote.

        Raises:
            EngramFileError: missing, damaged, of another format version, or an edit of weights.
        """
        contents = folder_format.read(folder)
        if contents.deltas:
            raise EngramFileError(
                f"{folder} holds an edit of weights ({contents!r}), no in-context edit; read it "
                "with Edit.load"
            )
        with folder_format.damage_of(folder):
            return cls.from_contents(contents)

    def contents(self) -> folder_format.Contents:
        """Return what the edit's folder holds: all but an encoder that is a function."""
        record = {
            "facts": [fact.to_dict() for fact in self.facts],
            "wordings": [asdict(wording) for wording in self.wordings],
        }
        record |= {name: getattr(self, name) for name in _RECORDED}
        return folder_format.Contents(record)

    @classmethod
    def from_contents(cls, contents: folder_format.Contents) -> PromptEdit:
        """Build an edit from what its folder holds."""
        record = dict(contents.record)
        facts = tuple(map(Fact.from_dict, record.pop("facts")))
        wordings = tuple(
            Wording(wording["statement"], tuple(wording["demonstrations"]))
            for wording in record.pop("wordings")
        )
        return cls(facts, wordings=wordings, **record)  # an unknown entry is damage: a TypeError


def _names(text: str, subject: str) -> bool:
    """Return whether a text has the subject's name in it, as words of its own."""
    # The plain search first: it is much faster than the pattern, and nearly always says no.
    pattern = rf"(?<!\w){re.escape(subject.strip())}(?!\w)"
    return subject in text and re.search(pattern, text) is not None
