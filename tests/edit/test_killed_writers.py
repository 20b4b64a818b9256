"""apply, revert and export, killed at any step, leave what was there, or all of the new; never half
of it, and nothing that the next one does not sweep. For saves of edits see test_files.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engram
from tests.edit.test_checkpoint import digests, stored
from tests.helpers.dying import DYING
from tests.helpers.edit_samples import random_edit, tiny

DIES = (
    DYING
    + """
import hashlib, os, pathlib, shutil, sys, tempfile
from engram import Edit
from engram.edit.checkpoint import revert_checkpoint
verb, edit, source, home = sys.argv[1:]
edit, home = Edit.load(edit), pathlib.Path(home)
out = home / "out"
def write(target):
    if verb == "apply":
        edit.to_checkpoint(source, target)
    elif verb == "widen":
        edit.to_checkpoint(source, target, dtype="float32")
    elif verb == "revert":
        revert_checkpoint(source, target)
    else:
        edit.to_peft(target)
def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    } if folder.exists() else None
write(home / "whole")
old, new = contents(out), contents(home / "whole")
let_die({tempfile: ["mkdtemp"], shutil: ["copyfile"],
         os: ["fsync", "rename", "rmdir", "unlink", "mkdir", "open"],
         pathlib.Path: ["write_bytes", "write_text", "chmod", "open"]})
for step in range(1, 400):
    pid = os.fork()
    if pid == 0:
        calls, killed_at = 0, step
        write(out)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    found = contents(out)
    if found is None and (home / ".out.old").exists():  # killed between two renames
        found = contents(home / ".out.old")
    state = "old" if found == old else "new" if found == new else f"neither {found}"
    print(state, status, flush=True)
    if status == 0:
        break
    if found == new and old is None:
        shutil.rmtree(out)
print(sorted(path.name for path in home.iterdir()))
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a writer for every step")
@pytest.mark.parametrize("verb", ["apply", "widen", "revert", "export"])
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path, verb: str) -> None:
    lm = tiny(dtype=torch.float16)
    source, edit = stored(lm, tmp_path / "source", "8KB"), random_edit(lm)
    edit.save(tmp_path / "edit")
    if verb == "revert":
        edit.to_checkpoint(source, tmp_path / "edited", dtype="float32")
        source = tmp_path / "edited"
    home = tmp_path / "home"
    home.mkdir()
    if verb == "export":
        random_edit(lm, seed=2).to_peft(home / "out")
    before = digests(source)
    arguments = [verb, str(tmp_path / "edit"), str(source), str(home)]
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIES, *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(engram.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        },
        timeout=240,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    *lines, names = output.stdout.splitlines()
    assert len(lines) > 8 and lines[-1] == "new 0", output.stdout
    assert {line.split()[0] for line in lines} == {"old", "new"}
    assert all(line.endswith(f" {signal.SIGKILL.value}") for line in lines[:-1])
    assert names == "['out', 'whole']"  # what the killed ones left was swept by the last
    assert digests(source) == before
    shutil.rmtree(home)
