"""Tracing many facts: which of them the model knows, which answer of each is scored, and the file
from which a killed run resumes.

Knows facts and runs. Refuses to know how one batch is traced (tracing) or averaged (average).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from engram.checks import Count, checked_call
from engram.errors import EngramError, FactError, SettingError
from engram.facts import Fact
from engram.files.cache_folder import sha256_of
from engram.locate.average import AverageTrace
from engram.locate.corruption import Corruptor
from engram.locate.settings import TraceConfig, default_window, tables
from engram.locate.trace import CausalTrace
from engram.locate.trace_input import TraceInput, TracePrompt, prepare
from engram.locate.trace_store import StoredRow, TraceStore
from engram.locate.trace_tables import described
from engram.locate.tracing import batched, trace_batch, traced_tokens
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.modules.fingerprints import fingerprints
from engram.progress import Progress, Work, announce, no_progress
from engram.runs.identity import tokenizer_text
from engram.runs.workers import Here, ModelJob, Workers, model_for

log = logging.getLogger(__name__)

Keep = Literal["known", "exact", "all"]
ScoredAnswer = Literal["model", "object"]
_FACTS_AT_ONCE = 256  # facts that are tokenised, filtered and ordered by length together


@checked_call
def average_trace(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    out: str | Path | None = None,
    keep: Keep = "known",
    answer: ScoredAnswer = "model",
    facts_per_batch: Count | None = None,
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
            killed run resumes and traces nothing twice; so does a longer list of facts, where
            nothing is measured on the whole list: neither the noise (give a number, or
            `noise_subjects`) nor the pairs of corruption="subject". Default: nothing is kept.
        keep: "known": facts whose object begins with the model's most probable next token; "exact":
            those whose object is that token, as in the released code, where an object of several
            tokens never counts; "all".
        answer: what is scored: the "model"'s own most probable next token, as published, or the
            fact's whole "object".
        facts_per_batch: recorded together; default: as many as fit in half a gigabyte, at most 32,
            on a CPU 8.
        workers: where batches are traced, such as `runs.workers.RayWorkers`; default: in this
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

    Example:
        >>> facts = engram.read_facts("pocket")[:4]
        >>> average = engram.average_trace(lm, facts, samples=2, sites="mlp")
        >>> len(average.traces) + len(average.skipped)
        4
    """
    if not facts:
        raise FactError("no facts were given; expected at least one Fact(subject, prompt, target)")
    # a mistake in the settings is reported before there is a file
    run = _Run(lm, _config(facts, settings), keep, answer, facts)
    keys = _keys(facts)
    listed = [ListedFact(*row) for row in zip(keys, range(len(facts)), facts, strict=True)]
    with TraceStore.writing(out, _about(run, keys)) as store:
        finished = store.keys()
        done = len(finished.intersection(keys))
        tally = _Tally.begun(run, [f for f in listed if f.key not in finished], out, progress)
        # blocks of the whole list, also when resumed: the same batches give the same bytes
        for at in range(0, len(listed), _FACTS_AT_ONCE):
            todo = [f for f in listed[at : at + _FACTS_AT_ONCE] if f.key not in finished]
            for rows in _traced(run, todo, facts_per_batch, workers, tally):
                store.add(rows)
                done += len(rows)
                progress("facts", done, len(listed))
        skipped = store.skipped(keys)
        for reason, count in Counter(reason for _, reason in skipped).items():
            log.info("%d facts left out: %s", count, reason)
        return AverageTrace(store.traces(keys), skipped)


def _config(facts: Sequence[Fact], settings: Mapping[str, Any]) -> TraceConfig:
    """Return the config of a list of facts, whose subjects set the noise unless others are given.

    Raises:
        SettingError: a setting that fits one prompt only.
    """
    config = TraceConfig.of(**settings)
    if config.metric == "logit_difference" and config.subject.corruption != "subject":
        raise SettingError(
            "metric='logit_difference' over many facts takes the paired fact's object for the "
            "foil; say corruption='subject'"
        )
    if isinstance(config.subject.noise, Tensor):
        raise SettingError(
            "noise as a tensor fits subjects of one length; over many facts give a rule, such as "
            "'s3'"
        )
    if config.patching.frozen_noise is not None:
        raise SettingError(
            "frozen_noise is a tensor, which fits subjects of one length; over many facts leave it "
            "out"
        )
    if not isinstance(config.patching.positions, str):
        raise SettingError(
            "numeric positions mean different words in each prompt; for many facts use 'all', "
            "'subject_last' or 'last'"
        )
    if config.subject.noise_subjects is not None:
        return config
    subjects = tuple(fact.subject for fact in facts)
    return replace(config, subject=replace(config.subject, noise_subjects=subjects))


class ListedFact(NamedTuple):
    """A fact of the list, with its name in the file (see `_keys`) and its number in the list."""

    key: str
    number: int
    fact: Fact


class _Run:
    """The parts of a run that all its facts share, prepared once."""

    def __init__(
        self,
        lm: LanguageModel,
        config: TraceConfig,
        keep: Keep,
        answer: ScoredAnswer,
        facts: Sequence[Fact],
    ) -> None:
        self.lm, self.config, self.keep, self.answer = lm, config, keep, answer
        self.facts = facts
        self.corruptor = Corruptor(lm, config.subject)

    def prepare(self, number: int, fact: Fact) -> TraceInput:
        """Return the prompt of a fact in tokens, with its answer, foil and partner.

        Raises:
            FactError: the fact does not count; the message says why.
        """
        target = fact.target if self.answer == "object" else None
        differs = self.config.metric == "logit_difference"
        top_id = None
        if self.keep != "all" or (differs and target is None):
            top_id = self._top_id(fact)
            if not self._counts(fact, top_id):
                raise FactError("the model's next token is not the object")
        if self.config.subject.corruption != "subject":
            return prepare(self.lm, self._prompt(fact, target), self.config, self.corruptor)
        for other in self._others(number, fact):
            prompt = self._prompt(fact, target, other.target if differs else None, other.subject)
            try:
                result = prepare(self.lm, prompt, self.config, self.corruptor)
            except FactError:  # the subjects differ in length
                continue
            answer_id = result.answer[0] if result.answer else top_id
            if result.foil is None or result.foil != answer_id:
                return result
        raise FactError("no other fact has another object and a subject of as many tokens")

    def _prompt(
        self, fact: Fact, target: str | None, foil: str | None = None, other: str | None = None
    ) -> TracePrompt:
        return TracePrompt(fact.prompt_text, fact.subject, target, foil, other, fact.subject_start)

    def _others(self, number: int, fact: Fact) -> Iterator[Fact]:
        """Yield facts with another object that may be this one's partner, in random order, those of
        the same prompt first.
        """
        others = [
            other
            for other in self.facts
            if other.target != fact.target and other.subject != fact.subject
        ]
        # by the fact's number, not by one stream for the run: a resumed run pairs the same facts
        random.Random(f"{self.config.subject.seed}:{number}").shuffle(others)
        yield from sorted(others, key=lambda other: other.prompt != fact.prompt)

    def _top_id(self, fact: Fact) -> int:
        """Return the id of the model's most probable next token."""
        cloze = self.lm.cloze(fact.prompt_text)
        decoder = None if cloze.decoder_ids is None else [cloze.decoder_ids]
        (logits,) = self.lm.logits_at([cloze.ids], [cloze.read], decoder)
        return int(logits[0].argmax())

    def _counts(self, fact: Fact, top_id: int) -> bool:
        if self.keep == "exact":
            # " Sea" is not "Seattle": the released code counts objects of one token only
            return self.lm.token_strings([top_id])[0].strip() == fact.target.strip()
        return (
            self.keep == "all" or top_id == self.lm.cloze(fact.prompt_text, fact.target).answer[0]
        )


@dataclass(frozen=True)
class TracesJob(ModelJob):
    """The work of a worker: trace one batch, see `engram.runs.workers.Job`."""

    config: TraceConfig

    def do(self, state: LanguageModel, unit: Sequence[TraceInput]) -> list[CausalTrace]:
        return trace_batch(state, unit, self.config)


class _Tally:
    """Counts what a run does, for the time left: facts are checked one by one, which is quick, and
    those that count are traced, which is not. How many count is known as checks go on.
    """

    def __init__(self, run: _Run, facts: Sequence[ListedFact], work: Work, pace: float) -> None:
        self.run, self.facts, self.work, self.pace = run, len(facts), work, pace
        self.checked = self.counted = 0
        self.tokens = 0.0  # that the traces run of the facts that count
        some = [*map(self._tokens_guessed, facts[:: max(1, len(facts) // 8)])] or [0.0]
        guess = sum(some) / len(some)
        work.expect("checks", len(facts), 0.0 if run.keep == "all" else 20 * pace)
        work.expect("traces", guess * len(facts), pace)

    @classmethod
    def begun(
        cls, run: _Run, facts: Sequence[ListedFact], out: str | Path | None, progress: Progress
    ) -> _Tally:
        """Return the tally of the facts that are left, announced."""
        kept = f"kept in {out}; a stopped run is resumed" if out else "without a file of the run"
        work = Work("facts", f"tracing {len(facts):,} facts", kept)
        tally = cls(run, facts, work, seconds_per_token(run.lm, progress))
        announce(progress, work)
        return tally

    def check(self, prompt: TraceInput | None) -> None:
        """Count a fact that was checked; None: it does not count."""
        self.checked += 1
        self.work.did("checks")
        if prompt is not None:
            self.counted += 1
            self.tokens += traced_tokens(self.run.lm, prompt, self.run.config)
        if self.counted:  # the facts to come count as often, and are as long
            self.work.expect("traces", self.tokens * self.facts / self.checked, self.pace)

    def trace(self, prompts: Sequence[TraceInput]) -> None:
        """Count prompts that were traced."""
        tokens = (traced_tokens(self.run.lm, prompt, self.run.config) for prompt in prompts)
        self.work.did("traces", sum(tokens))

    def _tokens_guessed(self, listed: ListedFact) -> float:
        prompt = TracePrompt(listed.fact.prompt_text, listed.fact.subject)
        try:
            ready = prepare(self.run.lm, prompt, self.run.config, self.run.corruptor)
        except EngramError:  # it is left out, or needs a partner
            return 0.0
        return traced_tokens(self.run.lm, ready, self.run.config)


def _traced(
    run: _Run,
    listed: Sequence[ListedFact],
    facts_per_batch: int | None,
    workers: Workers | None,
    tally: _Tally,
) -> Iterator[list[StoredRow]]:
    """Yield rows for the store, those that are skipped first."""
    owners: dict[int, ListedFact] = {}  # by id() of the input: two facts may have equal prompts
    inputs: list[TraceInput] = []
    skipped: list[StoredRow] = []
    for fact in listed:
        try:
            inputs.append(run.prepare(fact.number, fact.fact))
            owners[id(inputs[-1])] = fact
            tally.check(inputs[-1])
        except FactError as error:
            tally.check(None)
            skipped.append(_row(fact, skipped=str(error)))
    if skipped:  # stored too, so that a resumed run does not ask the model about them again
        yield skipped
    units = list(batched(run.lm, inputs, run.config, facts_per_batch))
    job = TracesJob(model_for(workers, run.lm), run.config)
    for number, traces in (workers or Here()).run(job, units):
        tally.trace(units[number])
        pairs = zip(units[number], traces, strict=True)
        yield [_row(owners[id(prompt)], trace=trace) for prompt, trace in pairs]


def _row(
    listed: ListedFact, *, skipped: str | None = None, trace: CausalTrace | None = None
) -> StoredRow:
    return StoredRow(listed.key, listed.number, listed.fact.prompt_text, skipped, trace)


def _keys(facts: Sequence[Fact]) -> list[str]:
    """Return a name for each fact. It depends on the other facts only in how often the same one
    came before.
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
    """Return everything that changes the numbers: the model's weights, dtype and tokenizer, and
    the settings.
    """
    lm, config, subject = run.lm, run.config, run.config.subject
    weights = fingerprints(lm.model)
    subjects = json.dumps(list(subject.noise_subjects or ()), ensure_ascii=False)
    measured = subject.corruption == "mean" or (
        subject.corruption == "noise"
        and isinstance(subject.noise, str)
        and subject.noise[:1] in "smt"
    )
    return {
        "model": lm.name,
        "weights": sha256_of(json.dumps(weights, sort_keys=True)),
        "dtype": str(lm.dtype),
        "tables": [table.name for table in tables(lm, config)],
        "window": config.patching.window or default_window(lm.n_layers),
        "samples": subject.samples,
        "positions": config.patching.positions,
        "cloze": [lm.cloze_template, lm.cloze_decoder],
        # without truncation and padding, which other calls leave set: see `tokenizer_text`
        "tokenizer": sha256_of(tokenizer_text(lm)),
        "method": config.estimation.method,
        "keep": run.keep,
        "answer": run.answer,
        "noise_subjects": sha256_of(subjects) if measured else None,
        "pairs": sha256_of(json.dumps(keys)) if subject.corruption == "subject" else None,
        **described(config),
    }
