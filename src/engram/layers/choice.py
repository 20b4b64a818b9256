"""Which layer to edit: edit facts that the model knows at many layers, keep the results as a card,
and take the layer whose edits are best.

A trace's strongest layer need not be the best one to edit (Hase et al. 2023, arXiv:2301.04213), so
a card holds both, and edits decide. Knows where cards are kept. Refuses to know what is measured
(evidence.py) and what follows from it (card.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from engram import pocket
from engram.checks import Count, Natural, Seed, checked_call
from engram.edit.recipe import library_versions
from engram.editors.methods import check_method
from engram.editors.presets import preset
from engram.editors.second_moments.corpora import Bundled, Corpus, as_corpus
from engram.errors import EngramFileError, FactError
from engram.evaluate.verify import true_answer
from engram.facts import Fact
from engram.files.cache_folder import cache_folder, sha256_of, written_if_possible
from engram.layers.candidates import as_edits, bundled_edits, known
from engram.layers.card import FORMAT_VERSION, LayerCard
from engram.layers.evidence import Budget, EditRecipe, Measurements, measure, trace_settings
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress
from engram.runs.identity import identity

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "cards"  # cards of named models, a file each
# size of the card that layer="auto" measures where there is none: half a minute on pocket
_QUICK_FACTS, _QUICK_LAYERS = 4, 8


@checked_call
def layer_card(
    lm: LanguageModel,
    facts: Sequence[Fact] | None = None,
    *,
    keep: Literal["known", "all"] = "known",
    edits: Count = 20,
    traces: Natural = 20,
    estimates: Natural = 40,
    layer_step: Count | None = None,
    refine: bool = True,
    method: str = "rome",
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: Count | None = None,
    seed: Seed = 0,
    cache_dir: str | Path | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> LayerCard:
    """Measure which layer of a model to edit: trace facts that it knows, and edit each of them at
    every layer.

    A card that was measured before is read, and a killed run resumes. Cards are kept under a name
    made of everything that they depend on, so that other weights give another card.

    Args:
        facts: edits with `target_true`, or facts that state what is true, which are edited to
            another object of their relation; default: facts of the bundled table that this model
            knows, in random order.
        keep: which of `facts` count: "known", those whose true object is the model's answer, or
            "all".
        edits: facts that are edited, one at a time, at each tested layer; the card's advice rests
            on them.
        traces: facts that are traced exactly.
        estimates: facts whose trace is estimated to first order.
        layer_step: test every Nth layer first; default: all layers of a model of 12 or fewer, about
            12 of a deeper one.
        refine: then test the layers between the best of those and its neighbours.
        method: how to edit: any of `METHODS` that takes a layer.
        corpus, tokens: of the second moments, see `second_moments`; default: the model's preset.
            All layers are measured in one pass and held in memory: d_ff x d_ff float64 each.
        seed: of facts, objects, contexts and sampled text.
        cache_dir: default: $ENGRAM_CACHE, or ~/.cache/engram.
        progress: called with (what is done, done, total).
        settings: the method's other settings.
    Returns:
        The card; `best` is the layer to edit, `layers(count)` the layers for a method that edits
        several.
    Raises:
        FactError: no facts to edit, or none that the model knows.
        SettingError: a method without a layer, or a setting out of its range.
        UnsupportedModelError: a family that cannot be edited.
    Example:
        >>> small = {"edits": 1, "traces": 1, "estimates": 0, "layer_step": 7, "refine": False}
        >>> fact = engram.Fact("ABBA", "{} comes originally from", "Japan", "Sweden")
        >>> card = engram.layer_card(lm, [fact], keep="all", **small, tokens=500, steps=3)
        >>> card.layers_tested
        [0, 7]
    """
    budget = Budget(edits, traces, estimates, layer_step, refine)
    settings = {name: value for name, value in settings.items() if value is not None}
    if corpus is None:  # the model's, whatever the method: other presets have none
        corpus = preset("rome", lm.name).get("corpus")
    recipe = EditRecipe(method, settings, corpus, tokens, seed)
    # here and not by the first edit, which comes after all traces
    check_method(method, settings, lm.name)
    lm.parts.mlp_out_name(0)  # a family that cannot be edited raises before anything is measured
    about = _recorded_settings(lm, recipe)
    model_id, versions, traced = identity(lm), library_versions(), trace_settings(lm)
    table = Bundled().digest() if facts is None else [fact.to_dict() for fact in facts]
    depends_on = [FORMAT_VERSION, versions["engram"], method, about, traced]
    depends_on += [asdict(budget), table, keep]
    key = sha256_of(json.dumps(depends_on, sort_keys=True, default=repr))
    path = cache_folder("layer_cards", cache_dir) / f"{model_id[:16]}-{key[:16]}.json"
    if (card := _load(path)) is not None:
        return card
    if facts is None:
        measured = bundled_edits(lm, budget.facts, seed)
    else:
        measured = _distinct_edits(lm, facts, keep, seed)
    if not measured:
        raise FactError(_no_facts(lm, facts))
    partial = path.with_suffix(".partial")
    with _measurements(partial) as file:
        evidence = tuple(measure(lm, measured, budget, recipe, file, progress))
        seconds = round(file.seconds(), 1)
    # as a file gives it back, so that a measured card equals its loaded self
    about = json.loads(json.dumps(about, default=repr))
    card = LayerCard(
        lm.name, model_id, lm.n_layers, method, about, traced, evidence, seconds, versions
    )
    with written_if_possible(path.parent):
        card.save(path)  # before the measurements go: a kill in between leaves a file too many
        partial.unlink(missing_ok=True)
    return card


@contextmanager
def _measurements(partial: Path) -> Iterator[Measurements]:
    """Open the file of measurements, whose name says what they are about; one in memory where it
    cannot be used.
    """
    with ExitStack() as stack:
        file = None
        with written_if_possible(partial.parent):
            file = stack.enter_context(Measurements.writing(partial, {}))
        yield file or stack.enter_context(Measurements.writing(None, {}))


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
    """Return `count` consecutive layers to edit by this model's card: what `layer="auto"` means.

    Of the cards for this model and method, the bundled one of the pocket model included, the one
    with the most edited facts decides. Where there is none, a quick one is measured: four facts at
    no more than eight layers.

    Args:
        facts: those to be edited; the quick card takes them where the model knows none of the
            bundled table.
        method: how to edit; the best layer of one method need not be that of another.
        settings: of `layer_card`, for the quick one: those of the method, such as `contexts`, and
            `corpus`, `tokens` and `seed`.
    Raises:
        FactError: there is no card, the model knows nothing of the bundled table, and no facts are
            given.
    """
    card = find_card(lm, method, cache_dir)
    if card is None:
        log.info("no layer card of %s; measuring a quick one of %d facts", lm.name, _QUICK_FACTS)
        # facts that the model knows are better evidence than the caller's, which it may not know
        known_edits = bundled_edits(lm, _QUICK_FACTS, settings.get("seed", 0))
        given_edits = [_with_truth(lm, fact) for fact in facts[:_QUICK_FACTS] if not known_edits]
        card = layer_card(
            lm,
            known_edits or given_edits or None,
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
    log.info("%s", card.reason())  # a layer that was chosen for the caller is never silent
    return card.layers(count)


def find_card(
    lm: LanguageModel, method: str = "rome", cache_dir: str | Path | None = None
) -> LayerCard | None:
    """Return the card of this model, in its present weights, and of this method that has the most
    edited facts; None where there is none.
    """
    model_id = identity(lm)
    cached = sorted(cache_folder("layer_cards", cache_dir).glob(f"{model_id[:16]}-*.json"))
    paths = (*cached, *sorted(SHIPPED.glob("*.json")))
    cards = [card for path in paths if (card := _load(path)) is not None]
    fitting = [card for card in cards if card.identity == model_id and card.method == method]
    # Not the newest: a quick card of four facts must not hide one of twenty.
    return max(fitting, key=lambda card: len(card.edited), default=None)


def _load(path: Path) -> LayerCard | None:
    """Load a cached card; log and ignore a damaged file."""
    try:
        return LayerCard.load(path) if path.exists() else None
    except (EngramFileError, OSError) as error:
        log.warning("%s", error)
        return None


def _distinct_edits(lm: LanguageModel, facts: Sequence[Fact], keep: str, seed: int) -> list[Fact]:
    """Return one edit for each prompt and subject, by which finished traces are recognised."""
    distinct = {(fact.prompt_text, fact.subject): fact for fact in as_edits(facts, seed)}
    return known(lm, list(distinct.values())) if keep == "known" else list(distinct.values())


def _no_facts(lm: LanguageModel, facts: Sequence[Fact] | None) -> str:
    if facts is None:
        return (
            f"{lm.name} knows none of the bundled facts that were tried, so no layer can be "
            "chosen; give facts that it knows (facts=..., or engram layers MODEL --facts FILE), or "
            "name the layer"
        )
    return (
        f"none of the {len(facts)} facts can be used to choose a layer of {lm.name}; expected "
        "facts with target_true, or of a relation that has several objects, whose true object is "
        "the model's own answer (keep='all': whatever it answers)"
    )


def _with_truth(lm: LanguageModel, fact: Fact) -> Fact:
    """Return the fact with the model's present answer as the true object, where neither the caller
    nor the bundled table names one.
    """
    fact = pocket.evidence_for(fact)
    if fact.target_true is not None:
        return fact
    return replace(fact, target_true=true_answer(lm, fact))


def _recorded_settings(lm: LanguageModel, recipe: EditRecipe) -> dict[str, Any]:
    """Return all settings of a card's edits: the preset's for this model, but for the layer, with
    the caller's.
    """
    published = preset(recipe.method, lm.name)
    for name in ("layer", "layers", "depth", "corpus"):
        published.pop(name, None)
    text = as_corpus(recipe.corpus, recipe.seed).digest()
    caller = {"corpus": text, "tokens": recipe.tokens, "seed": recipe.seed}
    return {**published, **recipe.settings, **caller}
