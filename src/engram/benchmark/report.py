"""Reports of runs: the paper's table with intervals, differences on the same records, and rows.

Knows finished numbers and how tables are written. Refuses to compute scores (see metrics). Scores
of generated answers come first, since teacher-forced ones flatter.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any

from engram.benchmark.data.records import Form
from engram.benchmark.data.write import case_id
from engram.benchmark.metrics.summary import Estimate, paired
from engram.benchmark.metrics.table import HARMONIC, METRICS, of_form
from engram.benchmark.results import UNEDITED, Run
from engram.bootstrap import DEFAULT, Bootstrap
from engram.editors.methods import METHODS
from engram.errors import MissingExtraError, SettingError
from engram.evaluate.words import REPORT_WORDS
from engram.files.atomic import atomic_file

# With fewer records a few of them decide, and a percentile bootstrap makes intervals too narrow.
LEAST_RECORDS = 20

Scores = dict[str, dict[str, float | None]]  # id of a record -> its scores


@dataclass(frozen=True)
class ScoreTable:
    """Means and intervals of several methods.

    Attributes:
        form, columns: what is reported, in this order.
        rows: name -> number of records and metric -> estimate; the unedited model first.
        best: metric -> the method whose lead over every other one is beyond chance, see
            `beyond_chance`; metrics without such a method are absent.
        note: why no method is the best, where that is for want of evidence.
    """

    form: Form
    columns: tuple[str, ...]
    rows: dict[str, tuple[int, dict[str, Estimate]]]
    best: dict[str, str]
    note: str | None = None


def table(
    runs: Sequence[Run], *, all_metrics: bool = False, bootstrap: Bootstrap = DEFAULT
) -> ScoreTable:
    """Return the table of one or several runs of the same benchmark.

    Args:
        all_metrics: all metrics that have numbers, not only the headline ones.
    Raises:
        SettingError: no runs, or runs of different benchmarks.
    """
    rows = _named(runs)
    form = runs[0].form
    summaries = {id(run): run.summary(bootstrap) for run in runs}
    estimates = {
        name: (len(run.rows[label]), summaries[id(run)][label])
        for name, (run, label) in rows.items()
    }
    measured = {metric for _, summary in estimates.values() for metric in summary}
    columns = tuple(
        name for name in METRICS if name in measured and (all_metrics or METRICS[name].headline)
    )
    differences = _differences(_methods(rows), form, bootstrap)
    best = _best(rows, differences, columns)
    note = None if best else no_verdicts(list(differences.values()), columns)
    return ScoreTable(form, columns, estimates, best, note)


def compare(
    runs: Sequence[Run], *, bootstrap: Bootstrap = DEFAULT
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Return (one method, another) -> metric -> difference on the records that both have.

    See `paired` for the intervals.

    Raises:
        SettingError: fewer than two methods.
    """
    methods = _methods(_named(runs))
    if len(methods) < 2:
        raise SettingError(
            "there is nothing to compare: the runs have results of "
            f"{', '.join(methods) or 'no method'}"
        )
    return _differences(methods, runs[0].form, bootstrap)


def _methods(rows: dict[str, tuple[Run, str]]) -> dict[str, Scores]:
    return {name: run.rows[label] for name, (run, label) in rows.items() if label != UNEDITED}


def _differences(
    methods: dict[str, Scores], form: Form, bootstrap: Bootstrap
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Return the differences of every pair with common records, the earlier method first."""
    # Two runs of different data have methods without a common record: these have no difference.
    pairs = [(a, b) for a, b in combinations(methods, 2) if methods[a].keys() & methods[b].keys()]
    return {(a, b): paired(methods[a], methods[b], form, bootstrap=bootstrap) for a, b in pairs}


def _named(runs: Sequence[Run]) -> dict[str, tuple[Run, str]]:
    """Return name of a row -> its run and label: the unedited model, then methods as in METHODS.

    The unedited model of several runs has one row, that of the run with the most records of it.
    """
    if not runs:
        raise SettingError("runs is empty; give the file of at least one")
    kinds = {(run.form, run.about["dataset"], run.about["identity"]) for run in runs}
    if len({(form, dataset) for form, dataset, _ in kinds}) > 1:
        runs_of = "; ".join(f"{run.path.name}: {run.about['dataset']} ({run.form})" for run in runs)
        raise SettingError(
            f"these runs are of different benchmarks and have no common table: {runs_of}"
        )
    # The model's name goes in front of a row only where it tells two rows apart.
    several = len({identity for *_, identity in kinds}) > 1
    order = list(METHODS)
    rows: dict[str, tuple[Run, str]] = {}
    for run in runs:
        about = f"{run.about['model']} " if several else ""
        for label in run.labels:
            if label == UNEDITED and any(
                other.about["identity"] == run.about["identity"]
                and len(other.unedited) >= len(run.unedited)
                for other, other_label in rows.values()
                if other_label == UNEDITED
            ):
                continue
            name = f"{about}{label}"
            if name in rows and label != UNEDITED:
                name = _unused(f"{name} ({run.path.stem}", rows)
            rows[name] = (run, label)

    def place(entry: tuple[str, tuple[Run, str]]) -> tuple[bool, int]:
        run, label = entry[1]
        method = run.methods[label][0] if label in run.methods else ""
        # Methods that are no longer in METHODS come last, in the order of their runs.
        return label != UNEDITED, order.index(method) if method in order else len(order)

    return dict(sorted(rows.items(), key=place))


def _unused(start: str, names: Container[str]) -> str:
    """Return the first of `start)`, `start, 2)`, `start, 3)` ... that is no name yet."""
    numbered = (f"{start}, {number})" for number in count(2))
    return next(name for name in chain([f"{start})"], numbered) if name not in names)


def _best(
    rows: dict[str, tuple[Run, str]],
    differences: dict[tuple[str, str], dict[str, Estimate]],
    columns: Sequence[str],
) -> dict[str, str]:
    best = {}
    for metric in columns:
        # "neither": no method leads in a number that no editor aims at, such as AS.
        sign = {"up": 1, "down": -1, "neither": 0}[METRICS[metric].better]
        for name in rows:
            # By the intervals of differences, not of means: two means whose intervals overlap may
            # differ on the same records beyond chance, see `paired`.
            leads = [
                _beyond(of_pair.get(metric), sign if name == pair[0] else -sign)
                for pair, of_pair in differences.items()
                if name in pair
            ]
            if sign and leads and all(leads):
                best[metric] = name
    return best


def _beyond(difference: Estimate | None, sign: int) -> bool:
    """Return whether a difference, times `sign`, is above 0 beyond chance."""
    return difference is not None and beyond_chance(difference) and sign * difference.mean > 0


def beyond_chance(difference: Estimate) -> bool:
    """Return whether the 95 % interval of a difference excludes 0, and says something about chance:
    it is of at least `LEAST_RECORDS` records, and not a point.
    """
    return why_open(difference) is None and not difference.low <= 0 <= difference.high


def why_open(difference: Estimate) -> str | None:
    """Return why no verdict can be given on a difference, whatever its size; None if one can."""
    if difference.count < LEAST_RECORDS:
        return f"{difference.count} records, at least {LEAST_RECORDS} needed"
    # Means of equal numbers differ by rounding.
    if difference.high - difference.low <= 1e-9 * abs(difference.mean):
        return "every record differs by as much, so the interval is a point"
    return None


def no_verdicts(
    differences: Sequence[Mapping[str, Estimate]], columns: Sequence[str]
) -> str | None:
    """Return why nothing can be called beyond chance, as a line for the reader; None where
    something could.

    Args:
        differences: metric -> difference, of each pair of methods.
        columns: the metrics that are shown.
    """
    shown = [[pair[metric] for metric in columns if metric in pair] for pair in differences]
    if not any(shown):
        return None  # a method alone: nobody expects a verdict
    # Of the pair with the fewest: a method leads if it leads every other one.
    records = min(max(difference.count for difference in pair) for pair in shown if pair)
    if records < LEAST_RECORDS:
        return f"no verdicts: {records} records, at least {LEAST_RECORDS} needed"
    reasons = [why_open(difference) for pair in shown for difference in pair if difference.mean]
    # Methods that are equal on every record need no reason.
    return f"no verdicts: {reasons[0]}" if reasons and None not in reasons else None


# -- how tables are written ------------------------------------------------------------------------


def shown(estimate: Estimate | None, metric: str, *, interval: bool = True) -> str:
    """Return an estimate as the paper writes it: the mean, and half the width of its 95 % interval.

    The interval is the published one, or for harmonic means that of the bootstrap.
    """
    if estimate is None:
        return ""
    scale = METRICS[metric].scale
    # Percentages and points have the paper's one decimal; nats and seconds are small, bytes are
    # whole.
    digits = 1 if scale > 1 else 0 if METRICS[metric].unit == "bytes" else 3
    # The published width where there is one, so that the table can be held against the paper's.
    half = (
        estimate.half_published
        if estimate.half_published is not None
        else (estimate.high - estimate.low) / 2
    )
    mean = f"{estimate.mean * scale:.{digits}f}".replace("-", "−")
    return f"{mean} ({half * scale:.{digits}f})" if interval else mean


def meanings(scores: ScoreTable) -> dict[str, str]:
    """Return what the heads of a table mean, in its order."""
    return {METRICS[name].title: METRICS[name].described for name in scores.columns}


def all_meanings(form: Form) -> dict[str, str]:
    """Return what the words of a benchmark's reports mean, and each of its numbers."""
    return REPORT_WORDS | {metric.title: metric.described for metric in of_form(form).values()}


def markdown(scores: ScoreTable) -> str:
    """Return `markdown_table`, and under it what its heads mean and why nothing is bold."""
    notes = [f"- **{_in_markdown(head)}**: {text}" for head, text in meanings(scores).items()]
    why = [scores.note, ""] if scores.note else []
    return "\n".join([markdown_table(scores), "", *why, *notes])


def markdown_table(scores: ScoreTable) -> str:
    """Return a table in GitHub's markdown; leads beyond chance are bold."""
    heads = [
        METRICS[name].title + {"up": " ↑", "down": " ↓", "neither": ""}[METRICS[name].better]
        for name in scores.columns
    ]
    lines = [f"| | n | {' | '.join(heads)} |", "|---|--:" + "|--:" * len(heads) + "|"]
    for name, (records, summary) in scores.rows.items():
        cells = [shown(summary.get(metric), metric) for metric in scores.columns]
        cells = [
            f"**{cell}**" if scores.best.get(m) == name else cell
            for m, cell in zip(scores.columns, cells, strict=True)
        ]
        lines.append(f"| {_in_markdown(name)} | {records} | {' | '.join(cells)} |")
    return "\n".join(lines)


def latex(scores: ScoreTable) -> str:
    """Return a table for LaTeX with booktabs; leads beyond chance are bold.

    Under it is a paragraph about what its heads mean, and why nothing is bold.
    """
    arrows = {"up": r" $\uparrow$", "down": r" $\downarrow$", "neither": ""}
    heads = [
        _in_latex(METRICS[name].title) + arrows[METRICS[name].better] for name in scores.columns
    ]
    lines = [
        rf"\begin{{tabular}}{{lr{'r' * len(heads)}}}",
        r"\toprule",
        f" & $n$ & {' & '.join(heads)} \\\\",
        r"\midrule",
    ]
    for name, (records, summary) in scores.rows.items():
        cells = [
            shown(summary.get(metric), metric).replace("−", "$-$") for metric in scores.columns
        ]
        cells = [
            rf"\textbf{{{cell}}}" if scores.best.get(m) == name else cell
            for m, cell in zip(scores.columns, cells, strict=True)
        ]
        lines.append(f"{_in_latex(name)} & {records} & {' & '.join(cells)} \\\\")
        if name.endswith(UNEDITED):
            lines.append(r"\midrule")
    notes = [
        rf"\textbf{{{_in_latex(head)}}}: {_in_latex(text)}."
        for head, text in meanings(scores).items()
    ]
    why = [f"{_in_latex(scores.note)}."] if scores.note else []
    lines += [r"\bottomrule", r"\end{tabular}", "", r"\smallskip\noindent{\footnotesize"]
    return "\n".join([*lines, *why, *notes, r"\par}"])


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%_#$" + "{" + "}"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "×": r"$\times$",
    "−": "$-$",
}


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _in_markdown(text: str) -> str:
    """Escape the characters of tables, emphasis, links and HTML."""
    return re.sub(r"[\\|*_`<\[]", r"\\\g<0>", text)


def as_csv(scores: ScoreTable) -> str:
    """Return a line for each method and metric, in the metric's unit: mean, intervals, count."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "metric", "mean", "low", "high", "half_published", "std", "count"])
    for name, (_, summary) in scores.rows.items():
        for metric in scores.columns:
            if (estimate := summary.get(metric)) is not None:
                scale = METRICS[metric].scale
                numbers = [
                    None if x is None else x * scale
                    for x in (
                        estimate.mean,
                        estimate.low,
                        estimate.high,
                        estimate.half_published,
                        estimate.std,
                    )
                ]
                writer.writerow([name, METRICS[metric].title, *numbers, estimate.count])
    return out.getvalue()


def as_json(scores: ScoreTable) -> str:
    """Return method -> metric -> its estimate, not scaled, as JSON.

    Besides metrics a method has its number of "records", "best", the metrics in which it leads
    beyond chance, and "note", why no method leads where that is for want of evidence.
    """
    rows = {
        name: {
            "records": records,
            "best": [metric for metric, best in scores.best.items() if best == name],
            "note": scores.note,
            **{
                metric: asdict(estimate)
                for metric, estimate in summary.items()
                if metric in scores.columns
            },
        }
        for name, (records, summary) in scores.rows.items()
    }
    return json.dumps(rows, indent=1, ensure_ascii=False)


def write_parquet(runs: Sequence[Run], path: str | Path) -> None:
    """Write a row for each record and method: run, method, id, and every score of one record.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval") from error
    # A harmonic mean is of means over records, and a record has none.
    names = [name for name in METRICS if name not in HARMONIC]
    columns: dict[str, list[Any]] = {name: [] for name in ("run", "method", "id", *names)}
    for run in runs:
        for label, rows in run.rows.items():
            for id, of_record in rows.items():
                about = {"run": run.path.name, "method": label, "id": id}
                for name, values in columns.items():
                    values.append(about.get(name) if name in about else of_record.get(name))
    # Spelt out: a column of None alone would be of type null, and two such files do not
    # concatenate.
    types = {name: pa.float64() for name in names}
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    with atomic_file(path) as fresh:
        pq.write_table(table, fresh)


def published_cases(run: Run, label: str) -> list[dict[str, Any]]:
    """Return results as the released code's files hold them, one for each record.

    Raises:
        SettingError: a label that the run does not have, or another benchmark than CounterFact.
    """
    if label not in run.measured:
        raise SettingError(f"label={label!r}: the run has {', '.join(run.measured)}")
    if run.form != "counterfact":
        raise SettingError(
            f"{run.path} is a run of form {run.form!r}; the released files are of CounterFact"
        )
    cases = []
    for place, measured in run.measured[label].items():
        record = run.records[place]
        fact = record.facts[0]
        request = {
            "prompt": fact.prompt,
            "subject": fact.subject,
            "relation_id": fact.relation,
            "target_new": {"str": fact.target},
            "target_true": {"str": fact.target_true},
        }
        case: dict[str, Any] = {
            "case_id": case_id(record.id),
            "requested_rewrite": request,
            "time": measured.seconds,
        }
        for phase, outcome in (("post", measured.after), ("pre", measured.before)):
            of_phase: dict[str, Any] = {}
            for kind in ("rewrite", "paraphrase", "neighbourhood", "attribute"):
                key = f"{kind.replace('neighbourhood', 'neighborhood')}_prompts_probs"
                of_phase[key] = []
                for at in record.of(kind):
                    reading = outcome.readings[at]
                    # A probe holds what is wanted first. The released file holds the new object
                    # first, and for neighbours the wanted one is the true object. Despite the key's
                    # name the values are negative log-probabilities, as released.
                    pair = (reading.wanted, reading.unwanted)
                    new, true = reversed(pair) if kind == "neighbourhood" else pair
                    of_phase[key].append({"target_new": new, "target_true": true})
            if outcome.texts:
                of_phase |= {
                    "ngram_entropy": outcome.fluency,
                    "reference_score": outcome.consistency,
                    "text": list(outcome.texts),
                }
            if outcome.essence_published is not None:
                of_phase["essence_score"] = outcome.essence_published
            case[phase] = of_phase
        cases.append(case)
    return cases
