"""`engram ledger`: the edits of one model over months, in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from engram.cli.options import AsJson, EditFolder, Model, ModelOptions, Out
from engram.cli.usage import Commands

app = Commands(
    help="Keep the edits of one model in a folder: add, list, remove exactly, apply all of them."
)
Book = Annotated[
    Path,
    typer.Argument(
        metavar="LEDGER", help="Folder that 'engram ledger create' wrote.", show_default=False
    ),
]


@app.command()
def create(
    ledger: Annotated[
        Path, typer.Argument(help="Folder to write; must not exist.", show_default=False)
    ],
    model: Model,
    *,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(
            help="Limit for held-out perplexity with all edits, divided by without. [default: 1.05]"
        ),
    ] = None,
    max_norm_ratio: Annotated[
        float | None, typer.Option(help="Limit for ||change|| / ||weight||. [default: 10]")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file to measure perplexity on; default: half a page of prose.",
        ),
    ] = None,
    model_options: ModelOptions,
) -> None:
    """Create a ledger for a model, with limits that every added edit has to keep."""
    import engram
    from engram.evaluate.canary import Canary

    # Options that were not given are left out, so that `Canary` alone says the defaults.
    given = {"max_perplexity_ratio": max_perplexity_ratio, "max_norm_ratio": max_norm_ratio}
    limits = {name: value for name, value in given.items() if value is not None}
    canary = Canary(**limits, text=text.read_text(encoding="utf8") if text else None)
    new = engram.Ledger.create(ledger, model_options.load(model), canary=canary)
    typer.echo(f"ledger: {new.folder}, for {new.base['model']}")


@app.command()
def add(
    ledger: Book,
    edits: Annotated[
        list[Path], typer.Argument(help="Folders that 'engram edit' wrote.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option(help="Unedited model; default: the ledger's, by its name.")
    ] = None,
    canary: Annotated[
        bool,
        typer.Option(
            help="Measure the model with all edits; roll back an edit that exceeds a limit."
        ),
    ] = True,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Remove older facts about the same subject and relation."),
    ] = False,
    device_map: Annotated[
        str | None, typer.Option(help="Passed to transformers, such as 'auto' or 'cuda:0'.")
    ] = None,
) -> None:
    """Put edits in force, one after another.

    An edit that damages the model is rolled back, and the exit code is 2.
    """
    import engram
    from engram.cli import terminal
    from engram.edit.edit import Edit

    book = engram.Ledger.open(ledger)
    # All of them before the first is added: a wrong folder leaves the ledger as it was.
    loaded = [Edit.load(folder) for folder in edits]
    # Without a canary nothing has to run, and adding takes no model. The dtype is the ledger's: its
    # fingerprints are of weights in that dtype.
    lm = (
        terminal.load(model or str(book.base["model"]), book.dtype, device_map)
        if canary or model
        else None
    )
    for edit in loaded:
        book.add(edit, lm, replace=replace)
        # At once, not at the end: a later edit may be rolled back with an error.
        typer.echo(str(book.history()[-1]))


@app.command("list")  # the function has another name: `list` is a type in this module
def list_(
    ledger: Book,
    everything: Annotated[
        bool, typer.Option("--all", help="List removed and rolled-back entries too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what is in force, with the names by which it can be removed."""
    import engram

    entries = engram.Ledger.open(ledger).list(everything=everything)
    if as_json:
        typer.echo(
            json.dumps(
                [
                    # JSON has no sets, and `asdict` leaves properties out.
                    {**asdict(entry), "gone": sorted(entry.gone), "status": entry.status}
                    for entry in entries
                ]
            )
        )
    else:
        typer.echo("\n".join(map(str, entries)) or "nothing is in force")


@app.command()
def show(
    ledger: Book,
    number: Annotated[int, typer.Argument(help="Number of the entry.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for a copy of the edit as it was added."),
    ] = None,
) -> None:
    """Show an entry: facts, date, measurements, the entries it was computed on, receipt."""
    import engram
    from engram.cli import show
    from engram.evaluate.receipt import Receipt

    book = engram.Ledger.open(ledger)
    edit = book.show(number)
    entry = next(entry for entry in book.list(everything=True) if entry.number == number)
    typer.echo(f"{entry}\nadded {entry.when}, {edit!r}")
    for name, value in entry.canary.items():
        typer.echo(f"{name.replace('_', ' ')} with everything in force then: {value:.3f}")
    if edit.receipt is not None:
        show.show_receipt(Receipt.from_dict(edit.receipt))
    if out is not None:
        typer.echo(f"edit: {edit.save(out)}")


@app.command()
def remove(
    ledger: Book,
    names: Annotated[
        list[str],
        typer.Argument(help="Entries such as 3, or single facts such as 3.1.", show_default=False),
    ],
) -> None:
    """Remove entries or single facts exactly; their files stay until 'prune'."""
    import engram

    book = engram.Ledger.open(ledger)
    book.remove(*names)
    typer.echo(str(book.history()[-1]))


@app.command()
def conflicts(
    ledger: Book,
    edit: EditFolder,
    near: Annotated[
        float | None,
        typer.Option(help="Overlap (cosine) above which two keys conflict; default: as measured."),
    ] = None,
) -> None:
    """List facts in force that an edit conflicts with. Exit code 1 if there are any."""
    import engram
    from engram.edit.edit import Edit
    from engram.ledger.conflicts import NEAR

    clashes = engram.Ledger.open(ledger).conflicts(
        Edit.load(edit), near=NEAR if near is None else near
    )
    for conflict in clashes:
        typer.echo(str(conflict))
    if clashes:
        raise typer.Exit(1)


@app.command()
def history(ledger: Book, as_json: AsJson = False) -> None:
    """List every event, oldest first."""
    import engram

    events = engram.Ledger.open(ledger).history()
    typer.echo(
        json.dumps([event.to_dict() for event in events])
        if as_json
        else "\n".join(map(str, events))
    )


@app.command()
def apply(
    ledger: Book,
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint of the base model; default: by its name.")
    ] = None,
) -> None:
    """Write the model with everything in force as one checkpoint."""
    import engram

    typer.echo(f"edited checkpoint: {engram.Ledger.open(ledger).materialise(out, model)}")


@app.command()
def export(
    ledger: Book,
    peft: Annotated[
        Path,
        typer.Option(
            help="Folder to write a LoRA adapter of the peft library in; an adapter is replaced.",
            show_default=False,
        ),
    ],
) -> None:
    """Write everything in force for other libraries, to be used with the unedited model."""
    import engram

    typer.echo(f"adapter: {engram.Ledger.open(ledger).to_peft(peft)}")


@app.command()
def prune(ledger: Book) -> None:
    """Delete the files of what is no longer in force; the history stays."""
    import engram

    gone = engram.Ledger.open(ledger).prune()
    typer.echo(
        f"files of {len(gone)} entries deleted" + (f": {', '.join(map(str, gone))}" if gone else "")
    )
