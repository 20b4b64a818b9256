"""`engram stats`, second moments of keys, and `engram plan`, what an edit takes in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, Corpus, Model, ModelOptions, Seed, WorkerOptions


@dataclass(frozen=True)
class TextOptions:
    """The text that second moments are measured on."""

    corpus: Corpus = None
    data_set: Annotated[
        str | None,
        typer.Option(help="NAME or NAME:CONFIG of a Hugging Face data set (extra 'data')."),
    ] = None
    tokens: Annotated[
        int | None, typer.Option(help="Number of tokens measured; default: 20 x d_ff.", min=1)
    ] = None
    seed: Seed = 0


def stats(
    model: Model,
    layers: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="Block, from 0; repeat. Default: all.")
    ] = None,
    *,
    text: TextOptions,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for one file per layer, beside the cache."),
    ] = None,
    as_json: AsJson = False,
    workers: WorkerOptions,
    model_options: ModelOptions,
) -> None:
    """Measure second moments of keys, several layers in one pass.

    They are cached for later edits; a stopped measurement is resumed.

    Example: engram stats pocket --layer 3 --corpus text.txt
    """
    from engram.cli import terminal
    from engram.errors import EngramError

    if text.corpus and text.data_set:
        raise EngramError(
            "--corpus and --data-set both say where the text comes from; give one of them"
        )

    def show() -> None:
        rows = [
            {
                "layer": layer,
                "d_ff": len(moment.matrix_ff),
                "tokens": moment.count,
                "condition": moment.condition(),
                "file": files[layer].path,
            }
            for layer, moment in moments.items()
        ]
        if as_json:
            terminal.print_json(rows)
            return
        typer.echo(f"{'layer':>5} {'d_ff':>6} {'tokens':>9} {'condition':>10}")
        for row in rows:
            typer.echo("{layer:>5} {d_ff:>6} {tokens:>9} {condition:>10.1e}".format_map(row))

    # Which layers a model has is known once it is loaded; whether the folder can be written, now.
    folder = outputs.Output("folder", out and out / "layers", parents=True)
    with outputs.tried(folder, cached=outputs.in_cache) as written:
        from engram.editors.second_moments.corpora import DataSet
        from engram.editors.second_moments.measure import second_moments

        lm = model_options.load(model)
        wanted = layers or list(range(lm.n_layers))
        files = {
            layer: outputs.Output("moment", out and out / f"layer{layer}.safetensors", said=False)
            for layer in wanted
        }
        widths = [lm.parts.mlp_width(layer) for layer in wanted if 0 <= layer < lm.n_layers]
        written.reserve(*files.values(), needs=8 * sum(width**2 for width in widths))  # float64
        # As in `datasets.load_dataset(name, config)`; a name itself has no colon.
        name, _, config = (text.data_set or "").partition(":")
        with terminal.progress() as progress:
            moments = second_moments(
                lm,
                wanted,
                DataSet(name, config or None) if text.data_set else text.corpus,
                text.tokens,
                seed=text.seed,
                workers=workers.open(),
                progress=progress,
            )
            for done, moment in enumerate(moments.values()):  # kept for the table; takes long
                progress("condition numbers", done, len(moments))
                moment.condition()
        written.finish(show, {files[layer]: moment.save for layer, moment in moments.items()})


def plan(
    model: Model,
    facts: Annotated[int, typer.Option("--facts", "-n", help="Number of facts.", min=1)] = 1,
    method: Annotated[str, typer.Option(help="Method of the edit.")] = "rome",
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", "-l", help="Block, from 0; repeat. Default: the preset's."),
    ] = None,
    facts_per_batch: Annotated[int, typer.Option(help="Facts optimised in one batch.", min=1)] = 32,
    as_json: AsJson = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own."),
    ] = None,
) -> None:
    """Report the memory and disk an edit takes, from the model's config: no weight is read.

    Example: engram plan pocket --facts 1000 --method memit
    """
    from dataclasses import asdict

    import engram
    from engram.cli import terminal
    from engram.model.loading import load_shapes

    terminal.avoid_hub_without_network(model)
    memory = engram.memory_plan(
        load_shapes(model, dtype=dtype),  # on the meta device: no ModelOptions, nothing is placed
        facts,
        method,
        layers=layers,
        facts_per_batch=facts_per_batch,
    )
    # Properties of the plan, which `asdict` leaves out.
    sums = {"peak": memory.peak, "beside": memory.beside, "on_disk": memory.on_disk}
    if as_json:
        terminal.print_json(asdict(memory) | sums)
    else:
        typer.echo(str(memory))
