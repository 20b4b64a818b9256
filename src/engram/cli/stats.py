"""TODO cli.stats"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engram.cli.options import NumWorkers, OnWorkers, RayAddress, workers_of

if TYPE_CHECKING:
    pass
from engram.cli.options import AsJson, DeviceMap, Dtype, Model, Seed


def stats(
    model: Model,
    layers: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="Block, from 0; repeat. Default: all.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file; default: what the model samples.")
    ] = None,
    data_set: Annotated[
        str | None,
        typer.Option(help="NAME or NAME:CONFIG of a Hugging Face data set (extra 'data')."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="How many are measured; default: 20 x d_ff.", min=1)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for one file a layer, beside the cache."),
    ] = None,
    workers: OnWorkers = None,
    num_workers: NumWorkers = 2,
    ray_address: RayAddress = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure second moments of keys, several layers in one pass; kept for later edits, resumed
    where it was stopped.
    """
    from engram.cli import terminal
    from engram.editors.second_moments.corpora import DataSet
    from engram.editors.second_moments.measure import second_moments
    from engram.errors import EngramError

    if corpus and data_set:
        raise EngramError(
            "--corpus and --data-set both say where the text comes from; give one of them"
        )
    lm = terminal.load(model, dtype, device_map)
    name, _, config = (data_set or "").partition(":")
    source = DataSet(name, config or None) if data_set else corpus
    with terminal.progress() as progress:
        found = second_moments(
            lm,
            layers or range(lm.n_layers),
            source,
            tokens,
            seed=seed,
            workers=workers_of(workers, num_workers, ray_address),
            progress=progress,
        )
    terminal.console.print(f"{'layer':>5} {'d_ff':>6} {'tokens':>9} {'condition':>10}")
    for layer, moment in found.items():
        terminal.console.print(
            f"{layer:>5} {len(moment.matrix_ff):>6} {moment.count:>9} {moment.condition():>10.1e}"
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            moment.save(out / f"layer{layer}.safetensors")


def plan(
    model: Model,
    facts: Annotated[int, typer.Option("--facts", "-n", help="How many are rewritten.", min=1)] = 1,
    method: Annotated[str, typer.Option(help="How to edit.")] = "rome",
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", "-l", help="Block, from 0; repeat. Default: the preset's."),
    ] = None,
    facts_per_batch: Annotated[int, typer.Option(help="Facts optimised in one batch.", min=1)] = 32,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Tell what an edit will take in memory and on disk, from the model's config alone: no weight
    is read.
    """
    from dataclasses import asdict

    import engram
    from engram.model.loading import load_shapes

    told = engram.memory_plan(
        load_shapes(model, dtype=dtype),
        facts,
        method,
        layers=layers,
        facts_per_batch=facts_per_batch,
    )
    typer.echo(
        json.dumps(
            {**asdict(told), "peak": told.peak, "beside": told.beside, "on_disk": told.on_disk}
        )
        if as_json
        else str(told)
    )
