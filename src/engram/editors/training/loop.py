"""The training loop that fine-tuning and LoRA share: batches over all facts, epoch after epoch,
until every target is the most probable answer, inside a model that is otherwise frozen.

    epoch   batch of rows 2, 0     batch of row 1
    0       loss 5.1: a step       loss 6.3: a step
    1       all top-1: no step     loss 1.9: a step
    2       all top-1: no step     all top-1: no step       an epoch without a step ends training

Knows losses, Adam and when to stop. Refuses to know which parameters are trained and how they
become an edit. Sources: breadth first in mini-batches, Yang et al. 2025, arXiv:2509.22072; locality
rows, Gangadhar & Stratos 2024, arXiv:2402.11078.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from engram.checks import Count, Natural, NonNegative, Positive, check_fields
from engram.editors.contexts import contexts_of
from engram.editors.training.target_rows import TargetBatch, TargetRow, batches_of
from engram.engine.recording import record_run
from engram.engine.replayable import Engine, use_replay
from engram.engine.suffix import Suffix
from engram.errors import FactError, NonFiniteError
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress

Forward = Callable[[], Tensor]  # logits [p, v] of a batch, with the parameters as they are


@dataclass(frozen=True)
class TuningConfig:
    """Settings of the training loop.

    Args:
        epochs: largest number of passes over all rows.
        rows_per_batch: rows of a step.
        learning_rate: of Adam (betas 0.9, 0.999).
        weight_decay: this times the weights is added to their gradient.
        stop: "argmax": skip batches whose targets are all top-1; stop after an epoch without a
            step, so that every target is the most probable answer at the end. "loss": skip batches
            with a loss below `stop_loss` (nats); stop after an epoch whose mean is below it, as
            published. "never": run all epochs.
        contexts: templates with one `{}` in which the prompt is trained; "sampled": the bare one
            and 20 that the model samples.
        train_paraphrases: number of paraphrases of each fact that are trained too; a receipt's
            numbers about them then no longer measure generalisation.
        locality_loss: what unrelated rows add to the loss: "kl", KL(before || now) at their
            answers' positions, or "ce", cross-entropy.
        locality_weight: factor of that.
    """

    epochs: Count = 25
    rows_per_batch: Count = 64
    learning_rate: Positive = 5e-4
    weight_decay: NonNegative = 0.0
    stop: Literal["argmax", "loss", "never"] = "argmax"
    stop_loss: NonNegative = 0.01
    contexts: tuple[str, ...] | Literal["sampled"] = ("{}",)
    train_paraphrases: Natural = 0
    locality_loss: Literal["kl", "ce"] = "kl"
    locality_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def settled(self, lm: LanguageModel, seed: int) -> TuningConfig:
        """Return the same settings with the contexts written out.

        Raises:
            FactError: a context without a place for the prompt.
        """
        contexts = contexts_of(lm, self.contexts, seed=seed)
        if not contexts or any(context.count("{}") != 1 for context in contexts):
            raise FactError(
                f"contexts={list(contexts)[:3]}: expected templates with exactly one '{{}}' each"
            )
        return replace(self, contexts=contexts)


def forward_from(
    lm: LanguageModel, batch: TargetBatch, layer: int, engine: Engine = "auto"
) -> Forward:
    """Return a function that computes the batch's logits while only blocks from `layer` on change.

    The states that enter that block are computed here, once, so nothing may have changed yet. Of 12
    blocks with `layer` 9, a step then runs three blocks forward and backward.
    """
    if not use_replay(lm, engine):
        return lambda: batch.logits(lm)
    recording = record_run(lm, batch.ids_bt)
    entering = recording.hidden[layer]
    # A recording holds the states and the keys and values of every block. Here no token is replayed
    # from them (the suffix begins at token 0), so all but what enters the block is freed.
    recording.hidden = [entering]
    recording.calls = [_light(entering, *call) for call in recording.calls]
    recording.keys, recording.values = (
        [block[:, :, :0].clone() for block in blocks]
        for blocks in (recording.keys, recording.values)
    )
    # the suffix is the whole row: training changes what every token passes through
    suffix = Suffix(recording, 0, batch.ids_bt.shape[1])

    def forward() -> Tensor:
        hidden_btd = entering
        for above in range(layer, lm.n_layers):
            hidden_btd = suffix.block(above, hidden_btd)
        # logits only where targets are read: at every token they would take t times the memory
        return lm.parts.head(hidden_btd[batch.rows_p, batch.positions_p])

    return forward


def _light(
    entering: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a block's call without the states and the cache of that call."""

    # a cache that was filled by the recording would be read again as earlier tokens
    def empty(value: Any) -> Any:
        return DynamicCache() if isinstance(value, Cache) else value

    if args:
        args = (entering, *map(empty, args[1:]))
    return args, {
        name: entering if name == "hidden_states" else empty(value)
        for name, value in kwargs.items()
    }


@dataclass(frozen=True)
class Task:
    """Batches, and the functions that compute their logits."""

    batches: list[TargetBatch]
    forwards: list[Forward]


@dataclass(frozen=True)
class Descent:
    """How training went: mean loss of each epoch (nats), number of steps, and whether it stopped by
    its own rule.
    """

    losses: list[float]
    steps: int
    stopped: bool

    def diagnostics(self) -> dict[str, Any]:
        """Return the fields for an edit's diagnostics."""
        return {"losses": self.losses, "steps": self.steps, "stopped": self.stopped}


@dataclass(frozen=True)
class TrainingLoop:
    """Training of parameters that a frozen model depends on from one block on.

    Args:
        lm: the model, in a `frozen` block.
        layer: first block that the parameters change.
        config: settings, with contexts written out.
        generator: deals rows into batches, and shuffles these each epoch; None: in order.
        engine: "replay", "whole" forward passes, or by itself.
        progress: called with (what is done, done, total).
    """

    lm: LanguageModel
    layer: int
    config: TuningConfig
    generator: torch.Generator | None = None
    engine: Engine = "auto"
    progress: Progress = no_progress

    def task(self, rows: Sequence[TargetRow]) -> Task:
        """Deal rows into batches, and compute what is below the layer once, before any change."""
        batches = list(batches_of(rows, self.config.rows_per_batch, self.generator))
        forwards = []
        for i, batch in enumerate(batches):
            self.progress("below the layer", i, len(batches))
            forwards.append(forward_from(self.lm, batch, self.layer, self.engine))
        return Task(batches, forwards)

    def descend(
        self,
        parameters: Sequence[Tensor],
        targets: Task,
        locality: Task,
        *,
        decayed: Callable[[Tensor], Tensor] = lambda parameter: parameter,
        after_step: Callable[[], None] = lambda: None,
    ) -> Descent:
        """Run Adam on `parameters`, in place.

        The loss of a batch is the mean over its rows of the mean -log p of their target tokens.

        Args:
            parameters: leaves that the forwards depend on, at values that leave the model as it is.
            targets: what is trained.
            locality: unrelated rows whose loss is added, one batch a step in turn.
            decayed: returns what weight decay pulls to zero, of a parameter.
            after_step: called when the parameters may have moved.
        Raises:
            NonFiniteError: a loss that is not finite.
        """
        config = self.config
        # weight decay is not given to Adam, see `_step`
        adam = torch.optim.Adam(parameters, lr=config.learning_rate)
        # log p of the locality rows' answers while the model is still as it was
        with torch.no_grad():
            use_kl = config.locality_loss == "kl"
            before = [f().log_softmax(-1) for f in locality.forwards] if use_kl else []
        # batches differ in size, so an epoch's mean is over rows and not over batches
        rows = sum(len(batch.sizes_b) for batch in targets.batches)
        losses: list[float] = []
        steps = 0
        for epoch in range(config.epochs):
            self.progress("training", epoch, config.epochs)
            total, steps_before = 0.0, steps
            for i in self._order(len(targets.batches)):
                batch, logits_pv = targets.batches[i], targets.forwards[i]()
                loss = batch.mean_by_row(batch.token_nll(logits_pv)).mean()
                if not torch.isfinite(loss):
                    raise NonFiniteError(
                        f"the loss is {loss.item()} in epoch {epoch}; nothing was changed. Try a "
                        f"smaller learning_rate than {config.learning_rate}, or dtype=torch.float32"
                    )
                # the loss of the epoch counts skipped batches, and never the locality rows
                total += loss.item() * len(batch.sizes_b)
                if self._is_done(batch, logits_pv, loss):
                    continue
                if locality.batches:
                    # one batch in turn: all of them at every step would multiply its cost
                    turn = steps % len(locality.batches)
                    loss = loss + config.locality_weight * _locality_loss(locality, turn, before)
                self._step(adam, parameters, loss, decayed)
                with torch.no_grad():  # it may write into leaves that require gradients
                    after_step()
                steps += 1
            losses.append(total / rows)
            if config.stop == "loss":
                stopped = losses[-1] < config.stop_loss
            else:
                stopped = config.stop == "argmax" and steps == steps_before
            if stopped:
                break
        self.progress("training", config.epochs, config.epochs)
        return Descent(losses, steps, stopped)

    def _order(self, count: int) -> Iterable[int]:
        if self.generator is None:
            return range(count)
        return torch.randperm(count, generator=self.generator).tolist()

    def _is_done(self, batch: TargetBatch, logits_pv: Tensor, loss: Tensor) -> bool:
        """Return whether a batch is skipped."""
        if self.config.stop == "loss":
            return bool(loss < self.config.stop_loss)
        return self.config.stop == "argmax" and batch.all_top1(logits_pv)

    def _step(
        self,
        adam: torch.optim.Adam,
        parameters: Sequence[Tensor],
        loss: Tensor,
        decayed: Callable[[Tensor], Tensor],
    ) -> None:
        """Step Adam by the loss's gradient and weight decay.

        Adam's own weight_decay would pull a *change* to zero; what decays is the weight with it.
        """
        decay = self.config.weight_decay
        # grad() and not backward(): nothing accumulates in the model's own parameters
        gradients = torch.autograd.grad(loss, list(parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            shrink = decay * decayed(parameter.detach()) if decay else 0.0
            parameter.grad = gradient + shrink
        adam.step()


def _locality_loss(locality: Task, i: int, before: Sequence[Tensor]) -> Tensor:
    """Return the loss of a batch of unrelated rows: KL from `before`, without it cross-entropy."""
    batch, logits_pv = locality.batches[i], locality.forwards[i]()
    if not before:
        return batch.mean_by_row(batch.token_nll(logits_pv)).mean()
    # KL(before || now): summed over the vocabulary at each position where an answer is read
    divergence_p = (before[i].exp() * (before[i] - logits_pv.log_softmax(-1))).sum(-1)
    return batch.mean_by_row(divergence_p).mean()
