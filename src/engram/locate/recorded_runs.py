"""The clean and the corrupted runs of a batch of prompts, recorded once: where every patch takes
its states from.

`record_runs` runs the model; `Recorded` is what it leaves: states and two scores a prompt.
Refuses to know how patched runs are computed: see sweep and whole_passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.engine.recording import Recording, record_run
from engram.errors import FactError
from engram.locate.rows import PromptRows
from engram.locate.settings import PARTS, EffectTable, Metric
from engram.model.language_model import LanguageModel
from engram.modules.hooks import record, substitute


@dataclass(frozen=True)
class Scorer:
    """What is read at the end of a run.

    Attributes:
        answers: [f, a] ids of each prompt's answer; foils: [f] ids, for "logit_difference".
    """

    metric: Metric
    answers: Tensor
    foils: Tensor | None

    def __call__(self, logits_nav: Tensor, facts_n: Tensor) -> Tensor:
        """Return [n] scores from logits at the read positions of rows that belong to these
        prompts; float32 or better.
        """
        # in half precision, exp and log over a vocabulary lose the digits that effects consist of
        logits = logits_nav if logits_nav.dtype == torch.float64 else logits_nav.float()
        facts_n = facts_n.to(logits.device)
        answers = self.answers.to(logits.device)[facts_n]
        chosen = logits.gather(-1, answers[..., None])[..., 0]
        if self.foils is not None:
            foils = self.foils.to(logits.device)[facts_n]
            return chosen[:, 0] - logits[:, 0].gather(-1, foils[:, None])[:, 0]
        # tokens of an answer multiply: what is scored is the whole answer, not its first piece
        log_p = (chosen - logits.logsumexp(-1)).sum(-1)
        return log_p.exp() if self.metric == "probability" else log_p


@dataclass(frozen=True)
class Recorded:
    """The recorded runs of a batch.

    Attributes:
        rows: which row is which run.
        scorer: what is read at the end of a run.
        clean, corrupted: [f] score of the clean run, and of the corrupted runs (mean over samples).
        seen: module name -> [state rows, t, c] recorded outputs (or inputs, of parts).
        state_rows: the rows that `seen` holds.
        recording: what replay needs; None where whole forward passes are run.
    """

    rows: PromptRows
    scorer: Scorer
    clean: Tensor
    corrupted: Tensor
    seen: dict[str, Tensor]
    state_rows: Tensor
    recording: Recording | None

    @property
    def lm(self) -> LanguageModel:
        return self.rows.lm

    def unpatched(self) -> Tensor:
        """Return [f] scores of the run that is patched, as it is."""
        inserts = self.rows.config.patching.inserts_corrupted
        return self.clean if inserts else self.corrupted

    def states(self, site: str, layer: int, rows_n: Tensor, tokens_n: Tensor) -> Tensor:
        """Return [n, c] states of some state rows, at one token of each."""
        states_ntc, rows = self._find(site, layer, rows_n)
        return states_ntc[rows, tokens_n.to(states_ntc.device)]

    def states_of_rows(self, site: str, layer: int, rows_n: Tensor) -> Tensor:
        """Return [n, t, c] states of some state rows, at every token."""
        states_ntc, rows = self._find(site, layer, rows_n)
        return states_ntc[rows]

    def _find(self, site: str, layer: int, rows_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tensor [rows, t, c] that holds a site's states, and these rows' indices in
        it.
        """
        if site == "residual" and self.recording is not None:
            states = self.recording.hidden[layer + 1]
            return states, rows_n.to(states.device)
        name = module_name(self.lm, site, layer)
        # a module that is traced both ways is recorded twice; its input goes by a name of its own
        of_input = f"{name}:input"
        states = self.seen[of_input if site in PARTS and of_input in self.seen else name]
        # `state_rows` is sorted: a row's index in `seen` is found by bisection
        return states, torch.searchsorted(self.state_rows, rows_n).to(states.device)


def module_name(lm: LanguageModel, site: str, layer: int) -> str:
    """Return the dotted name of the module whose output (of parts: whose input) holds a site."""
    if site == "head":
        return lm.parts.heads_out_name(layer)
    if site == "neuron":
        return lm.parts.mlp_out_name(layer)
    return lm.parts.site_module_name(site, layer)


@torch.no_grad()
def record_runs(rows: PromptRows, tables: Sequence[EffectTable], replay: bool) -> Recorded:
    """Run the model once on all rows and keep the states that the tables' patches need.

    Args:
        replay: keep what `engine.suffix` needs to run blocks again; else whole passes follow.
    Raises:
        FactError: a foil that begins with the answer's own first token.
    """
    state_rows, recording = rows.state_rows(), None
    inputs, outputs = _module_names(rows.lm, tables, replay)

    def keep(tensor: Tensor) -> Tensor:
        """Return [state rows, t, c]; rows and tokens share an axis in some modules' outputs."""
        return tensor.view(*rows.ids_bt.shape, -1)[state_rows.to(tensor.device)]

    hooks = rows.embeddings("recorded")
    if replay:  # prompts may end at different positions, so that logits are taken row by row
        recording = record_run(
            rows.lm, rows.ids_bt, changes=hooks, inputs=inputs, outputs=outputs, keep=keep
        )
        seen, last_btd = recording.seen, recording.hidden[-1]
        at_ba = rows.read.repeat_interleave(rows.per_prompt, 0).to(last_btd.device)
        at_bad = at_ba[..., None].expand(-1, -1, last_btd.shape[-1])
        logits_bav = rows.lm.parts.head(last_btd.gather(1, at_bad))
    else:
        with substitute(hooks), record(rows.lm.model, inputs, outputs, keep=keep) as seen:
            logits_bav = rows.logits(rows.ids_bt, rows.decoder_bt)
    scorer = _scorer(rows, logits_bav)
    facts = torch.arange(len(rows.inputs)).repeat_interleave(rows.per_prompt)
    scores_fr = scorer(logits_bav, facts).view(len(rows.inputs), rows.per_prompt).cpu()
    # a mean of probabilities (or of the metric), as published; that of logits is another number
    corrupted_f = scores_fr[:, 1 : 1 + rows.samples].mean(1)
    return Recorded(rows, scorer, scores_fr[:, 0], corrupted_f, seen, state_rows, recording)


def _module_names(
    lm: LanguageModel, tables: Sequence[EffectTable], replay: bool
) -> tuple[list[str], list[str]]:
    """Return names of the modules whose inputs, and of those whose outputs, are recorded.

    Replay records every block's output anyway, so that residual states need no module here.
    """
    patches = [patch for table in tables for patch in table.patches]
    wanted = dict.fromkeys((p.site, layer) for p in patches for layer in range(p.first, p.end))
    wanted |= dict.fromkeys(
        (p.severed, layer) for p in patches if p.severed for layer in range(lm.n_layers)
    )
    inputs: dict[str, None] = {}
    outputs: dict[str, None] = {}
    for site, layer in wanted:
        if site != "residual" or not replay:
            (inputs if site in PARTS else outputs)[module_name(lm, site, layer)] = None
    return list(inputs), list(outputs)


def _scorer(rows: PromptRows, logits_bav: Tensor) -> Scorer:
    """Return the scorer; a prompt without a target is scored by the model's own next token."""
    # the clean run's own choice, fixed for all runs: an effect is how much of it comes back
    answers = [
        prompt.answer or [int(logits_bav[f * rows.per_prompt, 0].argmax())]
        for f, prompt in enumerate(rows.inputs)
    ]
    for prompt, answer in zip(rows.inputs, answers, strict=True):
        if prompt.foil == answer[0]:
            raise FactError(
                f"foil={prompt.prompt.foil!r} begins with the same token as the answer "
                f"{rows.lm.token_strings(answer[:1])[0]!r}, so their logits do not differ; choose "
                "answers with different first tokens"
            )
    metric = rows.config.metric
    foils = None
    if metric == "logit_difference":
        foils = torch.tensor([prompt.foil for prompt in rows.inputs])
    return Scorer(metric, torch.tensor(answers), foils)
