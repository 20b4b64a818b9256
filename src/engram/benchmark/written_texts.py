"""What a record's model writes: the greedy answer to each probe, and sampled texts with their
scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engram.benchmark.data.records import Record, References
from engram.benchmark.metrics.generation import consistency, fluency
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.benchmark.probe_rows import ProbeRef, ProbeRows
from engram.model.generation import Writing, normalised_text, seed_of, write
from engram.model.language_model import LanguageModel
from engram.modules.hooks import RowContext, no_edits


def greedy(
    lm: LanguageModel, questions: ProbeRows, config: MeasureConfig, around: RowContext = no_edits
) -> dict[ProbeRef, str]:
    """The greedy continuation of every probe's prompt, up to an end of text; of a prompt that
    several probes have, once.

    Args:
        around: given numbers of records, one a row, lays their edits on the model.
    """
    if not config.answer_tokens:
        return {}
    wanted: dict[tuple[int, str], int] = {}
    for n, record in enumerate(questions.records):
        for p in answered_probes(record):
            probe = record.probes[p]
            new = max(config.answer_tokens, questions.answer_tokens(n, p) + 2)
            wanted[n, probe.prompt] = max(new, wanted.get((n, probe.prompt), 0))
    owners = [n for n, _ in wanted]
    prompts = [tuple(lm.cloze(prompt).ids) for _, prompt in wanted]
    writings = [
        Writing(ids, max(1, min(new, lm.max_tokens - len(ids))))
        for ids, new in zip(prompts, wanted.values(), strict=True)
    ]
    written = write(lm, writings, lambda rows: around([owners[row] for row in rows]))
    texts = dict(
        zip(wanted, (normalised_text(lm, _ended(lm, ids)) for ids in written), strict=True)
    )
    return {
        (n, p): texts[n, record.probes[p].prompt]
        for n, record in enumerate(questions.records)
        for p in answered_probes(record)
    }


def _ended(lm: LanguageModel, ids: list[int]) -> list[int]:
    end = lm.tokenizer.eos_token_id
    return ids[: ids.index(end)] if end in ids else ids


def answered_probes(record: Record) -> list[int]:
    """Probes whose greedy answer is looked at: all but attribute prompts, which no score is made
    of.
    """
    return [p for p, probe in enumerate(record.probes) if probe.kind != "attribute"]


def sampled(
    lm: LanguageModel,
    records: Sequence[Record],
    config: MeasureConfig,
    around: RowContext = no_edits,
) -> list[tuple[str, ...]]:
    """Each record's texts, prompts included; none where they are not asked for."""
    if not config.texts:
        return [() for _ in records]
    owners = [n for n, record in enumerate(records) for _ in record.generation]
    prompts = [tuple(lm.cloze(prompt).ids) for record in records for prompt in record.generation]
    seeds = [
        seed_of(config.seed, record.id, i)
        for record in records
        for i in range(len(record.generation))
    ]
    length = min(config.text_tokens, lm.max_tokens)
    writings = [
        Writing(ids, max(1, length - len(ids)), seed)
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    written = write(lm, writings, lambda rows: around([owners[row] for row in rows]))
    texts: list[list[str]] = [[] for _ in records]
    for n, ids, new in zip(owners, prompts, written, strict=True):
        texts[n].append(normalised_text(lm, [*ids, *new]))
    return [tuple(each) for each in texts]


def with_texts(
    outcome: Outcome, record: Record, texts: Sequence[str], references: References | None
) -> Outcome:
    """The outcome with these texts and what they score."""
    if not texts:
        return outcome
    compared = None
    if references is not None and record.references is not None:
        told = [snippet.text for snippet in references.snippets[record.references]]
        compared = consistency(texts, told, references.tfidf)
    return replace(outcome, texts=tuple(texts), fluency=fluency(texts), consistency=compared)
