"""Models in bfloat16 and float16: what is optimised and summed is float32 or better, and what is
written can be taken back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import engram
from engram import Edit, Fact
from engram.edit.checkpoint import revert_checkpoint
from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_value
from engram.editors.second_moments.measure import second_moments
from engram.engine.replayable import replayable
from engram.modules.fingerprints import fingerprints
from engram.modules.hooks import record
from tests.helpers.tiny import TEXT, tiny_folder, tiny_lm

FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    neighbours=(("The river runs through", "London"),),
)
DOCUMENTS = TEXT.splitlines() * 4
CONTEXTS = ["{}", "He sings. {}"]
SETTINGS: dict[str, Any] = {
    "layer": 1,
    "contexts": CONTEXTS,
    "corpus": DOCUMENTS,
    "tokens": 200,
    "steps": 3,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "engram.model.loading")  # that half precision is slow on a CPU


@DTYPES
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_from_a_folder_to_an_adapter_and_back(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path, family, dtype)
    lm = engram.load(folder)
    assert lm.dtype == dtype and replayable(lm)
    before = fingerprints(lm.model)
    edit = engram.rewrite(lm, [FACT, Fact("river", "The {} runs through", "Madrid")], **SETTINGS)
    receipt = engram.verify(lm, edit, text=TEXT, continuation_tokens=2)
    assert receipt.how == "weights" and 0 < receipt.rounding < 0.5
    edit.with_receipt(receipt).save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    ids = torch.tensor([lm.encode(FACT.prompt_text).ids])
    with torch.no_grad():
        with edit.applied(lm):
            edited = lm.model(ids).logits
        with edit.applied(lm, how="beside"):
            beside = lm.model(ids).logits
        assert fingerprints(lm.model) == before
        edit.to_checkpoint(folder, tmp_path / "edited")
        assert torch.equal(engram.load(tmp_path / "edited").model(ids).logits, edited)
        revert_checkpoint(tmp_path / "edited", tmp_path / "back")
        assert fingerprints(engram.load(tmp_path / "back").model) == before
        edit.to_peft(tmp_path / "adapter")
        adapted = PeftModel.from_pretrained(
            engram.load(folder).model, str(tmp_path / "adapter")
        ).eval()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            adapted(ids).logits, beside, rtol=0, atol=20 * eps * float(beside.abs().max())
        )


@DTYPES
def test_values_keys_and_deltas_are_float32(dtype: torch.dtype) -> None:
    lm = tiny_lm(dtype=dtype)
    value = optimise_value(lm, FACT, ValueSearch(1, CONTEXTS, ValueConfig(steps=3)))
    assert {
        each.dtype for each in (value.start_d, value.delta_d, value.keys_cf, value.outputs_cd)
    } == {torch.float32}
    exact = optimise_value(tiny_lm(), FACT, ValueSearch(1, CONTEXTS, ValueConfig(steps=3)))
    assert torch.cosine_similarity(value.keys_cf, exact.keys_cf).min() > 0.999
    assert torch.cosine_similarity(value.delta_d, exact.delta_d, dim=0) > 0.95
    edit = engram.rewrite(lm, FACT, **SETTINGS)
    assert all(
        factor.dtype == torch.float32
        for delta in edit.deltas.values()
        for factor in delta.factors().values()
    )


@DTYPES
def test_second_moments_are_the_float64_sums_of_the_keys_as_the_model_gives_them(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    lm = tiny_lm(dtype=dtype)
    (moment,) = second_moments(lm, [1], DOCUMENTS[:4], 100_000, cache_dir=tmp_path).values()
    total, count = torch.zeros_like(moment.matrix_ff), 0
    for text in DOCUMENTS[:4]:
        ids = lm.tokenizer(text)["input_ids"]
        with record(lm.model, inputs=[lm.parts.mlp_out_name(1)]) as seen, torch.no_grad():
            lm.model(torch.tensor([ids]))
        keys_tf = seen[lm.parts.mlp_out_name(1)].double().reshape(len(ids), -1)
        total, count = total + keys_tf.T @ keys_tf, count + len(ids)
    eps = torch.finfo(
        dtype
    ).eps  # a batch is computed in another order than its rows, and rounded as it goes
    assert moment.matrix_ff.dtype == torch.float64
    assert float((moment.matrix_ff - total / count).norm() / moment.matrix_ff.norm()) < 3 * eps
