"""`engram trace`: where a model keeps one fact, or many on average. What it takes is what
`TraceConfig` takes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.options import (
    AsJson,
    DeviceMap,
    Dtype,
    Model,
    NumWorkers,
    OnWorkers,
    RayAddress,
    Seed,
    settings_of,
    workers_of,
)

HEATMAPS, LINES, SEVERED, TRACES, SUMMARY = (
    "heatmaps.png",
    "lines.png",
    "severed.png",
    "traces.sqlite",
    "summary.json",
)


def trace(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text up to the object: 'The Space Needle is in the city of'."),
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option("--subject", "-s", help="Words of the prompt that name the subject."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Text to score; default: the model's own next token.")
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            help="File of facts to average over (JSON, JSON lines, CSV) or 'pocket', instead of a prompt."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="So many random facts of the file.", min=1)
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Facts that count: known, exact (as published) or all.")
    ] = "known",
    answer: Annotated[
        str,
        typer.Option(
            help="With --facts, what is scored: the model's own next token, or the object."
        ),
    ] = "model",
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--site", help="residual, mlp, attention, head, neuron, or one of the family's; repeat."
        ),
    ] = None,
    severed: Annotated[
        list[str] | None, typer.Option(help="Freeze mlp or attention behind the state; repeat.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Layers replaced together at MLP and attention; default: 10, or a third."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Noise samples.")] = 10,
    noise: Annotated[
        str,
        typer.Option(
            help="s3: three standard deviations of subjects' embeddings; 0.1, u0.1, m, t10."
        ),
    ] = "s3",
    corruption: Annotated[
        str, typer.Option(help="What happens to the subject: noise, zeros, mean or subject.")
    ] = "noise",
    other_subject: Annotated[
        str | None, typer.Option(help="The other subject of --corruption subject.")
    ] = None,
    direction: Annotated[
        str, typer.Option(help="denoise: clean states into the corrupted run; noise: the reverse.")
    ] = "denoise",
    effect: Annotated[
        str, typer.Option(help="indirect, or direct: everything but the state is exchanged.")
    ] = "indirect",
    metric: Annotated[
        str, typer.Option(help="probability, log_probability or logit_difference.")
    ] = "probability",
    foil: Annotated[
        str | None, typer.Option(help="The other answer of --metric logit_difference.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="exact, or attribution: an estimate, many times faster.")
    ] = "exact",
    screen: Annotated[
        int | None, typer.Option(help="Estimate all cells, compute so many of the best.", min=1)
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, any other setting of a trace; repeat."),
    ] = None,
    occurrence: Annotated[
        str, typer.Option(help="Which place of the subject: first, last or all.")
    ] = "first",
    seed: Seed = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Picture (.png, .pdf, .svg); with --facts a folder, which is gone on with.",
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="File for one trace's numbers: .safetensors.")
    ] = None,
    workers: OnWorkers = None,
    num_workers: NumWorkers = 2,
    ray_address: RayAddress = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Find which states of a model carry a fact (causal tracing), of one prompt or on average over
    a file of facts.
    """
    from engram.errors import FactError
    from engram.locate.settings import TraceConfig

    others = settings_of(setting)
    TraceConfig.check_names(others)
    asked: dict[str, Any] = {
        "sites": sites or None,
        "severed": severed or (),
        "window": window,
        "samples": samples,
        "noise": _rule(noise),
        "corruption": corruption,
        "direction": direction,
        "metric": metric,
        "method": method,
        "screen": screen,
        "effect": effect,
        "occurrence": occurrence,
        "seed": seed,
        **others,
    }
    if (prompt is None) == (facts is None):
        raise FactError("give either a PROMPT with --subject, or --facts FILE to average over")
    if facts is not None:
        one = {
            "--subject": subject,
            "--target": target,
            "--foil": foil,
            "--other-subject": other_subject,
            "--save": save,
        }
        if given := [name for name, value in one.items() if value is not None]:
            raise FactError(
                f"{', '.join(given)} speak of one prompt; with --facts every fact brings its own"
            )
        asked |= {
            "keep": keep,
            "answer": answer,
            "workers": workers_of(workers, num_workers, ray_address),
        }
        _average(model, facts, limit, asked, out, as_json, dtype, device_map)
        return
    if subject is None:
        raise FactError("--subject is missing; give the words of the prompt that name the subject")
    company = {"target": target, "foil": foil, "other_subject": other_subject}
    _one(model, str(prompt), subject, company, asked, out, save, as_json, dtype, device_map)


def _one(
    model: str,
    prompt: str,
    subject: str,
    company: dict[str, Any],
    asked: dict[str, Any],
    out: Path | None,
    save: Path | None,
    as_json: bool,
    dtype: str | None,
    device_map: str | None,
) -> None:
    import engram
    from engram.cli import show, terminal

    lm = terminal.load(model, dtype, device_map)
    with terminal.progress() as progress:
        found = engram.trace(lm, prompt, subject=subject, progress=progress, **company, **asked)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        show.show_trace(found)
    if out is not None:
        found.plot().savefig(out)
        typer.echo(f"picture: {out}", err=as_json)
    if save is not None:
        found.save(save)
        typer.echo(f"numbers: {save}", err=as_json)


def _average(
    model: str,
    facts: str,
    limit: int | None,
    asked: dict[str, Any],
    out: Path | None,
    as_json: bool,
    dtype: str | None,
    device_map: str | None,
) -> None:
    import engram
    from engram.cli import show, terminal

    table = engram.read_facts(facts)
    asked.setdefault(
        "noise_subjects", tuple(fact.subject for fact in table)
    )  # of the whole file, as published
    if limit is not None and limit < len(table):
        table = random.Random(asked["seed"]).sample(table, limit)
    if out is not None:
        _make_folder(out)
    lm = terminal.load(model, dtype, device_map)
    with terminal.progress() as progress:
        average = engram.average_trace(
            lm, table, out=out and out / TRACES, progress=progress, **asked
        )
    if as_json:
        typer.echo(json.dumps(average.summary()))
    else:
        show.show_average(average)
    if out is not None:
        (out / SUMMARY).write_text(json.dumps(average.summary(), indent=1) + "\n", encoding="utf8")
        all_places = average.layered and asked.get("positions", "all") == "all"
        pictures = {HEATMAPS: average.plot, LINES: average.plot_lines} if all_places else {}
        pictures |= {SEVERED: average.plot_severed} if average.severed else {}
        for name, draw in pictures.items():
            draw().savefig(out / name)
        typer.echo(f"{out}: {', '.join([TRACES, SUMMARY, *pictures])}", err=as_json)


def _make_folder(out: Path) -> None:
    from engram.errors import EngramFileError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngramFileError(
            f"--out {out} cannot be the folder of a run: {error}. Choose another name"
        ) from error


def _rule(noise: str) -> str | float:
    """A number is a standard deviation; anything else names a rule."""
    try:
        return float(noise)
    except ValueError:
        return noise
