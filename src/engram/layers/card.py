"""LayerCard: measurements of edits at each layer of a model, the layer to edit that follows from
them, and how certain that is.

Ties are decided the same way everywhere: the best layer is the first of those with the highest mean
score; a range of layers for a method that edits several is the deepest of the best ranges (see
`LayerCard.layers`); and a layer is *tied with the best* where the bootstrap interval of its
fact-by-fact score difference to the best layer includes 0.

Knows numbers of facts and layers, and a JSON file. Refuses to know models: evidence.py measures,
choice.py keeps cards. The question whether traces show where to edit is that of Hase et al. 2023,
arXiv:2301.04213.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePath
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Le, Predicate
from typing_extensions import TypedDict

from engram.bootstrap import DEFAULT, Array, Mean, means, spearman
from engram.edit.recipe import library_versions
from engram.errors import EngramFileError, SettingError
from engram.facts import Fact
from engram.files.atomic import atomic_file
from engram.files.checksums import stamped
from engram.files.forms import read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram.plots.curves import Curve

FORMAT_VERSION = 1
_FACT = ("subject", "prompt", "target", "target_true")  # what a card says about a fact
_SHARES = {  # of a score, in pictures: colour, line and marker
    "efficacy": ("#e8902a", "o-"),
    "paraphrase": ("#3b7dd8", "s-"),
    "neighbourhood": ("#8a8a8a", "^-"),
}


Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class EditOutcome:
    """The result of one edit at one layer: shares of its prompts, and one number (see
    `evidence.receipt_score`).
    """

    score: Share
    efficacy: Share | None = None
    paraphrase: Share | None = None
    neighbourhood: Share | None = None


@dataclass(frozen=True)
class Evidence:
    """The measurements of one fact.

    Attributes:
        fact: as it was edited, without paraphrases and neighbours.
        trace: indirect effect by layer of MLP windows at the subject's last token, probability;
            None: not traced.
        attribution: first-order estimate of the trace.
        edits: layer -> result of the edit there.
    """

    fact: Fact
    trace: tuple[float, ...] | None = None
    attribution: tuple[float, ...] | None = None
    edits: dict[int, EditOutcome] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRow:
    """One layer, averaged over facts; None where it was not measured."""

    layer: int
    trace: Mean | None
    attribution: Mean | None
    efficacy: float | None
    paraphrase: float | None
    neighbourhood: float | None
    score: Mean | None


@dataclass(frozen=True)
class LayerCard:
    """Which layer of a model to edit, and why.

    Attributes:
        model: its name.
        identity: sha256 of weights, config and tokenizer, which recognises the model.
        method, settings: of the edits.
        traces: settings of the traces, with their window.
        evidence: one item for each fact.
        seconds: time that measuring took.
    Raises:
        SettingError: no evidence, or edits of different facts at different layers.
    """

    model: str
    identity: str
    n_layers: int
    method: str
    settings: dict[str, Any]
    traces: dict[str, Any]
    evidence: tuple[Evidence, ...]
    seconds: float
    versions: dict[str, str] = field(default_factory=library_versions)

    def __post_init__(self) -> None:
        if not self.edited:
            raise SettingError(
                "a layer card needs at least one fact that was edited at one layer or more"
            )
        if any(set(fact.edits) != set(self.edited[0].edits) for fact in self.edited):
            raise SettingError(
                "a layer card compares layers: every fact has to be edited at the same ones"
            )
        if not set(self.layers_tested) <= set(range(self.n_layers)):
            raise SettingError(f"edits at layers {self.layers_tested} of {self.n_layers}")
        window = self.traces.get("window")
        if type(window) is not int or window < 1:
            raise SettingError(f"traces.window={window!r}, expected the number of layers restored")
        curves = (curve for fact in self.evidence for curve in (fact.trace, fact.attribution))
        if any(curve is not None and len(curve) != self.n_layers for curve in curves):
            raise SettingError(f"a trace needs an effect for each of {self.n_layers} layers")

    # -- what follows ------------------------------------------------------------------------------

    @property
    def edited(self) -> list[Evidence]:
        """The facts that were edited; others were traced only."""
        return [fact for fact in self.evidence if fact.edits]

    @property
    def layers_tested(self) -> list[int]:
        """The layers that were edited."""
        return sorted(self.edited[0].edits)

    @cached_property
    def rows(self) -> tuple[LayerRow, ...]:
        """One row for each layer of the model."""
        traced, estimated = self._effects("trace"), self._effects("attribution")
        # not every layer was edited, so rows take their scores by layer
        scored = dict(zip(self.layers_tested, means(self._scores), strict=True))
        return tuple(
            LayerRow(
                layer,
                trace=traced.get(layer),
                attribution=estimated.get(layer),
                efficacy=self._share(layer, "efficacy"),
                paraphrase=self._share(layer, "paraphrase"),
                neighbourhood=self._share(layer, "neighbourhood"),
                score=scored.get(layer),
            )
            for layer in range(self.n_layers)
        )

    @property
    def best(self) -> int:
        """The layer whose edits have the highest mean score; the first of equal ones."""
        return self.layers_tested[int(self._scores.mean(0).argmax())]

    @cached_property
    def tied_with_best(self) -> list[int]:
        """Layers that these facts cannot distinguish from the best, the best included.

        Differences are taken fact by fact, since facts differ far more than layers do: intervals of
        the layers' own means overlap nearly always. For example, two facts:

            layer                  0       2 (best)
            scores            0.4, 0.9    0.5, 0.9
            minus the best   -0.1, 0.0    0.0, 0.0     interval -0.1 to 0.0: layer 0 is tied
        """
        differences_nl = self._scores - self._scores[:, [self.layers_tested.index(self.best)]]
        return [
            layer
            for layer, difference in zip(self.layers_tested, means(differences_nl), strict=True)
            if difference.high >= 0
        ]

    def layers(self, count: int) -> list[int]:
        """Return `count` consecutive layers, the best one among them, for a method that edits
        several: the range with the highest mean score.

        The score of a layer that was not tested is interpolated between its tested neighbours. Of
        equal ranges the deepest is taken, since such methods compute their values at the last
        layer and spread them to those before. For example, with scores 0.2, 0.9, 0.5, 0.9 the best
        layer is 1, and layers(2) compares

            0 to 1  (0.55)     1 to 2  (0.70)     -> [1, 2]

        Raises:
            SettingError: the model has fewer layers.
        """
        if not 1 <= count <= self.n_layers:
            raise SettingError(
                f"count={count}: {self.model} has {self.n_layers} layers; "
                f"expected 1 to {self.n_layers}"
            )
        # beyond the first and the last tested layer, interp repeats their score
        score_l = np.interp(np.arange(self.n_layers), self.layers_tested, self._scores.mean(0))
        # every range of `count` layers that has the best layer in it and fits the model
        starts = range(max(0, self.best - count + 1), min(self.best, self.n_layers - count) + 1)
        # rounded, so that sums in another order do not decide between equal ranges
        start = max(
            starts,
            key=lambda start: (round(float(score_l[start : start + count].mean()), 9), start),
        )
        return list(range(start, start + count))

    @cached_property
    def trace_correlation(self) -> Mean | None:
        """Rank correlation, over the tested layers, of mean trace effect and mean score; None where
        a curve is flat.
        """
        return self._correlation("trace")

    @cached_property
    def attribution_correlation(self) -> Mean | None:
        """The same of the estimated effect."""
        return self._correlation("attribution")

    @cached_property
    def own_trace_hits(self) -> tuple[int, int]:
        """(facts whose edit scores highest at their own strongest traced layer, facts that were
        edited and traced); only tested layers count.
        """
        traced = [(fact.trace, fact.edits) for fact in self.edited if fact.trace is not None]
        hits = 0
        for effects, edits in traced:
            strongest = max(self.layers_tested, key=lambda layer: effects[layer])
            # equal scores count: a fact whose edits all succeed is a hit wherever its trace peaks
            hits += edits[strongest].score == max(edit.score for edit in edits.values())
        return hits, len(traced)

    def reason(self) -> str:
        """Return why the best layer is the best, in a sentence or two."""
        score = self.rows[self.best].score
        assert score is not None, "the best layer was tested"
        others = [layer for layer in self.tied_with_best if layer != self.best]
        count = len(self.edited)
        return (
            f"layer {self.best}: edits there have the highest mean score, {score.mean:.3f} "
            f"({score.low:.3f} to {score.high:.3f}, {count} fact{'s' * (count != 1)}, "
            f"{len(self.layers_tested)} of {self.n_layers} layers tested)"
            + (f"; {ranges(others)} cannot be distinguished from it" if others else "; no ties")
        )

    def advice(self) -> Iterator[str]:
        """Yield the best layer and why, layers for methods that edit several, and whether the trace
        would have predicted it.
        """
        yield self.reason()
        several = [
            f"{count} → {ranges(self.layers(count))}" for count in (3, 5) if count < self.n_layers
        ]
        if several:
            yield "several at once: " + ", ".join(several)
        for name, value in (
            ("effect", self.trace_correlation),
            ("estimated effect", self.attribution_correlation),
        ):
            if value is not None:
                yield (
                    f"rank correlation over layers of {name} and score: {value.mean:+.2f} "
                    f"({value.low:+.2f} to {value.high:+.2f})"
                )
        hits, of = self.own_trace_hits
        if of:
            yield (
                f"facts whose own trace is strongest where their edit is best: {hits} of {of} "
                f"(by chance about {of / len(self.layers_tested):.1f})"
            )

    # -- as a file ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the card for JSON. What follows from the evidence is included for readers, and is
        computed again by `load`.
        """
        return {
            "format_version": FORMAT_VERSION,
            **{name: value for name, value in asdict(self).items() if name != "evidence"},
            "best": self.best,
            "tied_with_best": self.tied_with_best,
            "trace_correlation": self.trace_correlation and asdict(self.trace_correlation),
            "attribution_correlation": self.attribution_correlation
            and asdict(self.attribution_correlation),
            "rows": [asdict(row) for row in self.rows],
            "evidence": [_to_record(fact) for fact in self.evidence],
        }

    def to_json(self) -> str:
        return json.dumps(stamped(self.to_dict()), ensure_ascii=False)

    def save(self, path: str | Path) -> Path:
        """Write to one JSON file, whole or not at all."""
        path = Path(path)
        with atomic_file(path) as fresh:
            fresh.write_text(self.to_json() + "\n", encoding="utf8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> LayerCard:
        """Read what `save` wrote.

        Raises:
            EngramFileError: missing, damaged, or of another format version.
        """
        advice = "Make one with engram.layer_card, or delete it"
        record: _CardForm = read_record(
            path, _CardForm, "layer card", version=FORMAT_VERSION, advice=advice
        )
        # Only its own fields: what follows from them is computed again and not believed.
        own: dict[str, Any] = {field.name: record[field.name] for field in fields(cls)}  # type: ignore[literal-required]
        try:
            return cls(**own | {"evidence": tuple(map(_from_record, record["evidence"]))})
        except SettingError as error:
            raise EngramFileError(f"the layer card {path} is damaged: {error}. {advice}") from error

    def plot(self) -> Figure:
        """Draw two panels over layers: mean effects of tracing, and the mean score of edits with
        the shares it consists of.

        Bands are 95 % bootstrap intervals over facts. The best layer has a line; those that cannot
        be distinguished from it are shaded.
        """
        from engram.plots.layer_cards import LayerChoice, plot_layer_card

        effects = [self._curve("trace", "traced", "#20a020")]
        effects.append(self._curve("attribution", "estimated", "#20a020", "--"))
        edits = [self._curve(name, name, *look) for name, look in _SHARES.items()]
        edits.append(self._curve("score", "score", "#7261ab"))
        window, facts = self.traces["window"], len(self.edited)
        return plot_layer_card(
            [curve for curve in effects if curve is not None],
            [curve for curve in edits if curve is not None],
            LayerChoice(self.n_layers, self.best, self.tied_with_best),
            titles=(
                f"Effect of restoring {window} MLP{'s' * (window > 1)} at the subject's last token",
                f"Edits by {self.method} at one layer, {facts} fact{'s' * (facts != 1)}",
            ),
            model=PurePath(self.model).name,
            heading=(
                f"Which layer of {PurePath(self.model).name} to edit: {self.best}, by "
                f"{facts} fact{'s' * (facts != 1)} that it knows",
            ),
        )

    def _curve(self, name: str, label: str, colour: str, style: str = "-") -> Curve | None:
        """Return one column of `rows` for a picture; None where nothing was measured."""
        from engram.plots.curves import Curve

        cells = {row.layer: cell for row in self.rows if (cell := getattr(row, name)) is not None}
        if not cells:
            return None
        ends: tuple[Array | None, Array | None] = (None, None)
        means = list(cells.values())
        if isinstance(means[0], Mean):
            low_high = np.array([[mean.low, mean.high] for mean in means]).T
            ends, means = (low_high[0], low_high[1]), [mean.mean for mean in means]
        return Curve(list(cells), np.array(means), *ends, label, colour, style)

    # -- numbers -----------------------------------------------------------------------------------

    @cached_property
    def _scores(self) -> Array:
        """[facts, layers tested] scores."""
        return np.array(
            [[fact.edits[layer].score for layer in self.layers_tested] for fact in self.edited]
        )

    def _curves(self, name: str) -> Array:
        """Return the effects of the facts that have them, [facts, layers]."""
        curves = [getattr(fact, name) for fact in self.evidence]
        return np.array([curve for curve in curves if curve is not None])

    def _effects(self, name: str) -> dict[int, Mean]:
        curves_nl = self._curves(name)
        return dict(enumerate(means(curves_nl))) if len(curves_nl) else {}

    def _share(self, layer: int, name: str) -> float | None:
        outcomes = [fact.edits[layer] for fact in self.edited if layer in fact.edits]
        values = [share for outcome in outcomes if (share := getattr(outcome, name)) is not None]
        return fmean(values) if values else None

    def _correlation(self, name: str) -> Mean | None:
        effects_nl = self._curves(name)
        if not len(effects_nl):
            return None
        effects_nl = effects_nl[:, self.layers_tested]
        value = spearman(effects_nl.mean(0), self._scores.mean(0))
        # both resample the same facts where as many were traced as edited, independently otherwise
        draws = zip(DEFAULT.means(effects_nl), DEFAULT.means(self._scores), strict=True)
        spread = [drawn for pair in draws if (drawn := spearman(*pair)) is not None]
        if value is None or not spread:
            return None
        low, high = np.percentile(spread, (2.5, 97.5))
        # the interval is of the curves' correlation, with draws where a curve is flat left out
        return Mean(value, float(low), float(high))


def ranges(layers: Sequence[int]) -> str:
    """Return layers in words: "layer 3", "layers 0, 2 to 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
    return f"layer{'s' * (len(layers) != 1)} {shown}"


def _to_record(evidence: Evidence) -> dict[str, Any]:
    return {
        **{name: getattr(evidence.fact, name) for name in _FACT},
        "trace": evidence.trace,
        "attribution": evidence.attribution,
        # values without names: a card of 40 facts at 48 layers has thousands of them
        "edits": {
            str(layer): list(asdict(outcome).values())
            for layer, outcome in sorted(evidence.edits.items())
        },
    }


_Outcome = tuple[Share, Share | None, Share | None, Share | None]


class _EvidenceForm(TypedDict):
    subject: str
    prompt: str
    target: str
    target_true: str | None
    trace: tuple[float, ...] | None
    attribution: tuple[float, ...] | None
    edits: dict[Annotated[str, Predicate(str.isdecimal)], _Outcome]


class _CardForm(TypedDict):
    """What a file says itself; see `LayerCard`."""

    model: str
    identity: str
    n_layers: Annotated[int, Ge(1), Le(1 << 16)]
    method: str
    settings: dict[str, Any]
    traces: dict[str, Any]
    evidence: list[_EvidenceForm]
    seconds: Annotated[float, Ge(0)]
    versions: dict[str, str]


def _from_record(record: _EvidenceForm) -> Evidence:
    edits = {int(layer): EditOutcome(*values) for layer, values in record["edits"].items()}
    fact = Fact(record["subject"], record["prompt"], record["target"], record["target_true"])
    return Evidence(fact, record["trace"], record["attribution"], edits)
