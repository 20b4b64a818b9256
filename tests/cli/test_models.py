"""Every command that takes a model refuses a damaged one, in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import engram
from tests.helpers.command_line import FACT, failing
from tests.helpers.tiny import TEXT, tiny_folder

TOWER = "The tower is in the city of"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, an edit of it, facts and a corpus."""
    home = tmp_path_factory.mktemp("home")
    model = tiny_folder(home).rename(home / "model")
    fact = engram.Fact("tower", "The {} is in the city of", "Paris")
    settings: dict[str, Any] = {"layer": 1, "contexts": ["{}"], "steps": 1}
    lm = engram.load(model)
    engram.rewrite(lm, fact, corpus=[TEXT] * 9, tokens=200, **settings).save(home / "edit")
    row = {"subject": "tower", "prompt": "The {} is in the city of", "target": "Paris"}
    (home / "facts.json").write_text(json.dumps([row] * 3))
    (home / "corpus.txt").write_text(TEXT * 9)
    return home


COMMANDS: dict[str, list[str]] = {
    "trace": ["trace", "MODEL", TOWER, "-s", "tower"],
    "average": ["average", "MODEL", "--facts", "HOME/facts.json"],
    "knows": ["knows", "MODEL", "--facts", "HOME/facts.json"],
    "layers": ["layers", "MODEL", "--facts", "HOME/facts.json"],
    "lens": ["lens", "MODEL", TOWER],
    "refinement": ["refinement", "MODEL", TOWER],
    "memories": ["memories", "MODEL", TOWER, "--layer", "1"],
    "edit": ["edit", "MODEL", *FACT, "--layer", "1", "-o", "HOME/new"],
    "verify": ["verify", "MODEL", "HOME/edit"],
    "generate": ["generate", "MODEL", TOWER],
    "apply": ["apply", "HOME/edit", "MODEL", "-o", "HOME/new"],
    "stats": ["stats", "MODEL", "--corpus", "HOME/corpus.txt"],
    "plan": ["plan", "MODEL"],
    "ledger create": ["ledger", "create", "HOME/ledger", "MODEL"],
}


def other_layers(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layer": 3}))


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_number(model: Path) -> None:
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "other layers": (other_layers, "config.json"),
    "cut": (cut, "is not a whole safetensors file"),
    "no number": (no_number, "NaN or infinite"),
    "pickled": (pickled, "as pickle"),
}
UNREAD = {
    "plan": {"no number", "pickled"},  # it reads no weights
    "apply": {"other layers"},  # it reads no config
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_model_is_refused_by_every_command(
    command: str,
    damage: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if damage in UNREAD.get(command, ()):
        pytest.skip("what is damaged is not read")
    shutil.copytree(home / "model", tmp_path / "model")
    change, words = DAMAGES[damage]
    change(tmp_path / "model")
    places = {"MODEL": str(tmp_path / "model"), "HOME": str(home)}
    args = [places.get(arg, arg.replace("HOME", places["HOME"])) for arg in COMMANDS[command]]
    told = failing(monkeypatch, capsys, *args)
    error = told.strip().splitlines()[-1]
    assert error.startswith("engram: ") and words in error, told
    assert len([line for line in told.splitlines() if line.startswith("engram: ")]) == 1, told
    assert not (home / "new").exists() and not (home / "ledger").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "foo"], "dtype='foo': expected 'float32'"),
        (["--dtype", "int8"], "dtype='int8': expected 'float32'"),
        (["--device-map", "cuda:7"], "device_map='cuda:7': no such device"),
        (["--device-map", "gpu"], "device_map='gpu': no such device"),
    ],
)
def test_a_wrong_dtype_or_device_is_refused(
    options: list[str],
    words: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = failing(monkeypatch, capsys, "generate", str(home / "model"), TOWER, *options)
    assert words in told and len(told.strip().splitlines()) == 1
