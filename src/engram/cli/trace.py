"""`engram trace` and `engram average`: where a model keeps one fact, or many facts on average.

Their settings are those of `TraceConfig`, which checks them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, Model, ModelOptions, Seed, WorkerOptions, parse_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram.locate.average import AverageTrace

HEATMAPS, LINES, SEVERED, TRACES, SUMMARY = (
    "heatmaps.png",
    "lines.png",
    "severed.png",
    "traces.sqlite",
    "summary.json",
)


@dataclass(frozen=True)
class TraceOptions:
    """How to trace: settings of `TraceConfig`."""

    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--site", help="residual, mlp, attention, head, neuron, or one of the family's; repeat."
        ),
    ] = None
    severed: Annotated[
        list[str] | None,
        typer.Option(help="Freeze mlp or attention after the restored state; repeat."),
    ] = None
    window: Annotated[
        int | None,
        typer.Option(
            help="MLP or attention layers restored together; default: 10, or a third.", min=1
        ),
    ] = None
    samples: Annotated[int, typer.Option(help="Number of noise samples.", min=1)] = 10
    noise: Annotated[
        str,
        typer.Option(
            help="s3: three standard deviations of subjects' embeddings; 0.1, u0.1, m, t10."
        ),
    ] = "s3"
    corruption: Annotated[
        Literal["noise", "zeros", "mean", "subject"],
        typer.Option(help="How the subject is corrupted."),
    ] = "noise"
    direction: Annotated[
        Literal["denoise", "noise"],
        typer.Option(help="denoise: put clean states into the corrupted run; noise: the reverse."),
    ] = "denoise"
    effect: Annotated[
        Literal["indirect", "direct"],
        typer.Option(help="indirect; or direct: exchange everything but the state."),
    ] = "indirect"
    metric: Annotated[
        Literal["probability", "log_probability", "logit_difference"],
        typer.Option(help="What is read at the end."),
    ] = "probability"
    method: Annotated[
        Literal["exact", "attribution"],
        typer.Option(help="exact; or attribution: a first-order estimate, much faster."),
    ] = "exact"
    screen: Annotated[
        int | None, typer.Option(help="Estimate all cells, then compute the N best exactly.", min=1)
    ] = None
    occurrence: Annotated[
        Literal["first", "last", "all"], typer.Option(help="Which occurrence of the subject.")
    ] = "first"
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, any other setting of a trace; repeat."),
    ] = None
    seed: Seed = 1

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `engram.trace` and `engram.average_trace`.

        Raises:
            SettingError: a setting that no trace has, or of another type or range.
        """
        from engram.locate.settings import TraceConfig

        options = {field.name for field in fields(self)} - {"setting"}
        others = parse_settings(self.setting, options, "extra_tokens=1")
        settings = {
            # typer gives an empty list for an option that is left out.
            "sites": self.sites or None,
            "severed": self.severed or (),
            "window": self.window,
            "samples": self.samples,
            "noise": _number_or_rule(self.noise),
            "corruption": self.corruption,
            "direction": self.direction,
            "metric": self.metric,
            "method": self.method,
            "screen": self.screen,
            "effect": self.effect,
            "occurrence": self.occurrence,
            "seed": self.seed,
            **others,
        }
        TraceConfig.of(**settings)  # now, and not when tracing begins: the model takes long to load
        return settings


OwnScales = Annotated[
    bool,
    typer.Option(
        "--own-scales",
        help="Darkest colour of each panel: its own strongest effect, not that of all.",
    ),
]


@dataclass(frozen=True)
class PromptOptions:
    """What one prompt is about."""

    subject: Annotated[
        str, typer.Option("--subject", "-s", help="Words of the prompt that name the subject.")
    ]
    target: Annotated[
        str | None, typer.Option(help="Text to score; default: the model's own next token.")
    ] = None
    foil: Annotated[
        str | None, typer.Option(help="Other answer, for --metric logit_difference.")
    ] = None
    other_subject: Annotated[
        str | None, typer.Option(help="Subject to exchange it for, for --corruption subject.")
    ] = None


@dataclass(frozen=True)
class TraceOutput:
    """What one trace writes."""

    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture to write: .png, .pdf or .svg.")
    ] = None
    save: Annotated[Path | None, typer.Option(help="File for the numbers: .safetensors.")] = None
    own_scales: OwnScales = False
    as_json: AsJson = False


def trace(
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(
            help="Text up to the object: 'The Space Needle is in the city of'.", show_default=False
        ),
    ],
    question: PromptOptions,
    trace_options: TraceOptions,
    output: TraceOutput,
    model_options: ModelOptions,
) -> None:
    """Find which states of a model carry a fact, for one prompt (causal tracing).

    Example: engram trace pocket "The Eiffel Tower is in the city of" -s "Eiffel Tower" -o trace.png
    """
    import engram
    from engram.cli import show, terminal

    def show_result() -> None:
        if output.as_json:
            terminal.print_json(result.to_dict())
            if result.caveat:
                terminal.note(result.caveat)
        else:
            show.show_trace(result, shared_scale=not output.own_scales)

    picture = outputs.picture(output.out)
    numbers = outputs.Output("numbers", output.save, "numbers")
    with outputs.tried(picture, numbers) as written:
        settings = trace_options.settings()
        lm = model_options.load(model)
        with terminal.progress() as progress:
            result = engram.trace(
                lm,
                prompt,
                subject=question.subject,
                target=question.target,
                foil=question.foil,
                other_subject=question.other_subject,
                progress=progress,
                **settings,
            )
        writers: outputs.Writers = {
            picture: partial(
                outputs.draw, partial(result.plot, shared_scale=not output.own_scales)
            ),
            numbers: result.save,
        }
        written.finish(show_result, writers, as_json=output.as_json)


@dataclass(frozen=True)
class FactsOptions:
    """Which facts are averaged over, and what is scored."""

    facts: Annotated[
        str,
        typer.Option(
            help="File of facts (JSON, JSON lines, CSV), or 'pocket': the bundled table.",
            show_default=False,
        ),
    ]
    limit: Annotated[
        int | None, typer.Option(help="Number of facts, drawn at random; default: all.", min=1)
    ] = None
    keep: Annotated[
        Literal["known", "exact", "all"],
        typer.Option(help="Facts that count: known, exact (as published) or all."),
    ] = "known"
    answer: Annotated[
        Literal["model", "object"],
        typer.Option(help="What is scored: model (its own next token) or object."),
    ] = "model"


@dataclass(frozen=True)
class AverageOutput:
    """Where an average is written, and how it is shown."""

    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run; an existing run is resumed."),
    ] = None
    own_scales: OwnScales = False
    as_json: AsJson = False


def average(
    model: Model,
    facts_options: FactsOptions,
    trace_options: TraceOptions,
    *,
    output: AverageOutput,
    workers: WorkerOptions,
    model_options: ModelOptions,
) -> None:
    """Find which states carry facts on average over a file of facts (causal tracing).

    Example: engram average pocket --facts pocket --limit 20 -o run
    """
    import engram
    from engram.cli import show, terminal
    from engram.errors import EngramFileError
    from engram.facts import sample_facts

    out, as_json, shared_scale = output.out, output.as_json, not output.own_scales

    def show_result() -> None:
        if as_json:
            terminal.print_json(result.summary())
            if result.caveat:
                terminal.note(result.caveat)
        else:
            show.show_average(result, shared_scale=shared_scale)

    files = {
        name: outputs.Output(name, out and out / name, parents=True, said=False)
        for name in (TRACES, SUMMARY, HEATMAPS, LINES, SEVERED)
    }
    if out is not None and out.exists() and not out.is_dir():
        raise EngramFileError(
            f"--out {out} cannot be the folder of a run: it is a file. Choose another name"
        )
    with outputs.tried(*files.values(), cached=lambda: _kept(out)) as written:
        settings = trace_options.settings()
        facts = engram.read_facts(facts_options.facts)
        # The noise scale comes from the subjects of the whole file, as published, whatever --limit
        # is.
        settings.setdefault("noise_subjects", tuple(fact.subject for fact in facts))
        facts = sample_facts(facts, facts_options.limit, settings["seed"])
        lm = model_options.load(model)
        with terminal.progress() as progress:
            result = engram.average_trace(
                lm,
                facts,
                out=out and out / TRACES,
                keep=facts_options.keep,
                answer=facts_options.answer,
                workers=workers.open(),
                progress=progress,
                **settings,
            )
        pictures = _pictures(result, settings, shared_scale=shared_scale)
        writers: outputs.Writers = {files[SUMMARY]: partial(outputs.write_json, result.summary())}
        writers |= {files[name]: partial(outputs.draw, plot) for name, plot in pictures.items()}
        written.finish(show_result, writers, as_json=as_json)
    if out is not None:
        terminal.written(str(out), ", ".join([TRACES, SUMMARY, *pictures]), as_json)


def _pictures(
    result: AverageTrace, settings: dict[str, Any], *, shared_scale: bool
) -> dict[str, Callable[[], Figure]]:
    # Roles such as "first subject token" need every position; a run may have traced the last alone.
    every_position = result.layered and settings.get("positions", "all") == "all"
    maps: Callable[[], Figure] = partial(result.plot, shared_scale=shared_scale)
    pictures: dict[str, Callable[[], Figure]] = {}
    if every_position:
        pictures = {HEATMAPS: maps, LINES: result.plot_lines}
    return pictures | ({SEVERED: result.plot_severed} if result.severed else {})


def _kept(out: Path | None) -> str:
    """Return how much of a run that was stopped is in its file."""
    from engram.locate.trace_store import TraceStore

    if out is None:
        return "nothing was kept; with -o FOLDER a stopped run can be resumed"
    if not (out / TRACES).exists():
        return ""
    with TraceStore.reading(out / TRACES) as store:
        return f"{len(store.keys())} facts are kept in {out / TRACES}; {outputs.RESUME}"


def _number_or_rule(noise: str) -> str | float:
    """Return a number as a standard deviation, and anything else as the name of a rule."""
    try:
        return float(noise)
    except ValueError:
        return noise
