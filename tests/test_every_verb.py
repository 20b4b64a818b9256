"""Every family goes through every verb, from a folder on disk as a user has it: trace, edit,
verify, keep, apply, revert, export.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import engram
from engram import Edit, Fact
from engram.edit.checkpoint import revert_checkpoint
from tests.helpers.tiny import DENSE, EXPERTS, TEXT, tiny_folder

FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    neighbours=(("The river runs through", "London"),),
)
DOCUMENTS = TEXT.splitlines() * 4


@pytest.mark.parametrize("family", DENSE)
def test_from_a_folder_to_an_adapter(family, tmp_path):
    folder = tiny_folder(tmp_path, family)
    lm = engram.load(folder)
    trace = engram.trace(lm, FACT.prompt_text, subject=FACT.subject, samples=2, window=2)
    assert all(table.shape == (len(trace.tokens), lm.n_layers) for table in trace.scores.values())

    edit = engram.rewrite(
        lm, FACT, layer=1, contexts=["{}", "He sings. {}"], corpus=DOCUMENTS, tokens=200, steps=3
    )
    receipt = engram.verify(lm, edit, text="The river runs through London.", continuation_tokens=2)
    edit.with_receipt(receipt).save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    ids = torch.tensor([lm.encode(FACT.prompt_text).ids])
    with torch.no_grad():
        plain = lm.model(ids).logits
        with edit.applied(lm):
            edited = lm.model(ids).logits
            assert lm.generate(FACT.prompt_text, 3).startswith(FACT.prompt_text)
        assert torch.equal(lm.model(ids).logits, plain), "leaving the block restores the model"
    assert not torch.allclose(edited, plain, atol=1e-6)

    edit.to_checkpoint(folder, tmp_path / "edited")
    with torch.no_grad():
        torch.testing.assert_close(engram.load(tmp_path / "edited").model(ids).logits, edited)
    revert_checkpoint(tmp_path / "edited", tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }

    edit.to_peft(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, edited, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_traced_and_refuse_to_be_edited(family, tmp_path):
    lm = engram.load(tiny_folder(tmp_path, family))
    trace = engram.trace(lm, FACT.prompt_text, subject=FACT.subject, samples=2, window=2)
    assert all(table.isfinite().all() for table in trace.scores.values())
    with pytest.raises(engram.EngramError, match="mixture of experts"):
        engram.rewrite(lm, FACT)
