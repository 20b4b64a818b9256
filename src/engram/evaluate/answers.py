"""Whether a model says an object by itself, and whether a text that it wrote begins with one.

Knows greedy texts. Refuses to know facts and edits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from engram.evaluate.probe_rows import AnswerScores, ProbeRows
from engram.evaluate.probes import Probe
from engram.model.generation import normalised_text
from engram.model.language_model import LanguageModel


def says_objects(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Return for each (prompt, object) whether the model writes the object after the prompt by
    itself: its tokens are the most probable ones, and a word ends after them.

    No text is generated, so it works for every model that can be asked, in one or two passes.

    Example:
        >>> from engram.evaluate.answers import says_objects
        >>> prompt = "The Eiffel Tower is in the city of"
        >>> says_objects(lm, [(prompt, "Paris"), (prompt, "Rome")])
        [True, False]
    """
    rows = ProbeRows(lm, [[Probe("rewrite", *pair)] for pair in pairs])
    scores, _ = AnswerScores.read(lm, rows)
    says = [scores.says((n, 0)) for n in range(len(pairs))]
    if lm.kind != "causal":  # a blank has a fixed number of tokens: none comes after them
        return says
    # "Paris" and "Parisian" may begin with the same token; the next one shows which of them it is.
    said = [n for n, yes in enumerate(says) if yes]
    clozes = [lm.cloze(*pairs[n]) for n in said]
    whole = [[*cloze.ids, cloze.answer[-1]] for cloze in clozes]
    # An answer that fills the context has nothing after it.
    fits = [k for k, ids in enumerate(whole) if len(ids) <= lm.max_tokens]
    logits = lm.logits_at([whole[k] for k in fits], [[len(whole[k]) - 1] for k in fits])
    for k, next_v in zip(fits, logits, strict=True):
        text = normalised_text(lm, [*clozes[k].answer, int(next_v.argmax())])
        says[said[k]] = begins(text, (pairs[said[k]][1],))
    return says


def begins(text: str, answers: Sequence[str]) -> bool:
    """Tell whether a text begins with one of the answers, as words.

    "Paris, of course" begins with "Paris"; "Parisian" and "the Paris" do not. Leading space is
    ignored; capitals matter, since a name in other letters is seldom the name; characters that
    Unicode calls compatible are equal, however they are composed.
    """
    text = _folded(text).lstrip()
    return any(_pattern(answer).match(text) for answer in answers)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Tell whether one of the answers occurs anywhere in a text, as words; see `begins`."""
    text = _folded(text)
    return any(_pattern(answer).search(text) for answer in answers)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


@lru_cache(4096)
def _pattern(answer: str) -> re.Pattern[str]:
    # A combining mark that NFKC could not compose continues the word like a letter does; \w does
    # not match it.
    return re.compile(rf"(?<!\w){re.escape(_folded(answer).strip())}(?![\w\u0300-\u036f])")
