"""The localisation study's report: statistics, a picture, and the tables of
docs/what-tracing-tells.md, and of docs/smollm2.md.

    python tools/localisation_report.py    # reads docs/data/localisation.jsonl, fills the page
    python tools/localisation_report.py --model smollm2

Knows facts x layers arrays of numbers; refuses to know models (see localisation_study, which
measures). Intervals are percentiles of a bootstrap over facts. Source of the regressions: Hase et
al. 2023, arXiv:2301.04213.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from engram.bootstrap import ranks
from page_tables import DOCS, folder

SCORES = ("efficacy", "paraphrase", "neighbourhood")
QUALITY = "all three"
RESAMPLES = 1000
WORKS = 0.8  # mean margin at the edit's own prompt from which on editing works at a layer
LEAST_SPREAD = 0.001  # standard deviation over facts, of a probability or a score
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Study:
    """Numbers of n facts at l layers.

    Attributes:
        effects: name -> [n, l] indirect effects, probability.
        scores: name -> [n, l] margins after an edit at that layer, in [-1, 1], and `QUALITY`, in
            [0, 1].
    """

    settings: dict[str, Any]
    effects: dict[str, Array]
    scores: dict[str, Array]
    clean: float
    corrupted: float

    @property
    def facts(self) -> int:
        return len(self.scores[QUALITY])

    @property
    def layers(self) -> list[int]:
        """The layers that were edited, a column each."""
        return list(self.settings.get("layers", range(self.scores[QUALITY].shape[1])))


def read(path: Path) -> Study:
    """Return the study that localisation_study wrote to `path`."""
    head, *records = (json.loads(line) for line in path.read_text(encoding="utf8").splitlines())
    effects = {
        name: np.array([r["effects"][name] for r in records]) for name in records[0]["effects"]
    }
    scores = {name: np.array([r["after"][name] for r in records]) for name in SCORES}
    scores[QUALITY] = quality(list(scores.values()))
    clean, corrupted = (
        float(np.mean([r[name] for r in records])) for name in ("clean", "corrupted")
    )
    return Study(head["settings"], effects, scores, clean, corrupted)


def quality(margins: Sequence[Array]) -> Array:
    """Harmonic mean of margins moved from [-1, 1] to [0, 1]: an edit that spoils one of them is not
    a good one.
    """
    moved = np.clip((1 + np.stack(list(margins))) / 2, 1e-9, 1)
    return len(moved) / (1 / moved).sum(0)


# -- statistics ------------------------------------------------------------------------------------


def pearson(a: Array, b: Array) -> float | None:
    """Correlation over facts; None where one side hardly varies, so that there is nothing to
    explain or to explain it with.
    """
    if min(a.std(), b.std()) < LEAST_SPREAD:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: Array, b: Array) -> float | None:
    """Return the same of ranks."""
    if min(a.std(), b.std()) < LEAST_SPREAD:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def explained(effects_nl: Array, scores_nl: Array) -> dict[str, float]:
    """Share of the variance of scores that least squares explains by the effect, by the layer (one
    mean each), by both.

    `gain` is what the effect adds to the layer: the squared covariance within layers (Frisch and
    Waugh), never negative.
    """
    off_score, off_effect = scores_nl - scores_nl.mean(), effects_nl - effects_nl.mean()
    in_score, in_effect = scores_nl - scores_nl.mean(0), effects_nl - effects_nl.mean(0)
    total = (off_score**2).sum()
    alone, gain = (
        float((effect * score).sum() ** 2 / (effect**2).sum() / total)
        for effect, score in ((off_effect, off_score), (in_effect, in_score))
    )
    layer = float(1 - (in_score**2).sum() / total)
    return {"effect": alone, "layer": layer, "both": layer + gain, "gain": gain}


def gain_by_chance(effects_nl: Array, scores_nl: Array, seed: int = 0) -> float:
    """Return the gain that 95 of 100 deals of the effects to other facts stay below; a fit's gain
    is never negative.
    """
    draw = np.random.default_rng(seed)
    deals = (effects_nl[draw.permutation(len(effects_nl))] for _ in range(RESAMPLES))
    return float(np.percentile([explained(dealt, scores_nl)["gain"] for dealt in deals], 95))


def chosen_layers(effects_nl: Array, scores_nl: Array) -> dict[str, NDArray[np.int64]]:
    """Each fact's layer [n] by three rules: its own largest effect; the best mean score over the
    other half of the facts (leaving
    out one fact only would tip a near tie against just that fact); its own best score, known
    afterwards.
    """
    halves = np.stack([scores_nl[1::2].mean(0).argmax(), scores_nl[::2].mean(0).argmax()])
    return {
        "traced": effects_nl.argmax(1),
        "fixed": halves[np.arange(len(scores_nl)) % 2],
        "best": scores_nl.argmax(1),
    }


def choices(effects_nl: Array, scores_nl: Array) -> dict[str, Any]:
    """Editing each fact where its trace is strongest, against other ways to choose a layer.

    Returns:
        hits_*: how often a rule of `chosen_layers` meets the fact's best layer, `hits_chance`
            traces dealt to facts at random;
        score_*: mean score of the layers so chosen, `score_random` the mean over layers; lost: by
            how much the trace's
        choices score less than the fixed ones, and its interval.
    """
    facts, layers = scores_nl.shape
    by = chosen_layers(effects_nl, scores_nl)
    scores = {rule: scores_nl[np.arange(facts), chosen] for rule, chosen in by.items()}
    shares = {rule: np.bincount(chosen, minlength=layers) / facts for rule, chosen in by.items()}
    lost = scores["fixed"] - scores["traced"]
    return {
        **{f"hits_{rule}": float((chosen == by["best"]).mean()) for rule, chosen in by.items()},
        "hits_chance": float(shares["traced"] @ shares["best"]),
        **{f"score_{rule}": float(values.mean()) for rule, values in scores.items()},
        "score_random": float(scores_nl.mean()),
        "lost": float(lost.mean()),
        "lost interval": interval(lambda values: float(values.mean()), lost),
    }


def interval(
    statistic: Callable[..., float | None], *arrays: Array, seed: int = 0
) -> list[float] | None:
    """95 % bootstrap interval of a statistic, facts (first axes) drawn with replacement."""
    draw = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        rows = draw.integers(len(arrays[0]), size=len(arrays[0]))
        value = statistic(*(each[rows] for each in arrays))
        if value is not None:
            draws.append(value)
    return np.percentile(draws, [2.5, 97.5]).tolist() if draws else None


def band(values_nl: Array) -> dict[str, list[float]]:
    """Mean by layer and its 95 % interval."""
    ends = [
        interval(lambda v: float(v.mean()), values_nl[:, layer]) or [0, 0]
        for layer in range(values_nl.shape[1])
    ]
    return {
        "mean": values_nl.mean(0).tolist(),
        "low": [e[0] for e in ends],
        "high": [e[1] for e in ends],
    }


def summary(study: Study) -> dict[str, Any]:
    """Every number of the page, as JSON."""
    score = study.scores[QUALITY]
    columns = range(len(study.layers))
    works = [at for at in columns if study.scores["efficacy"][:, at].mean() > WORKS]
    result: dict[str, Any] = {
        "facts": study.facts,
        "layers": len(study.layers),
        "settings": study.settings,
        "clean": study.clean,
        "corrupted": study.corrupted,
        "effects": {name: band(values) for name, values in study.effects.items()},
        "scores": {name: band(values) for name, values in study.scores.items()},
        "success": {
            name: (values > 0).mean(0).tolist()
            for name, values in study.scores.items()
            if name != QUALITY
        },
        "best layers": np.bincount(score.argmax(1), minlength=len(study.layers)).tolist(),
        "traced layers": {
            name: np.bincount(values.argmax(1), minlength=len(study.layers)).tolist()
            for name, values in study.effects.items()
        },
        "layers where editing works": [study.layers[at] for at in works],
        "correlations": {},
        "explained": {},
        "choices": {},
    }
    for name, effect in study.effects.items():
        pairs = [(effect[:, at], score[:, at]) for at in columns]
        result["correlations"][name] = {
            "pearson": [pearson(e, s) for e, s in pairs],
            "spearman": [spearman(e, s) for e, s in pairs],
        }
        for where, chosen in (("all layers", list(columns)), ("layers where editing works", works)):
            if not chosen:
                continue
            e, s = effect[:, chosen], score[:, chosen]
            gain = interval(lambda a, b: explained(a, b)["gain"], e, s)
            shares = explained(e, s) | {
                "gain interval": gain,
                "gain by chance": gain_by_chance(e, s),
            }
            result["explained"].setdefault(where, {})[name] = shares
        result["choices"][name] = choices(effect, score)
    return result


# -- tables and picture ----------------------------------------------------------------------------


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    lines = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the page's tables by name, in markdown."""
    layers = result["settings"].get("layers", range(result["layers"]))
    by_layer = [
        [f"effect: {name}", *map(number, b["mean"])] for name, b in result["effects"].items()
    ]
    by_layer += [[f"edit: {name}", *map(number, b["mean"])] for name, b in result["scores"].items()]
    by_layer += [["facts whose best layer it is", *result["best layers"]]]
    correlations = [
        [f"{name}, {kind.capitalize()}", *map(number, of_kind[kind])]
        for name, of_kind in result["correlations"].items()
        for kind in ("pearson", "spearman")
    ]
    keys = ("effect", "layer", "both", "gain")
    shares = [
        [
            name,
            where,
            *(number(r[key], 3) for key in keys),
            span(r["gain interval"]),
            number(r["gain by chance"], 3),
        ]
        for where, by_name in result["explained"].items()
        for name, r in by_name.items()
    ]
    chosen: list[list[Any]] = [
        [
            f"its own trace: {name}",
            c["hits_traced"],
            c["score_traced"],
            percent(c["hits_chance"]),
            lost(c),
        ]
        for name, c in result["choices"].items()
    ]
    any_of = next(iter(result["choices"].values()))
    chosen += [
        [
            "the layer best on average over the other half of the facts",
            any_of["hits_fixed"],
            any_of["score_fixed"],
        ],
        ["at random", 1 / len(layers), any_of["score_random"]],
        ["each fact's best, known afterwards", 1, any_of["score_best"]],
    ]
    return {
        "by layer": table(["at layer", *layers], by_layer),
        "correlations": table(["effect and edit at layer", *layers], correlations),
        "explained": table(
            [
                "effect",
                "over",
                "effect alone",
                "layer alone",
                "both",
                "gain",
                "95 % interval",
                "by chance",
            ],
            shares,
        ),
        "choices": table(
            [
                "layer chosen by",
                "mean score",
                "is the fact's best",
                "by chance",
                "scores less than the best on average by",
            ],
            ([who, number(score, 3), percent(hits), *more] for who, hits, score, *more in chosen),
        ),
    }


def lost(choice: dict[str, Any]) -> str:
    return f"{number(choice['lost'], 3)} ({span(choice['lost interval'])})"


def span(ends: Sequence[float] | None) -> str:
    return "–" if ends is None else f"{number(ends[0], 3)} to {number(ends[1], 3)}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def put_tables(page: str, tables_by_name: dict[str, str]) -> str:
    """Return `page` with the text between `<!-- table: NAME -->` and `<!-- end -->` replaced."""
    for name, text in tables_by_name.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
        if count != 1:
            raise SystemExit(
                f"the page has {count} places '<!-- table: {name} -->' ... '<!-- end -->', "
                f"expected one"
            )
    return page


def picture(study: Study, result: dict[str, Any]) -> Figure:
    """Effects by layer, edits by layer, and one against the other for every fact and layer."""
    style: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(9.6, 3.0), dpi=150, layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _lines(left, study.layers, result["effects"], ("#6a51a3", "#74c476", "#006d2c"))
        left.set(
            title="Restoring the subject's last token",
            xlabel="layer",
            ylabel="indirect effect (probability)",
        )
        _lines(middle, study.layers, result["scores"], ("#d95f02", "#e7298a", "#1f78b4", "#000000"))
        middle.set(
            title="Editing at that layer",
            xlabel="layer",
            ylabel="margin after the edit (all three: score)",
        )
        layer_nl = np.tile(study.layers, (study.facts, 1))
        window = list(study.effects)[-1]
        effect_nl, score_nl = study.effects[window], study.scores[QUALITY]
        dots = right.scatter(effect_nl, score_nl, c=layer_nl, s=5, cmap="viridis", linewidths=0)
        right.set(
            title="Every fact at every layer",
            xlabel=f"indirect effect, {window.replace('mlp', 'MLP')}",
            ylabel="score of the edit",
        )
        figure.colorbar(dots, ax=right, label="layer", ticks=study.layers)
    return figure


def save_small(figure: Figure, path: Path) -> None:
    """As PNG of 128 colours, half the size."""
    raw = BytesIO()
    figure.savefig(raw, format="png")
    Image.open(raw).convert("RGB").quantize(128).save(path, optimize=True)


def _lines(
    ax: Axes,
    layers: Sequence[int],
    bands: dict[str, dict[str, list[float]]],
    colours: Sequence[str],
) -> None:
    for (name, b), colour in zip(bands.items(), colours, strict=True):
        ax.plot(layers, b["mean"], color=colour, label=name, linewidth=1.5)
        ax.fill_between(layers, b["low"], b["high"], color=colour, alpha=0.2, linewidth=0)
    ax.set_xticks(layers)
    ax.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket")
    given = parser.parse_args()
    page, picture_file = DOCS / "what-tracing-tells.md", DOCS / "localisation.png"
    if given.model != "pocket":
        page, picture_file = DOCS / f"{given.model}.md", DOCS / f"{given.model}-localisation.png"
    data = folder(given.model) / "localisation.jsonl"
    study = read(data)
    result = summary(study)
    data.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    save_small(picture(study, result), picture_file)
    texts = tables(result)
    if given.model != "pocket":  # whose page is there before its picture
        texts["picture"] = f"![Effects by layer, edits by layer, both by fact]({picture_file.name})"
    page.write_text(put_tables(page.read_text(encoding="utf8"), texts), encoding="utf8")
    print("\n\n".join(texts.values()))


if __name__ == "__main__":
    main()
