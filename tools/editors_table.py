"""Write the table of methods in docs/editors.md: what each row of METHODS says, what its function
takes, and what a quick edit of the pocket model by it shows.

    python tools/editors_table.py       # after adding a method; a minute or two
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import engram
from engram.editors.closed_form.mass_settings import KEEPS_PAST_KEYS
from engram.editors.methods import METHODS, method_named
from engram.errors import EngramError, SettingError
from engram.model.language_model import LanguageModel
from page_tables import DOCS, markdown, put

PAGE, MADE_BY = DOCS / "editors.md", "tools/editors_table.py"
COLUMNS = (
    "method",
    "what it does",
    "changes",
    "of text: C",
    "earlier edits",
    "one fact removable",
    "form",
    "source",
)
# Targets of several tokens: only these tell a column per fact from one per token.
FACTS = [
    engram.Fact("Space Needle", "The {} is located in the city of", "New York City"),
    engram.Fact("ABBA", "{} comes originally from", "New Zealand"),
]
QUICK: tuple[dict[str, Any], ...] = (
    {"steps": 2},
    {"epochs": 2},
    {},
)  # what ends a method early; the first that it has

AnyEdit = engram.Edit | engram.PromptEdit


def quick_edit(lm: LanguageModel, method: str) -> AnyEdit:
    """Return an edit of FACTS that has the method's form; it need not make the model say them."""
    for settings in QUICK[:-1]:
        try:
            return engram.rewrite(lm, FACTS, method, **settings)
        except SettingError:
            continue  # the method has no such setting
    return engram.rewrite(lm, FACTS, method, **QUICK[-1])


def row(lm: LanguageModel, method: str, edit: AnyEdit, facts: Sequence[engram.Fact]) -> list[str]:
    """Return the cells of one method, of which `edit` is one of `facts`."""
    about, takes = METHODS[method], signature(method_named(method)).parameters
    return [
        f"`{method}`",
        about.summary,
        _changes(edit),
        "yes" if "second_moments" in takes else "no",
        _earlier(method, edit),
        "yes" if _can_lose_one(edit) else "no",
        _form(lm, edit, facts),
        about.source,
    ]


def _changes(edit: AnyEdit) -> str:
    if isinstance(edit, engram.PromptEdit):
        return "nothing"
    several = len(edit.deltas) > 1
    count, noun = ("several", "matrices") if several else ("one", "matrix")
    if "targets" in edit.settings:
        return f"{count} {noun} (`targets`)"
    return f"{count} MLP output {noun}"


def _earlier(method: str, edit: AnyEdit) -> str:
    if isinstance(edit, engram.PromptEdit):
        return "nested"
    if method in KEEPS_PAST_KEYS:
        return "in force, keys preserved"
    takes = signature(method_named(method)).parameters
    return "in force; `statistics=`" if "statistics" in takes else "in force"


def _can_lose_one(edit: AnyEdit) -> bool:
    try:
        return len(edit.without(0).facts) == len(edit.facts) - 1
    except EngramError:
        return False


def _form(lm: LanguageModel, edit: AnyEdit, facts: Sequence[engram.Fact]) -> str:
    if isinstance(edit, engram.PromptEdit):
        return "a text"
    if any(delta.is_dense for delta in edit.deltas.values()):
        return "dense"
    if edit.rank == edit.settings.get("rank"):
        return f"rank `rank`, {edit.rank}"
    tokens = sum(len(lm.target_ids(fact.prompt_text, fact.target)) for fact in facts)
    forms = {len(facts): "rank 1 a fact", tokens: "rank 1 a token of a target"}
    return forms.get(edit.rank, f"rank {edit.rank} for {len(facts)} facts")


def main() -> None:
    """Edit the pocket model by each method, and write the table."""
    lm = engram.load("pocket")
    rows = [row(lm, method, quick_edit(lm, method), FACTS) for method in METHODS]
    put(PAGE, MADE_BY, markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
