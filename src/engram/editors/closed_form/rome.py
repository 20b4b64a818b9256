"""ROME: write one fact into one MLP output matrix as a rank-one change, and its repairs r-ROME and
p-ROME.

Knows the key, the value and the solve of one fact. Refuses to know how a value is optimised (see
values) and how a system is solved (see solver). Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3;
the repairs: Gupta, Baskaran & Anumanchipalli 2024, arXiv:2403.07175.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engram.checks import Count, NonNegative, Seed, check_fields, checked_call
from engram.edit.applied import applied
from engram.edit.base import describe_base
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.closed_form.inputs import MomentSource, in_force, settings_given
from engram.editors.closed_form.mass_settings import settings_of
from engram.editors.closed_form.solver import solve_each
from engram.editors.closed_form.value_search import ValueWork
from engram.editors.closed_form.values import (
    OnStep,
    Value,
    ValueConfig,
    ValueSearch,
    no_report,
    optimise_value,
    optimise_values,
)
from engram.editors.contexts import Source, contexts_of
from engram.editors.execution import Execution
from engram.editors.presets import preset_layers
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import SecondMoment
from engram.engine.replayable import Engine
from engram.errors import NonFiniteError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.weights import as_linear
from engram.progress import Progress, no_progress
from engram.settings import flat, read

log = logging.getLogger(__name__)

Variant = Literal["r-rome", "p-rome", "two-key"]


@dataclass(frozen=True)
class RomeConfig:
    """Settings of ROME, with those of the value optimisation.

    Args:
        variant: which key is sent to the value, where k_p is the key of the bare prompt and k_m the
            mean key over contexts. "r-rome": k_m. "p-rome": k_p. "two-key" (ours): both, by the
            least change that does; for models that treat a text's first token specially, where the
            two differ.
        residual: what r-rome adds at its key. "mean_output": v* minus the mean output over contexts
            (published). "delta": the change that the optimisation in fact applied in every context.
        ridge: added to the second moment before solving, relative to its mean eigenvalue.
        reference: the released code: k_m gives the direction and k_p the denominator, which for
            some facts destroys the model (rho near 0). Not to be combined with a variant.
    """

    variant: Variant = "r-rome"
    residual: Literal["mean_output", "delta"] = "mean_output"
    ridge: NonNegative = 0.0
    reference: bool = False
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reference and (self.variant != "r-rome" or self.residual != "mean_output"):
            raise SettingError(
                f"reference=True is ROME as released: without variant={self.variant!r} and "
                f"residual={self.residual!r}; leave both out"
            )


@dataclass(frozen=True)
class RankOne:
    """A rank-one change `left right^T` of one weight [d, f] and how it came about.

    Attributes:
        left_d, right_f: the factors, right_f of length 1.
        key_f: mean key over contexts; value: the optimisation's result.
        rho: (k_p . u) / (k_mean . u), 1 where the bare prompt's key is like the mean; near 0 or
            below, the reference variant's update explodes (Gupta et al. 2024).
        norm_ratio: ||change|| / ||weight||, Frobenius.
    """

    left_d: Tensor
    right_f: Tensor
    key_f: Tensor
    value: Value
    rho: float
    norm_ratio: float

    def diagnostics(self) -> dict[str, object]:
        """Return the numbers worth keeping with an edit."""
        return {
            "rho": self.rho,
            "norm_ratio": self.norm_ratio,
            "value_norm": float(self.value.delta_d.norm()),
            "start_norm": float(self.value.start_d.norm()),
            "losses": [list(terms) for terms in self.value.losses],
            "delta_norms": self.value.delta_norms,
        }


def rank_one_update(
    lm: LanguageModel,
    fact: Fact,
    search: ValueSearch,
    moment: SecondMoment,
    config: RomeConfig | None = None,
    on_step: OnStep = no_report,
) -> RankOne:
    """Return the change of one MLP output matrix that sends the subject's key to a new value.

    delta W = r u^T / (k . u), u = C^-1 k / ||C^-1 k||, r = wanted minus current output at k.

    Args:
        search: the block, the contexts, and how the value is optimised.
        moment: C, uncentred second moment of the matrix's inputs, [f, f].
        config: which key and residual are used; its own `value` settings give way to `search`.
        on_step: called after each step of the value's optimisation.
    Returns:
        The factors; the model is not changed.
    Raises:
        NonFiniteError: the update is not finite.
    """
    value = optimise_value(lm, fact, search, on_step)
    (update,) = _solve_updates(lm, [fact], search.layer, moment, config or RomeConfig(), [value])
    return update


def _solve_updates(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    moment: SecondMoment,
    config: RomeConfig,
    values: Sequence[Value],
) -> list[RankOne]:
    """Return the changes that write these values, each by itself, see `rank_one_update`.

    They are solved together, since C's factor is large: it is read once for all facts.
    """
    columns = [_key_columns(value.keys_cf, config) for value in values]
    norm = float(as_linear(lm.parts.mlp_out(layer)).detach().double().norm().cpu())
    return [
        _rank_one(fact, config, value, solved_nf.cpu().sum(0), norm)
        for fact, value, solved_nf in zip(
            facts, values, solve_each(columns, moment, config.ridge), strict=True
        )
    ]


def _rank_one(
    fact: Fact, config: RomeConfig, value: Value, solved_f: Tensor, weight_norm: float
) -> RankOne:
    """Return the change along `solved_f` [f], C^-1 times the key that is sent to the value.

    Which key is in the denominator, and what is added there:

        r-rome       k_m   v* - mean output over contexts, or delta
        p-rome       k_p   delta
        two-key      k_p   delta                               (along the sum of both keys' solves)
        reference    k_p   v* - output of the bare prompt      (along k_m: the mismatch is released)
    """
    bare_f, mean_f = value.keys_cf[0], value.keys_cf.mean(0)
    # Its length, and so the scale of C, cancels in u / (k . u).
    u_f = solved_f / solved_f.norm()
    # In float64: a denominator near zero is a difference of nearly equal terms.
    toward_bare, toward_mean = bare_f.double().cpu() @ u_f, mean_f.double().cpu() @ u_f
    key_dot_u, residual_d = toward_bare, value.delta_d
    if config.reference:
        residual_d = value.star_d - value.outputs_cd[0]
    elif config.variant == "r-rome":
        key_dot_u = toward_mean
        if config.residual == "mean_output":
            residual_d = value.star_d - value.outputs_cd.mean(0)
    left_d = (residual_d.double().cpu() / key_dot_u).to(value.delta_d.dtype)
    if not (left_d.isfinite().all() and u_f.isfinite().all()):
        raise NonFiniteError(
            f"the update for {fact.subject!r} is not finite (k.u = {float(key_dot_u):.3g}); "
            "nothing was changed"
        )
    rho = float(toward_bare / toward_mean)
    if config.reference and rho < 0.2:
        log.warning(
            "rho = %.3f for %r: the bare prompt's key is unlike the mean key; the reference update "
            "may break the model, leave out reference=True",
            rho,
            fact.subject,
        )
    ratio = float(left_d.norm()) / weight_norm
    return RankOne(left_d, u_f.to(value.delta_d.dtype), mean_f, value, rho, ratio)


def _key_columns(keys_cf: Tensor, config: RomeConfig) -> Tensor:
    """Return the keys that are sent to the value, [f, 1 or 2]; row 0 is the bare prompt's."""
    if config.variant == "two-key" and len(keys_cf) > 1:  # the bare prompt alone has one key only
        return torch.stack([keys_cf[0], keys_cf[1:].mean(0)], 1)
    bare = config.variant in ("p-rome", "two-key")
    return (keys_cf[0] if bare else keys_cf.mean(0))[:, None]


@dataclass(frozen=True)
class _Setup:
    """What every fact of a call needs."""

    weight: str
    config: RomeConfig
    search: ValueSearch
    moment: SecondMoment
    base: dict[str, Any]
    how: Execution

    @property
    def recipe(self) -> dict[str, Any]:
        about = {"contexts": list(self.search.contexts), "second_moment": self.moment.source}
        return {"layer": self.search.layer, **flat(self.config), **about}

    def edit(self, facts: Sequence[Fact], updates: Sequence[RankOne]) -> Edit:
        """Return the edit of these updates, a column per fact."""
        left_dn = torch.stack([update.left_d for update in updates], 1)
        right_nf = torch.stack([update.right_f for update in updates])
        # Column i belongs to fact i, so that a fact can be taken out of the edit exactly.
        delta = Delta(left_dn, right_nf).owned_by([i] for i in range(len(facts)))
        diagnostics = {
            "facts": [update.diagnostics() for update in updates],
            "condition": self.moment.condition(),
        }
        keys_nf = torch.stack([update.key_f for update in updates]).to(delta.left.dtype)
        return Edit(
            tuple(facts),
            "rome",
            self.recipe,
            {self.weight: delta},
            self.base,
            seed=self.how.seed,
            diagnostics=diagnostics,
            keys={self.weight: keys_nf},
        )


def _prepare(
    lm: LanguageModel, facts: Sequence[Fact], given: dict[str, Any], how: Execution
) -> _Setup:
    """Check the settings and facts of a call, and compute what all its facts share."""
    settings = settings_of("rome", lm.name, settings_given(given))
    (layer,) = preset_layers(settings, lm.n_layers, "layer")
    source, contexts = MomentSource.pop(settings, how.seed), settings.pop("contexts", None)
    config = read(
        RomeConfig, settings, "rome", "layer, contexts, second_moments, corpus, tokens, past, seed"
    )
    weight = f"{lm.parts.mlp_out_name(layer)}.weight"
    for fact in facts:  # every fact is checked before anything is computed
        lm.target_ids(fact.prompt_text, fact.target)
    # Always: EasyEdit's presets put the identity in C's place, which is not the published method.
    moment = source.moments(lm, [layer], how.progress)[layer]
    contexts = contexts_of(lm, contexts, seed=how.seed, progress=how.progress)
    search = ValueSearch(layer, contexts, config.value, engine=how.engine)
    return _Setup(weight, config, search, moment, describe_base(lm, [weight]), how)


@checked_call
def rome(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    layer: int | None = None,
    contexts: Sequence[str] | Source | None = None,
    second_moments: Mapping[int, SecondMoment | Tensor] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: Count | None = None,
    past: Sequence[Edit] = (),
    seed: Seed = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> Edit:
    """Rewrite facts one after another, each by a rank-one change of one block's MLP output matrix.

    A later fact sees the weights as the earlier ones left them, as in the released code; `lm` is
    not changed.

    Args:
        layer: block to edit, from 0; default: the preset of this model. `engram.rewrite` chooses
            one for "auto".
        contexts: templates with one `{}` each, the bare "{}" first; or "wikipedia" (sentences that
            the package brings) or "sampled" (from the model), drawn with `seed`; default: the
            preset's.
        second_moments: layer -> C [f, f]; default: measured on `corpus` over `tokens` tokens and
            cached.
        corpus: a name of `corpora.CORPORA`, a text file, texts, or a corpus; default: the preset's,
            or "wikipedia".
        past: earlier edits of the same base, in force while this one is computed.
        engine: "replay", "whole" forward passes, or by itself.
        progress: called with (what is done, done, total).
        settings: the fields of RomeConfig and ValueConfig.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with;
            NonFiniteError: see rank_one_update.
    """
    inputs = {"second_moments": second_moments, "corpus": corpus, "tokens": tokens}
    given = {"layer": layer, "contexts": contexts, **inputs, **settings}
    # Before earlier edits are in force: contexts and second moments stand for ordinary text of the
    # base, are the same for every edit of a sequence, and so are read from the cache.
    setup = _prepare(lm, facts, given, Execution(engine, None, seed, progress))
    updates: list[RankOne] = []
    work = ValueWork(lm, facts, setup.search, progress, 1)
    with in_force(past, lm), ExitStack() as edited:
        for i, fact in enumerate(facts):
            progress("value", i, len(facts))
            update = rank_one_update(
                lm, fact, setup.search, setup.moment, setup.config, work.begin([i])
            )
            work.finish([i])
            work.solved()
            updates.append(update)
            if i + 1 < len(facts):  # nothing reads the model after the last one
                step = Delta(update.left_d[:, None], update.right_f[None])
                changes = WeightChanges({setup.weight: step}, setup.base)
                edited.enter_context(applied(changes, lm))
        work.found()
        progress("value", len(facts), len(facts))
    return setup.edit(facts, updates)


@checked_call
def rome_each(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    facts_per_batch: int = 32,
    seed: int = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> list[Edit]:
    """Compute many edits of one fact each, every one on the unedited model, values in batches.

    An edit is what `rome` returns for its fact alone.

    Args:
        facts_per_batch: facts whose values are optimised in one batch, which bounds memory.
        settings: the others of `rome`, without `past`.
    """
    setup = _prepare(lm, facts, settings, Execution(engine, None, seed, progress))
    values: dict[int, Value] = {}
    for i, value in optimise_values(lm, facts, setup.search, facts_per_batch):
        progress("value", len(values), len(facts))
        values[i] = value
    progress("value", len(facts), len(facts))
    in_order = [values[i] for i in range(len(facts))]  # batches come by length
    layer, config = setup.search.layer, setup.config
    updates = _solve_updates(lm, facts, layer, setup.moment, config, in_order)
    return [setup.edit([fact], [update]) for fact, update in zip(facts, updates, strict=True)]
