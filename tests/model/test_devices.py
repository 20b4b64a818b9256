"""A model on several devices, or partly offloaded, gives the numbers of the whole one: no tensor
meets one of another device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import engram
from engram import Edit, Fact, LanguageModel
from engram.editors.second_moments.measure import second_moments
from engram.engine.replayable import replayable
from engram.errors import UnsupportedModelError
from engram.modules.fingerprints import fingerprints
from tests.helpers.pretend_devices import DEVICES, Placed, spread, two_devices
from tests.helpers.tiny import TEXT, tiny_folder, tiny_lm

FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    neighbours=(("The river runs through", "London"),),
)
DOCUMENTS = TEXT.splitlines() * 4
SETTINGS: dict[str, Any] = {
    "contexts": ["{}", "He sings. {}"],
    "corpus": DOCUMENTS,
    "tokens": 200,
    "steps": 3,
}
FAMILIES = ["gpt2", "llama"]


def on_two_devices(family: str) -> LanguageModel:
    """Blocks 0 and 1 and the embeddings on the first device; blocks 2 and 3, the last norm and the
    unembedding on the second.
    """
    lm = tiny_lm(family)
    blocks, above = (
        lm.parts.blocks,
        [module for module in (lm.parts.norm, lm.parts.unembedding) if module is not None],
    )
    inside = {id(each) for block in blocks for each in block.modules()}
    other = [
        module
        for module in lm.model.modules()
        if not list(module.children())
        and id(module) not in inside
        and all(module is not each for each in above)
    ]
    spread([*other, *blocks[:2]], [*blocks[2:], *above])
    return lm


def the_same(got: Edit, expected: Edit) -> None:
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(got.deltas[name].dense(), delta.dense(), rtol=1e-4, atol=1e-6)


def test_tensors_of_two_devices_do_not_meet() -> None:
    with two_devices():
        here, there = (torch.ones(2, device=device) for device in DEVICES)
        assert isinstance(here, Placed)
        with pytest.raises(RuntimeError, match=r"different devices: \['lazy:0', 'lazy:1'\]"):
            here + there
        with pytest.raises(RuntimeError, match="different devices"):
            here + torch.ones(2)
        assert (here + there.to(here.device)).sum().item() == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_replayed_and_traced(family: str) -> None:
    plain = tiny_lm(family)
    expected = engram.trace(plain, FACT.prompt_text, subject=FACT.subject, samples=1, sites=["mlp"])
    with two_devices():
        lm = on_two_devices(family)
        assert replayable(lm)
        got = engram.trace(lm, FACT.prompt_text, subject=FACT.subject, samples=1, sites=["mlp"])
    for site, table in expected.scores.items():
        torch.testing.assert_close(got.scores[site], table, rtol=1e-4, atol=1e-6)


def test_what_it_knows_is_asked() -> None:
    expected = engram.knows(tiny_lm(), [FACT], paraphrases=False)
    with two_devices():
        assert str(engram.knows(on_two_devices("gpt2"), [FACT], paraphrases=False)) == str(expected)


@pytest.mark.parametrize("engine", ["replay", "whole"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fact_is_rewritten_on_either_device(family: str, layer: int, engine: str) -> None:
    expected = engram.rewrite(tiny_lm(family), FACT, layer=layer, engine=engine, **SETTINGS)
    with two_devices():
        the_same(
            engram.rewrite(on_two_devices(family), FACT, layer=layer, engine=engine, **SETTINGS),
            expected,
        )


def test_an_edit_of_both_devices_is_verified_in_both_ways_and_gone_afterwards() -> None:
    plain = tiny_lm()
    edit = engram.compose(
        [engram.rewrite(plain, FACT, layer=layer, **SETTINGS) for layer in (1, 2)]
    )
    expected = engram.verify(plain, edit, text=TEXT, continuation_tokens=0)
    with two_devices():
        lm = on_two_devices("gpt2")
        before = lm.log_probs([(FACT.prompt_text, FACT.target)])[0].tolist()
        for how in ("weights", "beside"):
            with edit.applied(lm, how=how, force=True):
                got = lm.probabilities([(FACT.prompt_text, FACT.target)])[0]
            assert got == pytest.approx(expected.of("rewrite")[0].after[0], rel=1e-4)
        assert lm.log_probs([(FACT.prompt_text, FACT.target)])[0].tolist() == before


@pytest.fixture
def offloaded(tmp_path: Path) -> tuple[LanguageModel, LanguageModel]:
    """Yield a model whose upper half is on disk between forward passes, and the same model
    whole.
    """
    folder = tiny_folder(tmp_path, "llama")
    places: dict[str, Any] = {
        f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)
    }
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    lm = engram.load(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    assert lm.parts.mlp_out(2).weight.is_meta and not lm.parts.mlp_out(1).weight.is_meta
    return lm, engram.load(folder)


def test_an_offloaded_model_is_traced_measured_and_known_like_the_whole_one(offloaded: Any) -> None:
    lm, plain = offloaded
    assert fingerprints(lm.model) == fingerprints(plain.model)
    assert replayable(lm)
    traces = [
        engram.trace(each, FACT.prompt_text, subject=FACT.subject, samples=2, window=2)
        for each in offloaded
    ]
    for site, table in traces[1].scores.items():
        assert torch.equal(traces[0].scores[site], table)
    moments = [
        second_moments(each, [1, 2], DOCUMENTS, 200, cache_dir=Path(each.name) / str(i))
        for i, each in enumerate(offloaded)
    ]
    assert all(
        torch.equal(moments[0][layer].matrix_ff, moments[1][layer].matrix_ff) for layer in (1, 2)
    )
    assert str(engram.knows(lm, [FACT], paraphrases=False)) == str(
        engram.knows(plain, [FACT], paraphrases=False)
    )


@pytest.mark.parametrize(("layer", "how"), [(1, "weights"), (2, "beside")])
def test_an_offloaded_model_is_edited_where_its_weights_are_and_beside_them(
    offloaded: Any, layer: int, how: str
) -> None:
    lm, plain = offloaded
    facts = [FACT, Fact("river", "The {} runs through", "Madrid")]
    edit, expected = (engram.rewrite(each, facts, layer=layer, **SETTINGS) for each in offloaded)
    the_same(edit, expected)
    assert edit.base["tensors"] == expected.base["tensors"]
    receipt = engram.verify(lm, edit, text=TEXT, continuation_tokens=2)
    assert receipt.how == how
    with edit.applied(lm, how="beside"), expected.applied(plain):
        got, wanted = (each.log_probs([(FACT.prompt_text, FACT.target)])[0] for each in offloaded)
        torch.testing.assert_close(got, wanted)


def test_writing_into_an_offloaded_weight_is_refused(offloaded: Any) -> None:
    lm, plain = offloaded
    edit = engram.rewrite(plain, FACT, layer=2, **SETTINGS)
    with pytest.raises(
        UnsupportedModelError, match=r"is offloaded .*how='beside'\).*edit.to_peft\(folder\)$"
    ):
        edit.applied(lm, how="weights").__enter__()
