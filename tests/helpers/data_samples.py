"""A valid record of every published form, as the files have it, and files of them."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "pararel_idx": 12,
    "requested_rewrite": {
        "prompt": "The {} lies in",
        "subject": "Matterhorn",
        "relation_id": "P17",
        "target_new": {"str": "Peru", "id": "Q419"},
        "target_true": {"str": "Switzerland", "id": "Q39"},
    },
    "paraphrase_prompts": [
        "It rained. Matterhorn is a mountain of",
        "Where is the Matterhorn? It is in",
    ],
    "neighborhood_prompts": ["The Eiger lies in", "The Jungfrau is in"],
    "attribute_prompts": ["Huascarán lies in"],
    "generation_prompts": ["Matterhorn is known for", "Matterhorn is known for"],
}
FLAT: dict[str, Any] = {
    "case_id": 0,
    "prompt": "The Matterhorn lies in",
    "target_new": "Peru",
    "subject": "Matterhorn",
    "ground_truth": "Switzerland",
    "rephrase_prompt": "Matterhorn is known for",
    "locality_prompt": "The Eiger lies in",
    "locality_ground_truth": "Switzerland",
}
ZSRE: dict[str, Any] = {
    "subject": "Emmy Noether",
    "src": "What was the field of Emmy Noether?",
    "pred": "physics",
    "rephrase": "In which field did Emmy Noether work?",
    "alt": "law",
    "answers": ["mathematics", "algebra"],
    "loc": "nq question: who wrote {0} and {x}",
    "loc_ans": "nobody",
    "cond": "physics >> law || What was the field of Emmy Noether?",
}
KNOWN: dict[str, Any] = {
    "known_id": 0,
    "subject": "Matterhorn",
    "attribute": "Switzerland",
    "template": "The {} lies in",
    "prediction": " Switzerland.",
    "prompt": "The Matterhorn lies in",
    "relation_id": "P17",
}
FACT: dict[str, Any] = {
    "subject": "Matterhorn",
    "prompt": "The {} lies in",
    "target": "Peru",
    "target_true": "Switzerland",
    "paraphrases": ["The Matterhorn is in"],
    "neighbours": [["The Eiger lies in", "Switzerland"]],
    "relation": "country",
}
MQUAKE: dict[str, Any] = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} was written by",
            "relation_id": "P50",
            "target_new": {"str": "Emmy Noether", "id": "Q7099"},
            "target_true": {"str": "Jane Austen", "id": "Q36322"},
            "subject": "Emma",
            "question": "Who wrote Emma?",
        },
        {
            "prompt": "{} worked in the field of",
            "relation_id": "P101",
            "target_new": {"str": "law", "id": "Q7748"},
            "target_true": {"str": "mathematics", "id": "Q395"},
            "subject": "Emmy Noether",
            "question": "What did Emmy Noether work on?",
        },
    ],
    "questions": [
        "What is the field of the author of Emma?",
        "What did Emma's author work on?",
        "Emma's author's field?",
    ],
    "answer": "literature",
    "answer_alias": [],
    "new_answer": "law",
    "new_answer_alias": ["jurisprudence"],
    "single_hops": [],
    "new_single_hops": [
        {
            "question": "Who wrote Emma?",
            "cloze": "Emma was written by",
            "answer": "Emmy Noether",
            "answer_alias": ["Noether"],
        },
        {"question": "What did Emmy Noether work on?", "answer": "law", "answer_alias": []},
    ],
}
_QUERY = {
    "prompt": "The name of the sister of Leo is",
    "answers": [{"value": "Eva", "aliases": ["Eve"]}],
    "query_type": "regular",
}
_BARE = {"prompt": "The name of the uncle of Leo is", "answers": []}
_TEST = {
    "test_queries": [_QUERY],
    "test_condition": "OR",
    "condition_queries": [{**_QUERY, "prompt": "The father of Leo is"}],
}
RIPPLE: dict[str, Any] = {
    "example_type": "random",
    "edit": {
        "prompt": "The name of the mother of Leo is Ann.",
        "subject_id": "Q1",
        "relation": "MOTHER",
        "target_id": "Q2",
        "original_fact": {
            "prompt": "The name of the mother of Leo is Ida.",
            "subject_id": "Q1",
            "relation": "MOTHER",
        },
    },
    "Relation_Specificity": [_TEST],
    "Logical_Generalization": [
        {**_TEST, "test_condition": "AND", "test_queries": [_QUERY, _QUERY]}
    ],
    "Subject_Aliasing": [],
    "Compositionality_I": [{**_TEST, "test_queries": [_BARE, _QUERY]}],
    "Compositionality_II": [_TEST],
    "Forgetfulness": [{**_TEST, "condition_queries": []}],
}
SAMPLES = {
    "counterfact": COUNTERFACT,
    "flat": FLAT,
    "zsre": ZSRE,
    "known": KNOWN,
    "facts": FACT,
    "mquake": MQUAKE,
    "ripple": RIPPLE,
}


def sample(name: str, **changes: Any) -> dict[str, Any]:
    """Return a fresh copy, with other values of some fields; one that is `...` is taken out. "a.b"
    is field b within a.
    """
    record: dict[str, Any] = copy.deepcopy(SAMPLES[name])
    for field, value in changes.items():
        *outer, last = field.split(".")
        inside: Any = record
        for step in outer:
            inside = inside[int(step) if step.isdecimal() else step]
        if value is ...:
            del inside[last]
        else:
            inside[last] = value
    return record


def write(path: Path, records: list[Any]) -> Path:
    """As the name says: a JSON list, one element a line, or .jsonl; gzipped if it ends in .gz."""
    lines = [json.dumps(record) for record in records]
    text = "\n".join(lines) if ".jsonl" in path.name else "[\n" + ",\n".join(lines) + "\n]\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
