"""Which layer to edit: ask the model. Edit facts that it knows at many layers, keep what came of it
as a card, and go by that.

That a trace's strongest layer need not be the best one to edit (Hase et al. 2023, arXiv:2301.04213)
is why a card holds both and edits decide. Knows where cards are kept; what is measured is in
layer_evidence, what follows in layer_cards.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from engram import pocket
from engram.checks import one_of
from engram.edit.recipe import library_versions
from engram.editors.presets import preset
from engram.editors.second_moments.corpora import Bundled, Corpus, as_corpus
from engram.errors import EngramFileError, FactError
from engram.evaluate.verify import true_answer
from engram.facts import Fact
from engram.files.cache_folder import cache_folder, sha256_of
from engram.layers.candidates import as_edits, bundled_edits, known
from engram.layers.card import FORMAT_VERSION, LayerCard
from engram.layers.evidence import Budget, EditRecipe, ResumeLog, measure, trace_settings
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress
from engram.runs.identity import identity

log = logging.getLogger(__name__)

_QUICK_FACTS, _QUICK_LAYERS = (
    4,
    8,
)  # of the card that "auto" makes where there is none: so many edits of so many facts


def layer_card(
    lm: LanguageModel,
    facts: Sequence[Fact] | None = None,
    *,
    keep: Literal["known", "all"] = "known",
    edits: int = 20,
    traces: int = 20,
    estimates: int = 40,
    layer_step: int | None = None,
    refine: bool = True,
    method: str = "rome",
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> LayerCard:
    """Measure which layer of a model to edit: traces, and single edits at every layer, over facts
    that it knows.

    A card that was measured before is read; a run that was killed goes on. Cards are kept under a
    name made of all that they depend on, so that other weights give another card.

    Args:
        facts: edits with `target_true`, or facts that tell what is true, which get another object
            of their relation; default: facts of the bundled table that this model knows, in random
            order.
        keep: which of `facts` count: those whose true object is the model's answer, or all.
        edits: facts that are edited, one at a time, at each layer that is tried; what the card's
            advice rests on.
        traces: facts that are traced exactly; estimates: facts whose trace is estimated to first
            order.
        layer_step: every so many layers are tried; default: all of a model of 12 layers or fewer, else
            so many that 12 are.
        refine: whether the layers between are tried too, next to the best of those.
        method: how to edit: any of `METHODS` that takes a layer.
        corpus, tokens: of the second moments, see `second_moments`; default: the model's preset.
            All layers are measured in
            one pass, and held in memory: d_ff x d_ff in float64 each.
        seed: of facts, objects, contexts and sampled text.
        cache_dir: default: $ENGRAM_CACHE, or ~/.cache/engram.
        progress: called with (what is done, done, total).
        settings: the method's other settings.
    Returns:
        The card; `best` is the layer to edit, `layers(count)` those for a method that edits
        several.
    Raises:
        FactError: no facts to edit, or none that the model knows.
        SettingError: a method without a layer, a number that makes no sense.
        UnsupportedModelError: a family that cannot be edited.
    """
    plan = Budget(edits, traces, estimates, layer_step, refine)
    one_of("keep", keep, ("known", "all"))
    settings = {name: value for name, value in settings.items() if value is not None}
    corpus = (
        preset("rome", lm.name).get("corpus") if corpus is None else corpus
    )  # the model's, whatever the method
    how = EditRecipe(method, settings, corpus, tokens, seed)
    lm.parts.mlp_out_name(0)  # a family that cannot be edited is told before anything is measured
    text = as_corpus(corpus, seed).digest()
    about = {**_preset(method, lm), **settings, "corpus": text, "tokens": tokens, "seed": seed}
    traced = trace_settings(lm)
    who = identity(lm)
    table = Bundled().digest() if facts is None else [fact.to_dict() for fact in facts]
    versions = library_versions()
    everything = [
        FORMAT_VERSION,
        versions["engram"],
        method,
        about,
        traced,
        asdict(plan),
        table,
        keep,
    ]
    name = f"{who[:16]}-{sha256_of(json.dumps(everything, sort_keys=True, default=repr))[:16]}"
    path = cache_folder("layer_cards", cache_dir) / f"{name}.json"
    if (card := _read(path)) is not None:
        return card
    began = time.monotonic()
    chosen = (
        bundled_edits(lm, plan.facts, seed) if facts is None else _chosen(lm, facts, keep, seed)
    )
    if not chosen:
        raise FactError(_no_facts(lm, facts))
    notes = ResumeLog(path.with_suffix(".partial"))
    evidence = measure(lm, chosen, plan, how, notes, progress)
    seconds = round(time.monotonic() - began + notes.seconds, 1)
    about = json.loads(json.dumps(about, default=repr))
    card = LayerCard(
        lm.name, who, lm.n_layers, method, about, traced, tuple(evidence), seconds, versions
    )
    card.save(path)
    notes.path.unlink(missing_ok=True)
    return card


def choose_layers(
    lm: LanguageModel,
    count: int = 1,
    *,
    facts: Sequence[Fact] = (),
    method: str = "rome",
    cache_dir: str | Path | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> list[int]:
    """`count` consecutive layers to edit, by the card of this model: what `layer="auto"` means.

    The card with the most edited facts is taken of those that are there for this model and method,
    the bundled one of the pocket model included. Where there is none, a quick one is made: four
    facts at no more than eight layers.

    Args:
        facts: those that are to be edited; they stand in where the model knows none of the bundled
            table.
        settings: of `layer_card`, for the quick one.
    Raises:
        FactError: there is no card, the model knows nothing of the bundled table, and no facts are
            given.
    """
    card = find_card(lm, method, cache_dir)
    if card is None:
        log.info(
            "no layer card of %s is there; making a quick one of %d facts", lm.name, _QUICK_FACTS
        )
        known_ones = bundled_edits(lm, _QUICK_FACTS, settings.get("seed", 0))
        these = known_ones or [_with_truth(lm, fact) for fact in facts[:_QUICK_FACTS]]
        card = layer_card(
            lm,
            these or None,
            keep="all",
            edits=_QUICK_FACTS,
            traces=_QUICK_FACTS,
            estimates=0,
            layer_step=-(-lm.n_layers // _QUICK_LAYERS),
            refine=False,
            method=method,
            cache_dir=cache_dir,
            progress=progress,
            **settings,
        )
    log.info("%s", card.reason())
    return card.layers(count)


def find_card(
    lm: LanguageModel, method: str = "rome", cache_dir: str | Path | None = None
) -> LayerCard | None:
    """The card of this very model, in its present weights, and of this method that rests on the
    most facts; None: there is none.
    """
    who = identity(lm)
    paths = [
        *sorted(cache_folder("layer_cards", cache_dir).glob(f"{who[:16]}-*.json")),
        pocket.LAYER_CARD,
    ]
    cards = [card for path in paths if (card := _read(path)) is not None]
    fitting = [card for card in cards if card.identity == who and card.method == method]
    return max(fitting, key=lambda card: len(card.edited), default=None)


def _read(path: Path) -> LayerCard | None:
    """A card that is kept there; a damaged one is told and passed over."""
    if not path.exists():
        return None
    try:
        return LayerCard.load(path)
    except EngramFileError as error:
        log.warning("%s", error)
        return None


def _chosen(lm: LanguageModel, facts: Sequence[Fact], keep: str, seed: int) -> list[Fact]:
    different = {(fact.prompt_text, fact.subject): fact for fact in as_edits(facts, seed)}
    return known(lm, list(different.values())) if keep == "known" else list(different.values())


def _no_facts(lm: LanguageModel, facts: Sequence[Fact] | None) -> str:
    if facts is None:
        return (
            f"{lm.name} knows none of the bundled facts that it was asked, so there is nothing to choose a layer by; give facts "
            "that it knows (facts=..., or engram layers MODEL --facts FILE), or name the layer"
        )
    return (
        f"none of the {len(facts)} facts can be used to choose a layer of {lm.name}; expected facts with target_true, or of a "
        "relation that has several objects, whose true object is the model's own answer (keep='all': whatever it answers)"
    )


def _with_truth(lm: LanguageModel, fact: Fact) -> Fact:
    """With what the model says so far, where neither the caller nor the bundled table tells what is
    true.
    """
    fact = pocket.evidence_for(fact)
    return (
        fact if fact.target_true is not None else replace(fact, target_true=true_answer(lm, fact))
    )


def _preset(method: str, lm: LanguageModel) -> dict[str, Any]:
    """The settings by which the method edits this model, but for the layer."""
    try:
        found = preset(method, lm.name)
    except FileNotFoundError:  # a method without published numbers
        return {}
    return {
        name: value
        for name, value in found.items()
        if name not in ("layer", "layers", "depth", "corpus")
    }
