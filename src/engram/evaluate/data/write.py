"""Write records as CounterFact's published JSON, so that anybody's tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engram.errors import FactError
from engram.evaluate.data.records import Dataset, Record

_PROMPTS = {
    "paraphrase_prompts": "paraphrase",
    "neighborhood_prompts": "neighbourhood",
    "attribute_prompts": "attribute",
}


def write_dataset(dataset: Dataset, path: str | Path) -> Path:
    """The records as one JSON list; texts that generated ones are compared with go into `attribute_snippets.json` beside it.

    Read back by `read_dataset(path)`, which gives equal records.

    Raises:
        FactError: records of another form than CounterFact's.
    """
    path = Path(path)
    cases = [_case(record) for record in dataset.records]
    _write(path, cases)
    if dataset.references is not None:
        entries = []
        for key, snippets in dataset.references.snippets.items():
            relation, _, target = key.partition(":")
            samples = [{"name": each.name, "text": each.text} for each in snippets]
            entries.append({"relation_id": relation, "target_id": target, "samples": samples})
        _write(path.with_name("attribute_snippets.json"), entries)
    return path


def _case(record: Record) -> dict[str, Any]:
    known = {"rewrite", *_PROMPTS.values()}
    if len(record.facts) != 1 or {probe.kind for probe in record.probes} - known or record.facts[0].target_true is None:
        raise FactError(
            f"record {record.id!r} is not in CounterFact's form: one fact with its true object, and "
            f"probes of {', '.join(sorted(known))}"
        )
    fact = record.facts[0]
    new: dict[str, Any] = {"str": fact.target}
    if record.references is not None:
        new["id"] = record.references.partition(":")[2]
    rewrite: dict[str, Any] = {"prompt": fact.prompt, "subject": fact.subject, "target_new": new}
    rewrite |= {"target_true": {"str": fact.target_true}, "relation_id": fact.relation}
    prompts = {name: [probe.prompt for probe in record.probes if probe.kind == kind] for name, kind in _PROMPTS.items()}
    return {"case_id": record.id, "requested_rewrite": rewrite, **prompts, "generation_prompts": list(record.generation)}


def _write(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
    part.replace(path)
