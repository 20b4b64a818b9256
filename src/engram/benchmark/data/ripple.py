"""RippleEdits: what follows from an edit, and what does not, in six kinds of tests.

Knows the fields of its files. Refuses to know where files are (see sources).
Source: Cohen et al. 2024, arXiv:2307.12976.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from engram.benchmark.data.fields import Fields
from engram.benchmark.data.records import Record
from engram.evaluate.probes import Probe, ProbeKind
from engram.facts import Fact

KINDS: dict[str, ProbeKind] = {
    "Logical_Generalization": "logical-generalisation",
    "Compositionality_I": "compositionality-1",
    "Compositionality_II": "compositionality-2",
    "Subject_Aliasing": "subject-aliasing",
    "Forgetfulness": "preservation",
    "Relation_Specificity": "relation-specificity",
}
# Which words are the subject is not in the file. `.* of ` is greedy, so the last "of" counts: "The
# mother of Anne of Cleves is X" gives "Cleves". Its last token is that of "Anne of Cleves", and
# that is where editors act.
_STATED = re.compile(
    r"(?P<front>.* of )(?P<subject>.+)(?P<verb> (?:is|are|was|were)) (?P<object>.+?)\.?", re.DOTALL
)


def ripple_record(fields: Fields, number: int) -> Record:
    """Read an edit that is stated in a sentence, "The mother of X is Y.", and its tests."""
    edit = fields.inside("edit")
    stated = _STATED.fullmatch(edit.text("prompt").strip())
    if stated is None:
        raise edit.wrong(
            "prompt", "a sentence like 'The mother of Leo is Ann.', which names subject and object"
        )
    true = None
    if edit.has("original_fact"):
        before = _STATED.fullmatch(edit.inside("original_fact").text("prompt").strip())
        # Some edits state what was true already, and have nothing to be compared with.
        if before is not None and before["object"].strip() != stated["object"].strip():
            true = before["object"]
    template = f"{stated['front']}{{}}{stated['verb']}"
    if template.count("{}") != 1:
        raise edit.wrong("prompt", "a sentence without {}")
    fact = Fact(stated["subject"], template, stated["object"], true)
    probes = [Probe("rewrite", fact.prompt_text, fact.target, true)]
    for name, kind in KINDS.items():
        for at, test in enumerate(fields.each(name, needed=False)):
            probes += _test(test, kind, f"{name} {at}")
    return Record(str(number), (fact,), tuple(probes))


def _test(test: Fields, kind: ProbeKind, name: str) -> Iterator[Probe]:
    """Yield the queries of a test, then its conditions: queries to be answered before the edit."""
    joined = test.text("test_condition", "OR")
    if joined not in ("OR", "AND"):
        raise test.wrong("test_condition", "'OR' or 'AND'")
    for field, condition in (("test_queries", False), ("condition_queries", True)):
        # Conditions bear their test's name: a test is dropped if the unedited model fails one.
        for query in test.each(field, needed=not condition):
            names = []
            for answer in query.each("answers"):
                names += [answer.text("value"), *answer.texts("aliases", needed=False)]
            if not names:
                continue  # the published files hold queries without any answer
            yield Probe(
                kind,
                query.text("prompt"),
                names[0],
                aliases=tuple(names[1:]),
                test=name,
                condition=condition,
                joined="any" if joined == "OR" else "all",
            )
