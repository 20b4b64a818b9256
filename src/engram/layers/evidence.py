"""Evidence for a layer card: traces of facts, and results of edits of them at each layer.

    1. trace every fact                                   traces, estimates
    2. edit every fact at every Nth layer                 layers 0, 4, 8 of a model of 10
    3. edit every fact between the best one and its       best 4: layers 1, 2, 3, 5, 6, 7
       neighbours

Knows locate, editors and evaluate, which do not know each other. Refuses to know what follows from
the numbers (see card.py). Every number goes to a run file at once, so that a killed run resumes.
"""

from __future__ import annotations

import inspect
import json
import logging
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Annotated, Any, NamedTuple, TypeVar

from annotated_types import Ge, Len

from engram.checks import Count, Natural, Seed, check_fields
from engram.editors.methods import method_named
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import TOKENS_PER_KEY, second_moments
from engram.errors import EngramError, EngramFileError, NonFiniteError, SettingError
from engram.evaluate.receipt import Receipt
from engram.evaluate.verify import verify
from engram.facts import Fact
from engram.files.cache_folder import written_if_possible
from engram.files.forms import parsed
from engram.files.run_file import RunFile
from engram.layers.card import EditOutcome, Evidence
from engram.locate.settings import TraceConfig, default_window
from engram.locate.trace_input import TracePrompt
from engram.locate.tracing import trace_prompts
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.progress import Progress, Work, announce

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """How much is measured.

    Args:
        edits: facts that are edited, one at a time, at every tested layer.
        traces: facts that are traced exactly.
        estimates: facts whose trace is estimated, which is many times cheaper.
        layer_step: test every Nth layer first; default: all layers of a model of 12 or fewer, about
            12 of a deeper one.
        refine: then test the layers between the best of those and its neighbours.
    Raises:
        SettingError: no edits, or a negative number.
    """

    edits: Count = 20
    traces: Natural = 20
    estimates: Natural = 40
    layer_step: Count | None = None
    refine: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def facts(self) -> int:
        """How many facts are measured in all."""
        return max(self.edits, self.traces, self.estimates)

    def coarse(self, n_layers: int) -> list[int]:
        """Return the layers to test first."""
        return list(range(0, n_layers, self.layer_step or -(-n_layers // 12)))

    def between(self, coarse: Sequence[int], best: int, n_layers: int) -> list[int]:
        """Return the layers between the best of the coarse ones and its neighbours.

        Of 10 layers with coarse [0, 4, 8]: around 4 these are 1, 2, 3, 5, 6, 7; around 8, the last
        one, 5, 6, 7, 9.
        """
        if not self.refine:
            return []
        at = coarse.index(best)
        low = coarse[at - 1] if at else -1
        high = coarse[at + 1] if at + 1 < len(coarse) else n_layers
        return [layer for layer in range(low + 1, high) if layer != best]


@dataclass(frozen=True)
class EditRecipe:
    """How facts are edited: a method that takes a layer, and its settings.

    Raises:
        SettingError: the method takes no layer, or the settings name one.
    """

    method: str
    settings: dict[str, Any]
    corpus: Corpus | str | Path | Sequence[str] | None = None
    tokens: Count | None = None
    seed: Seed = 0
    _takes: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        check_fields(self)
        parameters = inspect.signature(method_named(self.method)).parameters
        if not {"layer", "layers"} & set(parameters):
            raise SettingError(
                f"method={self.method!r} has no setting layer or layers, so it has no layer to "
                "choose"
            )
        if given := {"layer", "layers"} & set(self.settings):
            raise SettingError(
                f"{' and '.join(given)} is what a layer card is to find; leave it out"
            )
        object.__setattr__(self, "_takes", frozenset(parameters))

    def at(self, layer: int) -> dict[str, Any]:
        """Return the setting that names the layer."""
        return {"layers": [layer]} if "layers" in self._takes else {"layer": layer}

    def shared(
        self, lm: LanguageModel, layers: Sequence[int], progress: Progress
    ) -> dict[str, Any]:
        """Return the settings of all edits, with the second moments of all layers, which one pass
        computes.
        """
        settings = {**self.settings, "seed": self.seed}
        if "second_moments" in self._takes:
            settings["second_moments"] = second_moments(
                lm, layers, self.corpus, self.tokens, seed=self.seed, progress=progress
            )
        return settings


class _NumbersRow(NamedTuple):
    value: str
    seconds: Annotated[float, Ge(0)]


class Measurements(RunFile):
    """The file of a run that is not finished: numbers by name. Made by `writing`.

    A cache: numbers that are damaged are measured again, and those that cannot be written are used.
    """

    what, made_by = "measurements of a layer card", "engram.layer_card"
    tables = "CREATE TABLE numbers (name TEXT PRIMARY KEY, value TEXT, seconds REAL)"
    mark = "numbers"

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        super().__init__(connection, path)
        self._unwritten: dict[str, tuple[Any, float]] = {}

    def get(self, name: str, form: type[T] | Any) -> T | None:
        """Return the numbers of that name as a value of `form`, None where they are not measured
        yet.
        """
        if name in self._unwritten:
            value: T = parsed(form, json.dumps(self._unwritten[name][0]), name)
            return value
        query = "SELECT value, seconds FROM numbers WHERE name = ?"
        try:
            for row in self._rows(_NumbersRow, "numbers", query, (name,)):
                stored: T = parsed(form, row.value, f"{self.path}, {name},")
                return stored
        except (EngramFileError, sqlite3.Error) as error:
            log.warning("%s; measuring it again", error)
        return None

    def measured(self, name: str, form: type[T] | Any) -> T:
        """Return the numbers of that name, which are measured."""
        value: T | None = self.get(name, form)
        assert value is not None, f"{name} is measured"
        return value

    def put(self, name: str, value: Any, seconds: float) -> None:
        """Write numbers, and how long measuring them took."""
        self._unwritten[name] = value, seconds
        with written_if_possible(self.path.parent), self._connection:
            row = (name, json.dumps(value), seconds)
            self._connection.execute("INSERT OR REPLACE INTO numbers VALUES (?, ?, ?)", row)
            del self._unwritten[name]

    def seconds(self) -> float:
        """Return how long all measurements took, those of earlier processes included."""
        query = "SELECT TOTAL(seconds) FROM numbers"
        written = float(self._connection.execute(query).fetchone()[0])
        return written + sum(seconds for _, seconds in self._unwritten.values())


def measure(
    lm: LanguageModel,
    facts: Sequence[Fact],
    budget: Budget,
    recipe: EditRecipe,
    file: Measurements,
    progress: Progress,
) -> list[Evidence]:
    """Trace and edit facts, except for what `file` holds already.

    Args:
        facts: edits, with the true object; each purpose takes the first ones.
    """
    edited = facts[: budget.edits]
    work = _work(lm, facts, budget, recipe, file, progress)
    exact = _traces(lm, facts[: budget.traces], "exact", file, progress, work)
    estimated = _traces(lm, facts[: budget.estimates], "attribution", file, progress, work)
    # Estimates before edits: they are cheap, and a run that is cut short then has all of them.
    coarse = budget.coarse(lm.n_layers)
    outcomes = _edit_at(lm, edited, coarse, recipe, file, progress, work)
    # by mean score, as the card decides; of equal layers the first
    best = max(
        coarse, key=lambda layer: fmean(outcomes[i, layer].score for i in range(len(edited)))
    )
    refined = budget.between(coarse, best, lm.n_layers)
    work.finish("editing")
    work.expect("editing", work.done("editing") + len(edited) * len(refined), 0.0)
    outcomes |= _edit_at(lm, edited, refined, recipe, file, progress, work)
    work.finish("editing")
    # with the coarse and the refined layers together, every fact has the same ones
    layers = sorted({layer for _, layer in outcomes})
    return [
        Evidence(
            replace(fact, paraphrases=(), neighbours=()),
            exact[i] if i < len(exact) else None,
            estimated[i] if i < len(estimated) else None,
            {layer: outcomes[i, layer] for layer in layers} if i < len(edited) else {},
        )
        for i, fact in enumerate(facts[: budget.facts])
    ]


def _work(
    lm: LanguageModel,
    facts: Sequence[Fact],
    budget: Budget,
    recipe: EditRecipe,
    file: Measurements,
    progress: Progress,
) -> Work:
    """Return what is left to do for a card, announced."""
    coarse = budget.coarse(lm.n_layers)
    edited = range(len(facts[: budget.edits]))
    effects_form = _effects_form(lm)
    exact, estimated = (
        sum(file.get(f"{method} {i}", effects_form) is None for i in range(len(facts[:count])))
        for method, count in (("exact", budget.traces), ("attribution", budget.estimates))
    )
    todo = [f"edit {i} {layer}" for i in edited for layer in coarse]
    editing = sum(file.get(name, EditOutcome) is None for name in todo)
    work = Work(
        "layer card",
        f"tracing {max(exact, estimated)} facts, and editing {len(edited)} at {len(coarse)} layers",
        "kept in the cache; a stopped measurement is resumed",
    )
    pace = seconds_per_token(lm, progress)
    # ten samples of each prompt through half of the blocks for every layer; a pass and its gradient
    work.expect("tracing", exact, 10 * lm.n_layers * 4 * pace)
    work.expect("estimating traces", estimated, 400 * pace)
    tokens = recipe.tokens or TOKENS_PER_KEY * lm.parts.mlp_width(0)
    work.expect("what edits share", 1, 2.5 * tokens * pace)
    # with the layers on both sides of the best, which are edited after the others. An edit takes
    # about 20 steps of 20 contexts of 12 tokens, back and forth, and its receipt
    gap = coarse[1] - coarse[0] - 1 if budget.refine and len(coarse) > 1 else 0
    work.expect("editing", editing + 2 * gap * len(edited), 17_000 * pace)
    announce(progress, work)
    return work


def trace_settings(lm: LanguageModel) -> dict[str, Any]:
    """Return the settings of a card's traces: windows of MLPs, restored at the subject's last
    token.
    """
    return {
        "sites": ["mlp"],
        "positions": "subject_last",
        "window": default_window(lm.n_layers),
        "samples": 10,
        "noise": "s3",
    }


def _effects_form(lm: LanguageModel) -> Any:
    """Return the form of a stored trace: one number a layer."""
    return Annotated[tuple[float, ...], Len(lm.n_layers, lm.n_layers)]


def _traces(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: str,
    file: Measurements,
    progress: Progress,
    work: Work,
) -> list[tuple[float, ...]]:
    """Return effects by layer, one row for each fact."""
    what = {"exact": "tracing", "attribution": "estimating traces"}[method]
    effects_form = _effects_form(lm)
    # a finished trace comes back with its prompt and subject, not with its fact's index
    missing = {
        (fact.prompt_text, fact.subject): i
        for i, fact in enumerate(facts)
        if file.get(f"{method} {i}", effects_form) is None
    }
    prompts = [
        TracePrompt(
            facts[i].prompt_text,
            facts[i].subject,
            facts[i].target_true,
            start=facts[i].subject_start,
        )
        for i in missing.values()
    ]
    config = TraceConfig.of(**trace_settings(lm), method=method)
    done, last = len(facts) - len(missing), time.monotonic()
    # one call for all, which runs prompts in batches and yields each when it is done
    for trace in trace_prompts(lm, prompts, config) if prompts else ():
        # six digits: a card is read by people, and bootstrap intervals are far wider
        effects = [round(effect, 6) for effect in trace.effects("mlp")[0].tolist()]
        now = time.monotonic()
        file.put(f"{method} {missing[trace.prompt, trace.subject]}", effects, now - last)
        done, last = done + 1, now
        work.did(what)
        progress(what, done, len(facts))
    return [file.measured(f"{method} {i}", effects_form) for i in range(len(facts))]


def _edit_at(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layers: Sequence[int],
    recipe: EditRecipe,
    file: Measurements,
    progress: Progress,
    work: Work,
) -> dict[tuple[int, int], EditOutcome]:
    """Return the result of editing each fact at each layer, by (fact, layer)."""
    # fact by fact, so that a run that is cut short has whole facts
    todo = [(i, layer) for i in range(len(facts)) for layer in layers]
    missing = [at for at in todo if file.get("edit {} {}".format(*at), EditOutcome) is None]
    last = time.monotonic()  # before what edits share, so that its time counts for the first one
    # `work` counts it, so that nothing else is announced
    shared = recipe.shared(lm, layers, lambda *report: progress(*report)) if missing else {}
    work.did("what edits share")
    done = len(todo) - len(missing)
    for i, layer in missing:
        progress("editing", done, len(todo))
        outcome = _outcome(lm, facts[i], recipe.method, **recipe.at(layer), **shared)
        now = time.monotonic()
        file.put(f"edit {i} {layer}", asdict(outcome), now - last)
        done, last = done + 1, now
        work.did("editing")
    progress("editing", done, len(todo))
    return {(i, layer): file.measured(f"edit {i} {layer}", EditOutcome) for i, layer in todo}


def _outcome(lm: LanguageModel, fact: Fact, method: str, **settings: Any) -> EditOutcome:
    """Return the edit's receipt in short; an edit that cannot be computed has score 0."""
    try:
        edit = method_named(method)(lm, [fact], **settings)
        # the shortest possible text: a receipt measures perplexity, which a card does not keep
        receipt = verify(lm, edit, text=fact.prompt_text, continuation_tokens=0)
    except NonFiniteError as error:
        log.warning("the edit of %r failed: %s", fact.subject, error)
        return EditOutcome(0.0, 0.0)
    shares = (receipt.share(kind) for kind in ("rewrite", "paraphrase", "neighbourhood"))
    return EditOutcome(
        round(receipt_score(receipt), 6),
        *(None if share is None else round(share, 6) for share in shares),
    )


def receipt_score(receipt: Receipt) -> float:
    """Return one number for a receipt: the harmonic mean of its efficacy, paraphrase and
    neighbourhood margins, those that were measured.

    A margin is the mean difference between the probabilities of the wanted and the unwanted answer,
    moved to [0, 1]. Shares of successes would tie on a single fact, where most are 0 or 1.

    Raises:
        EngramError: a receipt without any of them.
    """
    margins = [(1 + margin) / 2 for margin in receipt.margins() if margin is not None]
    if not margins:
        raise EngramError("the receipt measured nothing, so layers cannot be compared")
    return harmonic_mean(margins)
