"""Reports say what the rows of a run come to, in every format, and nothing beyond chance is called
best.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from statistics import fmean

import numpy as np
import pytest

from engram.benchmark import report
from engram.benchmark.data.write import write_dataset
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.benchmark.metrics.table import METRICS
from engram.benchmark.plots import plot_layers, plot_scores
from engram.benchmark.results import UNEDITED, Run
from engram.benchmark.store import RunStore
from engram.errors import MissingExtraError, SettingError
from engram.evaluate.probes import Reading
from tests.helpers.bench_samples import dataset
from tests.helpers.command_line import failing, run
from tests.helpers.tiny import tiny_folder

N = 24
DATA = dataset(N)
WELL, BADLY, ONE_BADLY = [True] * N, [False] * N, [True] * (N - 1) + [False]


def outcome(record, edited: bool, texts: bool = True) -> Outcome:
    """All that the new object is wanted for is answered with it, or none; neighbours always with
    their own.
    """

    def reading(probe):
        right = probe.kind == "neighbourhood" or edited
        pair = (0.5, 2.0) if right else (2.0, 0.5)
        return Reading(
            *pair,
            correct=float(right),
            answer=f" {probe.wanted if right else probe.unwanted} and",
            kl=0.1,
        )

    said = tuple(f"{prompt} sings" for prompt in record.generation) if texts else ()
    return Outcome(
        tuple(reading(probe) for probe in record.probes),
        said,
        1.5 if texts else None,
        0.25 if texts else None,
    )


def write(path, methods, data=DATA, model="tiny", **settings):
    """Return a run whose edits work or not: label, or label=method -> a flag a record."""
    about = {
        "model": model,
        "identity": model,
        "dtype": "float32",
        "dataset": data.name,
        "form": data.form,
        "config": {},
    }
    with RunStore.writing(path, about) as store:
        store.add_records(data.records)
        for number, (label, flags) in enumerate(methods.items()):
            label, _, method = label.partition("=")
            store.add_method(label, method or label, settings.get(label, {}))
            found = [
                (
                    at,
                    Measured(
                        record.id,
                        outcome(record, False),
                        outcome(record, flag),
                        (0.5 + number) * (1 + at / 100),
                        64,
                        None if flag else "no",
                    ),
                )
                for at, (record, flag) in enumerate(zip(data.records, flags, strict=False))
            ]
            store.add(label, found, texts=True)
    return Run.open(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """MEMIT was run first; ROME does what is asked, FT but once, MEMIT never."""
    return write(
        tmp_path_factory.mktemp("run") / "made.sqlite",
        {"memit": BADLY, "ft": ONE_BADLY, "rome": WELL},
    )


# -- the table -------------------------------------------------------------------------------------


def test_the_unedited_model_comes_first_and_methods_in_the_order_of_the_library(made):
    assert list(report.table([made]).rows) == [UNEDITED, "rome", "memit", "ft"]


def test_what_a_model_says_by_itself_comes_before_what_is_teacher_forced(made):
    columns = report.table([made]).columns
    assert columns == ("SG", "EG", "PG", "NG", "S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS")
    more = report.table([made], all_metrics=True).columns
    assert set(columns) < set(more)
    assert {"AS", "EA", "NKL", "failed", "seconds", "size"} <= set(more)


def test_means_are_those_of_the_records(made):
    rows = report.table([made], all_metrics=True).rows
    of = {name: summary for name, (_, summary) in rows.items()}
    assert (of[UNEDITED]["ES"].mean, of["rome"]["ES"].mean, of["memit"]["ES"].mean) == (0, 1, 0)
    assert of["ft"]["ES"].mean == of["ft"]["EG"].mean == (N - 1) / N
    assert of["rome"]["EM"].mean == pytest.approx(np.exp(-0.5) - np.exp(-2))
    assert of["ft"]["S"].mean == pytest.approx(3 / (2 * N / (N - 1) + 1))
    assert of["memit"]["S"].mean == 0
    assert of["memit"]["failed"].mean == 1
    assert [name for name in ("seconds", "size", "failed") if name in of[UNEDITED]] == []
    assert [count for count, _ in rows.values()] == [N] * 4


def test_only_a_lead_over_every_other_method_that_is_beyond_chance_is_best(made, tmp_path):
    assert "ES" not in report.table([made]).best, "ROME's lead over FT is one record"
    without = write(tmp_path / "run", {"memit": BADLY, "rome": ONE_BADLY})
    best = report.table([without], all_metrics=True).best
    assert best["ES"] == best["PS"] == best["EG"] == best["S"] == "rome"
    assert "NS" not in best, "they are equal"
    assert "AS" not in best, "of which neither more nor less is better"
    assert best["seconds"] == "memit", "less is better"
    assert best["failed"] == "rome"


def test_a_method_alone_is_not_the_best(tmp_path):
    assert report.table([write(tmp_path / "run", {"rome": WELL})]).best == {}


def test_cells_are_the_papers_mean_and_half_width_times_100(made):
    (_, summary) = report.table([made]).rows["ft"]
    half = 1.96 * np.std([1] * (N - 1) + [0]) / np.sqrt(N)
    assert report.shown(summary["ES"], "ES") == f"95.8 ({100 * half:.1f})"
    assert report.shown(summary["ES"], "ES", interval=False) == "95.8"
    assert report.shown(None, "ES") == ""
    low_high = summary["S"]
    assert low_high.half_published is None
    assert report.shown(low_high, "S").endswith(
        f"({100 * (low_high.high - low_high.low) / 2:.1f})"
    ), "of the bootstrap"


def test_nothing_is_best_on_fewer_than_20_records(tmp_path):
    few, enough = (
        report.table([write(tmp_path / str(n), {"memit": BADLY[:n], "rome": ONE_BADLY[-n:]})])
        for n in (19, 20)
    )
    assert few.best == {} and few.note == "no verdicts: 19 records, at least 20 needed"
    assert enough.best["ES"] == "rome" and enough.note is None


def test_nothing_is_best_where_the_interval_is_a_point(tmp_path):
    alike = report.table([write(tmp_path / "run", {"memit": BADLY, "rome": WELL})])
    assert alike.best == {}
    assert alike.note == (
        "no verdicts: every record differs by as much, so the interval is a point"
    )
    equal = report.table([write(tmp_path / "equal", {"memit": WELL, "rome": WELL})])
    assert equal.best == {} and equal.note is None, "no lead needs no reason"


def test_a_table_says_what_its_heads_mean_and_why_nothing_is_bold(tmp_path, made):
    few = report.table([write(tmp_path / "few", {"memit": BADLY[:4], "rome": WELL[:4]})])
    for all_metrics in (False, True):
        table = report.table([made], all_metrics=all_metrics)
        markdown = report.markdown(table).splitlines()
        latex = report.latex(table).splitlines()
        for name in table.columns:
            metric = METRICS[name]
            assert any(metric.title in line and metric.meaning in line for line in markdown), name
            assert any(line.startswith(rf"\textbf{{{metric.title}}}: ") for line in latex), name
    for writer in (report.markdown, report.latex, report.as_json):
        text = writer(few)
        assert "no verdicts: 4 records, at least 20 needed" in text
        assert "**95" not in text and "**100" not in text and r"\textbf{100" not in text
        assert "no verdicts" not in writer(report.table([made])).replace('"note": null', "")


def test_a_meaning_names_no_row_above_it():
    """Under a table with few columns the row that "the same" would point to may be missing."""
    for name, metric in METRICS.items():
        assert not re.search(r"\b(the same|that answer|there)\b", metric.meaning), name


# -- several runs ----------------------------------------------------------------------------------


def test_runs_of_one_model_have_one_unedited_row(made, tmp_path):
    more = write(tmp_path / "more.sqlite", {"rome": BADLY, "lora": WELL})
    assert list(report.table([made, more]).rows) == [
        UNEDITED,
        "rome",
        "rome (more)",
        "memit",
        "ft",
        "lora",
    ]


def test_the_unedited_row_is_of_the_run_with_the_most_records(made, tmp_path):
    short = write(tmp_path / "short.sqlite", {"lora": [True] * 3})
    for runs in ([made, short], [short, made]):
        rows = report.table(runs).rows
        assert (rows[UNEDITED][0], rows["lora"][0]) == (N, 3)


def test_runs_of_several_models_name_the_model(made, tmp_path):
    other = write(tmp_path / "other", {"rome": BADLY}, model="small")
    names = list(report.table([made, other]).rows)
    assert names == [
        "tiny unedited",
        "small unedited",
        "tiny rome",
        "small rome",
        "tiny memit",
        "tiny ft",
    ]


def test_no_run_is_lost_where_files_have_the_same_name(tmp_path):
    runs = [
        write(tmp_path / folder / "run", {"rome": flags})
        for folder, flags in zip("abc", (WELL, BADLY, ONE_BADLY), strict=True)
    ]
    rows = report.table(runs).rows
    assert [summary["ES"].mean for name, (_, summary) in rows.items() if name != UNEDITED] == [
        1,
        0,
        (N - 1) / N,
    ]


def test_runs_of_different_benchmarks_have_no_common_table(made, tmp_path):
    other = write(tmp_path / "other", {"rome": WELL}, dataset(N, "towns"))
    with pytest.raises(
        SettingError,
        match=r"no common table: made.sqlite: cities \(counterfact\); other: towns \(counterfact\)",
    ):
        report.table([made, other])
    with pytest.raises(SettingError, match="runs is empty"):
        report.table([])


# -- comparisons -----------------------------------------------------------------------------------


def test_differences_are_of_the_same_records(made):
    found = report.compare([made])
    assert list(found) == [("rome", "memit"), ("rome", "ft"), ("memit", "ft")]
    assert found["rome", "ft"]["ES"].mean == pytest.approx(1 / N)
    assert found["rome", "ft"]["ES"].low == 0, "within chance"
    assert found["memit", "ft"]["ES"].high < 0
    assert found["rome", "memit"]["NS"].mean == 0
    assert found["rome", "memit"]["SG"].mean == pytest.approx(1)


def test_only_records_that_both_have_are_compared(made, tmp_path):
    short = write(tmp_path / "short", {"lora": [False, True, True]})
    difference = report.compare([made, short])["ft", "lora"]["ES"]
    assert (difference.count, difference.mean) == (3, pytest.approx(1 / 3))


def test_one_method_has_nothing_to_be_compared_with(tmp_path):
    with pytest.raises(SettingError, match="nothing to compare: the runs have results of rome"):
        report.compare([write(tmp_path / "run", {"rome": WELL})])


# -- formats ---------------------------------------------------------------------------------------

ODD = r"rome_3 & {50%} $x^2~y\z #1 | [late] <b>"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run") / "odd", {"memit": BADLY, f"{ODD}=rome": ONE_BADLY})


def test_markdown_has_a_cell_a_column(made, odd):
    for one in (made, odd):
        table = report.table([one])
        rows = [line for line in report.markdown(table).splitlines() if line.startswith("|")]
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in rows]
        assert {len(cells) for cells in lines} == {2 + len(table.columns)}
        assert [re.sub(r"\\(.)", r"\1", cell.strip()) for cell, *_ in lines[2:]] == list(table.rows)
    at = 2 + table.columns.index("ES")
    assert [cells[at].strip() for cells in lines[2:]] == [
        "0.0 (0.0)",
        "**95.8 (8.0)**",
        "0.0 (0.0)",
    ]
    assert lines[0][at].strip() == "ES ↑"


def test_latex_has_a_cell_a_column_and_no_letter_that_means_something_to_it(odd):
    table = report.table([odd])
    text = report.latex(table)
    assert text.startswith(r"\begin{tabular}{lr" + "r" * len(table.columns) + "}")
    assert "\\bottomrule\n\\end{tabular}\n" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(table.rows)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {1 + len(table.columns)}
    (name,) = [re.split(r" (?<!\\)& ", row)[0] for row in rows if "rome" in row]
    left = re.sub(r"\\(textbackslash|textasciicircum|textasciitilde)\{\}|\\[&%$#_{}]", "", name)
    assert not set(left) & set(r"&%$#_{}~^\\"), left
    assert sum(r"\textbf{95.8 (8.0)}" in row for row in rows) == 1
    assert "−" not in text


def test_csv_has_the_numbers_in_their_unit(made):
    table = report.table([made], all_metrics=True)
    lines = list(csv.DictReader(io.StringIO(report.as_csv(table))))
    titles = {metric.title: name for name, metric in METRICS.items()}
    assert len(lines) == sum(len(summary) for _, summary in table.rows.values())
    for line in lines:
        name = titles[line["metric"]]
        each, scale = table.rows[line["method"]][1][name], METRICS[name].scale
        for column in ("mean", "low", "high", "half_published", "std"):
            value = getattr(each, column)
            assert (
                line[column] == ""
                if value is None
                else float(line[column]) == pytest.approx(scale * value)
            )
        assert int(line["count"]) == each.count


def test_json_is_json_to_every_reader(made, odd):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for one in (made, odd):
        table = report.table([one], all_metrics=True)
        told = json.loads(report.as_json(table), parse_constant=refuse)
        assert list(told) == list(table.rows)
        for name, (count, summary) in table.rows.items():
            assert told[name].pop("records") == count
            assert told[name].pop("note") == table.note
            best = [metric for metric, leader in table.best.items() if leader == name]
            assert told[name].pop("best") == best
            assert {metric: each["mean"] for metric, each in told[name].items()} == {
                m: e.mean for m, e in summary.items()
            }
        json.dumps(one.card(), allow_nan=False)


def test_parquet_has_a_row_a_record_and_method(made, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    report.write_parquet([made], tmp_path / "rows.parquet")
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert len(rows) == 4 * N
    for row in rows:
        assert row["run"] == "made.sqlite"
        expected = made.rows[row["method"]][row["id"]]
        assert {name: row[name] for name in METRICS if name in row} == {
            n: expected.get(n) for n in METRICS if n in row
        }
    assert "ES" in rows[0]
    assert "S" not in rows[0], "no record has one by itself"


def test_without_pyarrow_the_error_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'engram\[eval\]'"):
        report.write_parquet([made], tmp_path / "rows.parquet")


def test_published_cases_give_other_peoples_summaries_the_same_scores(made):
    cases = json.loads(json.dumps(report.published_cases(made, "ft")))
    assert [case["case_id"] for case in cases] == list(range(N)), "numbers, as released"
    for case, record in zip(cases, DATA.records, strict=True):
        rewrite = case["requested_rewrite"]
        assert rewrite["prompt"].format(rewrite["subject"]) == record.probes[0].prompt
        assert rewrite["target_new"]["str"] == record.facts[0].target
        assert case["time"] == 1.5 * (1 + case["case_id"] / 100)
        for phase, label in (("pre", UNEDITED), ("post", "ft")):
            told, scores = case[phase], made.rows[label][record.id]
            probs = {
                kind: told[f"{kind}_prompts_probs"]
                for kind in ("rewrite", "paraphrase", "neighborhood", "attribute")
            }
            assert [len(each) for each in probs.values()] == [1, 1, 2, 1]
            for kind, score, margin in (
                ("rewrite", "ES", "EM"),
                ("paraphrase", "PS", "PM"),
                ("attribute", "AS", "AM"),
            ):
                assert (
                    fmean(x["target_true"] > x["target_new"] for x in probs[kind]) == scores[score]
                )
                apart = fmean(
                    np.exp(-x["target_new"]) - np.exp(-x["target_true"]) for x in probs[kind]
                )
                assert apart == pytest.approx(scores[margin])
            assert (
                fmean(x["target_true"] < x["target_new"] for x in probs["neighborhood"])
                == scores["NS"]
            )
            assert (told["ngram_entropy"], told["reference_score"]) == (1.5, 0.25)
            assert told["text"] == [f"{prompt} sings" for prompt in record.generation]


def test_published_cases_hold_the_essence_where_there_is_one(tmp_path, monkeypatch):
    plain = outcome
    told = {"essence": 9.0, "essence_published": 8.0}
    monkeypatch.setitem(
        globals(), "outcome", lambda *args: Outcome(**{**plain(*args).__dict__, **told})
    )
    (case, *_) = report.published_cases(write(tmp_path / "run", {"rome": WELL}), "rome")
    assert case["post"]["essence_score"] == case["pre"]["essence_score"] == 8.0


def test_only_counterfact_has_published_cases(made, tmp_path):
    with pytest.raises(SettingError, match="label='lora': the run has memit, ft, rome"):
        report.published_cases(made, "lora")
    zsre = write(tmp_path / "run", {"rome": WELL}, type(DATA)("zsre", "zsre", DATA.records))
    with pytest.raises(SettingError, match="form 'zsre'; the released files are of CounterFact"):
        report.published_cases(zsre, "rome")


# -- failures and pictures -------------------------------------------------------------------------


def test_failures_are_the_answers_that_are_not_what_is_wanted(made):
    assert made.failures("rome") == []
    found = made.failures("ft", limit=99)
    assert {each.record for each in found} == {str(N - 1)}
    assert [each.kind for each in found] == ["rewrite", "paraphrase", "attribute"]
    first, fact = found[0], DATA.records[N - 1].facts[0]
    assert (first.prompt, first.wanted) == (fact.prompt_text, fact.target)
    assert first.after == first.before == f" {fact.target_true} and"
    assert len(made.failures("memit", "paraphrase", limit=3)) == 3
    assert {each.kind for each in made.failures("memit", "paraphrase")} == {"paraphrase"}
    with pytest.raises(SettingError, match="label='lora': the run has memit, ft, rome"):
        made.failures("lora")


def test_bars_are_the_scores_by_method(made):
    (axes,) = plot_scores([made], ["ES", "NS"]).axes
    heights = [
        [round(bar.get_height(), 6) for bar in group]
        for group in axes.containers
        if hasattr(group, "patches")
    ]
    assert heights == [[0, 100, 0, 95.833333], [100] * 4]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        UNEDITED,
        "rome",
        "memit",
        "ft",
    ]
    with pytest.raises(SettingError, match=r"metrics=.*the runs have"):
        plot_scores([made], ["multi-hop"])


def test_scores_against_the_layer_that_settings_name(tmp_path, made):
    at = {f"rome-{layer}": {"layer": layer} for layer in (3, 1, 2)}
    swept = write(
        tmp_path / "run",
        dict(zip((f"{label}=rome" for label in at), (WELL, BADLY, ONE_BADLY), strict=True)),
        **at,
    )
    (axes,) = plot_layers([swept], ["ES"]).axes
    (line,) = [
        line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() == "o"
    ]
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == [0, pytest.approx(95.8, abs=0.1), 100]
    with pytest.raises(
        SettingError,
        match=r"results at layers \[\]; expected two or more, as by --method rome-1=rome",
    ):
        plot_layers([made])


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(options of a bench, its output): two methods on four records."""
    folder = tmp_path_factory.mktemp("bench")
    path = write_dataset(dataset(4), folder / "cities.json")
    model = str(tiny_folder(folder))
    options = [
        "bench",
        "-m",
        model,
        "-d",
        str(path),
        "--records-per-batch",
        "2",
        "--answer-tokens",
        "2",
        "--drift-every",
        "0",
        "-o",
        str(folder / "run.sqlite"),
    ]
    settings = [
        "--set",
        "strong:epochs=8",
        "--set",
        "strong:learning_rate=0.05",
        "--set",
        "ft:epochs=2",
    ]
    return [*options, "--method", "ft", "--method", "strong=ft", *settings], folder / "run.sqlite"


def test_a_benchmark_in_one_command_and_its_report_in_another(ran, tmp_path):
    options, path = ran
    told = run(*options, "-n", "3").output
    for shown in ("cities", "unedited", "ft", "strong", "EG", "ES", f"run: {path}"):
        assert shown in told
    made = Run.open(path)
    assert made.methods["strong"] == ("ft", {"epochs": 8, "learning_rate": 0.05})
    assert len(made.measured["strong"]) == 3
    assert made.about["config"] == {
        **made.about["config"],
        "answer_tokens": 2,
        "texts": False,
        "drift_every": 0,
    }
    run(*options)
    assert len(Run.open(path).measured["ft"]) == 4, "it went on"

    for format, name in (
        ("markdown", "t.md"),
        ("latex", "t.tex"),
        ("csv", "t.csv"),
        ("json", "t.json"),
        ("parquet", "t.parquet"),
    ):
        assert (
            f"written: {tmp_path / name}"
            in run("report", str(path), "-f", format, "-o", str(tmp_path / name)).output
        )
        assert (tmp_path / name).stat().st_size > 100
    table = report.table([Run.open(path)])
    assert (tmp_path / "t.md").read_text() == report.markdown(table) + "\n"
    assert run("report", str(path), "-f", "csv").stdout.strip() == report.as_csv(table).strip()
    (card,) = json.loads(run("report", str(path), "-f", "card").stdout)
    assert len(card["sessions"]) == 2
    cases = json.loads(run("report", str(path), "-f", "cases").stdout)
    assert list(cases) == ["run.sqlite:ft", "run.sqlite:strong"]
    assert len(cases["run.sqlite:ft"]) == 4


def test_a_report_compares_shows_failures_and_draws(ran, tmp_path):
    options, path = ran
    run(*options)
    told = run(
        "report",
        str(path),
        "--compare",
        "--failures",
        "2",
        "--all",
        "--plot",
        str(tmp_path / "scores.png"),
    ).output
    for shown in (
        "ft minus strong",
        "4 records",
        "strong: prompts that fail after the edit",
        "wanted '",
        "picture: ",
        "no verdicts: 4 records, at least 20 needed",
        METRICS["EG"].meaning,
    ):
        assert shown in told
    assert "beyond chance" not in told
    assert told.count("wanted '") == 4
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_words_of_a_report_are_explained(ran):
    options, path = ran
    run(*options)
    told = run("report", str(path), "--explain").output
    for metric in METRICS.values():
        assert ("counterfact" in metric.forms) == bool(
            re.search(rf"^{re.escape(metric.title)} .*{re.escape(metric.meaning)}", told, re.M)
        )
    assert "teacher-forced  " in told and "beyond chance  " in told
    result = run("report", str(path), "--explain", "-f", "json")
    assert json.loads(result.stdout) and METRICS["EG"].meaning in result.stderr


def test_differences_in_json_are_one_document(ran, made):
    options, path = ran
    run(*options)
    record = json.loads(run("report", str(path), "--compare", "-f", "json").stdout)
    assert record["table"] == json.loads(report.as_json(report.table([Run.open(path)])))
    (pair,) = record["differences"]
    assert (pair["minuend"], pair["subtrahend"]) == ("ft", "strong")
    assert pair["note"] == "no verdicts: 4 records, at least 20 needed"
    assert pair["ES"]["count"] == 4 and pair["ES"]["beyond_chance"] is False
    assert json.loads(run("report", str(path), "--compare", "--json").stdout) == record
    (first, *_) = json.loads(run("report", str(made.path), "--compare", "--json").stdout)[
        "differences"
    ]
    assert first["subtrahend"] == "memit" and first["note"].endswith("the interval is a point")
    assert first["ES"]["mean"] == 1 and first["ES"]["beyond_chance"] is False


def test_a_sweep_over_layers_is_drawn(tmp_path):
    at = {"rome-1": {"layer": 1}, "rome-2": {"layer": 2}}
    swept = write(tmp_path / "run", {"rome-1=rome": BADLY, "rome-2=rome": WELL}, **at)
    assert (
        "picture: "
        in run("report", str(swept.path), "--plot-layers", str(tmp_path / "layers.png")).output
    )
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_shown_as_they_are(odd):
    assert ODD in run("report", str(odd.path)).output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--set", "rome:layer=3"],
            r"--set 'rome:layer=3': expected LABEL:NAME=VALUE with one of ft, strong as label",
        ),
        (["--set", "epochs=3"], r"--set 'epochs=3': expected LABEL:NAME=VALUE"),
        (["--method", "roem"], r"method='roem': expected .* \(did you mean 'rome'\?\)"),
        (["--seed", "3"], r"was begun with config="),
        (["--workers", "dask"], r"--workers='dask': expected 'ray'"),
    ],
)
def test_a_mistake_in_a_benchmark_ends_with_a_line(ran, monkeypatch, capsys, more, message):
    run(*ran[0])
    assert re.search(message, failing(monkeypatch, capsys, *ran[0], *more))


def test_a_mistake_in_a_report_ends_with_a_line(ran, tmp_path, monkeypatch, capsys):
    run(*ran[0])
    assert "give -o FILE.parquet" in failing(
        monkeypatch, capsys, "report", str(ran[1]), "-f", "parquet"
    )
    assert "is no file of a run" in failing(monkeypatch, capsys, "report", str(tmp_path / "gone"))
