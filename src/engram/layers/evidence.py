"""Evidence for a layer card: traces of facts, and how edits of them go at each layer.

Stands above locate, editors and evaluate, which do not know each other. Refuses to know what
follows from the numbers (see layer_cards). Each number is written down when it is there, so that a
killed run goes on where it was.
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from engram.editors.contexts import sample_contexts
from engram.editors.methods import method_named
from engram.editors.second_moments.corpora import Corpus
from engram.editors.second_moments.measure import second_moments
from engram.errors import EngramError, NonFiniteError, SettingError
from engram.evaluate.receipt import Receipt
from engram.evaluate.verify import verify
from engram.facts import Fact
from engram.layers.card import EditOutcome, Evidence
from engram.locate.settings import TraceConfig, default_window
from engram.locate.trace_input import TracePrompt
from engram.locate.tracing import trace_prompts
from engram.model.language_model import LanguageModel
from engram.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How much is measured.

    Args:
        edits: facts that are edited, one at a time, at every layer that is tried.
        traces: facts that are traced exactly; estimates: facts whose trace is estimated, which is
            many times cheaper.
        layer_step: every so many layers are tried at first; default: all of a model of 12 layers or
            fewer, else so many that 12 are.
        refine: whether the layers between are tried too, around the best of those.
    Raises:
        SettingError: no edits, or a negative number.
    """

    edits: int = 20
    traces: int = 20
    estimates: int = 40
    layer_step: int | None = None
    refine: bool = True

    def __post_init__(self) -> None:
        if (
            self.edits < 1
            or min(self.traces, self.estimates) < 0
            or (self.layer_step is not None and self.layer_step < 1)
        ):
            raise SettingError(
                f"edits={self.edits}, traces={self.traces}, estimates={self.estimates}, layer_step={self.layer_step}: a card needs at "
                "least one edited fact and a step of at least one layer; facts to trace may be 0"
            )

    @property
    def facts(self) -> int:
        return max(self.edits, self.traces, self.estimates)

    def coarse(self, n_layers: int) -> list[int]:
        return list(range(0, n_layers, self.layer_step or -(-n_layers // 12)))

    def between(self, coarse: Sequence[int], best: int, n_layers: int) -> list[int]:
        """Layers between the best of the coarse ones and its neighbours."""
        at = coarse.index(best)
        low = coarse[at - 1] if at else -1
        high = coarse[at + 1] if at + 1 < len(coarse) else n_layers
        return [layer for layer in range(low + 1, high) if layer != best] if self.refine else []


@dataclass(frozen=True)
class EditRecipe:
    """How facts are edited: a method that takes a layer, and its settings."""

    method: str
    settings: dict[str, Any]
    corpus: Corpus | str | Path | Sequence[str] | None = None
    tokens: int | None = None
    seed: int = 0
    _takes: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        takes = dict(inspect.signature(method_named(self.method)).parameters)
        if not {"layer", "layers"} & set(takes) and all(
            each.kind is not each.VAR_KEYWORD for each in takes.values()
        ):
            raise SettingError(
                f"method={self.method!r} has no setting layer or layers, so it has no layer to choose"
            )
        if given := {"layer", "layers"} & set(self.settings):
            raise SettingError(
                f"{' and '.join(given)} is what a layer card is to find; leave it out"
            )
        object.__setattr__(self, "_takes", takes)

    def at(self, layer: int) -> dict[str, Any]:
        return {"layer": layer} if "layer" in self._takes else {"layers": [layer]}

    def prepared(
        self, lm: LanguageModel, layers: Sequence[int], progress: Progress
    ) -> dict[str, Any]:
        """What all edits share, computed once: second moments of all layers in one pass, and
        contexts.
        """
        shared = dict(self.settings)
        if "contexts" in self._takes and shared.get("contexts") is None:
            shared["contexts"] = sample_contexts(lm, seed=self.seed)
        if "second_moments" in self._takes:
            shared["second_moments"] = second_moments(
                lm, layers, self.corpus, self.tokens, seed=self.seed, progress=progress
            )
        return shared


def measure(
    lm: LanguageModel,
    facts: Sequence[Fact],
    plan: Budget,
    edits: EditRecipe,
    notes: ResumeLog,
    progress: Progress,
) -> list[Evidence]:
    """Trace and edit, going on from `notes`.

    Args:
        facts: edits, with the true object; the first ones are used for each purpose.
    """
    exact = _traces(lm, facts[: plan.traces], "exact", notes, progress)
    estimated = _traces(lm, facts[: plan.estimates], "attribution", notes, progress)
    edited = facts[: plan.edits]
    coarse = plan.coarse(lm.n_layers)
    outcomes = _edit_at(lm, edited, coarse, edits, notes, progress)
    best = max(
        coarse, key=lambda layer: fmean(outcomes[i, layer].score for i in range(len(edited)))
    )
    outcomes |= _edit_at(
        lm, edited, plan.between(coarse, best, lm.n_layers), edits, notes, progress
    )
    return [
        Evidence(
            replace(fact, paraphrases=(), neighbours=()),
            exact[i] if i < len(exact) else None,
            estimated[i] if i < len(estimated) else None,
            {
                layer: outcome
                for (number, layer), outcome in sorted(outcomes.items())
                if number == i
            },
        )
        for i, fact in enumerate(facts[: plan.facts])
    ]


def trace_settings(lm: LanguageModel) -> dict[str, Any]:
    """Of the traces on a card: windows of MLPs, restored at the subject's last token."""
    return {
        "sites": ["mlp"],
        "positions": "subject_last",
        "window": default_window(lm.n_layers),
        "samples": 10,
        "noise": "s3",
    }


def _traces(
    lm: LanguageModel, facts: Sequence[Fact], method: str, notes: ResumeLog, progress: Progress
) -> list[tuple[float, ...]]:
    """Effects by layer, one row a fact."""
    what = {"exact": "tracing", "attribution": "estimating traces"}[method]
    left = {
        (fact.prompt_text, fact.subject): i
        for i, fact in enumerate(facts)
        if notes.get(f"{method} {i}") is None
    }
    asked = [
        TracePrompt(
            facts[i].prompt_text,
            facts[i].subject,
            facts[i].target_true,
            start=facts[i].subject_start,
        )
        for i in left.values()
    ]
    config = TraceConfig.of(**trace_settings(lm), method=method)
    done = len(facts) - len(left)
    for trace in trace_prompts(lm, asked, config) if asked else ():
        effects = [round(each, 6) for each in trace.effects("mlp")[0].tolist()]
        notes.put(f"{method} {left[trace.prompt, trace.subject]}", effects)
        done += 1
        progress(what, done, len(facts))
    return [tuple(notes.get(f"{method} {i}")) for i in range(len(facts))]


def _edit_at(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layers: Sequence[int],
    edits: EditRecipe,
    notes: ResumeLog,
    progress: Progress,
) -> dict[tuple[int, int], EditOutcome]:
    """How the edit of each fact at each layer goes, by (fact, layer)."""
    todo = [(i, layer) for i in range(len(facts)) for layer in layers]
    missing = [(i, layer) for i, layer in todo if notes.get(f"edit {i} {layer}") is None]
    shared = edits.prepared(lm, layers, progress) if missing else {}
    done = len(todo) - len(missing)
    for i, layer in missing:
        progress("editing", done, len(todo))
        outcome = _outcome(lm, facts[i], edits.method, seed=edits.seed, **edits.at(layer), **shared)
        notes.put(f"edit {i} {layer}", asdict(outcome))
        done += 1
    progress("editing", done, len(todo))
    return {(i, layer): EditOutcome(**notes.get(f"edit {i} {layer}")) for i, layer in todo}


def _outcome(lm: LanguageModel, fact: Fact, method: str, **settings: Any) -> EditOutcome:
    """The edit's receipt in short; an edit that cannot be computed or applied has the worst score."""
    try:
        edit = method_named(method)(lm, [fact], **settings)
        receipt = verify(
            lm, edit, text=fact.prompt_text, continuation_tokens=0
        )  # perplexity is not kept: of little text
    except NonFiniteError as error:
        log.warning("the edit of %r failed: %s", fact.subject, error)
        return EditOutcome(0.0, 0.0)
    shares = (receipt.share(kind) for kind in ("rewrite", "paraphrase", "neighbourhood"))
    return EditOutcome(
        round(receipt_score(receipt), 6),
        *(None if share is None else round(share, 6) for share in shares),
    )


def receipt_score(receipt: Receipt) -> float:
    """One number for a receipt: harmonic mean of efficacy, paraphrase and neighbourhood margins, as
    far as they were measured.

    A margin is the mean difference between the probabilities of the wanted and the unwanted answer,
    moved to [0, 1]; successes alone would tie on a single fact.
    """
    margins = [(1 + margin) / 2 for margin in receipt.margins() if margin is not None]
    if not margins:
        raise EngramError("the receipt measured nothing, so layers cannot be compared")
    return harmonic_mean(margins)


class ResumeLog:
    """Numbers by name in a file of JSON lines that grows as they are measured; a line that a kill
    tore is measured again.

    Attributes:
        seconds: that earlier runs took for what is noted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds, self._known, self._began = 0.0, dict[str, Any](), time.monotonic()
        lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
        for line in lines:
            try:
                name, value, self.seconds = json.loads(line)
            except ValueError:
                continue
            self._known[name] = value
        if lines:
            log.info("going on with %d numbers of %s", len(self._known), path)
            with path.open("a", encoding="utf8") as file:
                file.write("\n")  # ends a torn line

    def get(self, name: str) -> Any:
        """The number of that name, None where it is still to be measured."""
        return self._known.get(name)

    def put(self, name: str, value: Any) -> None:
        self._known[name] = value
        with self.path.open("a", encoding="utf8") as file:
            file.write(
                json.dumps([name, value, round(self.seconds + time.monotonic() - self._began, 1)])
                + "\n"
            )
