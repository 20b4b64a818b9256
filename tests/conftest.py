"""One thread (tiny matrices are slower on two), no network, and a cache that is nobody's."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of kernels and commands that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _a_cache_of_our_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
