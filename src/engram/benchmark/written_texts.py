"""What a model writes about a record: the greedy answer to each probe, and sampled texts with their
scores.

Knows prompts and texts. Refuses to know which edit is in force: `around` applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engram.benchmark.data.records import Record, References
from engram.benchmark.metrics.generation import consistency, fluency
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.evaluate.probe_rows import AnswerScores, ProbeRef
from engram.model.generation import Writing, normalised_text, seed_of, write
from engram.model.language_model import LanguageModel
from engram.modules.hooks import RowContext, no_edits


def greedy(
    lm: LanguageModel,
    records: Sequence[Record],
    scores: AnswerScores,
    config: MeasureConfig,
    around: RowContext = no_edits,
) -> dict[ProbeRef, str]:
    """Return the greedy continuation of every probe's prompt, up to an end of text.

    A prompt that several probes of a record have is continued once, by the most tokens that one of
    them needs.

    Args:
        scores: of the records' probes; says how many tokens an answer has.
        around: given the number of each row's record, applies that record's edit.
    """
    if not config.answer_tokens:
        return {}
    lengths: dict[tuple[int, str], int] = {}
    for n, record in enumerate(records):
        for p in answered_probes(record):
            key = n, record.probes[p].prompt
            # Longer than the answer, so that what follows it shows: " Paris" cut after its token
            # may be the beginning of " Parisian".
            length = max(config.answer_tokens, scores.of.wanted_tokens((n, p)) + 2)
            lengths[key] = max(length, lengths.get(key, 0))
    owners = [n for n, _ in lengths]
    prompts = [tuple(lm.cloze(prompt).ids) for _, prompt in lengths]
    writings = [
        # A prompt that fills the context still gets one token: the probe has an answer, not none.
        Writing(ids, max(1, min(length, lm.max_tokens - len(ids))))
        for ids, length in zip(prompts, lengths.values(), strict=True)
    ]
    written = write(lm, writings, lambda rows: around([owners[row] for row in rows]))
    texts = [normalised_text(lm, _up_to_end(lm, ids)) for ids in written]
    answers = dict(zip(lengths, texts, strict=True))
    return {
        (n, p): answers[n, record.probes[p].prompt]
        for n, record in enumerate(records)
        for p in answered_probes(record)
    }


def _up_to_end(lm: LanguageModel, ids: list[int]) -> list[int]:
    end = lm.tokenizer.eos_token_id
    # What comes after the end belongs to another text; `write` writes a fixed number of tokens.
    return ids[: ids.index(end)] if end in ids else ids


def answered_probes(record: Record) -> list[int]:
    """Return the numbers of probes with a greedy answer: all but attribute prompts, which no score
    uses.
    """
    return [p for p, probe in enumerate(record.probes) if probe.kind != "attribute"]


def sampled(
    lm: LanguageModel,
    records: Sequence[Record],
    config: MeasureConfig,
    around: RowContext = no_edits,
) -> list[tuple[str, ...]]:
    """Return each record's sampled texts, prompts included; none without `config.texts`."""
    if not config.texts:
        return [() for _ in records]
    owners, writings = [], []
    # The prompt counts, as released: a prompt of 12 tokens is continued by 88.
    length = min(config.text_tokens, lm.max_tokens)
    for n, record in enumerate(records):
        for i, prompt in enumerate(record.generation):
            ids = tuple(lm.cloze(prompt).ids)
            # A generator for each text. The released code draws from the global one, unseeded, so
            # its texts before and after an edit also differ by luck, and by the records before
            # them.
            seed = seed_of(config.seed, record.id, i)
            writings.append(Writing(ids, max(1, length - len(ids)), seed))
            owners.append(n)
    written = write(lm, writings, lambda rows: around([owners[row] for row in rows]))
    texts: list[list[str]] = [[] for _ in records]
    for n, writing, new in zip(owners, writings, written, strict=True):
        # Whole, prompt included, as released: the prompts' own words are part of GE and RS.
        texts[n].append(normalised_text(lm, [*writing.ids, *new]))
    return [tuple(of_record) for of_record in texts]


def with_texts(
    outcome: Outcome, record: Record, texts: Sequence[str], references: References | None
) -> Outcome:
    """Return the outcome with these texts and their scores."""
    if not texts:
        return outcome
    similarity = None
    if references is not None and record.references is not None:
        of_object = [snippet.text for snippet in references.snippets[record.references]]
        similarity = consistency(texts, of_object, references.tfidf)
    return replace(outcome, texts=tuple(texts), fluency=fluency(texts), consistency=similarity)
