"""How a command ends: its exit code, and one line on stderr if it did not end well.

Exit codes: 0 done, 1 a check failed (verify), 2 it could not be done, 128 + N stopped by signal N
(130: Ctrl-C, 143: SIGTERM). Imports the standard library only, so that Ctrl-C is handled while
everything else is imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

_TRACEBACK = "ENGRAM_TRACEBACK"  # set: mistakes of ours show their traceback
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # of Ctrl-C, `kill`, and a closed terminal
# `timeout` and some terminals send a signal to the process and to its group, which is one press.
_ONE_PRESS_S = 0.5
_LONGEST = 2000  # characters of a message: an argument may have many more


class Stopped(KeyboardInterrupt):
    """A signal asks the command to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(command: Callable[[], Any]) -> NoReturn:
    """Run a command and leave with its exit code."""
    _check_streams()
    with _signals_stop():
        try:
            command()
            code = 0
        except BaseException as error:
            code = _end(error)
        code = _flushed(code)
    sys.exit(code)


@contextmanager
def kept(what: str | Callable[[], str]) -> Iterator[None]:
    """Say what is kept, and how to resume, if the block is stopped by a signal.

    Args:
        what: a sentence, or a function that returns it once the block was stopped.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        with suppress(Exception):  # a file that cannot be read now: the user wants to leave
            stopped.add_note(what if isinstance(what, str) else what())
        raise


def _end(error: BaseException) -> int:
    """Report what stopped a command; return the exit code."""
    from engram.errors import EngramError

    causes = list(_chain(error))
    for one in causes:
        if isinstance(one, KeyboardInterrupt):
            notes = getattr(one, "__notes__", None) or ["nothing was written"]
            say(f"stopped; {'; '.join(notes)}")
            return 128 + getattr(one, "number", signal.SIGINT)
    if any(isinstance(one, BrokenPipeError) for one in causes):
        return 0  # `engram ... | head` has read enough
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    notes = [note[:1].upper() + note[1:] for note in getattr(error, "__notes__", [])]
    if isinstance(error, EngramError):
        say(". ".join([str(error), *notes]))
    elif isinstance(error, OSError):
        where = error.filename or ("stdout" if _is_broken(sys.stdout) else "a file")
        say(". ".join([f"{where}: {error.strerror or error}", *notes]))
    elif isinstance(error, MemoryError | RecursionError):
        say(f"not enough memory: {error or 'the command needs more than is free'}")
    elif os.environ.get(_TRACEBACK):
        raise error
    else:
        say(
            f"a mistake in engram, {type(error).__name__}: {error}. Please report it with what "
            f"{_TRACEBACK}=1 in the environment shows"
        )
    return 2


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from: typer and others replace a KeyboardInterrupt."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def say(message: str) -> None:
    """Print a message on stderr, in one line, after the name of the command."""
    text = " ".join(message.split())
    if len(text) > _LONGEST:  # its end says what to do
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    # A file's name or contents may hold characters that command a terminal, or are none.
    line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    with suppress(OSError):  # stderr may be full too
        print(f"engram: {line}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Turn the first signal to stop into `Stopped`, and leave at once at a second one."""
    first: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Stopped(number)
        if time.monotonic() - first > _ONE_PRESS_S:
            # Safe at any moment: files and folders are replaced by one rename.
            with suppress(OSError):
                os.write(2, b"engram: stopped at once; what was being written is gone\n")
            os._exit(128 + number)

    old = {}
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        # Ignored by whoever started us: `nohup`, or a script's `&`.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            with suppress(ValueError):  # not in the main thread
                old[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if old:
            # All is said and done: Ctrl-C while Python shuts down would only show a traceback.
            atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in old])


def _check_streams() -> None:
    """Leave if stdout is closed, and never let a file take the place of a closed stream.

    A file opened by a process without stdout gets its number, and what a library prints is then
    written into that file.
    """
    closed = sys.stdout is None
    with suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115, PTH123
    if closed:
        sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115, PTH123
        say("stdout is closed, and results are printed there; redirect it to a file or /dev/null")
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without arrows, a file's name in another encoding: "\u2192" is still an answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: int) -> int:
    """Return the exit code after what was printed has arrived, or has not."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)
        except OSError as error:
            if code == 0:
                code = 2
                say(f"stdout: {error.strerror or error}")
            _discard(stream)
    return code


def _is_broken(stream: Any) -> bool:
    try:
        stream.write("\n")  # a flush that failed has emptied the stream: the next one would pass
        stream.flush()
    except OSError:
        return True
    return False


def _discard(stream: Any) -> None:
    """Let what a stream still holds go nowhere; Python would flush it at the end, and complain."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
