"""Data sets by name or path: where they are published, which form a file has, and what happens with
malformed records.

Knows addresses and forms. Refuses to know what the fields of a form mean: each form has a module.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from engram.benchmark.data.counterfact import counterfact_record, flat_record, read_references
from engram.benchmark.data.download import fetched
from engram.benchmark.data.fields import Fields
from engram.benchmark.data.mquake import mquake_record
from engram.benchmark.data.records import FORMS, Dataset, Form, Record
from engram.benchmark.data.ripple import ripple_record
from engram.benchmark.data.zsre import zsre_record
from engram.checks import Count, checked_call, did_you_mean, one_of
from engram.errors import EngramError, FactError
from engram.fact_files import fact_of, raw_records, read_facts
from engram.facts import Fact
from engram.files.cache_folder import cache_folder
from engram.files.json_records import shown
from engram.files.names import read_bytes
from engram.progress import Progress, no_progress

# Addresses only: none of these sites publishes checksums, see download.
_ROME = "https://rome.baulab.info/data/dsets"
_MQUAKE = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets"
_RIPPLE = "https://raw.githubusercontent.com/edenbiran/RippleEdits/main/data/benchmark"
_LARGEST = 1 << 30  # bytes of an unpacked file; the published ones have half of that
_BESIDE = ("attribute_snippets.json", "idf.npy", "tfidf_vocab.json")


@dataclass(frozen=True)
class Source:
    """A data set that has a name.

    Attributes:
        url: of its file; None: it is built here.
        beside: files with the texts that generated ones are compared with, in the same folder.
        about: what it is, in a line.
    """

    form: Form
    about: str
    url: str | None = None
    beside: tuple[str, ...] = ()


SOURCES: dict[str, Source] = {
    "pocket": Source(
        "counterfact", "3,984 counterfactual edits of facts that the bundled model knows; offline"
    ),
    "counterfact": Source(
        "counterfact",
        "21,919 counterfactual edits (Meng et al. 2022)",
        f"{_ROME}/counterfact.json",
        _BESIDE,
    ),
    "multi-counterfact": Source(
        "counterfact",
        "20,877 of them without conflicts (Meng et al. 2023)",
        f"{_ROME}/multi_counterfact.json",
        _BESIDE,
    ),
    "zsre": Source(
        "zsre",
        "19,086 questions with true answers (Levy et al. 2017)",
        f"{_ROME}/zsre_mend_eval.json",
    ),
    "known": Source(
        "counterfact",
        "1,209 facts that GPT-2 XL knows (Meng et al. 2022)",
        f"{_ROME}/known_1000.json",
    ),
    "mquake-cf": Source(
        "mquake",
        "9,218 counterfactual chains of facts (Zhong et al. 2023)",
        f"{_MQUAKE}/MQuAKE-CF.json",
    ),
    "mquake-cf-3k": Source("mquake", "3,000 of them", f"{_MQUAKE}/MQuAKE-CF-3k.json"),
    "mquake-t": Source(
        "mquake", "1,868 chains with a fact that has changed", f"{_MQUAKE}/MQuAKE-T.json"
    ),
    **{
        f"ripple-{kind}": Source(
            "ripple", f"RippleEdits, {kind} (Cohen et al. 2024)", f"{_RIPPLE}/{kind}.json"
        )
        for kind in ("popular", "random", "recent")
    },
}
_READERS: dict[Form, Callable[[Fields, int], Record]] = {
    "counterfact": counterfact_record,
    "flat": flat_record,
    "zsre": zsre_record,
    "mquake": mquake_record,
    "ripple": ripple_record,
}
# MQuAKE has requested_rewrite too, so "questions" comes first; the flattened form shares prompt,
# subject and target_new with bare facts, and is known by the fields that only it has.
_MARKS: dict[str, Form] = {  # field -> the form that has it and no other, the surest first
    "questions": "mquake",
    "requested_rewrite": "counterfact",
    "src": "zsre",
    "loc": "zsre",
    "edit": "ripple",
    "locality_prompt": "flat",
    "rephrase_prompt": "flat",
    "ground_truth": "flat",
    "neighborhood_prompts": "counterfact",
}


@checked_call
def read_dataset(
    name: str | Path,
    *,
    form: Form | None = None,
    limit: Count | None = None,
    skip_malformed: bool = False,
    references: bool | Literal["if there"] = False,
    progress: Progress = no_progress,
) -> Dataset:
    """Read the records of a benchmark.

    A record's only fact has the paraphrases and neighbours of the record.

    Args:
        name: one of `SOURCES`, fetched into the cache folder when first used; or a file: JSON or
            JSON lines, also gzipped, in any of the published forms, or facts as `read_facts` takes
            them.
        form: of a file; default: guessed from its first record.
        limit: number of records, from the first.
        skip_malformed: leave malformed records out and say so in `Dataset.skipped`, instead of
            raising.
        references: also the texts that generated ones are compared with (of "counterfact" half a
            gigabyte), from the same address; of a file from its folder, where "if there" accepts
            that there are none. "pocket" always has them.
        progress: called with (file, bytes so far, bytes in all) while something is fetched.
    Raises:
        FactError: no such file, or a malformed record, reported with file, line and field.
        EngramError: a data set that could not be fetched; SettingError: a limit below 1, or a form
            that does not exist.
    Example:
        >>> dataset = engram.read_dataset("pocket", limit=3)
        >>> len(dataset.records), dataset.form
        (3, 'counterfact')
        >>> len(dataset.records[0].facts[0].neighbours) > 0
        True
    """
    if form is not None:
        one_of("form", form, FORMS, more=", or None to find it out")
    # Imported late: building needs the bundled table, which other data sets do not.
    if str(name) == "pocket":
        from engram.benchmark.data.pocket_benchmark import pocket_benchmark

        whole = pocket_benchmark()
        return whole if limit is None else _cut(whole, limit)
    source = SOURCES.get(str(name))
    if source is None:
        path = Path(name)
        wanted = bool(references) and (
            references != "if there" or (path.parent / _BESIDE[0]).is_file()
        )
        return _read_file(path, form, limit, skip_malformed, wanted, path.name.partition(".")[0])
    path, *_ = _fetched(source, bool(references), progress)
    return _read_file(
        path, None, limit, skip_malformed, bool(references and source.beside), str(name)
    )


def facts_to_edit(path: Path) -> list[Fact]:
    """Read the facts of a file in any form that `read_facts` or `read_dataset` takes.

    A data set's facts have the paraphrases and neighbours of their records, so that a receipt
    checks them.

    Raises:
        FactError: no such file, or a malformed record, reported with file, line and field.
    """
    try:
        first, _ = next(_given(path), (None, ""))
    except FactError:  # such as "pocket", which is no file
        first = None
    if first is None or _form_of(first) == "fact":
        return read_facts(path)
    return [fact for record in read_dataset(path).records for fact in record.facts]


def _cut(dataset: Dataset, limit: int) -> Dataset:
    return Dataset(
        dataset.name, dataset.form, dataset.records[:limit], dataset.references, dataset.skipped
    )


def _read_file(
    path: Path, form: Form | None, limit: int | None, skip: bool, references: bool, name: str
) -> Dataset:
    records: list[Record] = []
    skipped: list[str] = []
    ids: set[str] = set()
    reader: Form | Literal["fact"] | None = form
    for number, (given, where) in enumerate(_given(path)):
        if limit is not None and len(records) == limit:
            break
        try:
            if isinstance(given, FactError):
                raise given
            like = reader or _form_of(given)
            record = _record(given, where, like, number)
            # Results of methods are compared by id: two records of one id would be one.
            if record.id in ids:
                raise FactError(
                    f"{where}: id {record.id!r} is that of an earlier record; "
                    "expected another for each"
                )
        except FactError as error:
            if not skip:
                raise
            skipped.append(str(error))
            continue
        # After the first sound record only: a malformed one must not decide how all others are
        # read. Nor may the form change within a file, since a table has one set of columns.
        reader = like
        ids.add(record.id)
        records.append(record)
    if not records:
        first = f"; {len(skipped)} are malformed, the first: {skipped[0]}" if skipped else ""
        raise FactError(f"{path} holds no records{first}")
    texts = read_references(path.parent, records) if references else None
    shape: Form = "counterfact" if reader is None or reader == "fact" else reader
    return Dataset(name, shape, tuple(records), texts, tuple(skipped))


def _given(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        data = read_bytes(path)
        # By its first bytes: files are renamed, and browsers unpack without renaming.
        if data[:2] == b"\x1f\x8b":
            data = _unpacked(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _unreadable(path, error) from error
    return raw_records(text, str(path))


def _unpacked(data: bytes) -> bytes:
    """Return what gzip packed; a few bytes may unpack to more than the memory holds."""
    with gzip.GzipFile(fileobj=BytesIO(data)) as file:
        contents = file.read(_LARGEST + 1)
    if len(contents) > _LARGEST:
        raise ValueError(f"it unpacks to more than {_LARGEST / 1e6:,.0f} MB")
    return contents


def _unreadable(path: Path, error: Exception) -> FactError:
    return FactError(
        f"no data set could be read from {str(path)!r}{did_you_mean(str(path), SOURCES)}: {error}. "
        f"Expected a file, or one of {', '.join(SOURCES)}"
    )


def _form_of(record: Any) -> Form | Literal["fact"]:
    """Guess the form of a record from its fields."""
    fields = record if isinstance(record, dict) else {}
    if isinstance(fields.get("requested_rewrite"), list):
        return "mquake"
    return next((form for field, form in _MARKS.items() if field in fields), "fact")


def _record(given: Any, where: str, form: Form | Literal["fact"], number: int) -> Record:
    try:
        if form == "fact":
            return Record.from_fact(str(number), fact_of(given, where))
        if not isinstance(given, dict):
            raise FactError(f"{shown(given)} is no object; expected a record of form {form!r}")
        return _READERS[form](Fields(given, where), number)
    except FactError as error:
        if str(error).startswith(where):
            raise
        raise FactError(f"{where}: {error}") from error


def download(
    name: str, *, references: bool = False, progress: Progress = no_progress
) -> list[Path]:
    """Fetch a data set by name without reading it, and return its files.

    Raises:
        EngramError: no data set has that name, or it could not be fetched.
    """
    one_of("data set", name, SOURCES, error=EngramError)
    source = SOURCES[name]
    return [] if source.url is None else _fetched(source, references, progress)


def _fetched(source: Source, references: bool, progress: Progress) -> list[Path]:
    """Return the files of a source in the cache folder, that of the records first."""
    assert source.url is not None, "only the bundled data set has none"
    urls = [
        source.url,
        *(f"{source.url.rpartition('/')[0]}/{file}" for file in source.beside if references),
    ]
    return [fetched(url, cache_folder("data"), progress=progress) for url in urls]
