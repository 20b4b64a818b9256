"""UltraEdit: one forward and one backward pass, then a ridge solve; no values to optimise, no
subject, no corpus.

At every scored token t, h_t enters a matrix and g_t is the loss's gradient at its output. With h~
and g~ standardised by the mean and spread of all tokens seen in the model's life, the change of the
matrix is the S that minimises

    ||H S - V||^2 + ||S||^2,   rows of H: h_t (not standardised),   rows of V: v_t,
    v_t = -learning_rate ||h~_t||^2 g~_t,
    S = (H^T H + I)^-1 H^T V.

So a token pulls its matrix's output against its gradient, harder where its input is unusual, and
the unit ridge keeps tokens with short inputs from being fitted exactly.

Knows tokens, gradients and the solve. Source: Gu et al. 2025, arXiv:2505.14679.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engram.checks import Count, Positive, Seed, Texts, check_fields, checked_call
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.presets import preset, preset_layers
from engram.editors.training.matrices import Layers, matrix_names
from engram.editors.training.target_rows import TargetBatch, batches_of, fact_rows
from engram.errors import EngramError, NonFiniteError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.frozen import frozen
from engram.modules.hooks import record, substitute
from engram.progress import Progress, no_progress
from engram.settings import flat, read

_TINY = 1e-7  # added to a spread, for coordinates that never vary


@dataclass(frozen=True)
class UltraEditConfig:
    """Settings of UltraEdit.

    Args:
        learning_rate: factor of the step; the default is published for models of 7 billion
            parameters.
        targets: which matrices of a block, see `matrix_names`.
        rows_per_batch: rows of a forward pass; bounds memory and changes no result.
    """

    learning_rate: Positive = 1e-6
    targets: str | Texts = ("mlp_out",)
    rows_per_batch: Count = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))


@dataclass
class Statistics:
    """Mean and spread of [h; g] over all tokens edited in a model's life, for each matrix.

    Start with `Statistics()` and pass the same object to every `ultraedit` of a model; each adds
    its tokens when it is done.
    """

    count: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)  # matrix -> [in + out], float64
    squares: dict[str, Tensor] = field(default_factory=dict)  # sums of (x - mean)^2

    def add(self, tokens: dict[str, Tensor]) -> None:
        """Add tokens [n, in + out] of every matrix.

        Chan, Golub & LeVeque's update: means and sums of squared deviations of two sets combine
        without subtracting large numbers, which sum(x^2) - n mean^2 would.

            old:  1, 3 (mean 2, squares 2)     new: 5, 7, 9 (mean 7, squares 8)
            apart = 7 - 2 = 5, share = 3 / 5:  mean 2 + 5 * 3/5 = 5
                                               squares 2 + 8 + 5^2 * 2 * 3/5 = 40

        Raises:
            EngramError: statistics of other matrices.
        """
        if self.count and self.means.keys() != tokens.keys():
            raise EngramError(
                f"statistics are of {sorted(self.means)}, the edit changes {sorted(tokens)}; keep "
                "one for each"
            )
        n = len(next(iter(tokens.values())))
        for name, tokens_nc in tokens.items():
            mean_c = tokens_nc.mean(0)
            squares_c = (tokens_nc - mean_c).square().sum(0)
            apart_c = mean_c - self.means.get(name, torch.zeros_like(mean_c))
            share = n / (self.count + n)
            self.means[name] = mean_c - apart_c * (1 - share)
            self.squares[name] = (
                self.squares.get(name, 0) + squares_c + apart_c.square() * self.count * share
            )
        self.count += n

    def standardised(self, name: str, tokens_nc: Tensor) -> Tensor:
        """Return tokens of a matrix, less the mean, over the spread."""
        spread_c = (self.squares[name] / (self.count - 1)).sqrt()
        return (tokens_nc - self.means[name]) / (spread_c + _TINY)


@dataclass
class _Tokens:
    """The facts' scored tokens at each matrix, and the statistics of these and earlier ones."""

    config: UltraEditConfig
    recipe: dict[str, Any]
    inputs: dict[str, Tensor]  # [n, in]
    tokens: dict[str, Tensor]  # [n, in + out]
    facts_n: list[int]  # fact of each token
    statistics: Statistics

    def edit(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        chosen: Sequence[int],
        seed: int,
        progress: Progress,
    ) -> Edit:
        """Return the edit of the facts with these indices."""
        rows = [n for n, fact in enumerate(self.facts_n) if fact in set(chosen)]
        index = {fact: i for i, fact in enumerate(chosen)}
        precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
        deltas = {}
        for i, (name, inputs_ni) in enumerate(self.inputs.items()):
            progress("solving", i, len(self.inputs))
            standard_nc = self.statistics.standardised(name, self.tokens[name][rows])
            delta = _solve(inputs_ni[rows], standard_nc, self.config.learning_rate, precision)
            owners = [[index[self.facts_n[n]]] for n in rows]
            deltas[f"{name}.weight"] = delta if delta.is_dense else delta.owned_by(owners)
        base = describe_base(lm, deltas)
        return Edit(
            tuple(facts[i] for i in chosen), "ultraedit", self.recipe, deltas, base, seed=seed
        )


def _scored_tokens(
    lm: LanguageModel,
    facts: Sequence[Fact],
    progress: Progress,
    *,
    layers: Layers | None = None,
    statistics: Statistics | None = None,
    **settings: Any,
) -> _Tokens:
    """Run the facts forward and backward, and take in their tokens."""
    settings = {**preset("ultraedit", lm.name), **settings}
    usual = preset_layers(settings, lm.n_layers, "layers", count=3)
    layers = usual if layers is None else layers
    config = read(UltraEditConfig, settings, "ultraedit", "layers, statistics, seed, progress")
    names = matrix_names(lm, layers, config.targets)
    rows = fact_rows(lm, facts)
    batches = list(batches_of(rows, config.rows_per_batch))
    parts: list[dict[str, tuple[Tensor, Tensor]]] = []
    with frozen(lm.model):
        for i, batch in enumerate(batches):
            progress("gradients", i, len(batches))
            parts.append(_inputs_and_gradients(lm, batch, names))
    inputs = {name: torch.cat([part[name][0] for part in parts]) for name in names}
    gradients = {name: torch.cat([part[name][1] for part in parts]) for name in names}
    tokens = {name: torch.cat([inputs[name], gradients[name]], 1) for name in names}
    # a copy: the caller's statistics change only when the edit is there
    now = deepcopy(statistics) if statistics else Statistics()
    now.add(tokens)
    if now.count < 2:
        raise EngramError(
            "UltraEdit standardises over all scored tokens, and one token has no spread: give more "
            "facts, or statistics=... of earlier edits of this model"
        )
    facts_n = torch.cat([batch.facts_p for batch in batches]).tolist()
    recipe = {
        "layers": layers if layers == "all" else list(layers),
        **flat(config),
        "tokens_before": now.count - len(facts_n),
    }
    return _Tokens(config, recipe, inputs, tokens, facts_n, now)


@checked_call
def ultraedit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    layers: Layers | None = None,
    statistics: Statistics | None = None,
    seed: Seed = 0,
    progress: Progress = no_progress,
    **settings: Any,
) -> Edit:
    """Change matrices in one step toward the targets of all facts; the model itself is not changed.

    The change of a matrix has one column for each scored token, which belongs to the token's fact.

    Args:
        layers: blocks to change, from 0, or "all"; default: the preset of this model.
        statistics: of earlier edits of this model; this edit's tokens are added to it. Default: of
            this edit alone.
        seed: as every method takes it; recorded with the edit, nothing is drawn.
        progress: called with (what is done, done, total).
        settings: the fields of UltraEditConfig.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with.
        EngramError: fewer than two tokens to take a spread of, or statistics of other matrices.
    """
    scored = _scored_tokens(lm, facts, progress, layers=layers, statistics=statistics, **settings)
    edit = scored.edit(lm, facts, range(len(facts)), seed, progress)
    if statistics is not None:
        statistics.__dict__.update(scored.statistics.__dict__)
    return edit


@checked_call
def ultraedit_each(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    seed: Seed = 0,
    progress: Progress = no_progress,
    **settings: Any,
) -> list[Edit]:
    """Return one edit for each fact, every one made on the unedited model.

    The token of one fact has no spread of its own, so tokens are standardised over all these facts
    together, with those of `statistics`, to which nothing is added. The settings are those of
    `ultraedit`.
    """
    scored = _scored_tokens(lm, facts, progress, **settings)
    return [scored.edit(lm, facts, [i], seed, no_progress) for i in range(len(facts))]


def _inputs_and_gradients(
    lm: LanguageModel, batch: TargetBatch, names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each matrix its inputs at the p read positions [p, in], and the gradient of the
    summed loss at its outputs there [p, out].

    Gradients come from zeros that are added to the outputs, so the weights need none: their
    gradients would take as much memory as the model.
    """
    b, t = batch.ids_bt.shape
    probes: dict[str, Tensor] = {}

    def probed(name: str, out: Tensor) -> Tensor:
        # an output is a matrix's own tensor; adding zeros gives it a leaf to differentiate by
        probes[name] = torch.zeros_like(out, requires_grad=True)
        return out + probes[name]

    with ExitStack() as stack:
        entering = stack.enter_context(record(lm.model, inputs=names, keep=lambda x: x.detach()))
        modules = {
            lm.model.get_submodule(name): (lambda out, name=name: probed(name, out))
            for name in names
        }
        stack.enter_context(substitute(modules))
        loss = batch.token_nll(batch.logits(lm)).sum()
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss.item()}; nothing was changed. Try dtype=torch.float32"
        )
    gradients = dict(
        zip(names, torch.autograd.grad(loss, [probes[name] for name in names]), strict=True)
    )

    def at_read(x: Tensor) -> Tensor:
        # some families flatten rows and tokens before the MLP; float64 on the CPU for the solve
        return x.reshape(b, t, -1)[batch.rows_p, batch.positions_p].double().cpu()

    return {name: (at_read(entering[name]), at_read(gradients[name])) for name in names}


def _solve(inputs_ni: Tensor, standard_nc: Tensor, rate: float, precision: torch.dtype) -> Delta:
    """Return S^T, [out, in], for S = (H^T H + I)^-1 H^T V, in two factors or multiplied out.

    (H^T H + I)^-1 H^T = H^T (H H^T + I)^-1, so the smaller of both matrices is factored: with
    n = 3 tokens of width 3072 that is [3, 3]. Factors V^T [out, n] and [n, in] keep one column for
    each token, so that one fact can be taken out; they are multiplied out where n is above the
    smaller side of the matrix.
    """
    n, width = inputs_ni.shape
    h_ni, g_no = standard_nc[:, :width], standard_nc[:, width:]
    # H enters the solve as it is; only lengths and directions of V come from standardised tokens
    values_no = -rate * h_ni.square().sum(1, keepdim=True) * g_no
    small = inputs_ni @ inputs_ni.T if n <= width else inputs_ni.T @ inputs_ni
    factor = torch.linalg.cholesky(small + torch.eye(len(small), dtype=small.dtype))
    right_ni = (
        torch.cholesky_solve(inputs_ni, factor)
        if n <= width
        else torch.cholesky_solve(inputs_ni.T, factor).T
    )
    if n > min(width, values_no.shape[1]):
        return Delta((values_no.T @ right_ni).to(precision))
    return Delta(values_no.T.to(precision), right_ni.to(precision))
