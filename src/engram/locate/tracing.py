"""Causal traces of many prompts, several at a time: so that small models are not kept waiting by
the number of calls.

Prompts of similar length are recorded together; what is computed together then is up to the engine.
The numbers are those of one prompt at a time. Refuses to know what the traces are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.batching import batches
from engram.engine.replayable import use_replay
from engram.errors import NonFiniteError, SettingError
from engram.locate.attribution import estimate
from engram.locate.corruption import Corruptor
from engram.locate.recorded_runs import Runs
from engram.locate.settings import EffectTable, Patch, TraceConfig, default_window, tables
from engram.locate.sweep import Group, TracedToken, chunks, suffix_length, sweep
from engram.locate.trace import CausalTrace
from engram.locate.trace_input import TraceInput, TracePrompt, prepare
from engram.locate.whole_passes import can_matter, whole
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress

if TYPE_CHECKING:
    pass

_RECORDED_BYTES = 1 << 29  # what one batch's recording may take


def trace_prompts(
    lm: LanguageModel,
    prompts: Sequence[TracePrompt],
    config: TraceConfig,
    *,
    facts_per_batch: int | None = None,
    progress: Progress = no_progress,
) -> Iterator[CausalTrace]:
    """Traces of `prompts`, in batches of similar length, given out in the order in which they are
    done.

    Args:
        facts_per_batch: prompts recorded together; default: as many as fit in half a gigabyte, at
            most 32, on a CPU 8.
        progress: called with (what is done, done, total) of the batch at work.
    Yields:
        One trace a prompt; see `batched` for the order.
    """
    corruptor = Corruptor(lm, config)
    questions = [prepare(lm, prompt, config, corruptor) for prompt in prompts]
    for batch in batched(lm, questions, config, facts_per_batch):
        yield from trace_batch(lm, batch, config, progress)


def batched(
    lm: LanguageModel,
    questions: Sequence[TraceInput],
    config: TraceConfig,
    facts_per_batch: int | None = None,
) -> Iterator[list[TraceInput]]:
    """Questions by their number of answer tokens and their length, so many at a time."""
    together = _together(lm, config)

    def fits(batch: list[TraceInput], question: TraceInput) -> bool:
        limit = facts_per_batch or _affordable_facts(lm, question, config)
        return together and len(batch) < limit and len(question.read) == len(batch[0].read)

    return batches(questions, fits, key=lambda q: (len(q.read), len(q.ids)))


def _together(lm: LanguageModel, config: TraceConfig) -> bool:
    """Whether prompts can share a recording: only replay takes rows of several lengths apart again."""
    return config.frozen_noise is None and use_replay(lm, config.engine)


def _affordable_facts(lm: LanguageModel, question: TraceInput, config: TraceConfig) -> int:
    samples = 1 if question.noise is None else len(question.noise)
    tensors = (
        20 if config.estimates else 5
    ) * lm.n_layers  # states, keys, values and two sites a block; a graph holds more
    row = len(question.ids) * lm.d_model * lm.dtype.itemsize
    most = (
        8 if lm.device.type == "cpu" else 32
    )  # a CPU is kept busy by a few: 32 are no faster there
    return max(1, min(most, _RECORDED_BYTES // (tensors * row * (samples + 1))))


def trace_batch(
    lm: LanguageModel,
    questions: Sequence[TraceInput],
    config: TraceConfig,
    progress: Progress = no_progress,
) -> list[CausalTrace]:
    """Traces of questions that can be recorded together: one, or several for replay with equally
    many answer tokens.
    """
    replay = _together(lm, config)
    if config.frozen_noise is not None and config.engine == "replay":
        raise SettingError(
            "frozen_noise changes layers below the replaced state too, which replay cannot; leave out engine"
        )
    plan = tables(lm, config)
    runs = Runs(lm, questions, config, plan, replay)
    results = _Results(runs, plan)
    if config.estimates:
        results.estimated(estimate(runs, plan))
    if config.method == "exact":
        jobs = results.jobs(config.screen)
        done, total = 0, sum(len(group.strands) * len(group.patches) for group in jobs)
        for group in jobs:
            for part in chunks(runs, group, config.rows_per_batch):
                if replay:
                    found = sweep(runs, part)
                else:
                    found = torch.stack(
                        [whole(runs, strand.token, part.patches) for strand in part.strands], 1
                    )
                results.computed(part, found)
                done += found.numel()
                progress("tracing", done, total)
    return results.traces()


class _Results:
    """The tables of a batch, while they are filled. A flat list of patches runs through all tables
    of a prompt.
    """

    def __init__(self, runs: Runs, plan: Sequence[EffectTable]) -> None:
        self.runs, self.plan = runs, plan
        self.patches = [patch for table in plan for patch in table.patches]
        unpatched = runs.unpatched()
        self.scores = [
            unpatched[f].float().repeat(len(q.rows), len(self.patches))
            for f, q in enumerate(runs.questions)
        ]
        self.exact = [torch.ones_like(table, dtype=torch.bool) for table in self.scores]
        self.screened = False
        self._columns: dict[Patch, list[int]] = {}
        for column, patch in enumerate(self.patches):
            self._columns.setdefault(patch, []).append(column)

    def estimated(self, effects: list[Tensor]) -> None:
        """Take [rows, patches] estimated changes of each prompt; cells that cannot matter stay as
        they are.
        """
        for f, effect in enumerate(effects):
            alive = self._alive(f)
            self.scores[f] = torch.where(alive, self.scores[f] + effect.float(), self.scores[f])
            self.exact[f] = ~alive

    def _alive(self, fact: int) -> Tensor:
        rows = self.runs.questions[fact].rows
        return torch.tensor(
            [
                [can_matter(self.runs, fact, token, patch) for patch in self.patches]
                for token in rows
            ]
        )

    def jobs(self, screen: int | None) -> list[Group]:
        """What is to be computed: strands of one suffix length that share their patches."""
        self.screened = screen is not None
        found: dict[tuple[int, tuple[Patch, ...]], list[TracedToken]] = {}
        for f, question in enumerate(self.runs.questions):
            wanted = self._alive(f)
            if screen is not None:
                change = (
                    (self.scores[f] - self.runs.unpatched()[f].float())
                    .abs()
                    .masked_fill(~wanted, -1)
                )
                chosen = torch.zeros_like(wanted).flatten()
                chosen[change.flatten().topk(min(screen, change.numel())).indices] = True
                wanted &= chosen.view_as(wanted)
            for row, token in enumerate(question.rows):
                patches = tuple(
                    dict.fromkeys(
                        p for p, w in zip(self.patches, wanted[row].tolist(), strict=True) if w
                    )
                )
                if patches:
                    strand = TracedToken(f, token)
                    found.setdefault((suffix_length(self.runs, strand), patches), []).append(strand)
        return [Group(tuple(strands), patches) for (_, patches), strands in found.items()]

    def computed(self, group: Group, scores_ps: Tensor) -> None:
        for s, strand in enumerate(group.strands):
            row = self.runs.questions[strand.fact].rows.index(strand.token)
            for p, patch in enumerate(group.patches):
                self.scores[strand.fact][row, self._columns[patch]] = scores_ps[p, s].float()
                self.exact[strand.fact][row, self._columns[patch]] = True

    def traces(self) -> list[CausalTrace]:
        return [self._trace(f, question) for f, question in enumerate(self.runs.questions)]

    def _trace(self, fact: int, question: TraceInput) -> CausalTrace:
        runs, lm, config = self.runs, self.runs.lm, self.runs.config
        scores, exact, at = {}, {}, 0
        for table in self.plan:
            cut = slice(at, at + len(table.patches))
            scores[table.name] = self.scores[fact][:, cut].unflatten(1, table.shape).contiguous()
            exact[table.name] = self.exact[fact][:, cut].unflatten(1, table.shape).contiguous()
            at += len(table.patches)
        low, high = float(runs.corrupted[fact]), float(runs.clean[fact])
        finite = all(table.isfinite().all() for table in scores.values())
        if not finite or not torch.tensor([low, high]).isfinite().all():
            raise NonFiniteError(
                f"{lm.name} gives probabilities that are not finite on {question.prompt.text!r}; try dtype=torch.float32"
            )
        shown = lm.token_strings(question.ids)
        prompt = question.prompt
        return CausalTrace(
            prompt.text,
            prompt.subject,
            str(lm.tokenizer.decode(runs.answers[fact])),
            [shown[i] for i in question.rows],
            question.rows,
            question.span,
            question.corrupted,
            scores,
            low,
            high,
            config.window or default_window(lm.n_layers),
            runs.samples,
            lm.name,
            question.read[0] if lm.kind != "encoder-decoder" else len(question.ids) - 1,
            described(config, prompt),
            "screened" if self.screened else config.method,
            exact if self.screened else {},
        )


def described(config: TraceConfig, prompt: TracePrompt | None = None) -> dict[str, Any]:
    """The settings that change what the numbers mean, as JSON knows them."""
    about: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "window_align",
            "corruption",
            "replace",
            "seed",
            "extra_tokens",
            "occurrence",
            "direction",
            "effect",
            "metric",
            "correction",
            "screen",
        )
    }
    about["noise"] = "given" if isinstance(config.noise, Tensor) else config.noise
    about["severed"], about["neurons"] = (
        list(config.severed),
        [list(pair) for pair in config.neurons],
    )
    if prompt is not None:
        about |= {"foil": prompt.foil, "other_subject": prompt.other_subject}
    return about


def trace(
    lm: LanguageModel,
    prompt: str,
    *,
    subject: str,
    target: str | None = None,
    foil: str | None = None,
    other_subject: str | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> CausalTrace:
    """Find which states carry a fact: corrupt the subject, restore one state at a time, watch the
    answer.

    Args:
        prompt: text up to the object, e.g. "The Space Needle is located in the city of".
        subject: words of the prompt whose embeddings are corrupted.
        target: the scored text; default: the model's own most probable next token. Several tokens
            are scored as a whole.
        foil: the other answer of metric="logit_difference".
        other_subject: what stands in the subject's place in the corrupted run of
            corruption="subject".
        progress: called with (what is done, done, total).
        settings: any of `TraceConfig`: sites, window, samples, noise, corruption, direction,
            effect, metric, positions, severed, method, screen, ...
    Raises:
        FactError: subject not in the prompt or lost by the tokenizer, empty target, noise of a
            wrong shape.
        SettingError: a setting or a combination that makes no sense; the message says why.
        NonFiniteError: the model's probabilities are not finite.
    Source: Meng et al. 2022, Sec. 2.2 and Appendix B; noise as in the released code.
    """
    from engram.locate.trace_input import TracePrompt

    asked = TracePrompt(prompt, subject, target, foil, other_subject)
    (found,) = trace_prompts(lm, [asked], TraceConfig.of(**settings), progress=progress)
    return found
