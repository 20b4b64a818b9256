"""`engram layers`: which layer of a model to edit. Its options are those of `engram.layer_card`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, Corpus, Model, ModelOptions, Seed, Setting, parse_settings


@dataclass(frozen=True)
class EvidenceOptions:
    """Which facts are traced and edited, and at which layers."""

    facts: Annotated[
        Path | None,
        typer.Option(
            help="File of facts (JSON, JSON lines, CSV); default: bundled facts the model knows."
        ),
    ] = None
    keep: Annotated[Literal["known", "all"], typer.Option(help="Facts of the file that count.")] = (
        "known"
    )
    edits: Annotated[
        int, typer.Option(help="Number of facts edited at each tested layer.", min=1)
    ] = 20
    traces: Annotated[int, typer.Option(help="Number of facts traced exactly.", min=0)] = 20
    estimates: Annotated[
        int, typer.Option(help="Number of facts whose trace is estimated.", min=0)
    ] = 40
    layer_step: Annotated[
        int | None,
        typer.Option(
            help="Test every Nth layer first; default: all, or 12 of a deeper model.", min=1
        ),
    ] = None
    refine: Annotated[
        bool, typer.Option(help="Then test the skipped layers on both sides of the best.")
    ] = True


@dataclass(frozen=True)
class EditOptions:
    """How facts are edited."""

    method: Annotated[str, typer.Option(help="Method of the edits; one that takes a layer.")] = (
        "rome"
    )
    setting: Setting = None
    corpus: Corpus = None
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to measure second moments on; default: 20 x d_ff.", min=1),
    ] = None
    seed: Seed = 0


def layers(
    model: Model,
    evidence: EvidenceOptions,
    editing: EditOptions,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the card.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .png, .pdf or .svg.")] = None,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Measure which layer to edit: trace known facts, and edit them at every layer.

    The result is cached, and `--layer auto` of other commands uses it.

    Example: engram layers pocket -o card.json --plot card.png
    """
    import engram
    from engram.cli import show, terminal
    from engram.editors.methods import check_method

    def show_result() -> None:
        if as_json:
            terminal.print_json(json.loads(card.to_json()))
        else:
            show.show_layer_card(card)

    json_file, picture = outputs.Output("card", out, "JSON"), outputs.picture(plot)
    reads = [evidence.facts, editing.corpus]
    with outputs.tried(json_file, picture, reads=reads, cached=outputs.in_cache) as written:
        facts = None if evidence.facts is None else engram.read_facts(evidence.facts)
        # Files and settings before the model, whose loading takes longest.
        options = {field.name for group in (evidence, editing) for field in fields(group)}
        settings = parse_settings(editing.setting, options)
        check_method(editing.method, settings, model)
        lm = model_options.load(model)
        with terminal.progress() as progress:
            card = engram.layer_card(
                lm,
                facts,
                keep=evidence.keep,
                edits=evidence.edits,
                traces=evidence.traces,
                estimates=evidence.estimates,
                layer_step=evidence.layer_step,
                refine=evidence.refine,
                method=editing.method,
                corpus=editing.corpus,
                tokens=editing.tokens,
                seed=editing.seed,
                progress=progress,
                **settings,
            )
        writers: outputs.Writers = {json_file: card.save, picture: partial(outputs.draw, card.plot)}
        written.finish(show_result, writers, as_json=as_json)
