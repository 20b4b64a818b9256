"""Mass editing: many facts at once, spread over a few layers. MEMIT, EMMET, MEMIT-seq, AlphaEdit
and PMET are rows of one table.

Values are found on the unedited model for the last layer; then, layer by layer, keys and what is
still missing of the values are read off the model as it is by now, and solver says the change.
Knows the order of these steps and the methods' rows; refuses to know how values are optimised and
systems solved. Sources: Meng et al. 2023, arXiv:2210.07229 (MEMIT); Gupta et al. 2024,
arXiv:2403.14236 (EMMET); Fang et al. 2025, arXiv:2410.02355 (AlphaEdit, MEMIT-seq); Li et al. 2024,
arXiv:2308.08742 (PMET).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram.edit.applied import applied
from engram.edit.base import describe_base
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.closed_form.inputs import in_force, keys_of, moments_of, shared_subjects
from engram.editors.closed_form.mass_settings import (
    KEEPS_PAST_KEYS,
    MASS_METHODS,
    RESIDUAL_SHARES,
    MassConfig,
    _settings,
)
from engram.editors.closed_form.shifted_rows import mlp_shift_reaches_block_output
from engram.editors.closed_form.solver import Preservation, solve, solve_as_published, solve_exactly
from engram.editors.closed_form.subject_keys import SubjectStates
from engram.editors.closed_form.value_search import _found
from engram.editors.closed_form.value_store import ValueStore
from engram.editors.closed_form.values import Value
from engram.editors.contexts import STARTED, sample_contexts
from engram.editors.presets import preset_layers
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import SecondMoment
from engram.engine.replayable import Engine
from engram.errors import EngramError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.hooks import per_row_edits
from engram.progress import Progress, no_progress
from engram.runs.workers import Workers
from engram.settings import flat, read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Setup:
    """What a call works with, made of its settings.

    Attributes:
        names: layer -> weight; moments, old_keys: by layer; anchor: norm that values are scaled to.
    """

    method: str
    config: MassConfig
    names: dict[int, str]
    contexts: tuple[str, ...]
    moments: Mapping[int, SecondMoment]
    old_keys: Mapping[int, Tensor | None]
    anchor: float | None
    recipe: dict[str, Any]
    base: dict[str, Any]

    def targets(self, values: Sequence[Value]) -> Tensor:
        """[n, d] what the last layer's state shall be."""
        targets_nd = torch.stack(
            [value.star_d.cpu() for value in values]
        )  # those from a store are on the CPU
        return (
            targets_nd
            if self.anchor is None
            else targets_nd * (self.anchor / targets_nd.norm(dim=1, keepdim=True))
        )

    def edit(
        self,
        facts: Sequence[Fact],
        values: Sequence[Value],
        targets_nd: Tensor,
        deltas: dict[str, Delta],
        keys: dict[str, Tensor],
        about: dict[str, Any],
        seed: int,
        shared: list[str],
    ) -> Edit:
        diagnostics = {
            "layers": about,
            "target_norm": float(targets_nd.norm(dim=1).mean()),
            "shared_subjects": shared,
            "facts": [
                {
                    "loss": v.losses[-1][0],
                    "steps": len(v.losses),
                    "value_norm": float(v.delta_d.norm()),
                }
                for v in values
            ],
        }
        return Edit(
            tuple(facts),
            self.method,
            self.recipe,
            deltas,
            self.base,
            seed=seed,
            diagnostics=diagnostics,
            keys=keys,
        )


def _prepare(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    *,
    seed: int,
    progress: Progress,
    layers: Sequence[int] | None = None,
    contexts: Sequence[str] | None = None,
    second_moments: Mapping[int, SecondMoment | Tensor] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    past: Sequence[Edit] = (),
    **knobs: Any,
) -> _Setup:
    """The settings of a call, checked, and what is made by them."""
    settings = _settings(method, lm.name, knobs)
    usual, usual_corpus = (
        preset_layers(settings, lm.n_layers, "layers"),
        settings.pop("corpus", None),
    )
    corpus = usual_corpus if corpus is None else corpus
    config = read(
        MassConfig,
        settings,
        method,
        "layers, contexts, second_moments, corpus, tokens, past, facts_per_batch, store, workers, seed",
    )
    if layers is not None and (isinstance(layers, str | int) or not len(layers)):
        raise SettingError(
            f"layers={layers!r}: expected numbers of blocks, from 0, such as [3, 4, 5]; "
            f"engram.rewrite(lm, facts, {method!r}, layers='auto') chooses some"
        )
    chosen = sorted(set(usual if layers is None else layers))
    names = {layer: f"{lm.parts.mlp_out_name(layer)}.weight" for layer in chosen}
    for fact in facts:  # every fact is checked before anything is computed
        lm.target_ids(fact.prompt_text, fact.target)
    old_keys = {
        layer: keys_of(past, names[layer]) if method in KEEPS_PAST_KEYS else None
        for layer in chosen
    }
    if config.exact and any(keys is not None for keys in old_keys.values()):
        raise SettingError(
            "slack=0 meets every key exactly and leaves no room for past keys; set a slack above 0"
        )
    anchor = _anchor(past) if config.norm_anchor else None
    if config.site == "block" and not mlp_shift_reaches_block_output(lm, chosen[-1]):
        log.warning(
            "%s changes the MLP's output before it is added (by a norm or a factor), so that a value for the block's output cannot be "
            "written exactly; one for the MLP's can: site='mlp'",
            lm.name,
        )
    moments = moments_of(lm, chosen, second_moments, corpus, tokens, seed, progress)
    contexts = (
        sample_contexts(lm, seed=seed, started=STARTED) if contexts is None else tuple(contexts)
    )
    recipe = {
        "layers": chosen,
        **flat(config),
        "contexts": list(contexts),
        "second_moments": {str(layer): moment.source for layer, moment in moments.items()},
        "past": len(past),
    }
    base = describe_base(lm, names.values())
    return _Setup(method, config, names, contexts, moments, old_keys, anchor, recipe, base)


def mass_edit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    *,
    layers: Sequence[int] | None = None,
    contexts: Sequence[str] | None = None,
    second_moments: Mapping[int, SecondMoment | Tensor] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    past: Sequence[Edit] = (),
    facts_per_batch: int = 32,
    store: str | Path | bool = True,
    workers: Workers | None = None,
    seed: int = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **knobs: Any,
) -> Edit:
    """Rewrite many facts at once; `lm` is not changed.

    Column i of each weight's change belongs to fact i: it is fact i's residual times its share of
    the solution. So any fact can be taken out exactly, and what is left is the solution in which
    that fact's key stays where it was.

    Args:
        method: a row of the table above.
        layers: blocks to edit, from 0, in ascending order; default: the preset's. `engram.rewrite`
            chooses some for "auto".
        contexts: templates with one `{}` each, the bare "{}" first; default: five that the model
            samples with `seed`.
        second_moments: layer -> C [f, f]; default: measured on `corpus` over `tokens` tokens and
            cached.
        past: edits made before on the same base, in force while this one is made; methods that
            remember also preserve their keys.
        facts_per_batch: facts whose values are optimised in one batch, which bounds memory while
            values are found.
        store: keep each value as soon as it is found, under a digest of everything it depends on,
            and take it from there next time: a killed run goes on. A file, True for the cache
                folder, or False.
        workers: where values are found, in the same batches and so the same; default: in this
            process. They do not see `past`.
        progress: called with (what is done, done, total).
        knobs: the fields of MassConfig and ValueConfig.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with;
            NonFiniteError: keys or losses are not finite.
    """
    given: dict[str, Any] = {
        "layers": layers,
        "contexts": contexts,
        "corpus": corpus,
        "tokens": tokens,
    }
    given["second_moments"] = second_moments
    ready = _prepare(lm, facts, method, past=past, seed=seed, progress=progress, **given, **knobs)
    shared = shared_subjects(facts)
    if shared:
        log.warning(
            "%d subjects have several facts (%s, ...): they share a key, so that their changes are averaged",
            len(shared),
            shared[0],
        )
    with in_force(past, lm):
        values = _values(lm, facts, ready, engine, facts_per_batch, store, workers, progress)
        targets_nd = ready.targets(values)
        deltas, keys, about = _spread(lm, facts, targets_nd, ready, engine, progress)
    return ready.edit(facts, values, targets_nd, deltas, keys, about, seed, shared)


def mass_each(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    *,
    facts_per_batch: int = 32,
    store: str | Path | bool = True,
    workers: Workers | None = None,
    seed: int = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> list[Edit]:
    """Many edits of one fact each, every one made on the unedited model: what `mass_edit` gives of
    each fact alone.

    Values are found in batches; layer by layer, the rows of all facts go through the blocks
    together, each with its own fact's changes laid over it.

    Args:
        settings: the others of `mass_edit` but for `past`.
    """
    ready = _prepare(lm, facts, method, seed=seed, progress=progress, **settings)
    values = _values(lm, facts, ready, engine, facts_per_batch, store, workers, progress)
    targets_nd = ready.targets(values)
    states = SubjectStates(lm, facts, ready.contexts, list(ready.names), ready.config.site, engine)
    changes: dict[nn.Module, tuple[Tensor, Tensor] | Tensor] = {}
    deltas: list[dict[str, Delta]] = [{} for _ in facts]
    keys: list[dict[str, Tensor]] = [{} for _ in facts]
    about: list[dict[str, Any]] = [{} for _ in facts]
    for number, (layer, name) in enumerate(ready.names.items()):
        progress("layer", number, len(ready.names))
        keys_ncf, states_nd = states.at(layer, per_row_edits(changes))
        missing_nd = targets_nd.to(states_nd) - states_nd
        left = len(ready.names) - number
        each = [
            _change(keys_ncf[i : i + 1], missing_nd[i : i + 1], left, layer, ready)
            for i in range(len(facts))
        ]
        for i, (delta, key_1f, found) in enumerate(each):
            deltas[i][name], keys[i][name], about[i][str(layer)] = delta, key_1f, found
        factors = [delta.low_rank() for delta, *_ in each]
        changes[lm.parts.mlp_out(layer)] = (
            torch.stack([u for u, _ in factors]),
            torch.stack([v for _, v in factors]),
        )
    progress("layer", len(ready.names), len(ready.names))
    return [
        ready.edit(
            [fact], [values[i]], targets_nd[i : i + 1], deltas[i], keys[i], about[i], seed, []
        )
        for i, fact in enumerate(facts)
    ]


memit, emmet, memit_seq, alphaedit, pmet = (
    partial(mass_edit, method=name) for name in MASS_METHODS
)


memit_each, emmet_each, memit_seq_each, alphaedit_each, pmet_each = (
    partial(mass_each, method=name) for name in MASS_METHODS
)


def _values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    ready: _Setup,
    engine: Engine,
    facts_per_batch: int,
    kept: str | Path | bool,
    workers: Workers | None,
    progress: Progress,
) -> list[Value]:
    """Every fact's value: those that are in the store, and the others as they are found."""
    layer, contexts, config = max(ready.names), ready.contexts, ready.config
    with ValueStore.of(kept, lm) as store:
        return _found(
            lm, facts, layer, contexts, config, engine, facts_per_batch, store, workers, progress
        )


def _anchor(past: Sequence[Edit]) -> float | None:
    """Mean norm of the first edit's values; None where this is the first."""
    if past and "target_norm" not in past[0].diagnostics:
        raise SettingError(
            f"norm_anchor=True: past[0], {past[0]!r}, does not hold the norm of its values; expected an edit of a mass method as "
            "it was made (without facts taken out)"
        )
    return float(past[0].diagnostics["target_norm"]) if past else None


def _spread(
    lm: LanguageModel,
    facts: Sequence[Fact],
    targets_nd: Tensor,
    ready: _Setup,
    engine: Engine,
    progress: Progress,
) -> tuple[dict[str, Delta], dict[str, Tensor], dict[str, Any]]:
    """Layer by layer, each seeing the changes below it: the change of each weight, its keys [n, f],
    what is worth knowing.
    """
    states = SubjectStates(lm, facts, ready.contexts, list(ready.names), ready.config.site, engine)
    deltas, keys, about = {}, {}, {}
    with ExitStack() as edited:
        for number, (layer, name) in enumerate(ready.names.items()):
            progress("layer", number, len(ready.names))
            keys_ncf, states_nd = states.at(layer)
            missing_nd = targets_nd.to(states_nd) - states_nd
            left = len(ready.names) - number
            deltas[name], keys[name], about[str(layer)] = _change(
                keys_ncf, missing_nd, left, layer, ready
            )
            if left > 1:
                changes = WeightChanges({name: deltas[name]}, ready.base)
                edited.enter_context(applied(changes, lm))
    progress("layer", len(ready.names), len(ready.names))
    return deltas, keys, about


def _change(
    keys_ncf: Tensor, missing_nd: Tensor, left: int, layer: int, ready: _Setup
) -> tuple[Delta, Tensor, dict[str, Any]]:
    """One layer's change for facts that are solved together, their keys [n, f], what is worth
    knowing; `left` layers are to come.
    """
    config = ready.config
    solved_nf, rank = _solved(keys_ncf, config, ready.moments[layer], ready.old_keys[layer])
    wide = torch.float64 if config.reference or missing_nd.dtype == torch.float64 else torch.float32
    left_dn = missing_nd.T.cpu().to(wide) * RESIDUAL_SHARES[config.share](left)
    delta = Delta(left_dn, solved_nf.cpu().to(wide)).owned_by([i] for i in range(len(keys_ncf)))
    about = {"missing": float(missing_nd.norm(dim=1).mean()), "norm": delta.norm()} | rank
    return delta, _mean_keys(keys_ncf, config).cpu(), about


def _mean_keys(keys_ncf: Tensor, config: MassConfig) -> Tensor:
    if config.keys == "mean" or keys_ncf.shape[1] == 1:
        return keys_ncf.mean(1)
    return (keys_ncf[:, 0] + keys_ncf[:, 1:].mean(1)) / 2


def _solved(
    keys_ncf: Tensor, config: MassConfig, moment: SecondMoment, past_fp: Tensor | None
) -> tuple[Tensor, dict[str, int]]:
    """X^T [n, f] of a layer, and the null space's rank where there is one."""
    n, both = len(keys_ncf), config.keys == "both" and keys_ncf.shape[1] > 1
    keys_mf = (
        torch.cat([keys_ncf[:, 0], keys_ncf[:, 1:].mean(1)])
        if both
        else _mean_keys(keys_ncf, config)
    )
    d_ff = keys_mf.shape[1]
    weight = config.weight(d_ff)
    basis_fr = (
        moment.null_space(energy=config.null_energy, threshold=config.null_threshold)
        if config.projects
        else None
    )
    if basis_fr is not None and not basis_fr.shape[1]:
        raise EngramError(
            f"the null space of C has rank 0 at null_energy={config.null_energy}, null_threshold={config.null_threshold}, so nothing "
            "can be changed; lower the energy or raise the threshold"
        )
    if config.exact:
        solved_mf = solve_exactly(keys_mf.T, moment)
    else:
        preservation = Preservation(moment, weight, config.ridge, past_fp, basis_fr)
        solved_mf = (solve_as_published if config.reference else solve)(keys_mf.T, preservation)
    return solved_mf[:n] + solved_mf[n:] if both else solved_mf, {} if basis_fr is None else {
        "rank": basis_fr.shape[1]
    }
