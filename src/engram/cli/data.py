"""`engram data`: published benchmarks by name, and benchmarks that you build."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, ModelOptions, Seed
from engram.cli.usage import Commands

if TYPE_CHECKING:
    from engram.benchmark.data.records import Dataset

app = Commands(help="Benchmarks: those that are published, and those that you build.")


KnownTo = Annotated[
    str | None, typer.Option(help="Keep only facts that this model knows: 'pocket', a folder, ...")
]
OutFile = Annotated[
    Path, typer.Option("--out", "-o", help="JSON file to write, in CounterFact's format.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", "-n", help="Number of records at most.", min=1)
]


class Rule(StrEnum):
    greedy = "greedy"
    relation = "relation"


@app.command("list")  # the function has another name: `list` is a type in this module
def list_(as_json: AsJson = False) -> None:
    """List the data sets that have a name."""
    from engram.benchmark.data.sources import SOURCES
    from engram.cli import terminal

    if as_json:
        terminal.print_json({name: source.about for name, source in SOURCES.items()})
        return
    for name, source in SOURCES.items():
        typer.echo(f"{name:<18}{source.about}")


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="Name from 'engram data list'.", show_default=False)],
    references: Annotated[
        bool,
        typer.Option(
            "--references", help="Fetch the reference texts of generated text too (large)."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download a data set into the cache folder; a broken download is resumed.

    Example: engram data get counterfact
    """
    from engram.benchmark.data.sources import download
    from engram.cli import terminal
    from engram.cli.ending import kept

    with kept(f"what was fetched is kept; {outputs.RESUME}"), terminal.progress() as progress:
        files = download(name, references=references, progress=progress)
    if as_json:
        terminal.print_json([{"file": file, "bytes": file.stat().st_size} for file in files])
        return
    for file in files:
        typer.echo(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    if not files:
        typer.echo(f"{name} comes with engram: there is nothing to fetch")


@dataclass(frozen=True)
class TextFiles:
    """Where the wordings of a benchmark come from."""

    templates: Annotated[
        Path, typer.Option(help="JSON or TOML: relation -> texts with one {} for the subject.")
    ]
    generation: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML: relation -> texts with one {} that open a text on the subject."
        ),
    ] = None
    references: Annotated[
        Path | None,
        typer.Option(
            help='JSON: "relation:object" -> list of {name, text} about entities that have it.'
        ),
    ] = None
    openings: Annotated[
        Path | None,
        typer.Option(help="Text file: sentences to put before paraphrases, one a line."),
    ] = None
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML: relation -> templates for paraphrases only, never for prompts."
        ),
    ] = None

    def given(self) -> list[Path | None]:
        """Return the files that are read."""
        return [self.templates, self.generation, self.references, self.openings, self.held_out]

    def build(self, facts: Path, **settings: Any) -> Dataset:
        """Return the benchmark of these wordings and of a file of facts."""
        from engram.benchmark.data.build import (
            build_counterfact,
            read_associations,
            read_lines,
            read_snippets,
        )

        held_out = None if self.held_out is None else _texts(self.held_out)
        return build_counterfact(
            read_associations(facts),
            _texts(self.templates),
            generation=None if self.generation is None else _texts(self.generation),
            texts=None if self.references is None else read_snippets(self.references),
            openings=() if self.openings is None else read_lines(self.openings),
            held_out=None if held_out is None else lambda fact: held_out.get(fact.relation, []),
            **settings,
        )


@dataclass(frozen=True)
class WantedRecords:
    """Which of the records that can be built are kept."""

    known_to: KnownTo = None
    limit: Limit = None
    seed: Seed = 0


@app.command()
def build(
    facts: Annotated[
        Path,
        typer.Option(
            help="File of true facts: subject, relation, object (JSON lines, JSON or CSV)."
        ),
    ],
    files: TextFiles,
    *,
    out: OutFile,
    wanted: WantedRecords,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Build a CounterFact of your own domain.

    It has counterfactual objects, paraphrases, neighbours, attribute and generation prompts.

    Example: engram data build --facts facts.csv --templates templates.json -o mine.json
    """
    from engram.cli import terminal

    with (
        outputs.tried(outputs.Output("records", out, "JSON"), reads=[facts, *files.given()]),
        _reserved(out, files.references is not None),
    ):
        from engram.benchmark.data.write import write_dataset
        from engram.benchmark.known_records import known_records

        dataset = files.build(
            facts,
            seed=wanted.seed,
            # With --known-to the limit counts known records, so it is applied below.
            limit=wanted.limit if wanted.known_to is None else None,
            name=out.stem,
        )
        skipped = dataset.skipped  # of the building; `known_records` returns another data set
        if wanted.known_to is not None:
            lm = model_options.load(wanted.known_to)
            with terminal.progress() as progress:
                dataset = known_records(lm, dataset, limit=wanted.limit, progress=progress)
        write_dataset(dataset, out)
    if as_json:
        count = len(dataset.records)
        terminal.print_json({"file": out, "records": count, "left_out": skipped})
        return
    typer.echo(f"{len(dataset.records)} records: {out}")
    for reason in skipped[:5]:
        typer.echo(f"  left out: {reason}")
    if len(skipped) > 5:
        typer.echo(f"  and {len(skipped) - 5} more")


@dataclass(frozen=True)
class KnownRule:
    """Who has to know a fact, and what counts as knowing it."""

    known_to: Annotated[
        str, typer.Option(help="Keep the records whose true object this model knows.")
    ]
    rule: Annotated[
        Rule,
        typer.Option(
            help="greedy: it says the object; relation: the object is likeliest of its relation."
        ),
    ] = Rule.greedy


@app.command()
def filter(
    dataset: Annotated[str, typer.Argument(help="Name, or file.", show_default=False)],
    *,
    known: KnownRule,
    out: OutFile,
    references: Annotated[
        bool, typer.Option("--references", help="Keep the reference texts of generated text too.")
    ] = False,
    limit: Limit = None,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Keep the records about facts that a model knows; only there does an edit change something.

    Example: engram data filter pocket --known-to pocket --limit 100 -o known.json
    """
    from engram.cli import terminal

    with (
        outputs.tried(outputs.Output("records", out, "JSON"), reads=[dataset]),
        _reserved(out, references),
    ):
        from engram.benchmark.data.sources import read_dataset
        from engram.benchmark.data.write import write_dataset
        from engram.benchmark.known_records import known_records

        lm = model_options.load(known.known_to)
        with terminal.progress() as progress:
            records = read_dataset(dataset, references=references, progress=progress)
            tested = 0  # with --limit, testing stops early: the share known is of these

            def count(what: str, done: int, total: int) -> None:
                nonlocal tested
                tested = done
                progress(what, done, total)

            kept = known_records(lm, records, known.rule.value, limit=limit, progress=count)
        write_dataset(kept, out)
    if as_json:
        terminal.print_json(
            {"file": out, "records": len(kept.records), "tested": tested, "rule": known.rule.value}
        )
        return
    typer.echo(
        f"{len(kept.records)} of the first {tested} records are known by the rule "
        f"{known.rule.value!r}: {out}"
    )


@contextmanager
def _reserved(out: Path, references: bool) -> Iterator[None]:
    """Try the files beside a data set, which its reference texts are written to."""
    if not references:
        yield
        return
    from engram.benchmark.data.write import reserved_dataset

    with reserved_dataset(out, references=True):
        yield


def _texts(path: Path) -> dict[str, Any]:
    """Read relation -> texts from a JSON or TOML file."""
    from engram.errors import FactError
    from engram.files.forms import parsed
    from engram.files.names import read_text

    try:
        text = read_text(path)
        if path.suffix == ".toml":
            text = json.dumps(
                tomllib.loads(text), default=str
            )  # TOML has dates, which are no texts
    except (OSError, ValueError, RecursionError) as error:
        raise FactError(
            f"{path} could not be read: {error}; expected JSON or TOML, relation -> list of texts"
        ) from error
    advice = "Expected relation -> list of texts"
    return parsed(dict[str, list[str]], text, path, error=FactError, advice=advice)
