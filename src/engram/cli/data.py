"""`engram data`: benchmarks by name, and benchmarks of one's own."""

from __future__ import annotations

import json
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.options import DeviceMap, Dtype, Seed

app = typer.Typer(
    help="Benchmarks: those that are published, and those that you build.", no_args_is_help=True
)


class Rule(StrEnum):
    greedy = "greedy"
    relation = "relation"


@app.command("list")
def list_() -> None:
    """The data sets that have a name."""
    from engram.benchmark.data.sources import SOURCES

    for name, source in SOURCES.items():
        typer.echo(f"{name:<18}{source.about}")


@app.command()
def get(
    name: Annotated[
        str, typer.Argument(help="A name that 'engram data list' tells.", show_default=False)
    ],
    references: Annotated[
        bool,
        typer.Option(
            "--references", help="Also the texts that generated ones are compared with (large)."
        ),
    ] = False,
) -> None:
    """Fetch a data set into the cache folder; goes on where it broke off."""
    from engram.benchmark.data.sources import download
    from engram.cli import terminal

    with terminal.progress() as progress:
        files = download(name, references=references, progress=progress)
    for file in files:
        typer.echo(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    if not files:
        typer.echo(f"{name} comes with engram: there is nothing to fetch")


@app.command()
def build(
    facts: Annotated[
        Path,
        typer.Option(
            help="File of true facts: subject, relation, object (JSON lines, JSON or CSV)."
        ),
    ],
    templates: Annotated[
        Path,
        typer.Option(
            help="JSON or TOML: relation -> texts with one {} for the subject, object next."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="JSON file to write, in CounterFact's form.")
    ],
    generation: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML: relation -> texts with one {} that make a model tell of the subject."
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help='JSON: "relation:object" -> list of {name, text} about entities that have it.'
        ),
    ] = None,
    openings: Annotated[
        Path | None,
        typer.Option(help="Text file: sentences to put before paraphrases, one a line."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML: relation -> templates that serve as paraphrases and never as prompts."
        ),
    ] = None,
    known_to: Annotated[
        str | None, typer.Option(help="Keep the facts that this model says.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Records at most.", min=1)] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Build a CounterFact of your own domain: counterfactual objects, paraphrases, neighbours,
    attribute and generation prompts.
    """
    from engram.benchmark.data.build import (
        build_counterfact,
        read_associations,
        read_lines,
        read_snippets,
    )
    from engram.benchmark.data.write import write_dataset
    from engram.benchmark.known_records import known_records
    from engram.cli import terminal

    apart = None if held_out is None else _texts(held_out)
    made = build_counterfact(
        read_associations(facts),
        _texts(templates),
        generation=None if generation is None else _texts(generation),
        texts=None if references is None else read_snippets(references),
        openings=() if openings is None else read_lines(openings),
        held_out=None if apart is None else lambda fact: apart.get(fact.relation, []),
        seed=seed,
        limit=n if known_to is None else None,
        name=out.stem,
    )
    skipped = made.skipped
    if known_to is not None:
        lm = terminal.load(known_to, dtype, device_map)
        with terminal.progress() as progress:
            made = known_records(lm, made, limit=n, progress=progress)
    write_dataset(made, out)
    typer.echo(f"{len(made.records)} records: {out}")
    for reason in skipped[:5]:
        typer.echo(f"  left out: {reason}")
    if len(skipped) > 5:
        typer.echo(f"  and {len(skipped) - 5} more")


@app.command()
def filter(
    dataset: Annotated[str, typer.Argument(help="A name, or a file.", show_default=False)],
    known_to: Annotated[
        str, typer.Option(help="Keep the records whose true object this model says.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="JSON file to write, in CounterFact's form.")
    ],
    rule: Annotated[
        Rule,
        typer.Option(
            help="greedy: it says the object; relation: the object is the likeliest of the relation's."
        ),
    ] = Rule.greedy,
    references: Annotated[
        bool,
        typer.Option("--references", help="Also the texts that generated ones are compared with."),
    ] = False,
    n: Annotated[int | None, typer.Option("-n", help="Records at most.", min=1)] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Keep the records about facts that a model knows: only there does an edit change something."""
    from engram.benchmark.data.sources import read_dataset
    from engram.benchmark.data.write import write_dataset
    from engram.benchmark.known_records import known_records
    from engram.cli import terminal

    lm = terminal.load(known_to, dtype, device_map)
    with terminal.progress() as progress:
        whole = read_dataset(dataset, references=references, progress=progress)
        looked = 0

        def watch(what: str, done: int, total: int) -> None:
            nonlocal looked
            looked = done
            progress(what, done, total)

        kept = known_records(lm, whole, rule.value, limit=n, progress=watch)
    write_dataset(kept, out)
    typer.echo(
        f"{len(kept.records)} of the first {looked} records are known by the rule {rule.value!r}: {out}"
    )


def _texts(path: Path) -> dict[str, Any]:
    """relation -> texts, of a JSON or a TOML file."""
    from engram.errors import FactError

    try:
        text = path.read_text(encoding="utf8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise FactError(
            f"{path} could not be read: {error}; expected JSON or TOML, relation -> list of texts"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(each, list) and all(isinstance(text, str) for text in each)
        for each in found.values()
    ):
        raise FactError(f"{path}: expected relation -> list of texts")
    return found
