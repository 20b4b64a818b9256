"""The page about other programs says what was measured in llama.cpp."""

from __future__ import annotations

import json

from tools.check_llama_cpp import table

from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs/elsewhere.md").read_text("utf-8")
RESULT = json.loads((ROOT / "benchmarks/results/llama_cpp-smollm2.json").read_text("utf-8"))


def test_the_table_is_the_result():
    assert table(RESULT) in PAGE, "run: python tools/check_llama_cpp.py, and put its table there"


def test_the_text_says_no_more_than_the_table():
    plain, packed = RESULT["float32 base"].values(), RESULT["packed base"].values()
    prompts = sum(row["prompts"] for row in plain)
    assert all(row["largest_difference"] < 3e-5 for row in plain)
    assert RESULT["same_tokens"] and sum(row["same_texts"] for row in plain) == prompts
    assert f"{RESULT['packed base']['no edit']['largest_difference']:.1f}" == "0.7"
    assert 0.4 < sum(row["same_texts"] for row in packed) / prompts < 0.6
    assert sum(row["same_first_token"] for row in packed) > 0.9 * prompts
