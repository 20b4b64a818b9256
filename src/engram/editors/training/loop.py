"""Training inside a model that stays as it is: batches over all facts, epoch after epoch, until
every target is said.

Knows the loop that fine-tuning and LoRA share: losses, Adam, when to stop. Refuses to know which
parameters are trained and how they become an edit. Source of the order of things, breadth first in
mini-batches: Yang et al. 2025, arXiv:2509.22072; of the locality rows: Gangadhar & Stratos 2024,
arXiv:2402.11078.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from engram.checks import one_of
from engram.editors.contexts import sample_contexts
from engram.editors.training.target_rows import TargetBatch, TargetRow, batches_of, target_row
from engram.engine.recording import record_run
from engram.engine.replayable import Engine, use_replay
from engram.engine.suffix import Suffix
from engram.errors import FactError, NonFiniteError, SettingError
from engram.model.language_model import LanguageModel
from engram.progress import Progress

Forward = Callable[[], Tensor]  # logits [p, v] of a batch as the parameters stand


@dataclass(frozen=True)
class TuningConfig:
    """Knobs of the training loop.

    Args:
        epochs: passes over all rows at most.
        rows_per_batch: rows of a step.
        learning_rate: of Adam (betas 0.9, 0.999).
        weight_decay: times the weights, added to their gradient.
        stop: "argmax": a batch whose target tokens are all the most probable ones is not stepped
            on, and an epoch without a step is the last, so that all are said at the end. "loss":
            the same below `stop_loss` (nats), the last epoch being the one whose mean is below it,
            as published. "never": all epochs.
        contexts: templates with one `{}` in which the prompt is trained; "sampled": 20 that the
            model samples, and the bare one.
        train_paraphrases: so many paraphrases of each fact are trained too; what a receipt then
            says of them is no longer about generalisation.
        locality_loss: what unrelated rows add: "kl", KL(before || now) of their answers' positions,
            or "ce", cross-entropy.
        locality_weight: times that.
    """

    epochs: int = 25
    rows_per_batch: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    stop: Literal["argmax", "loss", "never"] = "argmax"
    stop_loss: float = 0.01
    contexts: tuple[str, ...] | str = ("{}",)
    train_paraphrases: int = 0
    locality_loss: Literal["kl", "ce"] = "kl"
    locality_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.rows_per_batch < 1:
            raise SettingError(
                f"epochs={self.epochs}, rows_per_batch={self.rows_per_batch}: both have to be at least 1"
            )
        if self.learning_rate <= 0:
            raise SettingError(f"learning_rate={self.learning_rate}: has to be above 0")
        one_of("stop", self.stop, ("argmax", "loss", "never"))
        one_of("locality_loss", self.locality_loss, ("kl", "ce"))
        if isinstance(self.contexts, str) and self.contexts != "sampled":
            raise SettingError(
                f"contexts={self.contexts!r}: expected 'sampled' or a list of templates such as '{{}}'"
            )

    def settled(self, lm: LanguageModel, seed: int) -> TuningConfig:
        """The same with its contexts written out.

        Raises:
            FactError: a context without a place for the prompt.
        """
        contexts = (
            sample_contexts(lm, seed=seed) if self.contexts == "sampled" else tuple(self.contexts)
        )
        if not contexts or any(context.count("{}") != 1 for context in contexts):
            raise FactError(
                f"contexts={list(contexts)[:3]}: expected templates with exactly one '{{}}' each"
            )
        return replace(self, contexts=contexts)


def forward_from(
    lm: LanguageModel, batch: TargetBatch, layer: int, engine: Engine = "auto"
) -> Forward:
    """How the batch's logits are computed when only blocks from `layer` on can change: what enters
    that block is kept.

    To be called before anything has changed.
    """
    if not use_replay(lm, engine):
        return lambda: batch.logits(lm)
    recording = record_run(lm, batch.ids_bt)
    entering = recording.hidden[layer]

    # of the whole run, only what enters the block is needed again
    recording.hidden, recording.calls = (
        [entering],
        [_light(entering, *call) for call in recording.calls],
    )
    recording.keys, recording.values = (
        [kept[:, :, :0].clone() for kept in each] for each in (recording.keys, recording.values)
    )
    suffix = Suffix(recording, 0, batch.ids_bt.shape[1])

    def forward() -> Tensor:
        hidden_btd = entering
        for above in range(layer, lm.n_layers):
            hidden_btd = suffix.block(above, hidden_btd)
        return lm.parts.head(hidden_btd[batch.rows_p, batch.positions_p])

    return forward


def _light(
    entering: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's call without the states and the cache that it was made with."""

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
    """Batches and how their logits are computed, in the order in which batches were dealt out."""

    batches: list[TargetBatch]
    forwards: list[Forward]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        batches: Iterator[TargetBatch],
        layer: int,
        engine: Engine,
        progress: Progress,
    ) -> Task:
        dealt = list(batches)
        forwards = []
        for i, batch in enumerate(dealt):
            progress("below the layer", i, len(dealt))
            forwards.append(forward_from(lm, batch, layer, engine))
        return cls(dealt, forwards)


def tasks(
    lm: LanguageModel,
    rows: Sequence[TargetRow],
    locality: Sequence[tuple[str, str]],
    layer: int,
    config: TuningConfig,
    generator: torch.Generator | None,
    engine: Engine,
    progress: Progress,
) -> tuple[Task, Task]:
    """What is trained, and the unrelated (text, answer) pairs that shall stay, dealt into batches
    by `generator` (None: in order).
    """
    kept = [target_row(lm, text, answer) for text, answer in locality]
    wanted, staying = (batches_of(each, config.rows_per_batch, generator) for each in (rows, kept))
    return Task.of(lm, wanted, layer, engine, progress), Task.of(
        lm, staying, layer, engine, progress
    )


@dataclass(frozen=True)
class Descent:
    """How training went: mean loss of each epoch (nats), steps taken, whether it stopped by itself."""

    losses: list[float]
    steps: int
    stopped: bool

    def diagnostics(self) -> dict[str, Any]:
        return {"losses": self.losses, "steps": self.steps, "stopped": self.stopped}


def descend(
    parameters: Sequence[Tensor],
    wanted: Task,
    staying: Task,
    config: TuningConfig,
    *,
    generator: torch.Generator | None,
    progress: Progress,
    decayed: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    after_step: Callable[[], None] = lambda: None,
) -> Descent:
    """Adam on `parameters`, in place.

    The loss of a batch is the mean over rows of the mean -log p of their target tokens.

    Args:
        parameters: leaves that the forwards depend on, at a value where the model is as it was.
        staying: rows whose loss is added, one batch a step in turn.
        generator: shuffles the batches of each epoch; None: they come in order.
        decayed: what weight decay pulls to zero, of a parameter.
        after_step: called when the parameters may have moved.
    Raises:
        NonFiniteError: a loss that is not finite.
    """
    optimiser = torch.optim.Adam(parameters, lr=config.learning_rate)
    with torch.no_grad():
        before = (
            [forward().log_softmax(-1) for forward in staying.forwards]
            if config.locality_loss == "kl"
            else []
        )

    def step(loss: Tensor) -> None:
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, list(parameters)), strict=True
        ):
            decay = (
                config.weight_decay * decayed(parameter.detach()) if config.weight_decay else 0.0
            )
            parameter.grad = gradient + decay
        optimiser.step()
        with torch.no_grad():
            after_step()

    count, rows = len(wanted.batches), sum(len(batch.sizes_b) for batch in wanted.batches)
    losses: list[float] = []
    steps = 0
    for epoch in range(config.epochs):
        progress("training", epoch, config.epochs)
        total, stepped = 0.0, False
        for i in (
            range(count)
            if generator is None
            else torch.randperm(count, generator=generator).tolist()
        ):
            batch, logits_pv = wanted.batches[i], wanted.forwards[i]()
            loss = batch.mean_by_row(batch.token_nll(logits_pv)).mean()
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss is {loss.item()} in epoch {epoch}; nothing was changed. Try a smaller learning_rate than "
                    f"{config.learning_rate}, or dtype=torch.float32"
                )
            total += loss.item() * len(batch.sizes_b)
            if _done(config, batch, logits_pv, loss):
                continue
            if staying.batches:
                loss = loss + config.locality_weight * _locality(
                    staying, steps % len(staying.batches), before
                )
            step(loss)
            steps, stepped = steps + 1, True
        losses.append(total / rows)
        stopped = (
            losses[-1] < config.stop_loss
            if config.stop == "loss"
            else config.stop == "argmax" and not stepped
        )
        if stopped:
            break
    progress("training", config.epochs, config.epochs)
    return Descent(losses, steps, stopped)


def _done(config: TuningConfig, batch: TargetBatch, logits_pv: Tensor, loss: Tensor) -> bool:
    """Whether a batch is not stepped on."""
    if config.stop == "loss":
        return bool(loss < config.stop_loss)
    return config.stop == "argmax" and batch.all_said(logits_pv)


def _locality(staying: Task, i: int, before: list[Tensor]) -> Tensor:
    batch, logits_pv = staying.batches[i], staying.forwards[i]()
    if not before:
        return batch.mean_by_row(batch.token_nll(logits_pv)).mean()
    divergence_p = (before[i].exp() * (before[i] - logits_pv.log_softmax(-1))).sum(-1)
    return batch.mean_by_row(divergence_p).mean()
