"""Random argument lists, drawn from what the command line says of itself: whatever is given, a
command ends with one of its exit codes, in one line, and writes where it was told to.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer

from engram import cli
from engram.editors.methods import METHODS
from tests.helpers.hostile_files import Zoo, make_zoo

LISTS, CHUNK, FAST = 2000, 100, 2  # argument lists; in one test; tests that `make test` runs
SEED = int(os.environ.get("ENGRAM_FUZZ_SEED", "0"))  # for other lists than last time
LIMIT_S = 240  # a command that takes longer hangs; on a busy machine lm-eval's import takes 60
CHECKS = ("verify", "ledger conflicts", "demo")  # commands that end with 1 if a check fails
LINES = 8  # on stderr, at most: notes before the work, and the error

LONG = ["demo", "harness"]  # drawn less often
# What keeps a command short if nothing else is drawn; typer takes the last of an option given twice
SMALL = {
    "trace": ["--samples", "1", "--site", "mlp"],
    "average": ["--samples", "1", "--limit", "1", "--site", "mlp"],
    "knows": ["--limit", "1"],
    "layers": ["--edits", "1", "--traces", "1", "--estimates", "1", "--tokens", "100"],
    "edit": ["--set", "steps=1"],
    "generate": ["-n", "2"],
    "stats": ["--tokens", "50"],
    "bench": ["--limit", "1", "--drift-every", "0", "--set", "rome:steps=1"],
    "data build": ["--limit", "1"],
    "data filter": ["--limit", "1"],
    "harness": ["--limit", "1"],
}
WORDS = [
    *("", " ", "--", "-", "x", "a" * 5000, "\x00"[:0] + "\x1b[31m", "‮Rome", "名前", "[bold]x[/]"),
    *("nan", "-1", "..", "/dev/null", "%s", "{}", "null", "\udcff", "😀"),
]
INTEGERS = ["0", "1", "2", "3", "-1", "-2", "1.5", "nan", "", "x", str(2**70), str(-(2**70)), "1e3"]
NUMBERS = ["0", "0.5", "1", "2", "-1", "nan", "inf", "-inf", "1e400", "x", "", "1e-320"]
TEXTS = {  # name of a parameter -> values that it may well have
    "subject": ["tower", "tower of Rome", "Eiffel Tower"],
    "prompt": ["The {} is in the city of", "The tower of Rome is in the city of", "{}"],
    "text": ["The tower of Rome is in the city of", "The"],
    "target": ["Paris", "London", "piano"],
    "old_target": ["Rome"],
    "foil": ["Rome"],
    "other_subject": ["river"],
    "method": [*METHODS, "a=ft", "exact", "attribution"],
    "layer": ["0", "1", "1,2", "auto", "99", "0,0", ","],
    "dtype": ["float32", "bfloat16", "float16", "foo", "int8", "torch.float32"],
    "device_map": ["cpu", "auto", "cuda:7", "disk", "{}"],
    "workers": ["threads", "Ray"],
    "candidates": ["vocabulary", "relation", "relations"],
    "paraphrases": ["first", "best", "mean", "none", "mode"],
    "length": ["sum", "mean"],
    "keep": ["known", "exact", "all", "some"],
    "answer": ["model", "object"],
    "sites": ["residual", "mlp", "attention", "head", "neuron", "mpl"],
    "severed": ["mlp", "attention", "head"],
    "noise": ["s3", "0.1", "u0.1", "m", "t10", "-1", "s-3", "loud"],
    "corruption": ["noise", "zeros", "mean", "subject", "none"],
    "direction": ["denoise", "noise"],
    "effect": ["indirect", "direct"],
    "metric": ["probability", "log_probability", "logit_difference"],
    "occurrence": ["first", "last", "all"],
    "shade": ["probability", "answer", "rank", "entropy", "kl", "x"],
    "names": ["1", "1.0", "2.0", "7", "1.9", "0", "a.b"],
    "name": ["pocket", "counterfact", "conterfact"],
    "data_set": ["wikitext", "a:b", ":"],
    "tasks": ["arc_easy", "no_such_task"],
    "ray_address": ["auto"],
    "setting": [
        *("steps=1", "steps=NaN", "steps=1.5", 'steps="a"', "steps=null", "steps=true", "steps=0"),
        *("kl_weight=-5", "ridge=-1", "ridge=0.5", "tokens=0", "stop_loss=NaN", "rank=100000"),
        *("seed=-1", f"seed={2**70}", "lm=1", "extra_tokens=99", "layers=[0, 1]", "layer=1"),
        *("window=1", "neurons=[[1, 3]]", "positions=last", "positions=[-1]", "progress=1"),
        *("stop=argmax", "contexts=[]", "contexts=[1]", "facts_per_batch=1", "clamp=1e400", "="),
        *("epochs=1", "learning_rate=1e999", "facts=[]", "method=rome", "batch=-1", "=1", "a"),
        *("steps=" + "[" * 2000, "steps=" + "9" * 5000, "rome:steps=1", "ft:epochs=1", "x:a=1"),
    ],
}
FILES = {  # name of a parameter -> list of the zoo
    "model": "models",
    "checkpoint": "models",
    "known_to": "models",
    "edit": "edits",
    "edits": "edits",
    "ledger": "ledgers",
    "runs": "runs",
    "facts": "facts",
    "dataset": "facts",
    "corpus": "texts",
    "base": "texts",
    "openings": "texts",
    "text": "texts",
    "templates": "templates",
    "generation": "templates",
    "held_out": "templates",
    "references": "templates",
}
OUTPUTS = ("out", "plot", "plot_layers", "save", "peft", "gguf")


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def drawn_list(dice: random.Random, zoo: Zoo) -> list[str]:
    """Return the words of a command, most of them of the right kind."""
    verb = dice.choice([name for name in COMMANDS if name not in LONG] * 4 + LONG)
    options: list[list[str]] = []
    arguments: list[str] = []
    for parameter in COMMANDS[verb].params:
        if parameter.name == "help":
            continue
        likely = verb == "edit" and parameter.name in ("subject", "prompt", "target")
        wanted = 0.97 if parameter.required or likely else 0.18
        if parameter.name in ("plot", "plot_layers", "device_map"):
            wanted = 0.05
        times = 1 + (dice.random() < 0.2 and (parameter.multiple or parameter.nargs == -1))
        for _ in range(times if dice.random() < wanted else 0):
            if parameter.param_type_name == "argument":
                arguments.append(drawn_value(dice, zoo, parameter))
                continue
            flags = [*parameter.opts, *parameter.secondary_opts]
            option = [dice.choice(flags)]
            if not getattr(parameter, "is_flag", False):
                option.append(drawn_value(dice, zoo, parameter))
            options.append(option)
    dice.shuffle(options)
    words = [word for option in options for word in option]
    words = arguments + words if dice.random() < 0.8 else words + arguments
    for chance, more in (
        (0.03, ["--no-such-option"]),
        (0.03, [dice.choice(WORDS)]),
        (0.02, ["--help"]),
        (0.02, ["--"]),
    ):
        if dice.random() < chance:
            words[dice.randint(0, len(words)) : 0] = more
    if verb == "demo" and "-h" not in words and "--help" not in words:
        words += ["--subject", dice.choice(["Spaec Needle", "", "x" * 500])]  # the rest takes long
    return [*verb.split(), *SMALL.get(verb, []), *words]


def drawn_value(dice: random.Random, zoo: Zoo, parameter: Any) -> str:
    """Return a value of the right kind for a parameter, or of a wrong one."""
    form, name = parameter.type_descriptor, parameter.name
    annotation = str(form.annotation)
    if name in OUTPUTS:
        return drawn_output(dice, zoo)
    if dice.random() < 0.05:
        return dice.choice([*WORDS, "../victims/victim.txt", str(zoo.victims)])
    if dice.random() < 0.05:
        return str(dice.choice(zoo.every))
    if form.choices:
        return dice.choice([*map(str, form.choices), "x"])
    if "int" in annotation and name != "prompt":
        least = form.parameter_info.min
        near = [] if least is None else [str(int(least) + n) for n in (-1, 0, 1, 2)]
        return dice.choice([*(near or ["0", "1", "2"]) * 4, *INTEGERS])
    if "float" in annotation:
        return dice.choice(NUMBERS)
    if name in FILES and ("Path" in annotation or name in ("model", "known_to", "dataset")):
        right = getattr(zoo, FILES[name])
        if name == "dataset" and dice.random() < 0.7:
            return str(zoo.data_set)  # the 4,000 records of "pocket" take long
        # the first ones are whole
        return str(right[0] if dice.random() < 0.6 else dice.choice([*right, *zoo.wrong]))
    if name == "facts":
        return str(dice.choice([*zoo.facts, *zoo.wrong, "pocket"]))
    if name in TEXTS:
        return dice.choice(TEXTS[name])
    return str(dice.choice(zoo.every))


def drawn_output(dice: random.Random, zoo: Zoo) -> str:
    out = zoo.home / "out"
    new = dice.choice(["a", "b.png", "c.svg", "d.safetensors", "e.json", "f.parquet", "g.txt"])
    return str(
        dice.choice(
            [
                *(out / new, out / f"{dice.random()}", out / f"{dice.random()}.png") * 3,
                *(Path(new), Path(), Path("no\nne"), zoo.home / "deep/er" / new, Path("/dev/null")),
                *(zoo.home / "edit" / "x", zoo.home / ("y" * 300), dice.choice(zoo.every)),
            ]
        )
    )


# What was opened to be written, and where: events of Python's own hook, which cannot be removed.
_watched: list[str] | None = None
_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link"}


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(args[0], str | bytes):
        flags = args[2] if isinstance(args[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _watched.append(os.fsdecode(args[0]))
    elif event in _EVENTS and not (event == "os.mkdir" and Path(os.fsdecode(args[0])).is_dir()):
        _watched.extend(os.fsdecode(one) for one in args[:2] if isinstance(one, str | bytes))


sys.addaudithook(_watch)


@dataclass
class Ended:
    """How a command ended."""

    code: Any
    stdout: str
    stderr: str
    written: list[str] = field(default_factory=list)


class Hang(BaseException):
    """A command took too long."""


@contextmanager
def time_limit() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ended(args: list[str], monkeypatch: pytest.MonkeyPatch) -> Ended:
    """Run `engram` with arguments, as a process would."""
    global _watched
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["engram", *args])
    _watched = written = []
    code: Any = None
    try:
        with redirect_stdout(out), redirect_stderr(err), time_limit():
            cli.main()
    except SystemExit as left:
        code = left.code
    except Hang:
        code = "hang: " + traceback.format_exc().strip().splitlines()[-3]
    except BaseException as error:
        # The kind: what was raised and where, the last place of ours.
        places = list(traceback.extract_tb(error.__traceback__))
        ours = [f"{Path(f.filename).name}:{f.name}" for f in places if "/engram/" in f.filename]
        code = f"{type(error).__name__}: {str(error)[:150]} in {ours[-1] if ours else ''}"
    finally:
        _watched = None
    return Ended(code, out.getvalue(), err.getvalue(), written)


def complaints(args: list[str], end: Ended, zoo: Zoo) -> Iterator[str]:
    """Yield what is wrong with the way a command ended."""
    lines = end.stderr.splitlines()
    verb = next((name for name in CHECKS if args[: len(name.split())] == name.split()), None)
    if end.code not in (0, 2, 130) and not (end.code == 1 and verb):
        yield f"ended with {end.code}"
    if "Traceback" in end.stderr or "mistake in engram" in end.stderr:
        yield f"traceback {end.stderr[-300:]}"
    if end.code == 2:
        if not lines or not lines[-1].startswith("engram: "):
            yield f"no line of ours: {end.stderr[-300:]!r}"
        many = len(lines) > LINES and "--explain" not in args
        if many or max(map(len, lines), default=0) > 2200:
            yield f"long: {len(lines)} lines {end.stderr[:300]!r}"
        if any(not letter.isprintable() for letter in (lines or [""])[-1]):
            yield f"control characters: {lines[-1]!r}"
    helped = {"--help", "-h"} & set(args)
    if end.code == 0 and "--json" in args and not helped:
        try:
            json.loads(end.stdout, parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            yield f"no JSON: {end.stdout[:200]!r}"
    if end.code == 0 and {"-q", "--quiet"} & set(args) and end.stderr:
        yield f"not quiet: {end.stderr[:200]!r}"
    inside = (str(zoo.home), "/dev")  # /dev/null is given as an output
    for path in end.written:
        whole = os.path.normpath(zoo.home / path)
        # Caches of Python and of matplotlib's first import are where they always are.
        if not whole.startswith(inside) and "__pycache__" not in whole:
            yield f"wrote {whole}"


def sentinel(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return contents and times of all files of a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def shut_in(monkeypatch, tmp_path):
    """Make the zoo the only place there is: home, cache, temporary files, and no network."""
    zoo = make_zoo(tmp_path)
    for name in ("HOME", "ENGRAM_CACHE", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        folder = zoo.home / f"of-{name}"
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(zoo.home / "of-TMPDIR"))
    monkeypatch.setenv("ENGRAM_TRACEBACK", "1")  # mistakes of ours show
    monkeypatch.chdir(zoo.home)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return zoo


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n >= FAST), id=f"lists-{n * CHUNK}")
        for n in range(LISTS // CHUNK)
    ],
)
def test_any_arguments_end_well(chunk, shut_in, monkeypatch):
    before = sentinel(shut_in.victims)
    dice = random.Random(f"{SEED}-{chunk}")
    failures = []
    for number in range(CHUNK):
        args = drawn_list(dice, shut_in)
        if any("\0" in word for word in args):
            continue  # no process can be given a zero byte
        if os.environ.get("ENGRAM_FUZZ_SHOW"):
            print(number, args, file=sys.__stderr__, flush=True)
        end = ended(args, monkeypatch)
        if os.environ.get("ENGRAM_FUZZ_SHOW"):
            print("   ", end.code, end.stderr[-300:].strip(), file=sys.__stderr__, flush=True)
        failures += [f"{number} {args}\n   {one}" for one in complaints(args, end, shut_in)]
        if sentinel(shut_in.victims) != before:
            failures.append(f"{number} {args}\n   changed a victim")
            before = sentinel(shut_in.victims)
    assert not failures, f"{len(failures)} of {CHUNK} lists\n" + "\n".join(failures)
