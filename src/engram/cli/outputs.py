"""What a command writes: names are tried before the work, files are written whole after it.

A verb works inside `tried(...)` and ends with `finish`. Each file or folder is written whole or not
at all; of several, those that were written before an error stay. Knows names. Refuses to know what
is written to them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram.checks import alternatives
from engram.cli.ending import kept
from engram.errors import EngramFileError
from engram.files.atomic import atomic_file, reserved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESUME = "run the same command again to resume"
_ROOM = 1 << 18  # bytes: a disk without room for a small picture is full
# Those of matplotlib that need nothing else; a test compares them with matplotlib's own list.
PICTURES = (".eps", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".tif", ".tiff", ".webp")
# What a file's ending says is in it. Other endings say nothing, and may be given to any text.
_KINDS = {
    "a picture": PICTURES,
    "numbers": (".safetensors",),
    "JSON": (".json",),
    "CSV": (".csv",),
    "LaTeX": (".tex",),
    "markdown": (".md",),
    "parquet": (".parquet",),
    "a run": (".sqlite", ".db"),
    "an adapter": (".gguf",),
}


@dataclass(frozen=True)
class Output:
    """One name that a command writes.

    Args:
        what: for the line that says it was written.
        path: None: not wanted.
        kind: of a file's contents, a key of `_KINDS`.
        said: whether a line says that it was written.
        folder, replaces, parents: see `reserved`.
    """

    what: str
    path: Path | None
    kind: str | None = None
    folder: bool = False
    replaces: str | None = None
    parents: bool = False
    said: bool = True

    def say(self, as_json: bool) -> None:
        """Say that it was written."""
        from engram.cli import terminal  # not at the top: rich takes 0.1 s

        if self.said and self.path is not None:
            size = f" ({terminal.size(self.path)})" if self.folder else ""
            terminal.written(self.what, f"{self.path}{size}", as_json)


Writers = dict[Output, Callable[[Path], object]]  # each writes its output, given the path


@dataclass
class Outputs:
    """The outputs of a command, held for it until its block ends.

    Args:
        cached: returns where results of the work are kept besides, and how to resume; "": nowhere.
    """

    stack: ExitStack
    cached: Callable[[], str]
    written: list[Output] = field(default_factory=list)
    _names: dict[Path, str] = field(default_factory=dict)

    def reserve(self, *outputs: Output, needs: int = _ROOM) -> None:
        """Try names and hold them; see `reserved`.

        Raises:
            EngramFileError: one cannot be written, or two are the same.
        """
        for output in outputs:
            if output.path is None:
                continue
            path = output.path.absolute()
            if path in self._names:
                raise EngramFileError(
                    f"{output.what} and {self._names[path]} would both be written to "
                    f"{output.path}; give them two names"
                )
            self._names[path] = output.what
            _check_ending(output)
            self.stack.enter_context(
                reserved(
                    path,
                    folder=output.folder,
                    parents=output.parents,
                    replaces=output.replaces,
                    needs=needs,
                )
            )

    def write(self, output: Output, write: Callable[[Path], object]) -> None:
        """Write one output before the others, if it is wanted."""
        if output.path is not None:
            write(output.path)
            self.written.append(output)

    def finish(
        self, show: Callable[[], object], writers: Writers, *, as_json: bool = False
    ) -> None:
        """Write the outputs that are wanted, show the result, and say what was written.

        A disk may have become full meanwhile: what was computed is then shown all the same.

        Args:
            as_json: stdout is JSON and nothing else, and such lines go to stderr.
        """
        failed: EngramFileError | OSError | None = None
        for output, write in writers.items():
            try:
                self.write(output, write)
            except (EngramFileError, OSError) as error:
                failed = failed or error
        show()
        for output in self.written:
            output.say(as_json)
        if failed is not None:
            failed.add_note(self.cached() or "The result is printed, and not lost")
            raise failed

    def state(self) -> str:
        """Return what there is when the command is stopped."""
        written = ", ".join(str(output.path) for output in self.written)
        return f"{written} was written" if written else self.cached() or "nothing was written"


@contextmanager
def tried(
    *outputs: Output,
    reads: Collection[Path | str | None] = (),
    cached: Callable[[], str] = lambda: "",
) -> Iterator[Outputs]:
    """Try the names of a command's outputs, and hold them until the block ends.

    Args:
        reads: files that the command reads; writing over one would lose it.
        cached: see `Outputs`.
    Raises:
        EngramFileError: one could not be written. EngramError: another process is writing it.
    """
    for output in outputs:
        _refuse_inputs(output, reads)
    with ExitStack() as stack:
        result = Outputs(stack, cached)
        result.reserve(*outputs)
        with kept(result.state):
            yield result


def edit_folder(path: Path | None) -> Output:
    """Return the output of an edit, which replaces another one."""
    return Output("edit", path, folder=True, replaces="edit.json")


def checkpoint(path: Path) -> Output:
    """Return the output of a checkpoint, which replaces nothing."""
    return Output("checkpoint", path, folder=True)


def adapter(path: Path) -> Output:
    """Return the output of a LoRA adapter, which replaces another one."""
    return Output("adapter", path, folder=True, replaces="adapter_config.json")


def adapter_file(path: Path) -> Output:
    """Return the output of a LoRA adapter of llama.cpp."""
    return Output("adapter", path, "an adapter")


def in_cache() -> str:
    """Return that what was measured so far is in the cache, if it can be written."""
    from engram.files.cache_folder import cache_folder

    folder = cache_folder("").absolute()
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return f"nothing was kept, since {folder} cannot be written"
    return f"what was measured so far is kept in {folder}; {RESUME}"


def picture(path: Path | None) -> Output:
    """Return the output of a picture."""
    return Output("picture", path, "a picture")


def draw(plot: Callable[[], Figure], path: Path, **settings: Any) -> None:
    """Write the figure that `plot` returns as a picture.

    Args:
        settings: of matplotlib's `savefig`.
    """
    figure = plot()
    # The format explicitly: the temporary name ends in random letters.
    with atomic_file(path) as fresh:
        figure.savefig(fresh, format=path.suffix[1:].lower(), **settings)


def write_text(text: str, path: Path) -> None:
    """Write a text file that ends in a newline."""
    with atomic_file(path) as fresh:
        fresh.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf8")


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file."""
    write_text(json.dumps(value, indent=1), path)


def _check_ending(output: Output) -> None:
    ending = Path(output.path or "").suffix.lower()
    expected = _KINDS.get(output.kind or "", ())
    if output.kind is None or ending in expected:
        return
    of = next((kind for kind, endings in _KINDS.items() if ending in endings), None)
    if of is None and output.kind != "a picture":
        return
    says = f", which is for {of}" if of else ""
    raise EngramFileError(
        f"{output.what}: {str(output.path)!r} ends in {ending!r}{says}; expected a name that ends "
        f"in {alternatives(expected)}"
    )


def _refuse_inputs(output: Output, reads: Collection[Path | str | None]) -> None:
    path = output.path
    if path is None or not path.exists():
        return
    for read in reads:
        if read is not None and Path(read).exists() and path.samefile(read):
            raise EngramFileError(
                f"{output.what}: {path} is read by this command and would be lost; choose "
                "another name"
            )
