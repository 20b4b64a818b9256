"""Write records as CounterFact's published files, so that other people's tools can read them.

Knows the published form. Refuses to lose anything silently: a record that would not be read back as
it is raises an error.
Source: Meng et al. 2022, arXiv:2202.05262, released data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from engram.benchmark.data.counterfact import counterfact_record
from engram.benchmark.data.fields import Fields
from engram.benchmark.data.records import Dataset, Record, References, without_evidence
from engram.errors import FactError
from engram.files.atomic import atomic_file, reserved

_PROMPTS = {
    "paraphrase_prompts": "paraphrase",
    "neighborhood_prompts": "neighbourhood",
    "attribute_prompts": "attribute",
}
_REFERENCES = _TEXTS, _VOCABULARY, _IDF = ("attribute_snippets.json", "tfidf_vocab.json", "idf.npy")


@contextmanager
def reserved_dataset(path: Path, *, references: bool) -> Iterator[None]:
    """Try the names of all files of a data set, and hold them; see `reserved`.

    Raises:
        FactError: the folder has the texts of another data set. EngramFileError: one file cannot be
            written.
    """
    with ExitStack() as stack:
        stack.enter_context(reserved(path))
        for name in _REFERENCES if references else ():
            stack.enter_context(reserved(path.with_name(name)))
        if references and path.with_name(_TEXTS).exists() and not path.exists():
            raise FactError(
                f"{path.parent} holds the texts of another data set ({_TEXTS}); choose a folder of "
                f"its own for {path.name}"
            )
        yield


def write_dataset(dataset: Dataset, path: str | Path) -> Path:
    """Write the records as one JSON list, each file whole or not at all.

    Texts that generated ones are compared with are written to the same folder under their published
    names: `attribute_snippets.json`, `idf.npy`, `tfidf_vocab.json`. So a data set with such texts
    needs a folder of its own. `read_dataset(path, references=True)` gives equal records and scores.

    Raises:
        FactError: a record that CounterFact's form cannot hold, the texts of another data set in
            the folder, or a file that cannot be written.
    """
    path = Path(path)
    cases = [_case(record) for record in dataset.records]
    references = dataset.references
    with reserved_dataset(path, references=references is not None):
        if references is not None:
            _write_references(references, dataset.records, path)
        _write_json(path, cases)
    return path


def _case(record: Record) -> dict[str, Any]:
    fact = record.facts[0]
    new: dict[str, Any] = {"str": fact.target}
    if record.references is not None:
        # "P17:Q142" is relation and object; the file has the relation in a field of its own.
        new["id"] = record.references.removeprefix(f"{fact.relation}:")
    rewrite: dict[str, Any] = {"prompt": fact.prompt, "subject": fact.subject, "target_new": new}
    rewrite |= {"target_true": {"str": fact.target_true}, "relation_id": fact.relation}
    prompts = {
        name: [probe.prompt for probe in record.probes if probe.kind == kind]
        for name, kind in _PROMPTS.items()
    }
    case = {
        "case_id": case_id(record.id),
        "requested_rewrite": rewrite,
        **prompts,
        "generation_prompts": list(record.generation),
    }
    # Read back by the reader itself: a list of conditions here would forget what it can read.
    if not _holds(case, record):
        raise FactError(
            f"record {record.id!r} is not in CounterFact's form: expected one fact with its true "
            f"object, and probes of {', '.join(('rewrite', *_PROMPTS.values()))} in this order, "
            "with the fact's own two objects as answers"
        )
    return case


def case_id(name: str) -> int | str:
    """Return the name as a number if it is written as one, as in the published file."""
    return int(name) if name.isascii() and name.isdecimal() and str(int(name)) == name else name


def _holds(case: dict[str, Any], record: Record) -> bool:
    """Tell whether the case is read back as the record."""
    # A record gives its fact the evidence of its probes again when it is read.
    bare = replace(record, facts=tuple(map(without_evidence, record.facts)))
    try:
        return counterfact_record(Fields(case, "a case"), 0) == bare
    except FactError:
        return False


def _write_references(references: References, records: tuple[Record, ...], path: Path) -> None:
    relations = {record.references: record.facts[0].relation for record in records}
    entries = []
    for key, snippets in references.snippets.items():
        # A relation may have a colon in its name; the part before the first one is a guess, for
        # texts that no record refers to.
        relation = relations.get(key) or key.partition(":")[0]
        samples = [{"name": snippet.name, "text": snippet.text} for snippet in snippets]
        entries.append(
            {
                "relation_id": relation,
                "target_id": key.removeprefix(f"{relation}:"),
                "samples": samples,
            }
        )
    _write_json(path.with_name(_TEXTS), entries)
    _write_json(path.with_name(_VOCABULARY), dict(references.tfidf.vocabulary))
    _write(path.with_name(_IDF), lambda file: np.save(file, references.tfidf.idf))


def _write_json(path: Path, value: Any) -> None:
    _write(
        path,
        lambda file: file.write((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()),
    )


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    with atomic_file(path) as fresh, fresh.open("wb") as file:
        write(file)
