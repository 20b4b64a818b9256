"""Whatever stands in a file, reading it gives records or a FactError that says what is wrong, and
nothing else.

ENGRAM_FUZZ=10000 tries so many examples of each kind.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram import Dataset, Record, read_dataset, read_facts
from engram.benchmark.data.build import read_associations, read_snippets
from engram.benchmark.data.counterfact import read_references, with_statement
from engram.errors import FactError
from engram.files.forms import parsed
from tests.helpers.data_samples import SAMPLES

fuzz = settings(
    deadline=None,
    max_examples=int(os.environ.get("ENGRAM_FUZZ", "200")),
    suppress_health_check=list(HealthCheck),
)
forms = st.sampled_from(sorted(SAMPLES))
texts = st.one_of(
    st.text(st.characters(), max_size=8),  # with halves of letters
    st.sampled_from(
        [
            "",
            " ",
            "{}",
            "{} {}",
            "{0}",
            "\ud800",
            "\x00",
            "nq question: ",
            "Matterhorn",
            "Peru",
            "OR",
            "of X is Y.",
        ]
    ),
)
numbers = st.one_of(st.integers(), st.floats(), st.just(10**4000), st.booleans(), st.none())
values = st.recursive(
    st.one_of(texts, numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# -- what is tried ---------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value within, by key and index."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, form: str) -> Any:
    """Return a record with one to three of its values replaced, taken out, doubled or named
    otherwise.
    """
    record = copy.deepcopy(SAMPLES[form])
    for _ in range(draw(st.integers(1, 3))):
        ways = list(places(record))
        if not ways:
            break
        *outer, last = draw(st.sampled_from(ways))
        inside = record
        for step in outer:
            inside = inside[step]
        change = draw(st.sampled_from(["replace", "replace", "take out", "double", "rename"]))
        if change == "replace":
            inside[last] = draw(values)
        elif change == "take out":
            del inside[last]
        elif change == "double" and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[last]))
        elif isinstance(inside, dict):
            inside[draw(texts)] = inside.pop(last)
    return record


@st.composite
def mutated_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(name, bytes) of a file with valid records, mutated ones and others in any order."""
    form = draw(forms)
    kinds = st.one_of(
        mutated(form), mutated(form), st.just(SAMPLES[form]), values, mutated(draw(forms))
    )
    lines = [
        json.dumps(record, ensure_ascii=True)
        for record in draw(st.lists(kinds, min_size=1, max_size=4))
    ]
    name = draw(st.sampled_from(["a.json", "a.jsonl"]))
    text = "\n".join(lines) if name == "a.jsonl" else "[\n" + ",\n".join(lines) + "]"
    return name, text.encode()


@st.composite
def damaged_files(draw: st.DrawFn, whole: bytes, names: tuple[str, ...]) -> tuple[str, bytes]:
    """(name, bytes): those of a valid file with a piece taken out, put in or replaced; or any bytes
    at all.
    """
    name = draw(st.sampled_from(names))
    if draw(st.integers(0, 4)) == 0:
        return name, draw(
            st.sampled_from([b"", b"\x1f\x8b", b"[", b"{", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
        ) + draw(st.binary())
    data = gzip.compress(whole, mtime=0) if draw(st.booleans()) else whole
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(st.binary(max_size=4)) + data[start + draw(st.integers(0, 8)) :]
    return name, data


def listed(form: str) -> bytes:
    return json.dumps([SAMPLES[form], SAMPLES[form]]).encode()


# -- what has to hold ------------------------------------------------------------------------------


def told(error: FactError, path: Path) -> None:
    """Check that the error says which file it is about, and can be printed."""
    assert str(path) in str(error)
    str(error).encode()


def tried(path: Path, read: Callable[[], Dataset]) -> Dataset | None:
    try:
        return read()
    except FactError as error:
        told(error, path)
        return None


def usable(dataset: Dataset) -> None:
    """Check that these are records of a form, with names, that go to JSON and back."""
    assert (
        len({record.id for record in dataset.records}) == len(dataset.records)
        and len(dataset.digest) == 64
    )
    for record in dataset.records:
        assert parsed(Record, json.dumps(record.to_dict()), "a record") == record
        kinds = {probe.kind for probe in record.probes}
        assert dataset.form != "flat" or kinds <= {"rewrite", "rephrase", "locality"}
    assert len(with_statement(dataset).records) == len(dataset.records)
    "".join(dataset.skipped).encode()


@pytest.mark.slow
@fuzz
@given(file=mutated_files())
def test_mutated_records_are_read_or_told(folder: Path, file: tuple[str, bytes]) -> None:
    name, data = file
    path = folder / name
    path.write_bytes(data)
    strict = tried(path, lambda: read_dataset(path))
    lenient = tried(path, lambda: read_dataset(path, skip_malformed=True))
    if strict is not None:
        assert not strict.skipped and lenient == strict  # with nothing malformed, both are the same
    if lenient is not None:
        usable(lenient)
        assert strict is not None or lenient.skipped
        assert all(each.startswith(f"{path}, line ") for each in lenient.skipped)


@fuzz
@given(
    file=forms.flatmap(
        lambda form: damaged_files(listed(form), ("a.json", "a.jsonl", "a.csv", "a.json.gz", "a"))
    )
)
def test_damaged_files_are_read_or_told(folder: Path, file: tuple[str, bytes]) -> None:
    name, data = file
    path = folder / name
    path.write_bytes(data)
    for skip in (False, True):
        found = tried(path, lambda skip=skip: read_dataset(path, skip_malformed=skip))
        if found is not None:
            usable(found)


TABLE = b'subject,prompt,target,paraphrases\nOslo,"{} is in",Norway,a | b\nRome,{} is in,Italy,\n'


@fuzz
@given(
    file=st.one_of(
        damaged_files(TABLE, ("f.csv", "f.CSV.gz")), damaged_files(listed("facts"), ("f.json", "f"))
    )
)
def test_damaged_facts_are_read_or_told(folder: Path, file: tuple[str, bytes]) -> None:
    name, data = file
    path = folder / name
    path.write_bytes(data)
    found = tried(path, lambda: read_dataset(path))
    try:
        facts = read_facts(path)
    except FactError as error:
        told(error, path)
    else:
        assert found is None or [record.facts[0] for record in found.records] == facts


ASSOCIATIONS = b'subject,relation,object\nOslo,country,Norway\n"Rome, the city",country,Italy\n'
TEXTS = json.dumps({"country:Norway": [{"name": "Oslo", "text": "Oslo is in Norway"}]}).encode()


@fuzz
@given(
    file=damaged_files(ASSOCIATIONS, ("b.csv", "b.json")),
    snippets=damaged_files(TEXTS, ("t.json",)),
)
def test_damaged_files_of_a_builder_are_read_or_told(
    folder: Path, file: tuple[str, bytes], snippets: tuple[str, bytes]
) -> None:
    for (name, data), read in ((file, read_associations), (snippets, read_snippets)):
        path = folder / name
        path.write_bytes(data)
        try:
            read(path)
        except FactError as error:
            told(error, path)


def weights() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([1.0, 2.0]))
    return file.getvalue()


@pytest.mark.slow
@fuzz
@given(
    idf=damaged_files(weights(), ("idf.npy",)),
    words=st.one_of(
        st.just(b'{"peru": 1}'), values.map(lambda value: json.dumps(value).encode()), st.binary()
    ),
    entries=st.lists(
        st.one_of(
            st.just(
                {
                    "relation_id": "P17",
                    "target_id": "Q419",
                    "samples": [{"name": "a", "text": "of Peru"}],
                }
            ),
            st.fixed_dictionaries(
                {
                    "relation_id": texts,
                    "target_id": texts,
                    "samples": st.one_of(values, st.lists(values)),
                }
            ),
            values,
        ),
        max_size=3,
    ),
)
def test_damaged_reference_texts_are_read_or_told(
    folder: Path, idf: tuple[str, bytes], words: bytes, entries: list[Any]
) -> None:
    for name, data in (
        idf,
        ("tfidf_vocab.json", words),
        ("attribute_snippets.json", json.dumps(entries).encode()),
    ):
        (folder / name).write_bytes(data)
    record = Record.from_fact(
        "0", read_dataset("pocket", limit=1).records[0].facts[0], references="P17:Q419"
    )
    try:
        references = read_references(folder, [record])
    except FactError as error:
        told(error, folder)
    else:
        joined = " ".join(snippet.text for each in references.snippets.values() for snippet in each)
        assert references.tfidf.cosine(joined, joined) in (None, pytest.approx(1))
