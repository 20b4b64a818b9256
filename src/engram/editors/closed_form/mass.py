"""Mass editing: many facts at once, spread over a few layers. MEMIT, EMMET, MEMIT-seq, AlphaEdit
and PMET are rows of one table.

The values are optimised on the unedited model, for the last layer. Then, layer by layer: recompute
keys and residuals on the partially edited model, and solve for the change of this layer. With two
layers, 3 and 4, and the share "even":

    layer   residual at layer 4        change of this layer            left to layer 4
    3       v* - state, no edit        solves for 1/2 of it            about 1/2
    4       v* - state, 3 edited       solves for all of it            0, up to preservation

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

from engram.checks import Count, Layers, Seed, checked_call
from engram.edit.applied import applied
from engram.edit.base import describe_base
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.closed_form.inputs import (
    MomentSource,
    in_force,
    keys_of,
    settings_given,
    shared_subjects,
)
from engram.editors.closed_form.mass_settings import (
    KEEPS_PAST_KEYS,
    RESIDUAL_SHARES,
    MassConfig,
    settings_of,
)
from engram.editors.closed_form.shifted_rows import mlp_shift_reaches_block_output
from engram.editors.closed_form.solver import Preservation, solve, solve_as_published, solve_exactly
from engram.editors.closed_form.subject_keys import SubjectStates
from engram.editors.closed_form.value_search import ValueWork, find_values
from engram.editors.closed_form.values import Value, ValueSearch
from engram.editors.contexts import STARTED, Source, contexts_of
from engram.editors.execution import Execution
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
class _LayerChange:
    """What was solved at one layer: the change, the keys [n, f], and numbers worth keeping."""

    delta: Delta
    keys_nf: Tensor
    about: dict[str, Any]


@dataclass(frozen=True)
class _Setup:
    """What every fact of a call needs.

    Attributes:
        names: layer -> weight, ascending; moments, old_keys: by layer.
        anchor: norm that values are scaled to, None where they are left alone.
        past: how many edits came before.
    """

    method: str
    config: MassConfig
    names: dict[int, str]
    contexts: tuple[str, ...]
    moments: Mapping[int, SecondMoment]
    old_keys: Mapping[int, Tensor | None]
    anchor: float | None
    past: int
    base: dict[str, Any]
    how: Execution

    @property
    def search(self) -> ValueSearch:
        """Values are those of the last layer."""
        config, engine = self.config, self.how.engine
        return ValueSearch(max(self.names), self.contexts, config.value, config.site, engine)

    @property
    def recipe(self) -> dict[str, Any]:
        moments = {str(layer): moment.source for layer, moment in self.moments.items()}
        about = {"contexts": list(self.contexts), "second_moments": moments, "past": self.past}
        return {"layers": list(self.names), **flat(self.config), **about}

    def states(self, lm: LanguageModel, facts: Sequence[Fact]) -> SubjectStates:
        config, engine = self.config, self.how.engine
        return SubjectStates(lm, facts, self.contexts, list(self.names), config.site, engine)

    def targets(self, values: Sequence[Value]) -> Tensor:
        """Return the states [n, d] that the last layer shall have."""
        # Values of the store are on the CPU, new ones where the model is.
        targets_nd = torch.stack([value.star_d.cpu() for value in values])
        if self.anchor is None:
            return targets_nd
        return targets_nd * (self.anchor / targets_nd.norm(dim=1, keepdim=True))

    def edit(
        self,
        facts: Sequence[Fact],
        values: Sequence[Value],
        targets_nd: Tensor,
        changes: Mapping[int, _LayerChange],
    ) -> Edit:
        diagnostics = {
            "layers": {str(layer): change.about for layer, change in changes.items()},
            "target_norm": float(targets_nd.norm(dim=1).mean()),
            "shared_subjects": shared_subjects(facts),
            "facts": [
                {
                    "loss": value.losses[-1][0],
                    "steps": len(value.losses),
                    "value_norm": float(value.delta_d.norm()),
                }
                for value in values
            ],
        }
        return Edit(
            tuple(facts),
            self.method,
            self.recipe,
            {self.names[layer]: change.delta for layer, change in changes.items()},
            self.base,
            seed=self.how.seed,
            diagnostics=diagnostics,
            keys={self.names[layer]: change.keys_nf for layer, change in changes.items()},
        )


def _prepare(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    given: dict[str, Any],
    past: Sequence[Edit],
    how: Execution,
) -> _Setup:
    """Check the settings and facts of a call, and compute what all its facts share."""
    settings = settings_of(method, lm.name, settings_given(given))
    layers = sorted(set(preset_layers(settings, lm.n_layers, "layers")))
    source, contexts = MomentSource.pop(settings, how.seed), settings.pop("contexts", None)
    config = read(
        MassConfig,
        settings,
        method,
        "layers, contexts, second_moments, corpus, tokens, past, facts_per_batch, store, workers, "
        "seed",
    )
    names = {layer: f"{lm.parts.mlp_out_name(layer)}.weight" for layer in layers}
    for fact in facts:  # every fact is checked before anything is computed
        lm.target_ids(fact.prompt_text, fact.target)
    # Read here already: an edit without keys is an error before anything is measured.
    remembers = method in KEEPS_PAST_KEYS
    old_keys = {layer: keys_of(past, name) if remembers else None for layer, name in names.items()}
    if config.exact and any(keys is not None for keys in old_keys.values()):
        raise SettingError(
            "slack=0 meets every key exactly and leaves no room for past keys; set a slack above 0"
        )
    anchor = _anchor(past) if config.norm_anchor else None
    # A value of the block's output is written by the MLP's: what is added to one has to arrive at
    # the other. After a norm (Gemma 2, OLMo 2) it arrives scaled, and the target is missed.
    if config.site == "block" and not mlp_shift_reaches_block_output(lm, layers[-1]):
        log.warning(
            "%s changes the MLP's output before it is added (by a norm or a factor), so that a "
            "value for the block's output cannot be written exactly; one for the MLP's can: "
            "site='mlp'",
            lm.name,
        )
    moments = source.moments(lm, layers, how.progress)
    contexts = contexts_of(lm, contexts, seed=how.seed, started=STARTED, progress=how.progress)
    base = describe_base(lm, names.values())
    return _Setup(method, config, names, contexts, moments, old_keys, anchor, len(past), base, how)


@checked_call
def mass_edit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    *,
    layers: Layers | None = None,
    contexts: Sequence[str] | Source | None = None,
    second_moments: Mapping[int, SecondMoment | Tensor] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: Count | None = None,
    past: Sequence[Edit] = (),
    facts_per_batch: Count = 32,
    store: str | Path | bool = True,
    workers: Workers | None = None,
    seed: Seed = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> Edit:
    """Rewrite many facts at once; `lm` is not changed.

    Column i of each weight's change belongs to fact i: it is fact i's residual times its share of
    the solution. So any fact can be taken out exactly, and what is left is the solution in which
    that fact's key stays where it was.

    Args:
        method: a row of `MASS_METHODS`.
        layers: blocks to edit, from 0; default: the preset's. `engram.rewrite` chooses some for
            "auto".
        contexts: templates with one `{}` each, the bare "{}" first; or "wikipedia" (five sentences
            that the package brings) or "sampled" (five from the model), drawn with `seed`; default:
            the preset's.
        second_moments: layer -> C [f, f]; default: measured on `corpus` over `tokens` tokens and
            cached.
        past: earlier edits of the same base, in force while this one is computed; the methods of
            `KEEPS_PAST_KEYS` also preserve their keys.
        facts_per_batch: facts whose values are optimised in one batch, which bounds memory while
            values are found.
        store: keep each value as soon as it is found, under a digest of everything it depends on,
            and read it from there next time, so that a killed run resumes. A file, True for the
            cache folder, or False.
        workers: where values are found, in the same batches and so the same; default: in this
            process. They do not see `past`.
        engine: "replay", "whole" forward passes, or by itself.
        progress: called with (what is done, done, total).
        settings: the fields of MassConfig and ValueConfig.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with;
            NonFiniteError: keys or losses are not finite.
    """
    inputs = {"second_moments": second_moments, "corpus": corpus, "tokens": tokens}
    given = {"layers": layers, "contexts": contexts, **inputs, **settings}
    how = Execution(engine, workers, seed, progress)
    # Before earlier edits are in force: contexts and second moments are those of the base.
    setup = _prepare(lm, facts, method, given, past, how)
    shared = shared_subjects(facts)
    if shared:
        log.warning(
            "%d subjects have several facts (%s, ...): they share a key, so that their changes are "
            "averaged",
            len(shared),
            shared[0],
        )
    with in_force(past, lm):
        values, work = find_values(
            lm, facts, setup.search, how, facts_per_batch, store, len(setup.names)
        )
        targets_nd = setup.targets(values)
        changes = _spread(lm, facts, targets_nd, setup, work)
    return setup.edit(facts, values, targets_nd, changes)


@checked_call
def mass_each(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    *,
    facts_per_batch: Count = 32,
    store: str | Path | bool = True,
    **settings: Any,
) -> list[Edit]:
    """Compute many edits of one fact each, every one on the unedited model.

    An edit is what `mass_edit` returns for its fact alone. Values are found in batches; layer by
    layer, the rows of all facts run through the blocks together, each with its own fact's changes
    on top of the weights.

    Args:
        settings: the others of `mass_edit`, without `past`.
    """
    how = Execution.pop(settings)
    setup = _prepare(lm, facts, method, settings, (), how)
    values, work = find_values(
        lm, facts, setup.search, how, facts_per_batch, store, len(setup.names)
    )
    targets_nd = setup.targets(values)
    states = setup.states(lm, facts)
    overlays: dict[nn.Module, tuple[Tensor, Tensor] | Tensor] = {}
    changes: list[dict[int, _LayerChange]] = [{} for _ in facts]
    for number, layer in enumerate(setup.names):
        how.progress("layer", number, len(setup.names))
        keys_ncf, states_nd = states.at(layer, per_row_edits(overlays))
        missing_nd = targets_nd.to(states_nd) - states_nd
        # Fact by fact, since facts that are solved together share the change; the rows above, which
        # take the time, were computed together.
        for i, of_fact in enumerate(changes):
            rows = slice(i, i + 1)
            of_fact[layer] = _change(keys_ncf[rows], missing_nd[rows], layer, setup)
        factors = [of_fact[layer].delta.low_rank() for of_fact in changes]
        overlays[lm.parts.mlp_out(layer)] = (
            torch.stack([left for left, _ in factors]),
            torch.stack([right for _, right in factors]),
        )
        work.solved()
    how.progress("layer", len(setup.names), len(setup.names))
    return [
        setup.edit([fact], [values[i]], targets_nd[i : i + 1], changes[i])
        for i, fact in enumerate(facts)
    ]


# METHODS names these functions. Each is written out, not unpacked from a loop over MASS_METHODS: an
# unpacking pairs names with rows by their order alone, and a text search does not find it.
memit = partial(mass_edit, method="memit")
emmet = partial(mass_edit, method="emmet")
memit_seq = partial(mass_edit, method="memit-seq")
alphaedit = partial(mass_edit, method="alphaedit")
pmet = partial(mass_edit, method="pmet")

memit_each = partial(mass_each, method="memit")
emmet_each = partial(mass_each, method="emmet")
memit_seq_each = partial(mass_each, method="memit-seq")
alphaedit_each = partial(mass_each, method="alphaedit")
pmet_each = partial(mass_each, method="pmet")


def _anchor(past: Sequence[Edit]) -> float | None:
    """Return the mean norm of the first edit's values; None where no edit came before."""
    if past and "target_norm" not in past[0].diagnostics:
        raise SettingError(
            f"norm_anchor=True: past[0], {past[0]!r}, does not hold the norm of its values; "
            "expected an edit of a mass method as it was computed (without facts taken out)"
        )
    return float(past[0].diagnostics["target_norm"]) if past else None


def _spread(
    lm: LanguageModel, facts: Sequence[Fact], targets_nd: Tensor, setup: _Setup, work: ValueWork
) -> dict[int, _LayerChange]:
    """Solve layer by layer, each on the model with the changes below it, and return the changes.

    The residual is measured again at every layer, not divided once: a change below moves the state
    by other amounts than it was solved for, since later blocks act on it too.
    """
    states, progress = setup.states(lm, facts), setup.how.progress
    changes: dict[int, _LayerChange] = {}
    with ExitStack() as edited:
        for number, (layer, name) in enumerate(setup.names.items()):
            progress("layer", number, len(setup.names))
            keys_ncf, states_nd = states.at(layer)
            missing_nd = targets_nd.to(states_nd) - states_nd
            changes[layer] = _change(keys_ncf, missing_nd, layer, setup)
            # In force for the layers above; nothing reads the model after the last one.
            if layer != max(setup.names):
                part = WeightChanges({name: changes[layer].delta}, setup.base)
                edited.enter_context(applied(part, lm))
            work.solved()
    progress("layer", len(setup.names), len(setup.names))
    return changes


def _change(keys_ncf: Tensor, missing_nd: Tensor, layer: int, setup: _Setup) -> _LayerChange:
    """Return one layer's change for facts that are solved together.

    Args:
        missing_nd: [n, d] what the states lack of their targets, now.
    """
    config = setup.config
    left = sum(other >= layer for other in setup.names)  # layers to come, this one included
    solved_nf, rank = _solved(keys_ncf, config, setup.moments[layer], setup.old_keys[layer])
    # The released code stores float64 changes. Otherwise float32 is enough: it is finer than the
    # rounding of the weights, and half the size of the edit.
    wide = config.reference or missing_nd.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    left_dn = missing_nd.T.cpu().to(dtype) * RESIDUAL_SHARES[config.share](left)
    delta = Delta(left_dn, solved_nf.cpu().to(dtype)).owned_by([i] for i in range(len(keys_ncf)))
    # "missing" falls from layer to layer where an edit works.
    about = {"missing": float(missing_nd.norm(dim=1).mean()), "norm": delta.norm()} | rank
    return _LayerChange(delta, _mean_keys(keys_ncf, config).cpu(), about)


def _mean_keys(keys_ncf: Tensor, config: MassConfig) -> Tensor:
    """Return one key per fact, [n, f]; the first context is the bare prompt."""
    # Halves, as released: a mean in each of two groups, then over both. The bare prompt weighs 1/2,
    # where a mean over all six contexts would give it 1/6.
    if config.keys == "mean" or keys_ncf.shape[1] == 1:
        return keys_ncf.mean(1)
    return (keys_ncf[:, 0] + keys_ncf[:, 1:].mean(1)) / 2


def _solved(
    keys_ncf: Tensor, config: MassConfig, moment: SecondMoment, past_fp: Tensor | None
) -> tuple[Tensor, dict[str, int]]:
    """Return X^T [n, f] of a layer, and the null space's rank where there is one.

    keys="both" solves for 2n keys that share n residuals: a fact's column is the sum of its two,
    so that the fact still has one column and can be taken out.
    """
    n, both = len(keys_ncf), config.keys == "both" and keys_ncf.shape[1] > 1
    keys_mf = _mean_keys(keys_ncf, config)
    if both:
        keys_mf = torch.cat([keys_ncf[:, 0], keys_ncf[:, 1:].mean(1)])
    basis_fr, rank = None, {}
    if config.projects:
        energy, threshold = config.null_energy, config.null_threshold
        basis_fr = moment.null_space(energy=energy, threshold=threshold)
        rank = {"rank": basis_fr.shape[1]}
        if not basis_fr.shape[1]:  # a published threshold means nothing for another model's scale
            raise EngramError(
                f"the null space of C has rank 0 at null_energy={energy}, null_threshold="
                f"{threshold}, so nothing can be changed; lower the energy or raise the threshold"
            )
    if config.exact:
        solved_mf = solve_exactly(keys_mf.T, moment)
    else:
        weight = config.weight(keys_mf.shape[1])
        ridge = config.ridge or config.relative_ridge * float(moment.matrix_ff.trace())
        preservation = Preservation(moment, weight, ridge, past_fp, basis_fr)
        solved_mf = (solve_as_published if config.reference else solve)(keys_mf.T, preservation)
    return (solved_mf[:n] + solved_mf[n:] if both else solved_mf), rank
