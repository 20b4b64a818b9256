"""The rows of a batch of prompts: which row is which run, what each reads, how each is corrupted.

Knows tokens, noise and row numbers. Refuses to know states and scores: see recorded_runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from engram.locate.settings import TraceConfig
from engram.locate.trace_input import TraceInput
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right

Change = Callable[[Tensor], Tensor]
RowKind = Literal["base", "source", "frozen"]


@dataclass(frozen=True)
class PromptRows:
    """A batch of prompts as rows: of each prompt the clean run, then one corrupted run for each
    noise sample (then one for each sample of `frozen_noise`).

    Two prompts with two samples, stars for noise:

        row  prompt  run                 reads
        0    0       clean               The Space Needle is in
        1    0       corrupted, sample 0 The Space* Needle* is in
        2    0       corrupted, sample 1 The Space* Needle* is in
        3    1       clean               Rome is in
        4    1       corrupted, sample 0 Rome* is in
        5    1       corrupted, sample 1 Rome* is in

    With direction="denoise", prompt 1 patches rows [4, 5] ("base") with states of rows [3, 3]
    ("source").

    Attributes:
        samples: patched runs of each prompt, averaged over; frozen_samples: those of
            `frozen_noise`, or 0.
        ids_bt, decoder_bt: what the rows read, padded on the right.
        read: [f, a] positions whose next-token distributions are scored.
    """

    lm: LanguageModel
    inputs: Sequence[TraceInput]
    config: TraceConfig
    samples: int
    frozen_samples: int
    ids_bt: Tensor
    decoder_bt: Tensor | None
    read: Tensor

    @classmethod
    def of(cls, lm: LanguageModel, inputs: Sequence[TraceInput], config: TraceConfig) -> PromptRows:
        """Lay out the rows of prompts that have equally many corrupted runs and answer tokens."""
        noise = inputs[0].noise
        samples = 1 if noise is None else len(noise)
        frozen_samples = samples if config.patching.frozen_noise is not None else 0
        corrupted = samples + frozen_samples
        ids, decoder = [], []
        # the clean run is one row for all samples; in the released code it is a row of each pass
        for prompt in inputs:
            other = prompt.ids if prompt.other_ids is None else prompt.other_ids
            ids += [prompt.ids, *[other] * corrupted]
            if prompt.decoder_ids is not None:
                other = prompt.other_decoder_ids or prompt.decoder_ids
                decoder += [prompt.decoder_ids, *[other] * corrupted]
        return cls(
            lm,
            list(inputs),
            config,
            samples,
            frozen_samples,
            # on the right, where causal states do not see it. The released code pads on the left
            # and passes no positions, which moves every token of a model with absolute ones
            pad_right(ids),
            pad_right(decoder) if decoder else None,
            torch.tensor([prompt.read for prompt in inputs]),
        )

    @property
    def per_prompt(self) -> int:
        return 1 + self.samples + self.frozen_samples

    def of_kind(self, facts: Sequence[int], kind: RowKind) -> Tensor:
        """Return [len(facts) * samples] row numbers: of the run that is patched ("base"), of the
        run that states come from ("source"), or of the run that severed modules are frozen to.
        """
        first = torch.tensor(list(facts))[:, None] * self.per_prompt
        sample = torch.arange(self.samples)[None]
        clean = first.expand(-1, self.samples)
        corrupted = first + 1 + sample
        if kind == "frozen" and self.frozen_samples:
            return (corrupted + self.samples).flatten()
        inserts = self.config.patching.inserts_corrupted
        # frozen outputs are those of the run that is patched, like "base"
        wants_corrupted = inserts if kind == "source" else not inserts
        return (corrupted if wants_corrupted else clean).flatten().contiguous()

    def state_rows(self) -> Tensor:
        """Return the rows whose module outputs are kept, since states are taken from them."""
        facts = range(len(self.inputs))
        kinds: list[RowKind] = ["source", "frozen"] if self.config.patching.severed else ["source"]
        return torch.cat([self.of_kind(facts, kind) for kind in kinds]).unique()

    def logits(self, ids_bt: Tensor, decoder_bt: Tensor | None) -> Tensor:
        """Return [b, a, v] by a whole forward pass, at the first prompt's read positions (all
        prompts have the same here).
        """
        decoder = None if decoder_bt is None else decoder_bt.to(self.lm.device)
        return self.lm.cloze_logits(ids_bt.to(self.lm.device), self.read[0].tolist(), decoder)

    # -- corruption --------------------------------------------------------------------------------

    def embeddings(self, which: Literal["recorded", "base"]) -> dict[nn.Module, Change]:
        """Return hooks that corrupt embeddings: those of the recorded rows, or of rows that are all
        the run that is patched, in sets of samples, prompt after prompt.
        """
        if which == "base" and self.config.patching.inserts_corrupted:
            return {}  # the clean run is patched
        corrupt = self._corrupt_recorded if which == "recorded" else self._corrupt_base
        # at the token embedding, before positions are added, as in the released code
        hooks: dict[nn.Module, Change] = {self.lm.parts.embed: partial(corrupt, False)}
        if any(prompt.decoder_corrupted for prompt in self.inputs):
            decoder = cast("Any", self.lm.model).get_decoder().get_input_embeddings()
            hooks[decoder] = partial(corrupt, True)
        return hooks

    def _corrupt_recorded(self, decoder: bool, embedded_btd: Tensor) -> Tensor:
        out = embedded_btd.detach().clone()
        for f, prompt in enumerate(self.inputs):
            row = f * self.per_prompt + 1
            self._corrupt(out[row : row + self.samples], prompt, decoder)
            if self.frozen_samples:
                frozen = out[row + self.samples : row + 2 * self.samples]
                self._corrupt(frozen, prompt, decoder, self.config.patching.frozen_noise)
        return out

    def _corrupt_base(self, decoder: bool, embedded_btd: Tensor) -> Tensor:
        out = embedded_btd.detach().clone()
        for rows, prompt in zip(out.chunk(len(self.inputs)), self.inputs, strict=True):
            self._corrupt(rows, prompt, decoder)
        return out

    def _corrupt(
        self, rows_btd: Tensor, prompt: TraceInput, decoder: bool, noise: Tensor | None = None
    ) -> None:
        """Corrupt whole sets of samples of one prompt in place."""
        if noise is None:
            noise = prompt.decoder_noise if decoder else prompt.noise
        if noise is None:
            return
        at = torch.tensor(
            prompt.decoder_corrupted if decoder else prompt.corrupted, device=rows_btd.device
        )
        noise = noise.to(rows_btd.device).repeat(len(rows_btd) // len(noise), 1, 1)
        # the sum is taken in float64 and rounded once, as if the model's embeddings were exact
        changed = noise if self.config.subject.replaces else rows_btd[:, at].double() + noise
        rows_btd[:, at] = changed.to(rows_btd.dtype)
