"""What the closed-form methods need before they compute: contexts, second moments, layers, and
earlier edits in force.

Knows where each comes from when the caller does not give it. Refuses to know what a method does
with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engram.edit.edit import Edit
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import SecondMoment
from engram.editors.second_moments.measure import second_moments as measure
from engram.errors import EngramError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.progress import Progress


def moments_of(
    lm: LanguageModel,
    layers: Sequence[int],
    given: Mapping[int, SecondMoment | Tensor] | None,
    corpus: Corpus | str | Path | Sequence[str] | None,
    tokens: int | None,
    seed: int,
    progress: Progress,
) -> dict[int, SecondMoment]:
    """The second moment of each layer: given, or measured on `lm` as it is now.

    Raises:
        EngramError: some were given, not those of all layers.
    """
    if given is None:
        return measure(lm, layers, corpus, tokens, seed=seed, progress=progress)
    missing = sorted(set(layers) - set(given))
    if missing:
        raise EngramError(
            f"second_moments has layers {sorted(given)}, the edit is at layer {', '.join(map(str, layers))}; give that of layer "
            f"{', '.join(map(str, missing))} too"
        )
    return {
        layer: moment if isinstance(moment, SecondMoment) else SecondMoment.from_matrix(moment)
        for layer, moment in ((layer, given[layer]) for layer in layers)
    }


@contextmanager
def in_force(past: Sequence[Edit], lm: LanguageModel) -> Iterator[None]:
    """Within the block, earlier edits lie on `lm`."""
    with ExitStack() as stack:
        for edit in past:
            stack.enter_context(edit.applied(lm))
        yield


def keys_of(past: Sequence[Edit], weight: str) -> Tensor | None:
    """[f, p] keys of all facts of earlier edits at one weight; None without earlier edits.

    Raises:
        SettingError: an edit that changes the weight and does not hold its keys.
    """
    found = []
    for number, edit in enumerate(past):
        if weight in edit.keys:
            found.append(edit.keys[weight].double())
        elif weight in edit.deltas:
            raise SettingError(
                f"past[{number}], {edit!r}, does not hold the keys of its facts at {weight!r}; expected edits of a closed-form "
                "method. Make it again with one, or leave it out of past and apply it to the model"
            )
    return torch.cat(found).T if found else None


def shared_subjects(facts: Sequence[Fact]) -> list[str]:
    """Subjects of several facts: they have one key, and what is asked of it is averaged."""
    return [
        subject for subject, count in Counter(fact.subject for fact in facts).items() if count > 1
    ]
