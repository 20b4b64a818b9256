"""`engram knows`: which facts of a file a model knows, by relation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from engram.cli.options import AsJson, DeviceMap, Dtype, Model, Seed


def knows(
    model: Model,
    facts: Annotated[
        str,
        typer.Option(help="File of facts (JSON, JSON lines, CSV), or 'pocket': the bundled table."),
    ] = "pocket",
    candidates: Annotated[
        str,
        typer.Option(
            help="What the object is ranked among: vocabulary, or relation (the file's objects of it)."
        ),
    ] = "vocabulary",
    paraphrases: Annotated[
        str,
        typer.Option(
            help="Prompt that counts: first, best (an oracle), mean (of log-probs); none: ask the first only."
        ),
    ] = "first",
    length: Annotated[
        str, typer.Option(help="Log-probability of objects of several tokens: sum or mean.")
    ] = "sum",
    k: Annotated[int, typer.Option("-k", help="Of P@k.")] = 10,
    limit: Annotated[
        int | None, typer.Option(help="Ask for so many random facts; default: all.", min=1)
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for every answer.")
    ] = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Ask which facts a model knows: P@1, P@k, MRR, and whether it answers every wording alike."""
    import engram
    from engram.cli import show, terminal

    table = engram.read_facts(facts)
    asked = (
        random.Random(seed).sample(table, limit)
        if limit is not None and limit < len(table)
        else table
    )
    lm = terminal.load(model, dtype, device_map)
    with terminal.progress() as progress:
        found = engram.knows(
            lm,
            asked,
            candidates=candidates,
            aggregate="first" if paraphrases == "none" else paraphrases,  # type: ignore[arg-type]
            length=length,  # type: ignore[arg-type]
            paraphrases=paraphrases != "none",
            k=k,
            table=table,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        show.show_knowledge(found, seed)
    if out is not None:
        found.save(out)
        typer.echo(f"answers: {out}", err=as_json)
