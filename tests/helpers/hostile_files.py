"""Files and folders of every wrong kind beside right ones, for commands that are given any of them.

Everything is inside one folder; `victims` is a folder beside it, which files of the wrong kind name
and which nobody may touch.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import engram
from engram import Fact
from engram.benchmark.data.write import write_dataset
from tests.helpers.bench_samples import dataset
from tests.helpers.edit_samples import random_edit
from tests.helpers.tiny import TEXT, tiny_folder

DEEP = "[" * 100_000 + "]" * 100_000
FACTS = [
    Fact("tower", "The {} is in the city of", "Paris", "Rome"),
    Fact("river", "The {} is in", "Rome"),
]


@dataclass
class Zoo:
    """Paths by what they should be; `wrong` are of no use to anybody."""

    home: Path
    victims: Path
    models: list[Path] = field(default_factory=list)
    edits: list[Path] = field(default_factory=list)
    ledgers: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    facts: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    templates: list[Path] = field(default_factory=list)
    wrong: list[Path] = field(default_factory=list)

    @property
    def data_set(self) -> Path:
        """Return a file of records."""
        return self.home / "records.json"

    @property
    def every(self) -> list[Path]:
        """Return all of them."""
        kinds = (self.models, self.edits, self.ledgers, self.runs, self.facts, self.texts)
        return [path for kind in (*kinds, self.templates, self.wrong) for path in kind]


def make_zoo(folder: Path) -> Zoo:
    """Write everything into a folder that does not exist yet."""
    zoo = Zoo(folder / "home", folder / "victims")
    zoo.home.mkdir(parents=True)
    zoo.victims.mkdir()
    (zoo.victims / "victim.txt").write_text("untouched", encoding="utf8")
    _add_models(zoo)
    _add_edits(zoo)
    _add_ledgers(zoo)
    _add_tables(zoo)
    _add_wrong(zoo)
    return zoo


def _changed(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.with_name(name), symlinks=True))


def _add_models(zoo: Zoo) -> None:
    model = tiny_folder(zoo.home)
    weights = "model.safetensors"
    shutil.copy(model / weights, zoo.victims / "victim.safetensors")

    cut = _changed(model, "model-cut")
    (cut / weights).write_bytes((model / weights).read_bytes()[:1000])
    empty = _changed(model, "model-empty")
    (empty / weights).write_bytes(b"")
    flipped = _changed(model, "model-flipped")
    (flipped / weights).write_bytes(b"\xff" + (model / weights).read_bytes()[1:])
    other = _changed(model, "model-other-layers")
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"n_layer": 7}))
    nan = _changed(model, "model-nan")
    tensors = {name: tensor * torch.nan for name, tensor in load_file(model / weights).items()}
    save_file(tensors, nan / weights, metadata={"format": "pt"})
    deep = _changed(model, "model-deep")
    (deep / "config.json").write_text(DEEP)
    wordless = _changed(model, "model-no-tokenizer")
    for file in wordless.glob("token*"):
        file.unlink()
    pickled = _changed(model, "model-bin")
    (pickled / weights).rename(pickled / "pytorch_model.bin")
    pipe = _changed(model, "model-pipe")
    (pipe / weights).unlink()
    os.mkfifo(pipe / weights)
    remote = _changed(model, "model-remote-code")
    (remote / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
    )
    (remote / "evil.py").write_text(f"open({str(zoo.victims / 'ran')!r}, 'w')\n")
    named = []
    for n, target in enumerate((zoo.victims / "victim.safetensors", "../../victims/victim.txt")):
        named.append(_changed(model, f"model-names-{n}"))
        (named[-1] / weights).rename(named[-1] / "model-00001-of-00001.safetensors")
        (named[-1] / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, str(target))})
        )
    zoo.models += [model, cut, empty, flipped, other, nan, deep, wordless, pickled, pipe, remote]
    zoo.models += named


def _add_edits(zoo: Zoo) -> None:
    lm = engram.load(zoo.models[0])
    edit = random_edit(lm, rank=2, seed=1, joint=False).save(zoo.home / "edit")
    zoo.edits += [edit, random_edit(lm, seed=2).save(zoo.home / "edit-two")]
    zoo.edits.append(engram.rewrite(lm, FACTS[:1], "in-context").save(zoo.home / "edit-text"))
    form = json.loads((edit / "edit.json").read_text())
    for name, change in {
        "edit-method": {"method": 7},
        "edit-settings": {"settings": {"seed": "a", "layer": [1e400]}},
        "edit-facts": {"facts": []},
        "edit-deltas": {"deltas": [{"name": "../../victims/victim.txt"}]},
        "edit-null": dict.fromkeys(form),
        "edit-version": {"format": 10**9, "version": -1, "format_version": "x"},
    }.items():
        zoo.edits.append(_changed(edit, name))
        (zoo.edits[-1] / "edit.json").write_text(json.dumps(form | change))
    for name, text in {"edit-deep": DEEP, "edit-list": "[]", "edit-bytes": "\0\1\2"}.items():
        zoo.edits.append(_changed(edit, name))
        (zoo.edits[-1] / "edit.json").write_text(text)
    zoo.edits.append(_changed(edit, "edit-pipe"))
    (zoo.edits[-1] / "edit.json").unlink()
    os.mkfifo(zoo.edits[-1] / "edit.json")
    zoo.edits.append(_changed(edit, "edit-cut"))
    for file in zoo.edits[-1].glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    zoo.edits.append(_changed(edit, "edit-link"))
    for file in zoo.edits[-1].glob("*.safetensors"):
        file.unlink()
        file.symlink_to(zoo.victims / "victim.safetensors")


def _add_ledgers(zoo: Zoo) -> None:
    lm = engram.load(zoo.models[0])
    book = engram.Ledger.create(zoo.home / "book", lm)
    for edit in zoo.edits[:2]:
        book.add(engram.Edit.load(edit))
    zoo.ledgers.append(book.folder)
    for file in sorted(book.folder.rglob("*")):
        if not file.is_file() or file.suffix not in (".json", ".jsonl"):
            continue
        place = file.relative_to(book.folder)
        for name, damage in {
            "cut": lambda text: text[: len(text) // 2],
            "names": lambda text: text.replace("0001", "../../victims").replace("1-", "../"),
            "types": lambda text: text.replace("0", '"a"'),
            "deep": lambda _: DEEP,
        }.items():
            zoo.ledgers.append(_changed(book.folder, f"book-{'-'.join(place.parts)}-{name}"))
            (zoo.ledgers[-1] / place).write_text(damage(file.read_text()))


def _add_tables(zoo: Zoo) -> None:
    lm = engram.load(zoo.models[0])
    write_dataset(dataset(3), zoo.data_set)
    run = zoo.home / "run.sqlite"
    engram.bench(lm, dataset(1), {"ft": {"method": "ft", "epochs": 1}}, run)
    damaged = zoo.home / "run-damaged.sqlite"
    shutil.copy(run, damaged)
    with sqlite3.connect(damaged) as connection:
        connection.execute("UPDATE records SET record = '{}'")
    connection.close()
    foreign = zoo.home / "run-foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE about (x)")
    connection.close()
    cut = zoo.home / "run-cut.sqlite"
    cut.write_bytes(run.read_bytes()[:5000])
    zoo.runs += [run, damaged, foreign, cut]

    def write(name: str, text: str) -> Path:
        (zoo.home / name).write_text(text, encoding="utf8")
        return zoo.home / name

    rows = [fact.to_dict() | {"relation": "city"} for fact in FACTS]
    zoo.facts += [
        write("facts.json", json.dumps(rows)),
        write("facts.csv", "subject,prompt,target\ntower,The {} is in,Rome\n"),
        write("facts-types.json", json.dumps([{"subject": 1, "prompt": None, "target": []}])),
        write("facts-hole.json", json.dumps([rows[0] | {"prompt": "no place"}])),
        write("facts-none.json", "[]"),
        write(
            "associations.json",
            json.dumps(
                [
                    {"subject": s, "relation": "city", "object": o}
                    for s, o in (("tower", "Paris"), ("river", "Rome"), ("bridge", "London"))
                ]
            ),
        ),
    ]
    zoo.texts.append(write("text.txt", (TEXT + "\n") * 40))
    zoo.templates += [
        write("templates.json", json.dumps({"city": ["The {} is in", "See the {} in"]})),
        write("templates.toml", 'city = ["The {} is in"]\n'),
        write("templates-types.json", json.dumps({"city": [1, None]})),
    ]


def _add_wrong(zoo: Zoo) -> None:
    wrong = zoo.home / "wrong"
    wrong.mkdir()
    (wrong / "empty").write_bytes(b"")
    (wrong / "bytes.json").write_bytes(bytes(range(256)))
    (wrong / "latin.txt").write_bytes("Trenčín café".encode("latin-1", "replace"))
    (wrong / "deep.json").write_text(DEEP)
    (wrong / "nan.json").write_text('[NaN, Infinity, 1e999, {"a": -Infinity}]')
    (wrong / ("long" * 60)).write_text("{}")
    os.mkfifo(wrong / "pipe")
    (wrong / "circle").symlink_to(wrong / "circle")
    (wrong / "nowhere").symlink_to(wrong / "missing")
    (wrong / "zeros.json").symlink_to("/dev/zero")
    (wrong / "null").symlink_to("/dev/null")
    (wrong / "folder").mkdir()
    (wrong / "weird \n\x1b[31m‮ [bold] 名.json").write_text("{}")
    (wrong / os.fsdecode(b"not-\xff-utf8.json")).write_text("{}")
    here = Path.cwd()  # a socket's name may have a hundred characters
    os.chdir(wrong)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.chdir(here)
    zoo.wrong += sorted(wrong.iterdir()) + [wrong / "missing", wrong / "empty" / "below"]
