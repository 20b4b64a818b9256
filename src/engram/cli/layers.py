"""`engram layers`: which layer of a model to edit. What it takes is what `engram.layer_card` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram.cli.options import AsJson, DeviceMap, Dtype, Model, Seed, settings_of


def layers(
    model: Model,
    facts: Annotated[
        Path | None,
        typer.Option(
            help="File of facts (JSON, JSON lines, CSV); default: those of the bundled table it knows."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Facts of the file that count: known or all.")
    ] = "known",
    edits: Annotated[int, typer.Option(help="Facts edited at every tested layer.")] = 20,
    traces: Annotated[int, typer.Option(help="Facts traced exactly.")] = 20,
    estimates: Annotated[int, typer.Option(help="Facts whose trace is estimated.")] = 40,
    layer_step: Annotated[
        int | None,
        typer.Option(help="Test every Nth layer first; default: all, or 12 of a deeper model."),
    ] = None,
    refine: Annotated[
        bool, typer.Option(help="Then test the layers between the best and its neighbours.")
    ] = True,
    method: Annotated[str, typer.Option(help="How to edit: a method that takes a layer.")] = "rome",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, any setting of the method; repeat."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file for second moments; default: the preset's.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens they are measured on; default: 20 x d_ff.", min=1)
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the card.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: .png, .pdf or .svg.")] = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure which layer to edit: trace facts that a model knows, and edit them at every layer.
    Kept; --layer auto goes by it.
    """
    import engram
    from engram.cli import show, terminal

    table = None if facts is None else engram.read_facts(facts)
    others = settings_of(setting)
    lm = terminal.load(model, dtype, device_map)
    with terminal.progress() as progress:
        card = engram.layer_card(
            lm,
            table,
            keep=keep,  # type: ignore[arg-type]
            edits=edits,
            traces=traces,
            estimates=estimates,
            layer_step=layer_step,
            refine=refine,
            method=method,
            corpus=corpus,
            tokens=tokens,
            seed=seed,
            progress=progress,
            **others,
        )
    if as_json:
        typer.echo(card.to_json())
    else:
        show.show_layer_card(card)
    if out is not None:
        typer.echo(f"card: {card.save(out)}", err=as_json)
    if plot is not None:
        card.plot().savefig(plot)
        typer.echo(f"picture: {plot}", err=as_json)
