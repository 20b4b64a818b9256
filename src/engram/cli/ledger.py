"""`engram ledger`: the edits of one model over months, in a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli import outputs
from engram.cli.ending import kept
from engram.cli.options import AdapterOptions, AsJson, EditFolder, Model, ModelOptions, Out
from engram.cli.usage import Commands

if TYPE_CHECKING:
    from engram.ledger.history import Entry, Event

app = Commands(
    help="Keep the edits of one model in a folder: add, list, remove exactly, apply all of them."
)
_WHOLE = "the ledger is whole, and 'engram ledger history' shows what is done"
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
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Create a ledger for a model, with limits that every added edit has to keep.

    Example: engram ledger create book pocket
    """
    import engram
    from engram.cli import terminal

    # Options that were not given are left out, so that `Canary` alone says the defaults.
    given = {"max_perplexity_ratio": max_perplexity_ratio, "max_norm_ratio": max_norm_ratio}
    limits = {name: value for name, value in given.items() if value is not None}
    with outputs.tried(outputs.Output("ledger", ledger, folder=True)):
        from engram.evaluate.canary import Canary
        from engram.files.names import read_text

        canary = Canary(**limits, text=read_text(text) if text else None)
        new = engram.Ledger.create(ledger, model_options.load(model), canary=canary)
    if as_json:
        terminal.print_json({"ledger": new.folder, "model": new.base["model"]})
    else:
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
    as_json: AsJson = False,
) -> None:
    """Put edits in force, one after another.

    An edit that damages the model is rolled back, and the exit code is 2.

    Example: engram ledger add book edit
    """
    import engram
    from engram.cli import terminal
    from engram.edit.edit import Edit

    book = engram.Ledger.open(ledger)
    # All of them before the first is added: a wrong folder leaves the ledger as it was.
    loaded = [Edit.load(folder) for folder in edits]
    events: list[Event] = []
    with kept(lambda: f"{len(events)} of {len(loaded)} edits were added; {_WHOLE}"):
        # Without a canary nothing has to run, and adding takes no model. The dtype is the ledger's:
        # its fingerprints are of weights in that dtype.
        lm = (
            terminal.load(model or str(book.base["model"]), book.dtype, device_map)
            if canary or model
            else None
        )
        try:
            for edit in loaded:
                book.add(edit, lm, replace=replace)
                events.append(book.history()[-1])
                if not as_json:
                    # At once, not at the end: a later edit may be rolled back with an error.
                    typer.echo(str(events[-1]))
        finally:
            if as_json:  # what was added stays, even if a later edit is rolled back
                terminal.print_json([event.to_dict() for event in events])


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
    from engram.cli import terminal

    entries = engram.Ledger.open(ledger).list(everything=everything)
    if as_json:
        terminal.print_json([_entry_dict(entry) for entry in entries])
    else:
        typer.echo("\n".join(map(str, entries)) or "nothing is in force")


def _entry_dict(entry: Entry) -> dict[str, Any]:
    # JSON has no sets, and `asdict` leaves properties out.
    return {**asdict(entry), "gone": sorted(entry.gone), "status": entry.status}


@app.command()
def show(
    ledger: Book,
    number: Annotated[int, typer.Argument(help="Number of the entry.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for a copy of the edit as it was added."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show an entry: facts, date, measurements, the entries it was computed on, receipt."""
    import engram
    from engram.cli import show, terminal
    from engram.evaluate.receipt import Receipt

    def show_entry() -> None:
        if as_json:
            terminal.print_json({**_entry_dict(entry), "receipt": edit.receipt})
            return
        typer.echo(f"{entry}\nadded {entry.when}, {edit!r}")
        for name, value in entry.canary.items():
            typer.echo(f"{name.replace('_', ' ')} with everything in force then: {value:.3f}")
        if edit.receipt is not None:
            show.show_receipt(Receipt.from_dict(edit.receipt))

    folder = outputs.edit_folder(out)
    with outputs.tried(folder) as written:
        book = engram.Ledger.open(ledger)
        edit = book.show(number)
        entry = next(entry for entry in book.list(everything=True) if entry.number == number)
        written.finish(show_entry, {folder: edit.save}, as_json=as_json)


@app.command()
def remove(
    ledger: Book,
    names: Annotated[
        list[str],
        typer.Argument(help="Entries such as 3, or single facts such as 3.1.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Remove entries or single facts exactly; their files stay until 'prune'.

    Example: engram ledger remove book 3.1
    """
    import engram
    from engram.cli import terminal

    book = engram.Ledger.open(ledger)
    with kept(_WHOLE):
        book.remove(*names)
    event = book.history()[-1]
    if as_json:
        terminal.print_json(event.to_dict())
    else:
        typer.echo(str(event))


@app.command()
def conflicts(
    ledger: Book,
    edit: EditFolder,
    near: Annotated[
        float | None,
        typer.Option(help="Overlap (cosine) above which two keys conflict; default: as measured."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List facts in force that an edit conflicts with. Exit code 1 if there are any."""
    import engram
    from engram.cli import terminal
    from engram.edit.edit import Edit
    from engram.ledger.conflicts import NEAR

    clashes = engram.Ledger.open(ledger).conflicts(
        Edit.load(edit), near=NEAR if near is None else near
    )
    if as_json:
        terminal.print_json([asdict(conflict) for conflict in clashes])
    else:
        for conflict in clashes:
            typer.echo(str(conflict))
    if clashes:
        raise typer.Exit(1)


@app.command()
def history(ledger: Book, as_json: AsJson = False) -> None:
    """List every event, oldest first."""
    import engram
    from engram.cli import terminal

    events = engram.Ledger.open(ledger).history()
    if as_json:
        terminal.print_json([event.to_dict() for event in events])
    else:
        typer.echo("\n".join(map(str, events)))


@app.command()
def apply(
    ledger: Book,
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint of the base model; default: by its name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the model with everything in force as one checkpoint.

    Example: engram ledger apply book -o edited
    """
    import engram
    from engram.cli import terminal

    with outputs.tried(outputs.checkpoint(out)):
        written = engram.Ledger.open(ledger).materialise(out, model)
    terminal.print_path("edited checkpoint", "checkpoint", written, as_json)


@app.command()
def export(ledger: Book, *, adapter: AdapterOptions, as_json: AsJson = False) -> None:
    """Write everything in force for other libraries, to be used with the unedited model."""
    import engram

    adapter.write(lambda: engram.Ledger.open(ledger), as_json)


@app.command()
def prune(ledger: Book, as_json: AsJson = False) -> None:
    """Delete the files of what is no longer in force; the history stays."""
    import engram
    from engram.cli import terminal

    with kept(_WHOLE):
        gone = engram.Ledger.open(ledger).prune()
    if as_json:
        terminal.print_json({"deleted": gone})
        return
    typer.echo(
        f"files of {len(gone)} entries deleted" + (f": {', '.join(map(str, gone))}" if gone else "")
    )
