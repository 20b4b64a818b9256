"""Contexts are sampled once for a model, and never taken from another one."""

from __future__ import annotations

import pytest
import torch

from engram.editors import contexts as module
from engram.editors.contexts import STARTED, sample_contexts
from engram.modules.fingerprints import quick_fingerprint
from tests.helpers.tiny import tiny_lm


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))


def never(*_):
    pytest.fail("sampled again")


@pytest.mark.parametrize("started", [(), STARTED])
def test_contexts_are_sampled_once(monkeypatch, started):
    first = sample_contexts(tiny_lm("llama"), seed=1, started=started)
    assert first == module._sampled(tiny_lm("llama"), 1, started)
    monkeypatch.setattr(module, "_sampled", never)
    assert sample_contexts(tiny_lm("llama"), seed=1, started=started) == first


@pytest.mark.parametrize("changed", ["seed", "started", "entry", "config", "tokenizer"])
def test_contexts_of_anything_else_are_not_taken(monkeypatch, changed):
    lm, seed, started = tiny_lm("llama"), 0, ()
    sample_contexts(lm, seed=seed, started=started)
    if changed == "seed":
        seed = 1
    if changed == "started":
        started = ("The",)
    if changed == "entry":  # one bit of one number, as a small edit might leave it
        entry = lm.parts.mlp_out(1).weight.data.view(torch.int32)
        entry[1, 2] ^= 1
    if changed == "config":
        lm.model.config.rms_norm_eps *= 2
    if changed == "tokenizer":
        lm.tokenizer.add_tokens(["Quito"])
    sampled = ("{}", "other. {}")
    monkeypatch.setattr(module, "_sampled", lambda *_: sampled)
    assert sample_contexts(lm, seed=seed, started=started) == sampled


@pytest.mark.parametrize("text", ["[", "[1]", '["{}", "no place"]', "[]"])
def test_a_damaged_file_is_sampled_again(tmp_path, caplog, text):
    first = sample_contexts(tiny_lm("gpt2"))
    (file,) = (tmp_path / "contexts").iterdir()
    file.write_text(text)
    assert sample_contexts(tiny_lm("gpt2")) == first
    assert "sampling contexts again" in caplog.text and str(file) in caplog.text


@pytest.mark.parametrize("shape", [(4, 8), (4, 6), (3, 5), (2, 3, 5), (16,), (7,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_quick_fingerprint_changes_with_every_entry(shape, dtype):
    whole = torch.arange(torch.Size(shape).numel() or 1).reshape(shape).to(dtype)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.itemsize]
    print_of_whole = quick_fingerprint(whole)
    for place in range(whole.numel()):
        other = whole.clone()
        other.view(bits).reshape(-1)[place] ^= 1
        assert quick_fingerprint(other) != print_of_whole
    assert quick_fingerprint(whole.reshape(1, *shape)) != print_of_whole
    assert quick_fingerprint(whole.clone()) == print_of_whole
