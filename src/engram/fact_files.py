"""Facts from files: JSON, JSON lines, CSV, the published known-facts file of causal tracing, and
the bundled table.

Knows what a record looks like and its place, so that an error names file, line and field. Refuses
to know models and what the facts are for. The known-facts file is that of Meng et al. 2022 (1,209
facts that GPT-2 XL knows).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram import pocket
from engram.checks import checked_call, did_you_mean
from engram.errors import EngramFileError, FactError
from engram.facts import Fact
from engram.files.json_records import is_text, json_records, shown, writable
from engram.files.names import read_text

_EXPECTED: dict[str, str] = {  # field -> what it holds
    "subject": "the subject's name as text",
    "prompt": "text with one {} for the subject and the object next",
    "target": "the object as text",
    "target_true": "the object before an edit as text, or null",
    "paraphrases": "a list of texts after which the object is expected",
    "neighbours": "a list of [text, answer] pairs",
    "relation": "the relation's name as text, or null",
}
_NEEDED = ("subject", "prompt", "target")
# fields that are read from the published file
_KNOWN_FACTS = ("subject", "attribute", "template", "prompt", "relation_id")
_CSV = tuple(name for name in _EXPECTED if name != "neighbours")


@checked_call
def read_facts(source: str | Path) -> list[Fact]:
    """Read facts from a file or by name, in the file's order.

    Args:
        source: "pocket" for the bundled table: the first template that was trained with a fact is
            its prompt, all the others are its paraphrases. Or a file:
            - JSON: a list of objects with subject, prompt, target and, where there are any,
              target_true, paraphrases, neighbours, relation, as `Fact.to_dict` gives them.
            - JSON lines: one such object a line.
            - the published known-facts JSON: objects with known_id, subject, attribute, template,
              prompt, relation_id. The prompt is the filled template and whatever the model wrote
              before the object.
            - CSV (by its name, .csv): a header with subject, prompt, target, and any of
              target_true, relation, paraphrases (one cell, texts separated by `|`). An empty cell
              is one that is not given.
    Raises:
        FactError: no such file, no facts in it, or a record that is no fact; with file, line and
            field.
    Example:
        >>> len(engram.read_facts("pocket"))
        3994
    """
    if source == "pocket":
        return [_pocket_fact(known) for known in pocket.facts()]
    path = Path(source)
    try:
        text = read_text(path, encoding="utf-8-sig")  # spreadsheets put a mark in front
    except (OSError, EngramFileError) as error:
        raise FactError(
            f"no facts could be read from {str(path)!r}: {error}. Expected 'pocket', or a file: a "
            "JSON list, JSON lines, or CSV"
        ) from error
    facts = [fact_of(record, where) for record, where in raw_records(text, str(path))]
    if not facts:
        raise FactError(
            f"{path} holds no facts; expected one object with {', '.join(_NEEDED)} a fact"
        )
    return facts


def _pocket_fact(known: pocket.KnownFact) -> Fact:
    # the model knows the fact in trained words; in all others it has to generalise
    prompt, *_ = known.trained()
    others = [text.replace("{}", known.subject) for text in known.prompts() if text != prompt]
    return Fact(
        known.subject, prompt, known.object, paraphrases=tuple(others), relation=known.relation
    )


# -- files -> records and their places -------------------------------------------------------------


def raw_records(text: str, path: str) -> Iterator[tuple[Any, str]]:
    """Yield (record, its place) of a CSV, by its name, or of JSON; a FactError instead of a record
    is what is wrong with this record alone.
    """
    return (_csv if path.lower().removesuffix(".gz").endswith(".csv") else json_records)(text, path)


def _csv(text: str, path: str) -> Iterator[tuple[Any, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_fields(dict.fromkeys(header), f"{path}, line 1", _CSV)
        if len(set(header)) < len(header):
            raise FactError(
                f"{path}, line 1: a column's name is in the header twice: {', '.join(header)}"
            )
        # line_num counts lines read so far: a quoted cell may take several
        before = reader.line_num
        for row in reader:
            where, before = f"{path}, line {before + 1}", reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                problem = (
                    f"{where}: {len(row)} cells, expected {len(header)} as in the header "
                    f'({", ".join(header)}); a text with a comma has to be quoted: "..."'
                )
                yield FactError(problem), where
                continue
            # A needed cell stays though it is empty, so that the error is about it and not missing.
            record: dict[str, Any] = {
                name: cell
                for name, cell in zip(header, row, strict=True)
                if cell or name in _NEEDED
            }
            if "paraphrases" in record:
                record["paraphrases"] = [text.strip() for text in record["paraphrases"].split("|")]
            yield record, where
    except csv.Error as error:
        raise FactError(f"{path}, line {reader.line_num}: no CSV, {error}") from error


# -- records -> facts ------------------------------------------------------------------------------


def fact_of(record: Any, where: str) -> Fact:
    """Return the fact of a record from `raw_records`.

    Raises:
        FactError: it is no fact; with its place and field.
    """
    if isinstance(record, FactError):
        raise record
    if not isinstance(record, dict):
        raise FactError(
            f"{where}: {shown(record)} is no object; expected one with {', '.join(_NEEDED)}"
        )
    # Recognised record by record, so that a file may mix both forms.
    if "attribute" in record:
        record = _known_fact(record, where)
    _check_fields(record, where, tuple(_EXPECTED))
    for name, value in record.items():
        if not _fits(name, value):
            raise FactError(
                f"{where}: field {name!r} is {shown(value)}; expected {_EXPECTED[name]}"
            )
    try:
        return Fact.from_dict(record)
    except FactError as error:
        raise FactError(f"{where}: {error}") from error


def _known_fact(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Turn a record of the published file into one of ours: the template, extended by what the
    prompt has after it.
    """
    for name in _KNOWN_FACTS:
        if not isinstance(record.get(name), str):
            raise FactError(
                f"{where}: field {name!r} is {shown(record.get(name))}; expected text, as in a "
                "known-facts file"
            )
    # The template is not always the whole prompt: the published one has words after it at times.
    subject, template, prompt = record["subject"], record["template"], record["prompt"]
    filled = template.replace("{}", subject)
    if not prompt.startswith(filled):
        raise FactError(
            f"{where}: field 'prompt' is {prompt!r}; expected it to begin with the filled "
            f"template, {filled!r}"
        )
    return {
        "subject": subject,
        "prompt": template + prompt[len(filled) :],
        "target": record["attribute"],
        "relation": record["relation_id"],
    }


def _check_fields(record: Mapping[str, Any], where: str, allowed: tuple[str, ...]) -> None:
    for name in record:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise FactError(
                f"{where}: field {name!r} is not one of a fact{hint}; expected "
                f"{', '.join(allowed)} (records of a data set: engram.read_dataset)"
            )
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        wanted = "; ".join(f"{name!r}: {_EXPECTED[name]}" for name in missing)
        raise FactError(
            f"{where}: field {' and '.join(map(repr, missing))} missing; expected {wanted}"
        )


def _fits(name: str, value: Any) -> bool:
    if name == "paraphrases":
        return isinstance(value, list) and all(map(is_text, value))
    if name == "neighbours":
        return isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(map(is_text, pair)) for pair in value
        )
    return (isinstance(value, str) and writable(value)) or (value is None and name not in _NEEDED)
