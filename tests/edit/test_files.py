"""An edit on disk is whole or not there, and what is damaged says so."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engram.files.atomic
from engram.edit.edit import Edit, compose
from engram.errors import EngramFileError
from engram.facts import Fact
from engram.files.checksums import stamped
from tests.helpers.dying import DYING
from tests.helpers.edit_samples import FAMILIES, random_edit, tiny

LM = tiny()
words = st.text(min_size=1, max_size=12).filter(str.strip)


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(FAMILIES), st.integers(0, 4), st.booleans(), words, words, st.integers(0, 2**40)
)
def test_what_is_loaded_equals_what_was_saved(
    family: str, rank: int, joint: bool, subject: str, target: str, seed: int
) -> None:
    edit = random_edit(tiny(family), (0, 2), rank=rank, joint=joint or rank == 0, seed=seed % 1000)
    facts = (Fact(subject, "{} is in", target, neighbours=(("x is in", "y"),)), *edit.facts[1:])
    edit = Edit(
        facts,
        "m",
        {"a": (1, 2.5), "b": None},
        edit.deltas,
        edit.base,
        seed,
        receipt={"passed": False},
    )
    with tempfile.TemporaryDirectory() as home:
        edit.save(Path(home) / "edit")
        assert Edit.load(Path(home) / "edit") == edit
        assert names(home) == ["edit"]
        assert names(Path(home) / "edit") == ["deltas.safetensors", "edit.json"]


def test_the_same_edit_gives_the_same_bytes(tmp_path: Path) -> None:
    edit = compose([random_edit(LM, seed=1), random_edit(LM, (0, 2), seed=2)])
    for name in "ab":
        edit.save(tmp_path / name)
    for file in ("edit.json", "deltas.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_edit_replaces_an_edit_and_nothing_else(tmp_path: Path) -> None:
    one, two = random_edit(LM, seed=1), random_edit(LM, seed=2)
    one.save(tmp_path / "edit")
    two.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit") == two
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(
        EngramFileError, match=r"holds other files; expected a folder with edit.json"
    ):
        one.save(tmp_path / "thesis")
    with pytest.raises(EngramFileError, match="is a file; expected the name of a folder"):
        one.save(tmp_path / "thesis" / "chapter.tex")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    one.save(tmp_path / "empty")


def _rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the recipe and put its checksum right, so that what is wrong is the content."""
    recipe = json.loads((folder / "edit.json").read_text())
    change(recipe)
    (folder / "edit.json").write_text(json.dumps(stamped(recipe)))


def _factors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and put the hash right, so that what is wrong is the content."""
    tensors = safetensors.torch.load_file(folder / "deltas.safetensors")
    change(tensors)
    raw = safetensors.torch.save(tensors)
    (folder / "deltas.safetensors").write_bytes(raw)
    _rewritten(folder, lambda recipe: recipe.update(sha256=hashlib.sha256(raw).hexdigest()))


NAME = "transformer.h.1.mlp.c_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no recipe": (lambda f: (f / "edit.json").unlink(), "holds no edit: edit.json cannot be read"),
    "no factors": (lambda f: (f / "deltas.safetensors").unlink(), "the edit is incomplete"),
    "cut recipe": (
        lambda f: (f / "edit.json").write_text('{"format_version": 1, "fa'),
        "edit.json is damaged",
    ),
    "cut factors": (
        lambda f: os.truncate(f / "deltas.safetensors", 90),
        "sha256 is not the one in edit.json",
    ),
    "newer": (
        lambda f: _rewritten(f, lambda r: r.update(format_version=2)),
        "format_version=2, this engram reads 1.*upgrade",
    ),
    "other": (
        lambda f: (f / "edit.json").write_text("{}"),
        "format_version=None.*not an edit of ours",
    ),
    "no object": (lambda f: (f / "edit.json").write_text("[]"), r"\[\], expected an object"),
    "no facts": (lambda f: _rewritten(f, lambda r: r.pop("facts")), "damaged: facts is missing"),
    "bad fact": (
        lambda f: _rewritten(f, lambda r: r["facts"][0].update(prompt="no place")),
        r"damaged: facts\[0\]: prompt='no place'",
    ),
    "no base": (
        lambda f: _rewritten(f, lambda r: r["base"].update(tensors={})),
        "base does not describe",
    ),
    "bad base": (lambda f: _rewritten(f, lambda r: r.update(base=3)), "is damaged"),
    "owners": (
        lambda f: _rewritten(f, lambda r: r["owners"].update({NAME: [[0], [0]]})),
        "one entry a column",
    ),
    "nan": (lambda f: _factors(f, lambda t: t[f"{NAME}.left"].fill_(torch.nan)), "NaN or infinity"),
    "shape": (
        lambda f: _factors(f, lambda t: t.update({f"{NAME}.left": torch.ones(3, 1)})),
        r"is \[out, in\] = \[3, 24\]",
    ),
    "extra": (
        lambda f: _factors(f, lambda t: t.update(more=torch.ones(1))),
        "tensors of no delta: more",
    ),
}


def _weight(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: _rewritten(folder, lambda r: change(r["base"]["tensors"][NAME]))


def _field(**values: Any) -> Callable[[Path], object]:
    return lambda folder: _rewritten(folder, lambda recipe: recipe.update(values))


def _pipe(name: str) -> Callable[[Path], object]:
    def replaced(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replaced


def _link(name: str, target: str) -> Callable[[Path], object]:
    def replaced(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(target.format(home=folder.parent, name=name))

    return replaced


LIST = r"expected a list"
DAMAGE |= {
    "version true": (_field(format_version=True), "format_version=True, this engram reads 1"),
    "version 1.0": (_field(format_version=1.0), "format_version=1.0, this engram reads 1"),
    "version text": (_field(format_version="1"), "format_version='1', this engram reads 1"),
    "kind": (_field(kind="weights"), "kind='weights', expected 'prompt'"),
    "method": (_field(method=3), "method=3, expected a text"),
    "method null": (_field(method=None), "method=None, expected a text"),
    "seed text": (_field(seed="1"), "seed='1', expected a whole number"),
    "seed fraction": (_field(seed=1.5), "seed=1.5, expected a whole number"),
    "seed true": (_field(seed=True), "seed=True, expected a whole number"),
    "seed negative": (_field(seed=-1), "seed=-1, expected at least 0"),
    "seed infinite": (_field(seed=float("inf")), "seed=.*expected"),
    "settings": (_field(settings=[]), r"settings=\[\], expected an object"),
    "diagnostics": (_field(diagnostics="none"), "diagnostics='none', expected an object"),
    "receipt": (_field(receipt=[1]), r"receipt=\[1\], expected an object"),
    "versions": (_field(versions={"torch": 2}), "versions.torch=2, expected a text"),
    "facts text": (_field(facts="all"), f"facts='all', {LIST}"),
    "facts none": (_field(facts=[]), r"facts=\[\], expected at least 1"),
    "fact of numbers": (_field(facts=[{"subject": 1}]), r"facts\[0\].subject=1, expected a text"),
    "fact too short": (_field(facts=[{"subject": "a"}]), r"facts\[0\].prompt is missing"),
    "fact null": (_field(facts=[None]), r"facts\[0\]=None, expected an object"),
    "fact with more": (
        lambda f: _rewritten(f, lambda r: r["facts"][0].update(more=1)),
        "unexpected keyword argument 'more'",
    ),
    "owners text": (_field(owners="all"), "owners='all', expected an object"),
    "owners flat": (_field(owners={NAME: [0]}), rf"owners.{NAME}\[0\]=0, {LIST}"),
    "owners negative": (_field(owners={NAME: [[-1]]}), r"\[0\]\[0\]=-1, expected at least 0"),
    "owners out of range": (_field(owners={NAME: [[9]]}), r"columns of facts \[9\]; there are 1"),
    "owners of nobody": (_field(owners={NAME: [[]]}), "expected at least 1"),
    "owners of another": (_field(owners={"other": [[0]]}), "no entry 'other.left'"),
    "sha256": (_field(sha256=3), "sha256=3, expected a text"),
    "base model": (
        lambda f: _rewritten(f, lambda r: r["base"].update(model=None)),
        "base.model=None, expected a text",
    ),
    "base tensors": (
        lambda f: _rewritten(f, lambda r: r["base"].update(tensors=[])),
        r"base.tensors=\[\], expected an object",
    ),
    "weight dtype": (_weight(lambda w: w.update(dtype="save")), "dtype='save', expected 'float16'"),
    "weight shape": (_weight(lambda w: w.update(shape=[16])), "shape=.*expected at least 2"),
    "weight shape huge": (_weight(lambda w: w.update(shape=[2**60, 2**60])), "its weight is"),
    "weight transposed": (_weight(lambda w: w.update(transposed=1)), "expected true or false"),
    "deep": (
        lambda f: (f / "edit.json").write_text('{"format_version": 1, "settings": ' + "[" * 10**5),
        "no JSON that can be read, recursion limit",
    ),
    "no text": (lambda f: (f / "edit.json").write_bytes(b"\xff{}"), "no JSON that can be read"),
    "pipe for a recipe": (_pipe("edit.json"), "edit.json is a pipe; expected a regular file"),
    "pipe for factors": (_pipe("deltas.safetensors"), "is a pipe; expected a regular file"),
    "recipe elsewhere": (_link("edit.json", "{home}/{name}"), "is a link that leaves its folder"),
    "factors elsewhere": (_link("deltas.safetensors", "../{name}"), "link that leaves its folder"),
    "a device": (_link("deltas.safetensors", "/dev/zero"), "is a link that leaves its folder"),
    "a link to itself": (_link("edit.json", "{name}"), "edit.json"),
    "no safetensors": (lambda f: _raw(f, b"no tensors"), "header"),
    "a header of 2^60 bytes": (lambda f: _raw(f, struct.pack("<Q", 2**60) + b"{}"), "header"),
    "factors of whole numbers": (
        lambda f: _factors(f, lambda t: t.update({f"{NAME}.left": torch.ones(16, 1).int()})),
        "expected a matrix in float32 or float64",
    ),
}


def _raw(folder: Path, raw: bytes) -> None:
    (folder / "deltas.safetensors").write_bytes(raw)
    _rewritten(folder, lambda recipe: recipe.update(sha256=hashlib.sha256(raw).hexdigest()))


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a letter of the target": lambda r: r["facts"][0].update(target="Citz 10"),
    "a digit of the receipt": lambda r: r["receipt"].update(efficacy=0.91),
    "the receipt": lambda r: r.update(receipt=None),
    "a setting": lambda r: r["settings"].update(rank=2),
    "the seed": lambda r: r.update(seed=2),
    "a diagnostic": lambda r: r["diagnostics"].update(rho=0.51),
    "the model": lambda r: r["base"].update(model="another"),
    "the weights": lambda r: r["base"]["tensors"][NAME].update(sha256="0" * 64),
    "the dtype": lambda r: r["base"]["tensors"][NAME].update(dtype="float16"),
    "a version": lambda r: r["versions"].update(torch="0"),
    "a field more": lambda r: r.update(more=1),
    "the checksum": lambda r: r.update(checksum="0" * 64),
    "the checksum's type": lambda r: r.update(checksum=None),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_since_the_save_is_noticed(tmp_path: Path, kind: str) -> None:
    folder = random_edit(LM).with_receipt({"efficacy": 0.9}).save(tmp_path / "edit")
    recipe = json.loads((folder / "edit.json").read_text())
    CHANGES[kind](recipe)
    (folder / "edit.json").write_text(json.dumps(recipe, indent=1))
    with pytest.raises(EngramFileError, match=r"edit.json is damaged: .* \(another checksum\)"):
        Edit.load(folder)


def test_the_same_contents_in_other_words_are_the_same_edit(tmp_path: Path) -> None:
    edit = random_edit(LM)
    path = edit.save(tmp_path / "edit") / "edit.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert Edit.load(tmp_path / "edit") == edit


def test_an_edit_of_an_older_engram_is_loaded_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit = random_edit(LM)
    path = edit.save(tmp_path / "edit") / "edit.json"
    recipe = json.loads(path.read_text())
    del recipe["checksum"]
    path.write_text(json.dumps(recipe))
    assert Edit.load(tmp_path / "edit") == edit
    assert "edit.json has no checksum (an older engram wrote it)" in caplog.text


def test_a_folder_that_is_a_link_is_followed(tmp_path: Path) -> None:
    edit = random_edit(LM)
    edit.save(tmp_path / "edit")
    (tmp_path / "link").symlink_to(tmp_path / "edit")
    assert Edit.load(tmp_path / "link") == edit


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    random_edit(LM).save(tmp_path / "edit")
    damage(tmp_path / "edit")
    with pytest.raises(EngramFileError, match=message):
        Edit.load(tmp_path / "edit")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        EngramFileError, match=r"nowhere is not a folder; expected one that Edit.save wrote"
    ):
        Edit.load(tmp_path / "nowhere")


@pytest.mark.parametrize("step", ["write_bytes", "write_text", "fsync", "rename 1", "rename 2"])
def test_a_full_disk_leaves_the_old_edit(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = random_edit(LM, seed=1), random_edit(LM, seed=2)
    old.save(tmp_path / "edit")
    home, _, number = step.partition(" ")
    owner: Any = Path if home.startswith("write") else os
    original, calls = getattr(owner, home), []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == int(number or 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, home, fails)
        with pytest.raises(
            EngramFileError,
            match=r"could not write .*No space left on device.*What was there before is unchanged",
        ):
            new.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit") == old
    assert names(tmp_path) == ["edit"]


def test_a_writer_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    old, new = random_edit(LM, seed=1), random_edit(LM, seed=2)
    old.save(tmp_path / "edit")
    (tmp_path / "edit").rename(tmp_path / ".edit.old")  # as far as it came
    assert Edit.load(tmp_path / "edit") == old
    new.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit") == new
    assert names(tmp_path) == ["edit"]


def test_what_a_killed_writer_left_is_swept_at_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / ".edit.new-abc"
    left.mkdir()
    random_edit(LM).save(tmp_path / "edit")
    assert not left.exists()


SAVES = """
import sys
from engram import Edit
one, two = Edit.load(sys.argv[1]), Edit.load(sys.argv[2])
print("ready", flush=True)
while True:
    one.save(sys.argv[3])
    two.save(sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_edit_or_the_new_one(tmp_path: Path) -> None:
    edits = [random_edit(LM, seed=seed) for seed in (1, 2)]
    for i, edit in enumerate(edits):
        edit.save(tmp_path / str(i))
    edits[0].save(tmp_path / "edit")
    command = [sys.executable, "-c", SAVES, *(str(tmp_path / name) for name in ("0", "1", "edit"))]
    source = str(Path(engram.files.atomic.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    for attempt in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.0137 * attempt)
            process.send_signal(signal.SIGKILL)
        assert Edit.load(tmp_path / "edit") in edits
    edits[0].save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit") == edits[0]


DIES = (
    DYING
    + """
import os, pathlib, shutil, sys, tempfile
from engram import Edit
old, new, folder = Edit.load(sys.argv[1]), Edit.load(sys.argv[2]), sys.argv[3]
let_die({tempfile: ["mkdtemp"], os: ["fsync", "rename", "rmdir", "unlink"],
         pathlib.Path: ["write_bytes", "write_text", "chmod"]})
for step in range(1, 60):
    old.save(folder)
    pid = os.fork()
    if pid == 0:
        calls, killed_at = 0, step
        new.save(folder)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    found = Edit.load(folder)
    print("old" if found == old else "new" if found == new else "neither", status, flush=True)
    if status == 0:
        break
"""
)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="forks a writer for every step at which it is killed"
)
def test_killed_at_any_step_a_save_leaves_the_old_edit_or_the_new_one(tmp_path: Path) -> None:
    old, new = random_edit(LM, seed=1), random_edit(LM, seed=2)
    for name, edit in {"old": old, "new": new}.items():
        edit.save(tmp_path / name)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        DIES,
        *(str(tmp_path / name) for name in ("old", "new", "edit")),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(engram.files.atomic.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    output = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert output.returncode == 0, output.stderr
    lines = output.stdout.splitlines()
    assert len(lines) > 8 and lines[-1] == "new 0"
    assert {line.split()[0] for line in lines} == {"old", "new"}
    assert all(line.endswith(f" {signal.SIGKILL.value}") for line in lines[:-1])
