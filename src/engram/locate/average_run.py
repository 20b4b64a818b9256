"""Tracing many facts: which of them the model knows, what each is asked, and the file that a killed
run goes on with.

Knows facts and runs. Refuses to know how one batch is traced (batches) or averaged (averages).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from engram.checks import one_of
from engram.errors import FactError, SettingError
from engram.facts import Fact
from engram.files.cache_folder import sha256_of
from engram.locate.average import AverageTrace
from engram.locate.corruption import Corruptor
from engram.locate.settings import TraceConfig, default_window, tables
from engram.locate.trace import CausalTrace
from engram.locate.trace_input import TraceInput, TracePrompt, prepare
from engram.locate.trace_store import TraceStore
from engram.locate.tracing import batched, described, trace_batch
from engram.model.language_model import LanguageModel
from engram.modules.fingerprints import fingerprints
from engram.progress import Progress, no_progress
from engram.runs.identity import tokenizer_text
from engram.runs.workers import ByName, Here, ModelJob, Workers

log = logging.getLogger(__name__)

Keep = Literal["known", "exact", "all"]
Answer = Literal["model", "object"]
_FACTS_AT_ONCE = 256  # facts that are tokenised, filtered and ordered by length together


def average_trace(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    out: str | Path | None = None,
    keep: Keep = "known",
    answer: Answer = "model",
    facts_per_batch: int | None = None,
    workers: Workers | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> AverageTrace:
    """Trace many facts and average their effects.

    Facts are recorded several at a time; each number is the one that `engram.trace` gives for the
    fact alone.

    Args:
        facts: what is traced: `prompt_text` is the prompt, `target` the object.
        out: file of the run, written a batch at a time. Started again with the same settings, a
            killed run goes on and traces nothing twice; so does a longer list of facts, where
            nothing is measured on the whole list: not the noise (give a number, or
                `noise_subjects`) nor the pairs of corruption="subject". Default: nothing is kept.
        keep: "known": facts whose object begins with the model's most probable next token; "exact":
            those whose object is that token, as in the released code, where an object of several
            tokens never counts; "all".
        answer: what is scored: the "model"'s own most probable next token, as published, or the
            fact's whole "object".
        facts_per_batch: recorded together; default: as many as fit in half a gigabyte, at most 32,
            on a CPU 8.
        workers: where batches are traced, such as `distribute.RayWorkers`; default: in this
            process. The batches are the same.
        progress: called with (what is done, done, total).
        settings: any of `TraceConfig`. "s3", "m" and "t" noise are measured on these facts'
            subjects unless `noise_subjects` says otherwise. With corruption="subject" each fact is
            paired with another of the same prompt (else of any) whose subject has as many tokens;
            metric="logit_difference" then is to that other fact's object.
    Returns:
        The average over all facts of the list that are traced in `out`.
    Raises:
        SettingError: settings that make no sense, or others than `out` was begun with.
        EngramError: no fact is left to average.
    """
    for name, value, kind in (("keep", keep, Keep), ("answer", answer, Answer)):
        one_of(name, value, get_args(kind))
    if facts_per_batch is not None and facts_per_batch < 1:
        raise SettingError(
            f"facts_per_batch={facts_per_batch}: at least one fact is recorded at a time"
        )
    config = TraceConfig.of(**settings)
    if config.metric == "logit_difference" and config.corruption != "subject":
        raise SettingError(
            "metric='logit_difference' over many facts takes the paired fact's object for the foil; say corruption='subject'"
        )
    if isinstance(config.noise, Tensor):
        raise SettingError(
            "noise as a tensor fits subjects of one length; over many facts give a rule, such as 's3'"
        )
    if config.frozen_noise is not None:
        raise SettingError(
            "frozen_noise is a tensor, which fits subjects of one length; over many facts leave it out"
        )
    if not isinstance(config.positions, str):
        raise SettingError(
            "positions by number are other words in every prompt; over many facts say 'all', 'subject_last' or 'last'"
        )
    if config.noise_subjects is None:
        config = replace(config, noise_subjects=tuple(fact.subject for fact in facts))
    keys = _keys(facts)
    plan = list(zip(keys, range(len(facts)), facts, strict=True))
    run = _Run(
        lm, config, keep, answer, facts
    )  # a mistake in the settings is told before there is a file
    with TraceStore.writing(out, _about(run, keys)) as store:
        finished = store.keys()
        done = len(finished.intersection(keys))
        for at in range(
            0, len(plan), _FACTS_AT_ONCE
        ):  # in a resumed run as in the first: the same batches, the same bytes
            todo = [job for job in plan[at : at + _FACTS_AT_ONCE] if job[0] not in finished]
            for rows in _traced(run, todo, facts_per_batch, workers):
                store.add(rows)
                done += len(rows)
                progress("facts", done, len(plan))
        skipped = store.skipped(keys)
        for reason, count in Counter(reason for _, reason in skipped).items():
            log.info("%d facts left out: %s", count, reason)
        return AverageTrace(store.traces(keys), skipped)


_Job = tuple[str, int, Fact]
_Row = tuple[str, int, str, str | None, CausalTrace | None]


class _Run:
    """What all facts of a run share, prepared once."""

    def __init__(
        self,
        lm: LanguageModel,
        config: TraceConfig,
        keep: Keep,
        answer: Answer,
        facts: Sequence[Fact],
    ) -> None:
        self.lm, self.config, self.keep, self.answer = lm, config, keep, answer
        self.facts = facts
        self.corruptor = Corruptor(lm, config)

    def prepare(self, number: int, fact: Fact) -> TraceInput:
        """What the model is asked about a fact.

        Raises:
            FactError: the fact does not count; the message says why.
        """
        target = fact.target if self.answer == "object" else None
        differs = self.config.metric == "logit_difference"
        said = self._said(fact) if self.keep != "all" or (differs and target is None) else None
        if said is not None and not self._counts(fact, said):
            raise FactError("the model's next token is not the object")
        if self.config.corruption != "subject":
            return prepare(self.lm, self._prompt(fact, target), self.config, self.corruptor)
        for other in self._others(number, fact):
            prompt = self._prompt(fact, target, other.target if differs else None, other.subject)
            try:
                question = prepare(self.lm, prompt, self.config, self.corruptor)
            except FactError:  # the subjects are not of one length
                continue
            if question.foil is None or question.foil != (
                question.answer[0] if question.answer else said
            ):
                return question
        raise FactError("no other fact has another object and a subject of as many tokens")

    def _prompt(
        self, fact: Fact, target: str | None, foil: str | None = None, other: str | None = None
    ) -> TracePrompt:
        return TracePrompt(fact.prompt_text, fact.subject, target, foil, other, fact.subject_start)

    def _others(self, number: int, fact: Fact) -> Iterator[Fact]:
        """Facts with another object that may be this one's partner, in random order, those of the
        same prompt first.
        """
        others = [
            other
            for other in self.facts
            if other.target != fact.target and other.subject != fact.subject
        ]
        random.Random(f"{self.config.seed}:{number}").shuffle(others)
        yield from sorted(others, key=lambda other: other.prompt != fact.prompt)

    def _said(self, fact: Fact) -> int:
        """Id of the model's most probable next token."""
        cloze = self.lm.cloze(fact.prompt_text)
        decoder = None if cloze.decoder_ids is None else [cloze.decoder_ids]
        (logits,) = self.lm.logits_at([cloze.ids], [cloze.read], decoder)
        return int(logits[0].argmax())

    def _counts(self, fact: Fact, said: int) -> bool:
        if self.keep == "exact":
            return self.lm.token_strings([said])[0].strip() == fact.target.strip()
        return self.keep == "all" or said == self.lm.cloze(fact.prompt_text, fact.target).answer[0]


@dataclass(frozen=True)
class TracesJob(ModelJob):
    """What workers do: trace a batch of questions, see `distribute.Job`."""

    config: TraceConfig

    def do(self, state: LanguageModel, unit: Sequence[TraceInput]) -> list[CausalTrace]:
        return trace_batch(state, unit, self.config)


def _traced(
    run: _Run, jobs: Sequence[_Job], facts_per_batch: int | None, workers: Workers | None
) -> Iterator[list[_Row]]:
    """Rows for the store, those that are skipped first."""
    asked: dict[int, _Job] = {}
    questions: list[TraceInput] = []
    skipped: list[_Row] = []
    for job in jobs:
        key, number, fact = job
        try:
            questions.append(run.prepare(number, fact))
            asked[id(questions[-1])] = job
        except FactError as error:
            skipped.append((key, number, fact.prompt_text, str(error), None))
    if skipped:
        yield skipped
    batches = list(batched(run.lm, questions, run.config, facts_per_batch))
    task = TracesJob(run.lm if workers is None else ByName.of(run.lm), run.config)
    for number, traces in (workers or Here()).run(task, batches):
        jobs_of_batch = [asked[id(question)] for question in batches[number]]
        yield [
            (key, n, fact.prompt_text, None, t)
            for (key, n, fact), t in zip(jobs_of_batch, traces, strict=True)
        ]


def _keys(facts: Sequence[Fact]) -> list[str]:
    """A name for each fact that does not depend on the others, but for how often the same one came
    before.
    """
    seen: Counter[str] = Counter()
    keys = []
    for fact in facts:
        digest = hashlib.sha256(
            json.dumps([fact.prompt, fact.subject, fact.target]).encode()
        ).hexdigest()[:32]
        keys.append(f"{digest}:{seen[digest]}")
        seen[digest] += 1
    return keys


def _about(run: _Run, keys: Sequence[str]) -> dict[str, Any]:
    """Everything that changes the numbers: the model's weights and dtype, and what is asked of it."""
    lm, config = run.lm, run.config
    weights = fingerprints(lm.model)
    subjects = json.dumps(list(config.noise_subjects or ()), ensure_ascii=False)
    draws = (
        config.corruption == "noise" and isinstance(config.noise, str) and config.noise[:1] in "smt"
    )
    return {
        "model": lm.name,
        "weights": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
        "dtype": str(lm.dtype),
        "tables": [table.name for table in tables(lm, config)],
        "window": config.window or default_window(lm.n_layers),
        "samples": config.samples,
        "positions": config.positions,
        "cloze": [lm.cloze_template, lm.cloze_decoder],
        "tokenizer": sha256_of(tokenizer_text(lm)),
        "method": config.method,
        "keep": run.keep,
        "answer": run.answer,
        "noise_subjects": hashlib.sha256(subjects.encode()).hexdigest()
        if draws or config.corruption == "mean"
        else None,
        "pairs": hashlib.sha256(json.dumps(keys).encode()).hexdigest()
        if config.corruption == "subject"
        else None,
        **described(config),
    }
