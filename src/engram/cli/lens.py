"""The commands that read states and memories in the vocabulary: lens, refinement, memories."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.options import AsJson, DeviceMap, Dtype, Model

if TYPE_CHECKING:
    from rich.text import Text

    from engram.locate.lenses.lens import LogitLens

Prompt = Annotated[
    str, typer.Argument(help="Any text: 'The Space Needle is in the city of'.", show_default=False)
]
Norm = Annotated[
    bool,
    typer.Option(
        "--norm/--raw", help="Apply the model's last norm, or read what is there as it is."
    ),
]
Target = Annotated[
    str | None, typer.Option(help="Token to score everywhere; default: the one that comes next.")
]
Position = Annotated[
    int, typer.Option("--position", "-p", help="Token of the text, from 0; negative: from its end.")
]
Picture = Annotated[
    Path | None, typer.Option("--out", "-o", help="Picture to write: .png, .pdf or .svg.")
]

_CELL = 10  # characters of a token in the terminal's table


def lens(
    model: Model,
    text: Prompt,
    norm: Norm = True,
    target: Target = None,
    k: Annotated[int, typer.Option("-k", help="Tokens kept for each state, in --json.")] = 5,
    shade: Annotated[
        str, typer.Option(help="Colours of the picture: probability, answer, rank, entropy or kl.")
    ] = "probability",
    out: Picture = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Show what every state of a text says about the next token (logit lens)."""
    import engram
    from engram.cli import terminal

    found = engram.lens(
        terminal.load(model, dtype, device_map), text, norm=norm, target=target, k=k
    )
    if out is not None:
        found.plot(shade).savefig(out)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        terminal.console.print(_grid(found, terminal.console.width))
        terminal.console.print(str(found), markup=False)
    _tell(out, as_json)


def refinement(
    model: Model,
    text: Prompt,
    norm: Norm = True,
    target: Target = None,
    position: Position = -1,
    out: Picture = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Show who changes the prediction, attention or the MLP, block by block."""
    import engram
    from engram.cli import terminal

    found = engram.refinement(
        terminal.load(model, dtype, device_map), text, norm=norm, target=target
    )
    if out is not None:
        found.plot(position).savefig(out)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        terminal.console.print(found.describe(position), markup=False)
    _tell(out, as_json)


def memories(
    model: Model,
    text: Prompt,
    layer: Annotated[int, typer.Option("--layer", "-l", help="Block, from 0.")],
    position: Position = -1,
    neurons: Annotated[
        int, typer.Option("--neurons", "-n", help="How many, strongest first.")
    ] = 10,
    k: Annotated[int, typer.Option("-k", help="Tokens of each neuron.")] = 8,
    norm: Norm = True,
    out: Picture = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Show the MLP neurons that fire on a text, and the tokens each of them pushes towards."""
    import engram
    from engram.cli import terminal

    found = engram.memories(
        terminal.load(model, dtype, device_map),
        text,
        layer,
        position,
        neurons=neurons,
        k=k,
        norm=norm,
    )
    if out is not None:
        found.plot().savefig(out)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        terminal.console.print(str(found), markup=False)
    _tell(out, as_json)


def _tell(picture: Path | None, as_json: bool) -> None:
    if picture is not None:
        typer.echo(f"picture: {picture}", err=as_json)


def _grid(found: LogitLens, width: int) -> Text:
    """Layers up, tokens across: each state's top token, darker for a higher probability, bold once
    it stays; wide texts go on below.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.style import Style
    from rich.text import Text

    shown = [*found.tokens, *found.top_tokens.values()]
    cell = min(_CELL, max(cell_len(_visible(token)) for token in shown))
    blocks = math.ceil(len(found.tokens) / max(1, (width - 4) // (cell + 1)))
    columns = math.ceil(len(found.tokens) / blocks)
    picture = Text(no_wrap=True)
    for start in range(0, len(found.tokens), columns):
        part = range(start, min(start + columns, len(found.tokens)))
        for row in reversed(range(len(found.rank))):
            picture.append(f"{found.labels()[row]:>3} ", Style(dim=True))
            for at in part:
                token, p = found.top(row, at)[0]
                picture.append(
                    set_cell_size(_visible(token), cell), _ink(p, row >= int(found.settled[at]))
                )
                picture.append(" ")
            picture.append("\n")
        below = " ".join(set_cell_size(_visible(found.tokens[at]), cell) for at in part)
        picture.append(f"    {below}\n\n", Style(bold=True))
    picture.right_crop(1)
    return picture


def _ink(probability: float, settled: bool) -> Any:
    """White on a purple that deepens with the probability; bold where the token stays to the end."""
    from rich.color import Color
    from rich.style import Style

    light, deep = (232, 228, 242), (74, 20, 134)
    share = min(1.0, max(0.0, probability))
    ground = Color.from_rgb(*(a + (b - a) * share for a, b in zip(light, deep, strict=True)))
    return Style(color="white" if share > 0.5 else "black", bgcolor=ground, bold=settled)


def _visible(token: str) -> str:
    return (
        "".join(
            letter if letter.isprintable() else "⏎" if letter == "\n" else "�" for letter in token
        ).strip(" ")
        or "␣"
    )
