"""The terminal: results on standard output; notes, bars and what loads on standard error."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from engram.cli.reports import Reports
from engram.progress import stage

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


# No highlighting of numbers and quotes: bold and colours mean something here. Soft wrap: a piped
# table keeps its lines.
console = Console(highlight=False, soft_wrap=True)  # results
messages = Console(highlight=False, soft_wrap=True, stderr=True)  # whatever is no result


@contextmanager
def session(quiet: bool) -> Iterator[None]:
    """Set up what a command says besides its results; `quiet`: nothing, within the block."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # Otherwise tokenizers warns at every fork of the process, such as that of a data loader.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            messages.quiet = True
        try:
            yield
        finally:
            logging.disable(disabled)
            messages.quiet = False


def note(text: str) -> None:
    """Print what a user should know besides the results, unless the session is quiet."""
    messages.print(f"engram: {text}", markup=False)


def printable(text: str) -> str:
    """Return text on one line that commands no terminal: a line's end is ⏎, a tab ⇥, others �."""
    marks = {"\n": "⏎", "\t": "⇥"}
    return "".join(one if one.isprintable() else marks.get(one, "�") for one in text)


def print_json(value: Any) -> None:
    """Print a result as one strict JSON document; NaN and infinity, which JSON lacks, are null."""
    # As ASCII: any terminal can write it.
    typer.echo(json.dumps(_finite(value), allow_nan=False, default=str))


def written(what: str, where: object, as_json: bool) -> None:
    """Print where something was written: with JSON, which is alone on stdout, as a note."""
    if not as_json:
        typer.echo(f"{what}: {where}")
    elif not messages.quiet:
        typer.echo(f"{what}: {where}", err=True)


def print_path(what: str, name: str, path: Path, as_json: bool) -> None:
    """Print what a command wrote, which is all of its result; `name`: of the path, in JSON."""
    if as_json:
        print_json({name: path})
    else:
        typer.echo(f"{what}: {path}")


@contextmanager
def no_results(silent: bool) -> Iterator[None]:
    """Print nothing on the console within the block: what is shown there follows as JSON."""
    console.quiet = silent
    try:
        yield
    finally:
        console.quiet = False


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(one) for one in value]
    return value


def avoid_hub_without_network(name: str) -> None:
    """Let the hub's library look into its cache only, if its server has no address from here.

    It would try five times, wait half a minute in all, and print a page of warnings. With a proxy
    no address is needed.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from engram.model.named_models import place_of

    path = Path(place_of(name).path)
    if getproxies():
        return
    from huggingface_hub import constants

    try:
        if path.exists():
            return
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _note_dequantising(name: str) -> None:
    """Say before the seconds that it takes that a GGUF file is dequantised, the first time."""
    from engram.model.dequantised_gguf import is_kept
    from engram.model.gguf_header import is_gguf
    from engram.model.named_models import place_of

    path = Path(place_of(name).path)
    if path.is_file() and is_gguf(path) and not is_kept(path):
        note(f"{path.name} is dequantised into the cache, which is needed once")


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Say what is waited for within the block: beside a spinner, or in a log if it takes long."""
    if messages.is_terminal:
        with messages.status(Text(what)):
            yield
    else:
        with progress() as reports, stage(reports, what):
            yield


def load(name: str, dtype: str | None = None, device_map: str | None = None) -> LanguageModel:
    """Call `engram.load`, without the progress bars of other libraries."""
    with _waiting(f"loading {name}"):
        from transformers.utils import logging as transformers_logging

        import engram

        avoid_hub_without_network(name)
        _note_dequantising(name)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        return engram.load(name, dtype=dtype, device_map=device_map)


@contextmanager
def progress() -> Iterator[Reports]:
    """Yield a callback (what, done, total) that shows on stderr how far long work is.

    On a terminal it draws bars. Elsewhere, as in a log, it writes a line every ten seconds. Before
    work that takes more than a few seconds, a line says what is done, how long it takes, and where
    results are kept. A quiet session shows nothing.
    """
    with Reports(messages) as reports:
        yield reports


def show_plan_if_large(
    lm: LanguageModel, facts: int, method: str, settings: dict[str, Any], above: int = 1 << 30
) -> None:
    """Print the memory plan on stderr if an edit takes over `above` bytes beside the model."""
    from engram.editors import memory_plan

    if method not in memory_plan.PLANNED:
        return
    layer, layers, contexts = (settings.get(name) for name in ("layer", "layers", "contexts"))
    plan = memory_plan.memory_plan(
        lm,
        facts,
        method,
        layers=[layer] if isinstance(layer, int) else layers if isinstance(layers, list) else None,
        contexts=len(contexts) if contexts else None,
        facts_per_batch=settings.get("facts_per_batch", 32),
    )
    if plan.beside > above:
        messages.print(Text(str(plan)))


def size(folder: Path) -> str:
    """Return the size on disk of a folder, as text."""
    return (
        f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1000:.0f} kB"
    )
