"""CounterFact: the published JSON, its flattened form, the texts beside it, and CounterFact+.

Knows the fields of these files. Refuses to know where files are (see sources).
Sources: Meng et al. 2022, arXiv:2202.05262, Sec. 3.4 and Appendix D; multi-CounterFact: Meng et al.
2023, arXiv:2210.07229; CounterFact+: Hoelscher-Obermaier et al. 2023, arXiv:2305.17553.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engram.benchmark.data.fields import Fields
from engram.benchmark.data.records import Dataset, Record, References, Snippet
from engram.benchmark.data.tfidf import TfIdf
from engram.errors import FactError
from engram.evaluate.probes import Probe
from engram.facts import Fact
from engram.files.json_records import is_text
from engram.files.names import open_regular, read_text


def counterfact_record(fields: Fields, number: int) -> Record:
    """Read a record of the published file: `requested_rewrite` and lists of prompts.

    Attribute and generation prompts may be missing.
    """
    rewrite = fields.inside("requested_rewrite")
    new, true = rewrite.inside("target_new"), rewrite.inside("target_true")
    relation = rewrite.text("relation_id") if rewrite.has("relation_id") else None
    fact = Fact(
        rewrite.text("subject"),
        rewrite.text("prompt"),
        new.text("str"),
        true.text("str"),
        relation=relation,
    )
    probes = [Probe("rewrite", fact.prompt_text, fact.target, fact.target_true)]
    # Each published paraphrase comes after an unrelated sentence, which is kept: PS measures it
    # too.
    probes += [
        Probe("paraphrase", text, fact.target, fact.target_true)
        for text in fields.texts("paraphrase_prompts")
    ]
    # The true object is what a neighbour shall keep, so it is the wanted one, and one comparison
    # serves ES, PS and NS.
    probes += [
        Probe("neighbourhood", text, str(fact.target_true), fact.target)
        for text in fields.texts("neighborhood_prompts")
    ]
    probes += [
        Probe("attribute", text, fact.target, fact.target_true)
        for text in fields.texts("attribute_prompts", needed=False)
    ]
    written = tuple(fields.texts("generation_prompts", needed=False))
    # By Wikidata's id, since two objects may share a word.
    key = f"{relation}:{new.text('id')}" if relation is not None and new.has("id") else None
    return Record(fields.id("case_id", str(number)), (fact,), tuple(probes), written, key)


def flat_record(fields: Fields, number: int) -> Record:
    """Read a record of the flattened form.

    Its rephrased prompt often was a generation prompt, and it has one neighbour: no PS, no NS.
    """
    prompt, subject = fields.text("prompt"), fields.text("subject")
    # Some files hold a template, others the filled prompt. A subject that occurs twice is
    # ambiguous.
    template = prompt if "{}" in prompt else prompt.replace(subject, "{}")
    if template.count("{}") != 1:
        raise fields.wrong("prompt", f"a text in which the subject {subject!r} occurs exactly once")
    fact = Fact(subject, template, fields.text("target_new"), fields.text("ground_truth"))
    probes = [Probe("rewrite", fact.prompt_text, fact.target, fact.target_true)]
    probes.append(Probe("rephrase", fields.text("rephrase_prompt"), fact.target, fact.target_true))
    if fields.has("locality_prompt"):
        answer = fields.text("locality_ground_truth")
        # A neighbour that has the new object by itself: nothing to compare it with.
        other = None if answer.strip() == fact.target.strip() else fact.target
        probes.append(Probe("locality", fields.text("locality_prompt"), answer, other))
    return Record(fields.id("case_id", str(number)), (fact,), tuple(probes))


def with_statement(dataset: Dataset) -> Dataset:
    """Return CounterFact+: every neighbour also after a sentence that states the edit."""

    def grown(record: Record) -> Record:
        fact = record.facts[0]
        # "The Space Needle is in the city of Paris. " and the neighbour's prompt, as published.
        stated = f"{fact.prompt_text} {fact.target.strip()}. "
        more = [
            replace(probe, kind="neighbourhood+", prompt=stated + probe.prompt)
            for probe in record.probes
            if probe.kind == "neighbourhood"
        ]
        return replace(record, probes=(*record.probes, *more))

    return replace(
        dataset, name=f"{dataset.name}+", records=tuple(grown(record) for record in dataset.records)
    )


def read_references(folder: Path, records: Sequence[Record]) -> References:
    """Read the texts that generated ones are compared with: `attribute_snippets.json`.

    Their TF-IDF weights are those of `idf.npy` and `tfidf_vocab.json`, or fitted without these.

    Raises:
        FactError: a file is missing or not what it should be.
    """
    path = folder / "attribute_snippets.json"
    entries = _json(path)
    if not isinstance(entries, list):
        raise FactError(
            f"{path} is no JSON list; expected objects with relation_id, target_id and samples"
        )
    snippets: dict[str, list[Snippet]] = defaultdict(list)
    for number, entry in enumerate(entries):
        fields = Fields(entry, f"{path}, element {number}")
        key = f"{fields.text('relation_id')}:{fields.text('target_id')}"
        for sample in fields.each("samples"):
            if is_text(sample.record.get("text")):  # some articles are empty
                # Appended: the published file has several entries for one key, and overwriting
                # would lose all but the last.
                snippets[key].append(Snippet(sample.text("name", " "), sample.text("text")))
    used = {record.references for record in records}
    # Half a gigabyte is read; only the records' own texts stay in memory.
    of_records = {key: tuple(value) for key, value in snippets.items() if key in used}
    return References(of_records, _tfidf(folder, snippets))


def _tfidf(folder: Path, snippets: Mapping[str, Sequence[Snippet]]) -> TfIdf:
    idf, vocabulary = folder / "idf.npy", folder / "tfidf_vocab.json"
    if not (idf.is_file() and vocabulary.is_file()):
        # Of all texts, not of the records' own: idf counts documents.
        return TfIdf.fit(snippet.text for value in snippets.values() for snippet in value)
    words = _json(vocabulary)
    try:
        with open_regular(idf) as file:
            # Without pickle: a file from elsewhere must not run code.
            weights = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # the header is parsed as Python: a damaged one may raise anything
        raise FactError(
            f"{idf} is no numpy file: {error}; delete it, and it is fetched again"
        ) from error
    fits = (
        isinstance(words, dict)
        and weights.ndim == 1
        and weights.dtype.kind == "f"
        # ln((1 + documents) / (1 + those with the word)) + 1
        and bool(np.all((weights >= 1) & (weights < 1000)))
        and all(type(column) is int and 0 <= column < len(weights) for column in words.values())
    )
    if not fits:
        raise FactError(
            f"{vocabulary} does not fit {idf}: expected word -> column of {weights.shape} "
            f"{weights.dtype} weights, each a number from 1 on"
        )
    return TfIdf(words, weights.astype(np.float64))


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise FactError(
            f"{path} could not be read: {error}; expected the published JSON file"
        ) from error
