"""Causal traces of one prompt, or of many, several at a time.

Prompts of similar length are recorded together, because small models spend more time on each call
than on its arithmetic; what is computed together afterwards is up to the engine. The numbers are
those of one prompt at a time. Refuses to know what the traces are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from engram.batching import batches
from engram.checks import checked_call
from engram.engine.precision import matmul_in
from engram.engine.replayable import use_replay
from engram.errors import SettingError
from engram.locate.attribution import estimate
from engram.locate.corruption import Corruptor
from engram.locate.recorded_runs import Recorded, record_runs
from engram.locate.rows import PromptRows
from engram.locate.settings import TraceConfig, tables
from engram.locate.sweep import Group, chunks, suffix_length, sweep
from engram.locate.trace import CausalTrace
from engram.locate.trace_input import TraceInput, TracePrompt, prepare
from engram.locate.trace_tables import TraceTables
from engram.locate.whole_passes import whole
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.progress import Progress, Work, announce, no_progress

_RECORDED_BYTES = 1 << 29  # what one batch's recording may take


def trace_prompts(
    lm: LanguageModel,
    prompts: Sequence[TracePrompt],
    config: TraceConfig,
    *,
    facts_per_batch: int | None = None,
    progress: Progress = no_progress,
) -> Iterator[CausalTrace]:
    """Yield a trace of each prompt, in the order of `batched`.

    Args:
        facts_per_batch: prompts recorded together; default: as many as fit in half a gigabyte, at
            most 32, on a CPU 8.
        progress: called with (what is done, done, total) of the batch at work.
    """
    corruptor = Corruptor(lm, config.subject)
    inputs = [prepare(lm, prompt, config, corruptor) for prompt in prompts]
    for batch in batched(lm, inputs, config, facts_per_batch):
        yield from trace_batch(lm, batch, config, progress)


def batched(
    lm: LanguageModel,
    inputs: Sequence[TraceInput],
    config: TraceConfig,
    facts_per_batch: int | None = None,
) -> Iterator[list[TraceInput]]:
    """Yield batches of prompts with equally many answer tokens and similar lengths."""
    together = _together(lm, config)

    def fits(batch: list[TraceInput], prompt: TraceInput) -> bool:
        limit = facts_per_batch or _affordable_facts(lm, prompt, config)
        return together and len(batch) < limit and len(prompt.read) == len(batch[0].read)

    return batches(inputs, fits, key=lambda prompt: (len(prompt.read), len(prompt.ids)))


def _together(lm: LanguageModel, config: TraceConfig) -> bool:
    """Return whether prompts can share a recording: only replay keeps rows of several lengths
    apart.
    """
    # a whole pass reads all rows at one position, which is right for prompts of one length only
    return config.patching.frozen_noise is None and use_replay(lm, config.engine)


def _affordable_facts(lm: LanguageModel, prompt: TraceInput, config: TraceConfig) -> int:
    samples = 1 if prompt.noise is None else len(prompt.noise)
    # states, keys, values and two sites a block; a graph for gradients holds more
    tensors = (20 if config.estimation.needed else 5) * lm.n_layers
    row = len(prompt.ids) * lm.d_model * lm.dtype.itemsize
    limit = 8 if lm.device.type == "cpu" else 32  # 8 keep a CPU busy: 32 are no faster there
    return max(1, min(limit, _RECORDED_BYTES // (tensors * row * (samples + 1))))


def traced_tokens(lm: LanguageModel, prompt: TraceInput, config: TraceConfig) -> float:
    """Return about how many tokens the trace of a prompt runs through the model, which its time
    depends on.

    For example, of 8 traced tokens of 12 layers, 3 sites and 10 samples: each of 36 patches runs
    the suffixes of 8, 7, ... 1 tokens in 10 samples through half of the blocks on average, which
    is 36 x 36 x 10 / 2 tokens. Recording the samples adds 8 x 11.
    """
    samples = 1 if prompt.noise is None else len(prompt.noise)
    recorded = len(prompt.ids) * (samples + 1)
    if config.estimation.method == "attribution":
        return 4.0 * recorded  # a forward and a backward pass
    patches = sum(len(table.patches) for table in tables(lm, config))
    if not _together(lm, config):
        return float(recorded + len(prompt.rows) * patches * samples * len(prompt.ids))
    suffixes = sum(prompt.read[-1] + 1 - token for token in prompt.rows)
    return recorded + suffixes * patches * samples / 2


def trace_batch(
    lm: LanguageModel,
    inputs: Sequence[TraceInput],
    config: TraceConfig,
    progress: Progress = no_progress,
) -> list[CausalTrace]:
    """Return traces of prompts that can be recorded together: one, or several for replay with
    equally many answer tokens.
    """
    replay = _together(lm, config)
    if config.patching.frozen_noise is not None and config.engine == "replay":
        raise SettingError(
            "frozen_noise changes layers below the replaced state too, which replay cannot; leave "
            "out engine"
        )
    plan = tables(lm, config)
    work = Work("tracing", f"tracing {len(inputs)} prompt" + "s" * (len(inputs) > 1))
    tokens = sum(traced_tokens(lm, prompt, config) for prompt in inputs)
    work.expect("tokens", tokens, seconds_per_token(lm, progress))
    announce(progress, work)
    with matmul_in(config.matmul):
        runs = record_runs(PromptRows.of(lm, inputs, config), plan, replay)
        filled = TraceTables(runs, plan)
        if config.estimation.needed:
            filled.add_estimates(estimate(runs, plan))
        work.did("recording")
        if config.estimation.method == "exact":
            groups = filled.groups(config.estimation.screen)
            done, total = 0, sum(len(group.tokens) * len(group.patches) for group in groups)
            # a token's suffix is what its rows run: those of the first tokens take longest
            cells = sum(_cells(runs, group) for group in groups)
            for group in groups:
                for part in chunks(runs, group, config.rows_per_batch):
                    if replay:
                        scores_pt = sweep(runs, part)
                    else:
                        columns = [
                            whole(runs, traced.token, part.patches) for traced in part.tokens
                        ]
                        scores_pt = torch.stack(columns, 1)
                    filled.add_exact(part, scores_pt)
                    done += scores_pt.numel()
                    work.did("tokens", tokens * _cells(runs, part) / cells)
                    progress("tracing", done, total)
    work.finish("tokens")
    return filled.traces()


def _cells(runs: Recorded, group: Group) -> int:
    """Return the number of cells of the tables, each times the tokens that it runs."""
    if runs.recording is None:  # whole passes run the whole prompt
        return len(group.tokens) * len(group.patches)
    return sum(suffix_length(runs, token) for token in group.tokens) * len(group.patches)


@checked_call
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
    """Find which states carry a fact: corrupt the subject, restore one state at a time, and measure
    how much of the answer comes back.

    Args:
        prompt: text up to the object, e.g. "The Space Needle is located in the city of".
        subject: words of the prompt whose embeddings are corrupted.
        target: the scored text; default: the model's own most probable next token. Several tokens
            are scored as a whole.
        foil: the other answer of metric="logit_difference".
        other_subject: takes the subject's place in the corrupted run of corruption="subject".
        progress: called with (what is done, done, total).
        settings: any of `TraceConfig`: sites, window, samples, noise, corruption, direction,
            effect, metric, positions, severed, method, screen, ...
    Raises:
        FactError: subject not in the prompt or lost by the tokenizer, empty target, noise of a
            wrong shape.
        SettingError: a setting or a combination that makes no sense; the message says why.
        NonFiniteError: the model's probabilities are not finite.
    Source: Meng et al. 2022, Sec. 2.2 and Appendix B; noise as in the released code.

    Example:
        >>> trace = engram.trace(lm, fact.prompt_text, subject=fact.subject, samples=2)
        >>> trace.scores["residual"].shape == (len(trace.tokens), lm.n_layers)
        True
        >>> trace.low_score < trace.high_score
        True
    """
    traced = TracePrompt(prompt, subject, target, foil, other_subject)
    (result,) = trace_prompts(lm, [traced], TraceConfig.of(**settings), progress=progress)
    return result
