"""zsRE, question answering as relation extraction, in MEND's form; its facts are true ones.

Knows the fields of its file. Refuses to know where files are (see sources).
Sources: Levy et al. 2017, arXiv:1706.04115; the split: Mitchell et al. 2022, arXiv:2110.11309; the
probes: Meng et al. 2022, arXiv:2202.05262, Sec. 3.3.
"""

from __future__ import annotations

from engram.benchmark.data.fields import Fields
from engram.benchmark.data.records import Record
from engram.evaluate.probes import Probe
from engram.facts import Fact


def zsre_record(fields: Fields, number: int) -> Record:
    """Read a question about a subject, a rephrased one, and an unrelated one with its gold answer.

    The field `alt`, an answer that is not true, is not used: the published protocol edits to the
    true answer.
    """
    subject, question = fields.text("subject"), fields.text("src")
    # Every occurrence, as released; two would make an ambiguous template, which is an error here.
    template = question.replace(subject, "{}")
    if template.count("{}") != 1:
        raise fields.wrong(
            "src", f"a question in which the subject {subject!r} occurs exactly once"
        )
    answers = fields.texts("answers")
    if not answers:
        raise fields.wrong("answers", "at least one answer")
    # No true object: the edit adds a true answer and contradicts none. The released loader puts the
    # end-of-text token there, a dummy that would take part in ES.
    fact = Fact(subject, template, answers[0])
    probes = [Probe("rewrite", fact.prompt_text, answers[0], aliases=tuple(answers[1:]))]
    probes.append(
        Probe("paraphrase", fields.text("rephrase"), answers[0], aliases=tuple(answers[1:]))
    )
    loc = fields.text("loc")
    if not loc.startswith("nq question: "):
        raise fields.wrong("loc", "an unrelated question that begins with 'nq question: '")
    # "nq question: " stays in the prompt and "?" is added, as released. Braces stay what they are:
    # the released code passes the prompt through str.format.
    probes.append(Probe("neighbourhood", f"{loc}?", fields.text("loc_ans")))
    return Record(str(number), (fact,), tuple(probes))
