"""Commands that read states and memories in the vocabulary: lens, refinement and memories."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, Model, ModelOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text

    from engram.locate.lenses.lens import LogitLens
    from engram.locate.lenses.memories import Memories
    from engram.locate.lenses.refinement import Refinement

Prompt = Annotated[
    str, typer.Argument(help="Any text: 'The Space Needle is in the city of'.", show_default=False)
]
Norm = Annotated[
    bool,
    typer.Option("--norm/--no-norm", help="Apply the model's last norm before the unembedding."),
]
Position = Annotated[
    int, typer.Option("--position", "-p", help="Token of the text, from 0; negative: from its end.")
]

_CELL = 10  # characters of a token in the terminal's table


@dataclass(frozen=True)
class LensOptions:
    """How states are read."""

    norm: Norm = True
    target: Annotated[
        str | None,
        typer.Option(help="Token to score everywhere; default: the most probable next one."),
    ] = None


@dataclass(frozen=True)
class LensOutput:
    """What a lens writes."""

    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture to write: .png, .pdf or .svg.")
    ] = None
    as_json: AsJson = False

    def tried(self) -> AbstractContextManager[outputs.Outputs]:
        """Try the picture's name; see `outputs.tried`."""
        return outputs.tried(outputs.picture(self.out))

    def write(
        self,
        written: outputs.Outputs,
        result: LogitLens | Refinement | Memories,
        plot: Callable[[], Figure],
        show: Callable[[], None],
    ) -> None:
        """Save the picture that `plot` draws, and print JSON or call `show`."""
        from engram.cli import terminal

        def show_result() -> None:
            if self.as_json:
                terminal.print_json(result.to_dict())
            else:
                show()

        writers: outputs.Writers = {outputs.picture(self.out): partial(outputs.draw, plot)}
        written.finish(show_result, writers, as_json=self.as_json)


def lens(
    model: Model,
    text: Prompt,
    lens_options: LensOptions,
    *,
    k: Annotated[int, typer.Option("-k", help="Tokens kept for each state, in --json.", min=1)] = 5,
    shade: Annotated[
        Literal["probability", "answer", "rank", "entropy", "kl"],
        typer.Option(help="Colours of the picture."),
    ] = "probability",
    output: LensOutput,
    model_options: ModelOptions,
) -> None:
    """Show what every state of a text predicts as the next token (logit lens).

    Example: engram lens pocket "The Eiffel Tower is in the city of"
    """
    import engram
    from engram.cli import terminal

    def show() -> None:
        terminal.console.print(_grid(result, terminal.console.width))
        terminal.console.print(str(result), markup=False)

    with output.tried() as written:
        result = engram.lens(
            model_options.load(model), text, norm=lens_options.norm, target=lens_options.target, k=k
        )
        output.write(written, result, lambda: result.plot(shade), show)


def refinement(
    model: Model,
    text: Prompt,
    lens_options: LensOptions,
    *,
    position: Position = -1,
    output: LensOutput,
    model_options: ModelOptions,
) -> None:
    """Show whether attention or the MLP changes the prediction, block by block.

    Example: engram refinement pocket "The Eiffel Tower is in the city of"
    """
    import engram
    from engram.cli import terminal

    with output.tried() as written:
        result = engram.refinement(
            model_options.load(model), text, norm=lens_options.norm, target=lens_options.target
        )
        output.write(
            written,
            result,
            lambda: result.plot(position),
            lambda: terminal.console.print(result.describe(position), markup=False),
        )


@dataclass(frozen=True)
class NeuronOptions:
    """Which neurons are shown, and at which token."""

    layer: Annotated[int, typer.Option("--layer", "-l", help="Block, from 0.", min=0)]
    position: Position = -1
    neurons: Annotated[
        int, typer.Option("--neurons", "-n", help="Number of neurons, strongest first.", min=1)
    ] = 10
    k: Annotated[int, typer.Option("-k", help="Tokens of each neuron.", min=1)] = 8


def memories(
    model: Model,
    text: Prompt,
    which: NeuronOptions,
    norm: Norm = True,
    *,
    output: LensOutput,
    model_options: ModelOptions,
) -> None:
    """Show the MLP neurons that fire on a text, and the tokens each of them promotes.

    Example: engram memories pocket "The Eiffel Tower is in the city of" --layer 3
    """
    import engram
    from engram.cli import terminal

    def show() -> None:
        terminal.console.print(str(result), markup=False)

    with output.tried() as written:
        result = engram.memories(
            model_options.load(model),
            text,
            which.layer,
            which.position,
            neurons=which.neurons,
            k=which.k,
            norm=norm,
        )
        output.write(written, result, result.plot, show)


def _grid(lens: LogitLens, width: int) -> Text:
    """Return each state's top token, layers up and tokens across, wrapped to `width`.

    A cell is darker for a higher probability, and bold from the layer on where its token stays.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.style import Style
    from rich.text import Text

    # Cells, not letters: Chinese and emoji take two cells of a terminal.
    shown = [*lens.tokens, *lens.top_tokens.values()]
    cell = min(_CELL, max(cell_len(_visible(token)) for token in shown))
    blocks = math.ceil(len(lens.tokens) / max(1, (width - 4) // (cell + 1)))
    # Blocks of equal width: 13 tokens over 2 blocks are 7 + 6, not 12 + 1.
    columns = math.ceil(len(lens.tokens) / blocks)
    picture = Text(no_wrap=True)
    for start in range(0, len(lens.tokens), columns):
        part = range(start, min(start + columns, len(lens.tokens)))
        for row in reversed(range(len(lens.rank))):
            picture.append(f"{lens.labels()[row]:>3} ", Style(dim=True))
            for at in part:
                token, p = lens.top(row, at)[0]
                picture.append(
                    set_cell_size(_visible(token), cell), _ink(p, row >= int(lens.settled[at]))
                )
                picture.append(" ")
            picture.append("\n")
        below = " ".join(set_cell_size(_visible(lens.tokens[at]), cell) for at in part)
        picture.append(f"    {below}\n\n", Style(bold=True))
    picture.right_crop(1)
    return picture


def _ink(probability: float, settled: bool) -> Any:
    """Return a style: darker for a higher probability; bold if the token stays to the end."""
    from rich.color import Color
    from rich.style import Style

    light, deep = (232, 228, 242), (74, 20, 134)
    share = min(1.0, max(0.0, probability))
    ground = Color.from_rgb(*(a + (b - a) * share for a, b in zip(light, deep, strict=True)))
    return Style(color="white" if share > 0.5 else "black", bgcolor=ground, bold=settled)


def _visible(token: str) -> str:
    from engram.cli import terminal

    return terminal.printable(token).strip(" ") or "␣"
