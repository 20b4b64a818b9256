"""What commands show: heat maps and receipts in characters, progress bars, loading a model quietly."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from engram.evaluate.knowledge import Knowledge
    from engram.evaluate.receipt import Receipt
    from engram.language_model import LanguageModel
    from engram.locate.causal_trace import CausalTrace
    from engram.locate.sweep import Site

console = Console(highlight=False, soft_wrap=True)
_SHADES = " ·░▒▓█"
_INK = {"residual": "medium_purple", "mlp": "green", "attention": "red"}  # legible on dark and on light

Report = Callable[[str, int, int], None]


def load(name: str, dtype: str | None = None, device_map: str | None = None) -> LanguageModel:
    """`engram.load`, without the library's own progress bars."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status(f"loading {name}"):
        from transformers.utils import logging as transformers_logging

        import engram

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        return engram.load(name, dtype=dtype, device_map=device_map)


@contextmanager
def progress() -> Iterator[Report]:
    """A callback (what, done, in all) that draws a bar; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def heat_maps(trace: CausalTrace) -> Columns:
    """All sites of a trace, side by side where the terminal is wide enough."""
    return Columns([_heat_map(trace, site) for site in trace.scores], padding=(0, 1))


def _heat_map(trace: CausalTrace, site: Site) -> Text:
    """One character or two a layer, darker for a higher probability of the answer, with a terminal's colours if it has any."""
    scores = trace.scores[site]
    layers = scores.shape[1]
    wide = 2 if layers <= 16 else 1
    low, span = trace.low_score, max(float(scores.max()) - trace.low_score, 1e-9)
    names = [label.replace("\n", "⏎") for label in trace.labels()]
    margin = min(16, max(map(len, names)))
    picture = Text()
    picture.append(f"{site}, highest {float(scores.max()):.2f}\n", Style(bold=True))
    for name, row in zip(names, scores.tolist(), strict=True):
        picture.append(f"{name[-margin:]:>{margin}} ")
        for score in row:
            depth = min(1.0, max(0.0, (score - low) / span))
            picture.append(_SHADES[round(depth * (len(_SHADES) - 1))] * wide, _INK[site])
        picture.append("\n")
    last = str(layers - 1)
    return picture.append(" " * (margin + 1) + "0" + last.rjust(layers * wide - 1) + "\n", Style(dim=True))


def show_trace(trace: CausalTrace) -> None:
    """Heat maps, and where the strongest effects are."""
    console.print(f"{_safe(trace.prompt)} →[bold]{_safe(trace.answer)}[/]")
    console.print(f"p = {trace.high_score:.3f}; with the subject corrupted {trace.low_score:.3f}")
    console.print(heat_maps(trace))
    for site in trace.scores:
        row, layer = trace.best(site)
        effect = float(trace.effects(site)[row, layer])
        console.print(f"  {site:<10} strongest at token {_safe(repr(trace.tokens[row]))}, layer {layer}: +{effect:.3f}")


def show_receipt(receipt: Receipt) -> None:
    """Continuations before and after, then the numbers."""
    for prompt, before, after in receipt.continuations:
        console.print(f"[bold]{_safe(prompt)}[/]")
        console.print(f"   before {_safe(_line(before))}")
        console.print(f"   after  {_safe(_line(after))}")
    console.print()
    for line in str(receipt).splitlines():
        style = "green" if line.endswith("ok") or line == "PASSED" else "red" if line.endswith("FAILED") else ""
        console.print(Text(line, style))


def show_knowledge(found: Knowledge, seed: int) -> None:
    """The table by relation."""
    for i, line in enumerate(found.table(seed=seed).splitlines()):
        style = "bold" if i == 0 or line.startswith(("relation ", "all facts")) else "dim" if line.startswith("  ") else ""
        console.print(Text(line, style))


def size(folder: Path) -> str:
    """What a folder of ours takes on disk."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1000:.0f} kB"


def _line(text: str) -> str:
    return " ".join(text.split())


def _safe(text: str) -> str:
    """Text in which brackets are not markup."""
    return text.replace("[", r"\[")
