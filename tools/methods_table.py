"""Every method on a model: single edits, many facts in one edit, edits one after another. Makes the
tables of docs/editors.md, of the pocket model, and those of many facts in docs/results.md.

    OMP_NUM_THREADS=1 python tools/methods_table.py > methods.log 2>&1    # resumes after a kill
    python tools/methods_table.py --only memit --settings mass:100        # some rows
    python tools/methods_table.py --again --only memit                    # measure them once more
    python tools/methods_table.py --table                                 # print, and fill the page
    python tools/methods_table.py --model smollm2 --facts ../shared/data/counterfact.jsonl.gz \\
        --settings mass:10 mass:100 mass:300 sequential:100

Facts are counterfactual edits of what the model answers rightly, of different subjects; every
method gets the first N of the same order, with its presets' settings for the model and no others. A
row is measured again when these settings change. What is measured and how it is scored is
measure_model's; refuses to know how any method works.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from inspect import signature
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import engram
from engram.benchmark.metrics.summary import Row as Scores
from engram.editors.methods import METHODS, method_named
from engram.editors.presets import preset
from engram.editors.training.ultraedit import Statistics
from engram.evaluate.held_out import held_out_text, perplexity
from engram.model.language_model import LanguageModel
from known_facts import FactSource, add_options, source
from measure_model import numbers, scored
from page_tables import DOCS, folder, put

SETTINGS = ("single:200", "mass:10", "mass:100", "mass:500", "sequential:200")
KINDS = ("single", "mass", "sequential")
LIMITS = {
    "rome": 100
}  # facts at most; ROME takes five seconds of processor time for each, in any setting
IN_WORDS = (
    "in-context",
    "ike",
)  # such edits do not add up: for one after another all facts go into one
UNEDITED = "unedited"  # the row that the others are compared with
# single edits: the first N are timed; perplexity is measured on every Nth
TIMED, DRIFT = 5, 10
OLD = {"efficacy": "ES", "paraphrase": "PS", "neighbourhood": "NS", "S": "S"}
SAID = ("SG", "EG", "PG", "NG", "NG+", "S", "ES", "PS", "NS", "NS+")  # of rows with intervals
COSTS = ("perplexity", "seconds", "CPU", "MB")
ANSWER_TOKENS = 5  # of greedy answers
BATCH = 10  # facts of each of the edits that follow one another

AnyEdit = engram.Edit | engram.PromptEdit


@dataclass(frozen=True)
class Row:
    """One method in one setting.

    Attributes:
        facts: how many were edited and measured.
        efficacy, paraphrase, neighbourhood, score: percent, see `measure_model.scored`.
        of: digest of everything that the row was made of but the code.
        perplexity: of held-out text, edited over unedited; of single edits the mean.
        seconds, cpu_seconds: of `rewrite`, on the wall and on the processor; of single edits the
            mean, otherwise in all.
        mb: megabytes of the edit as a saved folder; of single edits the mean.
        estimates: name of a score -> mean, low, high; None in rows older than these.
    """

    method: str
    setting: str
    facts: int
    efficacy: float
    paraphrase: float
    neighbourhood: float
    score: float
    of: str
    perplexity: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    mb: float | None = None
    torch: str = torch.__version__
    estimates: dict[str, tuple[float, float, float]] | None = None


def digest(
    method: str, setting: str, seed: int, model: str = "pocket", dtype: str = "float32"
) -> str:
    """Return changes with the method's settings on the model, the facts and their number."""
    settings = (
        preset(method, model)
        if (files("engram.editors.presets") / f"{method}.toml").is_file()
        else {}
    )
    more = [] if model == "pocket" else [model, dtype]
    return hashlib.sha256(
        json.dumps([method, settings, setting, seed, *more], sort_keys=True).encode()
    ).hexdigest()[:12]


# -- what is edited --------------------------------------------------------------------------------


@cache
def facts_of(lm: LanguageModel, source: FactSource, count: int) -> tuple[engram.Fact, ...]:
    """Return the first `count` facts of different subjects; a shorter list is the beginning of a
    longer one.
    """
    found: dict[str, engram.Fact] = {}
    for fact in source.facts(lm):
        found.setdefault(fact.subject, fact)
        if len(found) == count:
            break
    return tuple(found.values())


def without_each_other(facts: Sequence[engram.Fact]) -> list[engram.Fact]:
    """Return the facts of one edit, without the neighbours that it edits as well: these shall not
    stay as they are.
    """
    subjects = [fact.subject for fact in facts]
    return [
        replace(
            fact,
            neighbours=tuple(
                each for each in fact.neighbours if not any(name in each[0] for name in subjects)
            ),
        )
        for fact in facts
    ]


# -- how they are edited ---------------------------------------------------------------------------


@dataclass
class Found:
    """What one setting found: scores of each fact, megabytes and drift of each edit that these were
    measured on, times.
    """

    scored: list[Scores] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall, self.cpu = (
            self.wall + time.perf_counter() - wall,
            self.cpu + time.process_time() - cpu,
        )

    def take(
        self, lm: LanguageModel, edit: AnyEdit, facts: Sequence[engram.Fact], *, drift: bool = True
    ) -> None:
        """Score `facts` with an edit applied, and look at the edit itself."""
        before = perplexity(lm, edit, held_out_text(), edited=False) if drift else 1.0
        with edit.applied(lm):
            words = edit if isinstance(edit, engram.PromptEdit) else None
            self.scored += scored(lm, facts, answer_tokens=ANSWER_TOKENS, words=words)
            if drift:
                self.drifts.append(perplexity(lm, edit, held_out_text(), edited=True) / before)
        with tempfile.TemporaryDirectory() as folder:
            saved = edit.save(Path(folder) / "edit")
            self.sizes.append(sum(file.stat().st_size for file in saved.iterdir()) / 1e6)


def fresh(method: str) -> dict[str, Any]:
    """Return what a method keeps between edits, new and empty: no values found before, UltraEdit's
    statistics of all tokens edited.
    """
    takes = signature(method_named(method)).parameters
    return ({"store": False} if "store" in takes else {}) | (
        {"statistics": Statistics()} if "statistics" in takes else {}
    )


def single(lm: LanguageModel, method: str, facts: Sequence[engram.Fact]) -> Found:
    """Each fact by itself. Some are timed; the others of a mass method take values that were found
    for all in one batch.
    """
    found = Found()
    with tempfile.TemporaryDirectory() as folder:
        kept = fresh(method)
        # UltraEdit cannot standardise the token of one fact alone: it has seen these facts before
        if kept:
            kept |= {"store": Path(folder) / "values.sqlite"} if "store" in kept else {}
            engram.rewrite(lm, facts, method, **kept)
        for number, fact in enumerate(facts):
            if number < TIMED:
                with found.timed():
                    edit = engram.rewrite(
                        lm,
                        fact,
                        method,
                        **deepcopy(kept) | ({"store": False} if "store" in kept else {}),
                    )
            else:
                edit = engram.rewrite(lm, fact, method, **deepcopy(kept))
            found.take(lm, edit, [fact], drift=number % DRIFT == 0)
    timed = min(TIMED, len(facts))
    return replace(found, wall=found.wall / timed, cpu=found.cpu / timed)


def mass(lm: LanguageModel, method: str, facts: Sequence[engram.Fact]) -> Found:
    """All facts in one edit."""
    found = Found()
    with found.timed():
        edit = engram.rewrite(lm, facts, method, **fresh(method))
    found.take(lm, edit, without_each_other(facts))
    return found


def sequential(lm: LanguageModel, method: str, facts: Sequence[engram.Fact]) -> Found:
    """One edit of `BATCH` facts after another, each on top of those before; measured when all of
    them hold.
    """
    found, kept = Found(), fresh(method)
    edits: list[Any] = []
    with found.timed():
        for start in range(0, len(facts), BATCH):
            edits.append(
                engram.rewrite(lm, facts[start : start + BATCH], method, past=edits, **kept)
            )
    found.take(lm, engram.compose(edits), without_each_other(facts))
    return found


MEASURE: dict[str, Callable[[LanguageModel, str, Sequence[engram.Fact]], Found]] = {
    "single": single,
    "mass": mass,
    "sequential": sequential,
}


def measure(lm: LanguageModel, source: FactSource, method: str, setting: str, of: str) -> Row:
    """Measure one row of one table."""
    kind, _, count = setting.partition(":")
    facts = facts_of(lm, source, int(count))
    if method == UNEDITED:
        shown = facts if kind == "single" else without_each_other(facts)
        return row_of(method, setting, of, scored(lm, shown, answer_tokens=ANSWER_TOKENS))
    if "second_moments" in signature(method_named(method)).parameters:
        engram.rewrite(
            lm, facts[:1], method
        )  # they are measured once a model, and no part of an edit's time: now they are kept
    made = mass if kind == "sequential" and method in IN_WORDS else MEASURE[kind]
    found = made(lm, method, facts)
    costs = {"seconds": found.wall, "cpu_seconds": found.cpu, "mb": fmean(found.sizes)}
    drift = fmean(found.drifts)
    return row_of(method, setting, of, found.scored, perplexity=drift, **costs)


def row_of(method: str, setting: str, of: str, rows: Sequence[Scores], **costs: float) -> Row:
    """Return the row of these scores, one of each fact."""
    found = numbers(rows, SAID)
    means = [found[name][0] for name in OLD.values()]
    return Row(method, setting, len(rows), *means, of, **costs, estimates=found)


# -- rows and tables -------------------------------------------------------------------------------


def rows(path: Path) -> dict[tuple[str, str], Row]:
    """Return the latest row of each method in each table."""
    found: dict[tuple[str, str], Row] = {}
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else ():
        if line.endswith("}"):  # otherwise a run was killed while it wrote the line
            row = Row(**json.loads(line))
            found[row.method, group(row.setting)] = row
    return found


def keep(row: Row, path: Path) -> None:
    """Append the row, also where another run appends to the same file."""
    numbers = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(row).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_bytes() if path.exists() else b""
    torn = bool(there) and not there.endswith(b"\n")
    with path.open("a", encoding="utf8") as file:
        file.write("\n" * torn + json.dumps(numbers) + "\n")


def group(setting: str) -> str:
    """Return the table that a setting belongs to."""
    return setting if setting.startswith("mass:") else setting.partition(":")[0]


def affordable(method: str, setting: str) -> str | None:
    """Return the setting with as many facts as the method is given; None for more facts in one edit
    than that.
    """
    kind, _, count = setting.partition(":")
    limit = LIMITS.get(method, int(count))
    if int(count) <= limit:
        return setting
    return None if kind == "mass" else f"{kind}:{limit}"


def titled(name: str) -> str:
    if name.startswith("mass:"):
        return f"{name[5:]} facts in one edit"
    return {
        "single": "Single edits",
        "sequential": f"One edit of {BATCH} facts after another, measured after the last one",
    }[name]


def in_order(name: str) -> tuple[int, int]:
    """Return what sorts tables: single edits, larger and larger ones, those after one another."""
    kind, _, count = name.partition(":")
    return KINDS.index(kind), int(count or 0)


def tables(found: dict[tuple[str, str], Row]) -> str:
    """Return the tables in markdown, methods in the order of METHODS."""
    parts = []
    for name in sorted({name for _, name in found}, key=in_order):
        of_table = [found[each, name] for each in (UNEDITED, *METHODS) if (each, name) in found]
        intervals = all(row.estimates for row in of_table)
        columns = ("method", "facts", *(SAID if intervals else OLD), *COSTS)
        head = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
        lines = [shown(row, intervals=intervals) for row in of_table]
        parts.append("\n".join([f"**{titled(name)}**", "", *head, *lines]))
    return "\n\n".join(parts)


def shown(row: Row, *, intervals: bool) -> str:
    """Return a line of a table; in brackets half of each interval's width."""
    means = (row.efficacy, row.paraphrase, row.neighbourhood, row.score)
    scores = [f"{value:.1f}" for value in means]
    if intervals and row.estimates:
        triples = [row.estimates.get(name) for name in SAID]
        scores = [f"{t[0]:.1f} ({(t[2] - t[1]) / 2:.1f})" if t else "" for t in triples]
    if row.mb is None:
        return f"| {' | '.join([row.method, str(row.facts), *scores])} | | | | |"
    costs = [
        f"×{row.perplexity:.3f}",
        f"{row.seconds:.3g}",
        f"{row.cpu_seconds:.3g}",
        f"{row.mb:.3g}",
    ]
    return f"| {' | '.join([f'`{row.method}`', str(row.facts), *scores, *costs])} |"


def place(model: str) -> tuple[Path, Path, str]:
    """Return the file of a model's rows, the page of its tables, and who makes them there."""
    program = "tools/methods_table.py"
    if model == "pocket":
        return folder(model) / "methods.jsonl", DOCS / "editors.md", program
    return folder(model) / "methods.jsonl", DOCS / "results.md", f"{program}: {model}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(UNEDITED, *METHODS),
        default=[UNEDITED, *METHODS],
        metavar="METHOD",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=SETTINGS,
        metavar="KIND:FACTS",
        help=f"of {', '.join(KINDS)}",
    )
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--data", type=Path, help="file of the rows; default: the page's")
    parser.add_argument(
        "--table",
        action="store_true",
        help="measure nothing; print the tables and put them into the page",
    )
    given = parser.parse_args()
    data, page, program = place(given.model)
    data = given.data or data
    if given.table:
        made = tables(rows(data))
        put(page, program, made)
        print(made)
        return
    lm, facts = engram.load(given.model, dtype=given.dtype), source(given)
    for setting in given.settings:
        for method in given.only:
            if (asked := affordable(method, setting)) is None:
                continue
            of = digest(method, asked, given.seed, given.model, given.dtype)
            there = rows(data).get((method, group(asked)))
            if there is not None and there.of == of and not given.again:
                continue
            row = measure(lm, facts, method, asked, of)
            keep(row, data)
            print(asked, shown(row, intervals=True), flush=True)


if __name__ == "__main__":
    main()
