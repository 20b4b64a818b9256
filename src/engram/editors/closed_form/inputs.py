"""What closed-form methods need before they compute: second moments, and earlier edits in force.

Knows where each comes from when the caller does not give it. Refuses to know what a method does
with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.checks import Count, Seed, check_fields
from engram.edit.edit import Edit
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import SecondMoment, second_moments
from engram.errors import EngramError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.progress import Progress


@dataclass(frozen=True)
class MomentSource:
    """Where second moments come from.

    Args:
        corpus: a name of `corpora.CORPORA`, a text file, texts, or a corpus; None: "wikipedia".
        tokens: how many are measured; None: 20 x d_ff.
        given: layer -> C [f, f]; None: they are measured on the corpus, or read where they were
            measured before.
        seed: of the text, where it is drawn.
    """

    corpus: Corpus | str | Path | Sequence[str] | None = None
    tokens: Count | None = None
    given: Mapping[int, SecondMoment | Tensor] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def pop(cls, settings: dict[str, Any], seed: int) -> MomentSource:
        """Pop `corpus`, `tokens` and `second_moments` from a method's settings."""
        corpus, tokens = settings.pop("corpus", None), settings.pop("tokens", None)
        return cls(corpus, tokens, settings.pop("second_moments", None), seed)

    def moments(
        self, lm: LanguageModel, layers: Sequence[int], progress: Progress
    ) -> dict[int, SecondMoment]:
        """Return the second moment of each layer: given, or of `lm` as it is now.

        Raises:
            EngramError: some are given, but not those of all layers.
        """
        if self.given is None:
            # read from the cache by a digest of the weights and the corpus; the released code goes
            # by the model's name, and returns another model's where two have one name
            return second_moments(
                lm, layers, self.corpus, self.tokens, seed=self.seed, progress=progress
            )
        missing = sorted(set(layers) - set(self.given))
        if missing:
            raise EngramError(
                f"second_moments has layers {sorted(self.given)}, the edit is at layer "
                f"{', '.join(map(str, layers))}; give that of layer "
                f"{', '.join(map(str, missing))} too"
            )
        moments = {layer: self.given[layer] for layer in layers}
        return {
            layer: moment if isinstance(moment, SecondMoment) else SecondMoment.from_matrix(moment)
            for layer, moment in moments.items()
        }


# Settings of which None means "as the preset has it, or by default". None is a value of its own for
# the fields of a config, such as null_energy=None against a preset's energy.
_OPTIONAL = ("layer", "layers", "contexts", "second_moments", "corpus", "tokens")


def settings_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a caller gave, which go over a preset."""
    return {
        name: value
        for name, value in settings.items()
        if value is not None or name not in _OPTIONAL
    }


@contextmanager
def in_force(past: Sequence[Edit], lm: LanguageModel) -> Iterator[None]:
    """Apply earlier edits to `lm` inside the block."""
    with ExitStack() as stack:
        for edit in past:
            stack.enter_context(edit.applied(lm))
        yield


def keys_of(past: Sequence[Edit], weight: str) -> Tensor | None:
    """Return the keys [f, p] of all facts of earlier edits at one weight; None without any.

    Raises:
        SettingError: an edit that changes the weight and does not hold its keys.
    """
    # An edit of other layers only has nothing to preserve here. In float64, as the solver computes:
    # products of keys are summed over thousands of them.
    keys = []
    for number, edit in enumerate(past):
        if weight in edit.keys:
            keys.append(edit.keys[weight].double())
        elif weight in edit.deltas:
            raise SettingError(
                f"past[{number}], {edit!r}, does not hold the keys of its facts at {weight!r}; "
                "expected edits of a closed-form method. Compute it again with one, or leave it "
                "out of past and apply it to the model"
            )
    return torch.cat(keys).T if keys else None


def shared_subjects(facts: Sequence[Fact]) -> list[str]:
    """Return subjects of several facts: these have one key, so that their changes are averaged."""
    counts = Counter(fact.subject for fact in facts)
    return [subject for subject, count in counts.items() if count > 1]
