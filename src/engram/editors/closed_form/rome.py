"""ROME: write one fact into one MLP output matrix as a rank-one change, and its repairs r-ROME and
p-ROME.

Knows the key, the value and the solve of one fact. Source: Meng et al. 2022, arXiv:2202.05262, Sec.
3; the repairs: Gupta, Baskaran & Anumanchipalli 2024, arXiv:2403.07175.
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

from engram.checks import one_of
from engram.edit.applied import applied
from engram.edit.base import describe_base
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.closed_form.inputs import in_force, moments_of
from engram.editors.closed_form.solver import solve_each
from engram.editors.closed_form.values import Value, ValueConfig, optimise_value, optimise_values
from engram.editors.contexts import sample_contexts
from engram.editors.presets import preset, preset_layers
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import SecondMoment
from engram.engine.replayable import Engine
from engram.errors import NonFiniteError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.layouts import as_linear
from engram.progress import Progress, no_progress
from engram.settings import flat, read

log = logging.getLogger(__name__)

Variant = Literal["r-rome", "reference", "p-rome", "two-key"]
VARIANTS: tuple[Variant, ...] = ("r-rome", "reference", "p-rome", "two-key")


@dataclass(frozen=True)
class RomeConfig:
    """Settings of ROME, with those of the value optimisation.

    Args:
        variant: which keys are used. "r-rome": the key averaged over contexts throughout.
            "reference": the released code, averaged key in the direction and the bare prompt's key
            in the denominator, which for some facts destroys the model (rho near 0). "p-rome": the
            bare prompt's key throughout. "two-key" (ours): the least change that sends both the
            bare prompt's key and the mean key of the contexts to the value; for models that treat a
            text's first token specially, where these two keys differ.
        residual: what r-rome adds at its key. "published": v* minus the mean output over contexts.
            "consistent": delta, the change that the optimisation in fact applied in every context.
        ridge: added to the second moment before solving, relative to its mean eigenvalue.
    """

    variant: Variant = "r-rome"
    residual: Literal["published", "consistent"] = "published"
    ridge: float = 0.0
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        one_of("variant", self.variant, VARIANTS)
        one_of("residual", self.residual, ("published", "consistent"))


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
        """The numbers worth keeping with an edit."""
        return {
            "rho": self.rho,
            "norm_ratio": self.norm_ratio,
            "value_norm": float(self.value.delta_d.norm()),
            "start_norm": float(self.value.start_d.norm()),
            "losses": [list(each) for each in self.value.losses],
            "delta_norms": self.value.delta_norms,
        }


def rank_one_update(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    moment: SecondMoment,
    contexts: Sequence[str],
    config: RomeConfig | None = None,
    engine: Engine = "auto",
) -> RankOne:
    """The change of block `layer`'s MLP output matrix that sends the subject's key to a value that
    says the new object.

    delta W = r u^T / (k . u), u = C^-1 k / ||C^-1 k||, r = wanted minus current output at k.

    Args:
        moment: C, uncentred second moment of the matrix's inputs, [f, f].
        contexts: templates with one `{}`, the bare one first.
    Returns:
        The factors; the model is not changed.
    Raises:
        NonFiniteError: the update is not finite.
    """
    config = config or RomeConfig()
    value = optimise_value(lm, fact, layer, contexts, config.value, engine)
    (update,) = _solve_updates(lm, [fact], layer, moment, config, [value])
    return update


def _solve_updates(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    moment: SecondMoment,
    config: RomeConfig,
    values: Sequence[Value],
) -> list[RankOne]:
    """The changes that write values which were found before, each by itself, see `rank_one_update`."""
    solved = solve_each(
        [_key_columns(value.keys_cf, config.variant) for value in values], moment, config.ridge
    )
    return [
        _rank_one(lm, fact, layer, config, value, solved_nf.cpu().sum(0))
        for fact, value, solved_nf in zip(facts, values, solved, strict=True)
    ]


def _rank_one(
    lm: LanguageModel, fact: Fact, layer: int, config: RomeConfig, value: Value, solved_f: Tensor
) -> RankOne:
    """The change along `solved_f` [f], C^-1 times the key that is sent to the value."""
    bare_f, mean_f = value.keys_cf[0], value.keys_cf.mean(0)
    u_f = solved_f / solved_f.norm()
    toward_bare, toward_mean = bare_f.double().cpu() @ u_f, mean_f.double().cpu() @ u_f
    if config.variant == "reference":
        key_dot_u, residual_d = toward_bare, value.star_d - value.outputs_cd[0]
    elif config.variant in ("p-rome", "two-key"):
        key_dot_u, residual_d = toward_bare, value.delta_d
    else:
        key_dot_u = toward_mean
        residual_d = (
            value.delta_d
            if config.residual == "consistent"
            else value.star_d - value.outputs_cd.mean(0)
        )
    left_d = (residual_d.double().cpu() / key_dot_u).to(value.delta_d.dtype)
    if not (left_d.isfinite().all() and u_f.isfinite().all()):
        raise NonFiniteError(
            f"the update for {fact.subject!r} is not finite (k.u = {float(key_dot_u):.3g}); nothing was changed"
        )
    rho = float(toward_bare / toward_mean)
    if config.variant == "reference" and rho < 0.2:
        log.warning(
            "rho = %.3f for %r: the bare prompt's key is unlike the mean key; the reference update may break the "
            "model, use variant='r-rome'",
            rho,
            fact.subject,
        )
    weight_df = as_linear(lm.parts.mlp_out(layer))
    norm_ratio = float(left_d.norm() / weight_df.detach().double().norm().cpu())
    return RankOne(left_d, u_f.to(value.delta_d.dtype), mean_f, value, rho, norm_ratio)


def _key_columns(keys_cf: Tensor, variant: Variant) -> Tensor:
    """[f, 1 or 2]: the keys that are sent to the value."""
    if (
        variant == "two-key" and len(keys_cf) > 1
    ):  # with the bare prompt alone there is one key only
        return torch.stack([keys_cf[0], keys_cf[1:].mean(0)], 1)
    return (keys_cf[0] if variant in ("p-rome", "two-key") else keys_cf.mean(0))[:, None]


@dataclass(frozen=True)
class _Setup:
    """What every fact of a call needs."""

    layer: int
    weight: str
    config: RomeConfig
    contexts: tuple[str, ...]
    moment: SecondMoment
    base: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        about = {"contexts": list(self.contexts), "second_moment": self.moment.source}
        return {"layer": self.layer, **flat(self.config), **about}

    def edit(self, facts: Sequence[Fact], done: Sequence[RankOne], seed: int) -> Edit:
        """Of the changes that were found for these facts."""
        left_dn, right_nf = (
            torch.stack([u.left_d for u in done], 1),
            torch.stack([u.right_f for u in done]),
        )
        delta = Delta(left_dn, right_nf).owned_by([i] for i in range(len(facts)))
        diagnostics = {
            "facts": [u.diagnostics() for u in done],
            "condition": self.moment.condition(),
        }
        keys = {self.weight: torch.stack([u.key_f for u in done]).to(delta.left.dtype)}
        return Edit(
            tuple(facts),
            "rome",
            self.recipe,
            {self.weight: delta},
            self.base,
            seed=seed,
            diagnostics=diagnostics,
            keys=keys,
        )


def _prepare(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    seed: int,
    progress: Progress,
    layer: int | None = None,
    contexts: Sequence[str] | None = None,
    second_moments: Mapping[int, SecondMoment | Tensor] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    **knobs: Any,
) -> _Setup:
    """The settings of a call, checked, and what is made by them."""
    settings = {**preset("rome", lm.name), **knobs}
    (usual,), preset_corpus = (
        preset_layers(settings, lm.n_layers, "layer"),
        settings.pop("corpus", None),
    )
    corpus = preset_corpus if corpus is None else corpus
    config = read(
        RomeConfig, settings, "rome", "layer, contexts, second_moments, corpus, tokens, past, seed"
    )
    layer = usual if layer is None else layer
    if isinstance(layer, str):
        raise SettingError(
            f"layer={layer!r}: rome takes a block's number, from 0; engram.rewrite(lm, facts, "
            "layer='auto') chooses one"
        )
    weight = f"{lm.parts.mlp_out_name(layer)}.weight"
    for fact in facts:  # every fact is checked before anything is computed
        lm.target_ids(fact.prompt_text, fact.target)
    moment = moments_of(lm, [layer], second_moments, corpus, tokens, seed, progress)[layer]
    contexts = sample_contexts(lm, seed=seed) if contexts is None else tuple(contexts)
    return _Setup(layer, weight, config, contexts, moment, describe_base(lm, [weight]))


def rome(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    layer: int | None = None,
    contexts: Sequence[str] | None = None,
    second_moments: Mapping[int, SecondMoment | Tensor] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    past: Sequence[Edit] = (),
    seed: int = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **knobs: Any,
) -> Edit:
    """Rewrite facts one after another, each by a rank-one change of one block's MLP output matrix.

    A later fact sees the weights as the earlier ones left them, as in the released code; `lm` is
    not changed.

    Args:
        layer: block to edit, from 0; default: the preset of this model. `engram.rewrite` chooses one
            for "auto".
        contexts: templates with one `{}` each, the bare "{}" first; default: sampled from the model
            with `seed`.
        second_moments: layer -> C [f, f]; default: measured on `corpus` over `tokens` tokens and
            cached.
        corpus: a text file, a data set or texts (see corpora); default: the preset's, or text that
            the model itself samples.
        past: edits made before on the same base, in force while this one is made.
        engine: "replay", "whole" forward passes, or by itself.
        progress: called with (what is done, done, total).
        knobs: the fields of RomeConfig and ValueConfig.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with;
            NonFiniteError: see rank_one_update.
    """
    given: dict[str, Any] = {
        "layer": layer,
        "contexts": contexts,
        "second_moments": second_moments,
        "corpus": corpus,
        "tokens": tokens,
    }
    ready = _prepare(lm, facts, seed=seed, progress=progress, **given, **knobs)
    done: list[RankOne] = []
    with in_force(past, lm), ExitStack() as edited:
        for i, fact in enumerate(facts):
            progress("value", i, len(facts))
            update = rank_one_update(
                lm, fact, ready.layer, ready.moment, ready.contexts, ready.config, engine
            )
            done.append(update)
            if i + 1 < len(facts):
                step = Delta(update.left_d[:, None], update.right_f[None])
                changes = WeightChanges({ready.weight: step}, ready.base)
                edited.enter_context(applied(changes, lm))
        progress("value", len(facts), len(facts))
    return ready.edit(facts, done, seed)


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
    """Many edits of one fact each, every one made on the unedited model: what `rome` gives of each,
    with values in batches.

    Args:
        facts_per_batch: facts whose values are optimised in one batch, which bounds memory.
        settings: the others of `rome` but for `past`.
    """
    ready = _prepare(lm, facts, seed=seed, progress=progress, **settings)
    found: dict[int, Value] = {}
    for i, value in optimise_values(
        lm,
        facts,
        ready.layer,
        ready.contexts,
        ready.config.value,
        engine=engine,
        facts_per_batch=facts_per_batch,
    ):
        progress("value", len(found), len(facts))
        found[i] = value
    progress("value", len(facts), len(facts))
    values = [found[i] for i in range(len(facts))]
    updates = _solve_updates(lm, facts, ready.layer, ready.moment, ready.config, values)
    return [ready.edit([fact], [update], seed) for fact, update in zip(facts, updates, strict=True)]
