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
    """Keep second moments and values in a folder of this run, which its processes share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAM_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="session")
def pocket_lm():
    """Load the bundled model once; whoever uses it leaves every bit of it as it was."""
    import engram
    from engram import pocket

    if not pocket.PATH.exists():
        pytest.skip("the bundled model is not here")
    lm = engram.load("pocket")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    yield lm
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"a test left {name} changed"
