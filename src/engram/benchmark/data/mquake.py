"""MQuAKE: questions that need several facts, of which some are edited.

Knows the fields of its files. Refuses to know where files are (see sources).
Source: Zhong et al. 2023, arXiv:2305.14795.
"""

from __future__ import annotations

from engram.benchmark.data.fields import Fields
from engram.benchmark.data.records import Record
from engram.evaluate.probes import Probe
from engram.facts import Fact


def mquake_record(fields: Fields, number: int) -> Record:
    """Read facts that are edited together, and the questions about them.

    These are multi-hop questions, with the answer after the edit, and the single hops on the way.
    """
    facts = []
    for rewrite in fields.each("requested_rewrite"):
        target, true = (rewrite.inside(name).text("str") for name in ("target_new", "target_true"))
        relation = rewrite.text("relation_id") if rewrite.has("relation_id") else None
        facts.append(
            Fact(rewrite.text("subject"), rewrite.text("prompt"), target, true, relation=relation)
        )
    probes = [Probe("rewrite", fact.prompt_text, fact.target, fact.target_true) for fact in facts]
    new, old = fields.text("new_answer"), fields.text("answer")
    aliases = tuple(fields.texts("new_answer_alias", needed=False))
    # A chain may end at the same answer after the edit; then there is nothing to compare.
    unwanted = None if new.strip() == old.strip() else old
    # Usually three wordings of one question. Any of them is enough, as its authors count.
    probes += [
        Probe("multi-hop", text, new, unwanted, aliases) for text in fields.texts("questions")
    ]
    for hop in fields.each("new_single_hops", needed=False):
        # A sentence to be continued, where there is one: it is what a causal model was trained for.
        prompt = hop.text("cloze") if hop.has("cloze") else hop.text("question")
        more = tuple(hop.texts("answer_alias", needed=False))
        probes.append(Probe("single-hop", prompt, hop.text("answer"), aliases=more))
    return Record(fields.id("case_id", str(number)), tuple(facts), tuple(probes))
