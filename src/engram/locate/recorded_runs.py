"""The clean and the corrupted runs of a batch of prompts, recorded once: where every patch takes
its states from.

Knows rows: each prompt has a clean one, then one per noise sample (then one per sample of
    `frozen_noise`). Refuses to know
how patched runs are computed: see sweep and whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from engram.engine.recording import Recording, record_run
from engram.errors import FactError
from engram.locate.settings import PARTS, EffectTable, TraceConfig
from engram.locate.trace_input import TraceInput
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import record, substitute

Change = Callable[[Tensor], Tensor]


class Runs:
    """The recorded runs of `questions`, and what each of them scores.

    Attributes:
        samples: patched runs of each prompt, averaged over.
        answers: [f, a] ids of each prompt's answer.
        clean, corrupted: [f] metric of the clean run, and of the corrupted runs (mean over
            samples).
        recording: what replay needs; None where whole forward passes are run.
    """

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[TraceInput],
        config: TraceConfig,
        tables: Sequence[EffectTable],
        replay: bool,
    ) -> None:
        self.lm, self.questions, self.config = lm, list(questions), config
        noise = questions[0].noise
        self.samples = 1 if noise is None else len(noise)
        self.frozen_samples = self.samples if config.frozen_noise is not None else 0
        self.per_fact = 1 + self.samples + self.frozen_samples
        self.ids_bt = pad_right(
            [ids for q in questions for ids in self._rows_of(q.ids, q.other_ids)]
        )
        self.read = torch.tensor([q.read for q in questions])
        self.decoder_bt = None
        if questions[0].decoder_ids is not None:
            self.decoder_bt = pad_right(
                [
                    ids
                    for q in questions
                    for ids in self._rows_of(q.decoder_ids, q.other_decoder_ids)
                ]
            )
        patches = [patch for table in tables for patch in table.patches]
        wanted = dict.fromkeys((p.site, layer) for p in patches for layer in range(p.first, p.end))
        wanted |= dict.fromkeys(
            (p.severed, layer) for p in patches if p.severed for layer in range(lm.n_layers)
        )
        self._wanted = [(site, layer) for site, layer in wanted if site != "residual" or not replay]
        self._severs = bool(config.severed)
        self.seen: dict[str, Tensor] = {}
        self.recording: Recording | None = None
        self._kept = self._rows_to_keep()
        with torch.no_grad():
            logits = self._record_for_replay() if replay else self._record_whole()
            self.answers = torch.tensor(
                [
                    q.answer or [int(logits[f * self.per_fact, 0].argmax())]
                    for f, q in enumerate(self.questions)
                ]
            )
            self._check_foils()
            scores = self.metric(
                logits, torch.arange(len(self.questions)).repeat_interleave(self.per_fact)
            )
        scores = scores.view(len(self.questions), self.per_fact).cpu()
        self.clean, self.corrupted = scores[:, 0], scores[:, 1 : 1 + self.samples].mean(1)

    def _check_foils(self) -> None:
        """Refuse a foil that begins with the answer's own first token, which the model may have
        chosen.
        """
        for question, answer in zip(self.questions, self.answers[:, 0].tolist(), strict=True):
            if question.foil == answer:
                raise FactError(
                    f"foil={question.prompt.foil!r} begins with the same token as the answer "
                    f"{self.lm.token_strings([answer])[0]!r}, so their logits do not differ; choose answers with different first "
                    "tokens"
                )

    # -- rows --------------------------------------------------------------------------------------

    def rows(self, facts: Sequence[int], kind: str) -> Tensor:
        """[len(facts) * samples] recorded rows: the run that is patched ("base"), where states come
        from ("source"), or
        where severed modules are frozen to ("frozen")."""
        first = torch.tensor(list(facts))[:, None] * self.per_fact
        sample = torch.arange(self.samples)[None]
        clean = first.expand(-1, self.samples)
        corrupted = first + 1 + sample
        if kind == "frozen" and self.frozen_samples:
            return (corrupted + self.samples).flatten()
        wants_corrupted = (
            self.config.inserts_corrupted if kind == "source" else not self.config.inserts_corrupted
        )
        return (corrupted if wants_corrupted else clean).flatten().contiguous()

    def baseline(self) -> Tensor:
        """[f] the metric that effects are differences to."""
        return self.clean if self.config.direction == "noise" else self.corrupted

    def unpatched(self) -> Tensor:
        """[f] the metric of the run that is patched, as it is."""
        return self.clean if self.config.inserts_corrupted else self.corrupted

    def _rows_to_keep(self) -> Tensor:
        """Rows whose module outputs are kept: states are taken from them."""
        facts = range(len(self.questions))
        kinds = ("source", "frozen") if self._severs else ("source",)
        return torch.cat([self.rows(facts, kind) for kind in kinds]).unique()

    def _rows_of(self, ids: list[int] | None, other: list[int] | None) -> list[list[int]]:
        """The token ids of one prompt's recorded rows."""
        assert ids is not None
        return [ids] + [ids if other is None else other] * (self.per_fact - 1)

    # -- names -------------------------------------------------------------------------------------

    def name(self, site: str, layer: int) -> str:
        """Dotted name of the module whose output (or, for parts, whose input) holds a site."""
        parts = self.lm.parts
        if site == "head":
            return parts.heads_out_name(layer)
        return (
            parts.mlp_out_name(layer) if site == "neuron" else parts.site_module_name(site, layer)
        )

    def module(self, site: str, layer: int) -> nn.Module:
        return self.lm.model.get_submodule(self.name(site, layer))

    # -- recording ---------------------------------------------------------------------------------

    def embeddings(self, rows: Literal["recorded", "base"]) -> dict[nn.Module, Change]:
        """Hooks that corrupt the embeddings of the recorded rows, or of rows that are all the run
        that is patched: sets of
        samples, prompt after prompt."""
        if rows == "base" and self.config.inserts_corrupted:
            return {}
        corrupt = self._corrupt_recorded if rows == "recorded" else self._corrupt_base
        found: dict[nn.Module, Change] = {self.lm.parts.embed: partial(corrupt, False)}
        if any(q.decoder_corrupted for q in self.questions):
            found[cast("Any", self.lm.model).get_decoder().get_input_embeddings()] = partial(
                corrupt, True
            )
        return found

    def _corrupt_recorded(self, decoder: bool, embedded_btd: Tensor) -> Tensor:
        out = embedded_btd.detach().clone()
        for f, question in enumerate(self.questions):
            row = f * self.per_fact + 1
            self._corrupt(out[row : row + self.samples], question, decoder)
            if self.frozen_samples:
                frozen = out[row + self.samples : row + 2 * self.samples]
                self._corrupt(frozen, question, decoder, self.config.frozen_noise)
        return out

    def _corrupt_base(self, decoder: bool, embedded_btd: Tensor) -> Tensor:
        out = embedded_btd.detach().clone()
        for rows, question in zip(out.chunk(len(self.questions)), self.questions, strict=True):
            self._corrupt(rows, question, decoder)
        return out

    def _corrupt(
        self, rows_btd: Tensor, question: TraceInput, decoder: bool, noise: Tensor | None = None
    ) -> None:
        """Corrupt whole sets of samples of one prompt in place."""
        if noise is None:
            noise = question.decoder_noise if decoder else question.noise
        if noise is None:
            return
        at = torch.tensor(
            question.decoder_corrupted if decoder else question.corrupted, device=rows_btd.device
        )
        noise = noise.to(rows_btd.device).repeat(len(rows_btd) // len(noise), 1, 1)
        rows_btd[:, at] = (noise if self.config.replaces else rows_btd[:, at].double() + noise).to(
            rows_btd.dtype
        )

    def _keep(self, tensor: Tensor) -> Tensor:
        """[kept rows, t, c] of a module's output; rows and tokens may share an axis there."""
        return tensor.view(*self.ids_bt.shape, -1)[self._kept.to(tensor.device)]

    def _names(self, parts: bool) -> list[str]:
        """Modules whose inputs (parts) or outputs are recorded."""
        return list(
            dict.fromkeys(
                self.name(site, layer) for site, layer in self._wanted if (site in PARTS) == parts
            )
        )

    def _record_for_replay(self) -> Tensor:
        self.recording = record_run(
            self.lm,
            self.ids_bt,
            changes=self.embeddings("recorded"),
            inputs=self._names(parts=True),
            outputs=self._names(parts=False),
            keep=self._keep,
        )
        self.seen = self.recording.seen
        last_btd = self.recording.hidden[-1]
        at = self.read.repeat_interleave(self.per_fact, 0).to(last_btd.device)
        return self.lm.parts.head(
            last_btd.gather(1, at[..., None].expand(-1, -1, last_btd.shape[-1]))
        )

    def _record_whole(self) -> Tensor:
        inputs, outputs = self._names(parts=True), self._names(parts=False)
        with (
            substitute(self.embeddings("recorded")),
            record(self.lm.model, inputs, outputs, keep=self._keep) as seen,
        ):
            logits = self.logits(self.ids_bt, self.decoder_bt)
        self.seen = seen
        return logits

    def logits(self, ids_bt: Tensor, decoder_bt: Tensor | None) -> Tensor:
        """[b, a, v] by a whole forward pass, at the first prompt's read positions (all prompts have
        the same there).
        """
        decoder = None if decoder_bt is None else decoder_bt.to(self.lm.device)
        return self.lm.cloze_logits(ids_bt.to(self.lm.device), self.read[0].tolist(), decoder)

    # -- states and scores -------------------------------------------------------------------------

    def states(self, site: str, layer: int, rows_n: Tensor, tokens_n: Tensor) -> Tensor:
        """[n, c] recorded states at one token of each of some rows that are kept."""
        held, rows = self._held(site, layer, rows_n)
        return held[rows, tokens_n.to(held.device)]

    def states_of_rows(self, site: str, layer: int, rows_n: Tensor) -> Tensor:
        """[n, t, c] recorded states of some rows that are kept, at every token."""
        held, rows = self._held(site, layer, rows_n)
        return held[rows]

    def _held(self, site: str, layer: int, rows_n: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor [rows, t, c] in which a site's states are kept, and where in it these rows
        are.
        """
        if site == "residual" and self.recording is not None:
            held = self.recording.hidden[layer + 1]
            return held, rows_n.to(held.device)
        name = self.name(site, layer)
        held = (
            self.seen[f"{name}:input"]
            if site in PARTS and f"{name}:input" in self.seen
            else self.seen[name]
        )
        return held, torch.searchsorted(self._kept, rows_n).to(held.device)

    def metric(self, logits_nav: Tensor, facts_n: Tensor) -> Tensor:
        """[n] what is measured, from logits at the read positions of rows that belong to these
        prompts; float32 or better.
        """
        logits = logits_nav if logits_nav.dtype == torch.float64 else logits_nav.float()
        answers = self.answers.to(logits.device)[facts_n.to(logits.device)]
        chosen = logits.gather(-1, answers[..., None])[..., 0]
        if self.config.metric == "logit_difference":
            foils = torch.tensor([q.foil for q in self.questions], device=logits.device)[
                facts_n.to(logits.device)
            ]
            return chosen[:, 0] - logits[:, 0].gather(-1, foils[:, None])[:, 0]
        log_p = (chosen - logits.logsumexp(-1)).sum(-1)
        return log_p.exp() if self.config.metric == "probability" else log_p


_Job = tuple[list[int], int, tuple[int, int] | None, Tensor]


class RowChanges:
    """What is put where during one forward of rows that come in `states` equal groups, and the
    hooks that do it.
    """

    def __init__(self, runs: Runs, states: int) -> None:
        self.runs, self.states = runs, states
        self._jobs: dict[tuple[str, str], list[_Job]] = {}

    def put(
        self,
        site: str,
        layer: int,
        states: list[int],
        token: int,
        value_rc: Tensor,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Let `value_rc` [rows of a state, c] stand at position `token` of some states' rows, or
        `part` of its channels.
        """
        way = "inputs" if site in PARTS else "outputs"
        self._jobs.setdefault((way, self.runs.name(site, layer)), []).append(
            (states, token, part, value_rc)
        )

    def hooks(self) -> dict[str, dict[nn.Module, Change]]:
        """The arguments of `hooks.substitute`."""
        found: dict[str, dict[nn.Module, Change]] = {"outputs": {}, "inputs": {}}
        for (way, name), jobs in self._jobs.items():
            found[way][self.runs.lm.model.get_submodule(name)] = partial(self._change, jobs)
        return found

    def _change(self, jobs: list[_Job], tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        rows = len(jobs[0][3])
        view = changed.view(
            self.states, rows, -1, changed.shape[-1]
        )  # rows and tokens may share an axis
        for states, token, part, value in jobs:
            cut = slice(None) if part is None else slice(*part)
            view[states, :, token, cut] = value[:, cut].to(changed.device)
        return changed
