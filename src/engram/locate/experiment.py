"""Tracing many facts: which of them the model knows, what each is asked, and the file that a killed run goes on with.

Knows facts and runs. Refuses to know how one batch is traced (batches) or averaged (averages).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from engram.errors import FactError, SettingError
from engram.facts import Fact
from engram.language_model import LanguageModel
from engram.locate.averages import AverageTrace
from engram.locate.batches import batched, described, trace_batch
from engram.locate.config import TraceConfig, tables, usual_window
from engram.locate.question import Prompt
from engram.locate.trace_store import TraceStore
from engram.merging import fingerprint

log = logging.getLogger(__name__)

Keep = Literal["known", "exact", "all"]
Answer = Literal["model", "object"]
Progress = Callable[[int, int], None]
_FACTS_AT_ONCE = 256  # facts that are tokenised, filtered and ordered by length together


def average_trace(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    out: str | Path | None = None,
    keep: Keep = "known",
    answer: Answer = "model",
    facts_per_batch: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> AverageTrace:
    """Trace many facts and average their effects.

    Facts are recorded several at a time; each number is the one that `engram.trace` gives for the fact alone.

    Args:
        facts: what is traced: `prompt_text` is the prompt, `target` the object.
        out: file of the run, written a batch at a time. Started again with the same settings, a killed run goes on and traces
            nothing twice; so does a longer list of facts where `noise_subjects` is given, since noise is measured on the
            list's subjects otherwise. Default: nothing is kept.
        keep: "known": facts whose object begins with the model's most probable next token; "exact": those whose object is
            that token, as in the released code, where an object of several tokens never counts; "all".
        answer: what is scored: the "model"'s own most probable next token, as published, or the fact's whole "object".
        facts_per_batch: recorded together; default: as many as fit in half a gigabyte, 32 at most.
        progress: called with (facts done, facts in all).
        settings: any of `TraceConfig`. "s3", "m" and "t" noise are measured on these facts' subjects unless
            `noise_subjects` says otherwise. With corruption="subject" each fact is paired with another of the same prompt
            (else of any) whose subject has as many tokens; metric="logit_difference" then is to that other fact's object.
    Returns:
        The average over all facts of the list that are traced in `out`.
    Raises:
        SettingError: settings that make no sense, or others than `out` was begun with.
        EngramError: no fact is left to average.
    """
    for name, value, kind in (("keep", keep, Keep), ("answer", answer, Answer)):
        if value not in get_args(kind):
            raise SettingError(f"{name}={value!r} does not exist; expected {' or '.join(map(repr, get_args(kind)))}")
    config = TraceConfig.of(**settings)
    if config.metric == "logit_difference" and config.corruption != "subject":
        raise SettingError(
            "metric='logit_difference' over many facts takes the paired fact's object for the foil; say corruption='subject'"
        )
    if isinstance(config.noise, Tensor):
        raise SettingError("noise as a tensor fits subjects of one length; over many facts give a rule, such as 's3'")
    if config.noise_subjects is None:
        config = replace(config, noise_subjects=tuple(fact.subject for fact in facts))
    plan = [(key, number, fact) for number, (key, fact) in enumerate(zip(_keys(facts), facts, strict=True))]
    with TraceStore.writing(out, _about(lm, config, keep, answer)) as store:
        finished = store.keys()
        done, todo = 0, [job for job in plan if job[0] not in finished]
        pairs = _pairs(lm, facts, config.seed) if config.corruption == "subject" else {}
        for at in range(0, len(todo), _FACTS_AT_ONCE):
            for rows in _traced(lm, todo[at : at + _FACTS_AT_ONCE], config, keep, answer, pairs, facts_per_batch):
                store.add(rows)
                done += len(rows)
                if progress is not None:
                    progress(len(plan) - len(todo) + done, len(plan))
        skipped = store.skipped()
        for reason, count in Counter(reason for _, reason in skipped).items():
            log.info("%d facts left out: %s", count, reason)
        return AverageTrace(store.traces(), skipped)


_Job = tuple[str, int, Fact]
_Row = tuple[str, int, str, str | None, Any]


def _traced(
    lm: LanguageModel, jobs: Sequence[_Job], config: TraceConfig, keep: Keep, answer: Answer, pairs: dict[int, Fact | None],
    facts_per_batch: int | None,
) -> Iterator[list[_Row]]:  # fmt: skip
    """Rows for the store, those that are skipped first."""
    asked: dict[int, tuple[_Job, Prompt]] = {}
    skipped: list[_Row] = []
    known = dict.fromkeys(range(len(jobs)), True) if keep == "all" else _known(lm, [fact for *_, fact in jobs], keep)
    for i, job in enumerate(jobs):
        key, number, fact = job
        try:
            prompt = _prompt(fact, answer, config, pairs.get(number))
            if not known[i]:
                raise FactError("the model's next token is not the object")
            next(batched(lm, [prompt], config))
            asked[id(prompt)] = job, prompt
        except FactError as error:
            skipped.append((key, number, fact.prompt_text, str(error), None))
    if skipped:
        yield skipped
    for batch in batched(lm, [prompt for _, prompt in asked.values()], config, facts_per_batch):
        rows: list[_Row] = []
        for question, trace in zip(batch, trace_batch(lm, batch, config), strict=True):
            (key, number, fact), _ = asked[id(question.prompt)]
            rows.append((key, number, fact.prompt_text, None, trace))
        yield rows


def _prompt(fact: Fact, answer: Answer, config: TraceConfig, other: Fact | None) -> Prompt:
    target = fact.target if answer == "object" else None
    if config.corruption != "subject":
        return Prompt(fact.prompt_text, fact.subject, target)
    if other is None:
        raise FactError("no other fact's subject has as many tokens")
    foil = other.target if config.metric == "logit_difference" else None
    return Prompt(fact.prompt_text, fact.subject, target, foil, other.subject)


def _known(lm: LanguageModel, facts: Sequence[Fact], keep: Keep) -> dict[int, bool]:
    """Whether the model's most probable next token is the object, by a fact's number."""
    found = {}
    for i, fact in enumerate(facts):
        said, _ = lm.next_tokens(fact.prompt_text, 1)[0]
        if keep == "exact":
            found[i] = said.strip() == fact.target.strip()
        else:
            first = lm.cloze(fact.prompt_text, fact.target).answer[0]
            found[i] = said == lm.token_strings([first])[0]
    return found


def _pairs(lm: LanguageModel, facts: Sequence[Fact], seed: int) -> dict[int, Fact | None]:
    """For each fact, by number, another one whose subject takes the place of its own token by token; of the same prompt where
    there is one, and with another object."""
    lengths = [len(lm.encode(fact.prompt_text).ids) for fact in facts]
    found: dict[int, Fact | None] = {}
    for number, fact in enumerate(facts):
        same = [
            other for other, length in zip(facts, lengths, strict=True)
            if other.prompt == fact.prompt and length == lengths[number] and other.target != fact.target
        ]  # fmt: skip
        choices = same or [
            other for other in facts
            if other.target != fact.target and len(lm.encode(fact.prompt.replace("{}", other.subject)).ids) == lengths[number]
        ]  # fmt: skip
        found[number] = random.Random(f"{seed}:{number}").choice(choices) if choices else None
    return found


def _keys(facts: Sequence[Fact]) -> list[str]:
    """A name for each fact that does not depend on the others, but for how often the same one came before."""
    seen: Counter[str] = Counter()
    keys = []
    for fact in facts:
        digest = hashlib.sha256(json.dumps([fact.prompt, fact.subject, fact.target]).encode()).hexdigest()[:32]
        keys.append(f"{digest}:{seen[digest]}")
        seen[digest] += 1
    return keys


def _about(lm: LanguageModel, config: TraceConfig, keep: Keep, answer: Answer) -> dict[str, Any]:
    """Everything that changes the numbers: the model's weights and dtype, and what is asked of it."""
    weights = {name: fingerprint(tensor) for name, tensor in lm.model.state_dict().items()}
    subjects = json.dumps(list(config.noise_subjects or ()), ensure_ascii=False)
    measured = (isinstance(config.noise, str) and config.noise[:1] in "smt") or config.corruption == "mean"
    return {
        "model": lm.name,
        "weights": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
        "dtype": str(lm.dtype),
        "tables": [table.name for table in tables(lm, config)],
        "window": config.window or usual_window(lm.n_layers),
        "samples": config.samples,
        "positions": config.positions if isinstance(config.positions, str) else list(config.positions),
        "method": config.method,
        "keep": keep,
        "answer": answer,
        "noise_subjects": hashlib.sha256(subjects.encode()).hexdigest() if measured else None,
        **described(config),
    }
