"""benchmarks/gpu.py runs at tiny shape on the CPU: every part, with its result written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_part_runs_at_tiny_shape_and_is_written(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--shape", "tiny"]
    # Least pieces only: that every part runs is what is tested.
    command += ["--minutes", "0.02", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["card"] == "cpu" and written["bfloat16_matmul_flops"] > 0
    assert set(written["shapes"]) == {"tiny-gpt2", "tiny-llama"}
    for shape in written["shapes"].values():
        parts = shape["parts"]
        assert len(parts) == 7
        for name, part in parts.items():
            assert "not_run" not in part, f"{name}: {part}"
            assert part["seconds"] > 0 and part["operations"] > 0
            assert part["extrapolated"] == (part["measured"] < part["wanted"])
        assert parts["published trace"]["largest_difference"] < 0.01
