"""UltraEdit is one standardised gradient step through a ridge solve; its columns belong to facts,
its statistics to the caller.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import engram
from engram import Fact
from engram.editors.presets import preset, published
from engram.editors.training.ultraedit import Statistics, UltraEditConfig
from engram.errors import (
    EngramError,
    FactError,
    NonFiniteError,
    SettingError,
    UnsupportedModelError,
)
from engram.modules.weights import as_linear
from engram.settings import read
from tests.helpers.tiny import DENSE, tiny_lm
from tests.helpers.training import FACTS, unchanged

LAYERS = [1, 2]


def gathered(lm, name, facts):
    """[n, in], [n, out]: inputs of a matrix and gradients at its output, token by token, text by
    text.
    """
    module = lm.model.get_submodule(name)
    h, g = [], []
    for fact in facts:
        head, ids = lm.encode(fact.prompt_text).ids, lm.target_ids(fact.prompt_text, fact.target)
        seen = {}

        def keep(module, args, out, seen=seen):
            out.retain_grad()
            seen.update(h=args[0], out=out)

        hook = module.register_forward_hook(keep)
        logits_tv = lm.model(torch.tensor([head + ids[:-1]]), use_cache=False).logits[0]
        hook.remove()
        at = slice(len(head) - 1, None)
        torch.nn.functional.cross_entropy(
            logits_tv[at], torch.tensor(ids), reduction="sum"
        ).backward()
        h.append(seen["h"].detach().reshape(-1, seen["h"].shape[-1])[at])
        g.append(seen["out"].grad.reshape(-1, seen["out"].shape[-1])[at])
    lm.model.zero_grad()
    return torch.cat(h), torch.cat(g)


def expected(h, g, rate, mean=None, std=None):
    """Return the published equations: [out, in]."""
    both = torch.cat([h, g], 1)
    mean, std = (both.mean(0), both.std(0)) if mean is None else (mean, std)
    both = (both - mean) / (std + 1e-7)
    h_standard, g_standard = both[:, : h.shape[1]], both[:, h.shape[1] :]
    v = -rate * (h_standard**2).sum(1, keepdim=True) * g_standard
    return torch.linalg.solve(h.T @ h + torch.eye(h.shape[1], dtype=h.dtype), h.T @ v).T


@pytest.mark.parametrize("family", DENSE)
def test_the_change_is_that_of_the_equations(family):
    lm = tiny_lm(family, torch.float64)
    with unchanged(lm.model):
        edit = engram.rewrite(lm, FACTS, "ultraedit", layers=LAYERS, learning_rate=1e-2)
    assert len(edit.deltas) == 2
    for weight, delta in edit.deltas.items():
        wanted = expected(*gathered(lm, weight.removesuffix(".weight"), FACTS), 1e-2)
        assert (
            delta.dense() - wanted
        ).norm() < 1e-5 * wanted.norm()  # some families attend in float32


@pytest.mark.parametrize("rows_per_batch", [1, 2])
def test_batches_change_nothing(rows_per_batch):
    lm = tiny_lm("llama", torch.float64)
    whole = engram.rewrite(lm, FACTS, "ultraedit", layers=LAYERS)
    parts = engram.rewrite(lm, FACTS, "ultraedit", layers=LAYERS, rows_per_batch=rows_per_batch)
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(parts.deltas[name].dense(), delta.dense(), atol=1e-12, rtol=1e-6)


def test_each_token_is_a_column_of_its_fact():
    lm = tiny_lm("gpt2", torch.float64)
    edit = engram.rewrite(lm, FACTS, "ultraedit", layers=[1])
    (delta,) = edit.deltas.values()
    sizes = [len(lm.target_ids(fact.prompt_text, fact.target)) for fact in FACTS]
    assert delta.owners == tuple((i,) for i, size in enumerate(sizes) for _ in range(size))
    rest = edit.without(1).deltas[next(iter(edit.deltas))]
    assert rest.rank == delta.rank - sizes[1]


@pytest.mark.parametrize("targets", ["mlp_out", "gate_proj"])
def test_more_tokens_than_the_weight_has_rows_make_a_dense_change(targets):
    """Both ways of solving, each against the equations."""
    lm = tiny_lm("llama", torch.float64)
    facts = [
        Fact(f"tower {i}", "The {} of Rome is in", "London and Paris" if i % 2 else "Madrid")
        for i in range(30)
    ]
    edit = engram.rewrite(lm, facts, "ultraedit", layers=[1], targets=targets, learning_rate=1e-2)
    ((weight, delta),) = edit.deltas.items()
    assert delta.is_dense and delta.owners == (tuple(range(30)),)
    wanted = expected(*gathered(lm, weight.removesuffix(".weight"), facts), 1e-2)
    torch.testing.assert_close(delta.dense(), wanted, atol=1e-9, rtol=1e-6)


def test_a_small_step_makes_the_targets_likelier():
    lm = tiny_lm("gpt2", torch.float64)
    edit = engram.rewrite(lm, FACTS, "ultraedit", layers=LAYERS, learning_rate=1e-4)
    pairs = [(fact.prompt_text, fact.target) for fact in FACTS]
    before = sum(float(each.sum()) for each in lm.log_probs(pairs))
    with edit.applied(lm):
        assert sum(float(each.sum()) for each in lm.log_probs(pairs)) > before


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_of_every_edit_they_went_through():
    lm = tiny_lm("gpt2", torch.float64)
    life = Statistics()
    engram.rewrite(lm, FACTS[:2], "ultraedit", layers=[1], statistics=life)
    edit = engram.rewrite(
        lm, FACTS[2:], "ultraedit", layers=[1], learning_rate=1e-2, statistics=life
    )
    ((weight, delta),) = edit.deltas.items()
    name = weight.removesuffix(".weight")
    both = torch.cat(gathered(lm, name, FACTS), 1)
    assert life.count == len(both) and edit.settings["tokens_before"] == len(both) - delta.rank
    torch.testing.assert_close(life.means[name], both.mean(0))
    torch.testing.assert_close((life.squares[name] / (life.count - 1)).sqrt(), both.std(0))
    wanted = expected(*gathered(lm, name, FACTS[2:]), 1e-2, both.mean(0), both.std(0))
    torch.testing.assert_close(delta.dense(), wanted, atol=1e-9, rtol=1e-6)


def test_without_statistics_an_edit_knows_of_no_other():
    lm = tiny_lm("gpt2")
    first = engram.rewrite(lm, FACTS, "ultraedit", layers=[1])
    engram.rewrite(lm, FACTS[::-1], "ultraedit", layers=[1])
    assert engram.rewrite(lm, FACTS, "ultraedit", layers=[1]) == first


def test_an_edit_that_fails_leaves_statistics_alone():
    lm = tiny_lm("gpt2")
    life = Statistics()
    engram.rewrite(lm, FACTS, "ultraedit", layers=[1], statistics=life)
    before = deepcopy(life)
    with pytest.raises(
        EngramError, match=r"statistics are of \['transformer.h.1.mlp.c_proj'\], the edit changes"
    ):
        engram.rewrite(lm, FACTS, "ultraedit", layers=[2], statistics=life)
    assert life.count == before.count and life.means.keys() == before.means.keys()
    assert all(torch.equal(life.means[name], mean) for name, mean in before.means.items())


def test_one_token_alone_has_no_spread():
    lm = tiny_lm("gpt2")
    fact = Fact("tower", "The {} is in", "the")
    assert len(lm.target_ids(fact.prompt_text, fact.target)) == 1
    with pytest.raises(
        EngramError, match=r"one token has no spread.*statistics=\.\.\. of earlier edits"
    ):
        engram.rewrite(lm, fact, "ultraedit", layers=[1])


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_an_interrupt_leaves_nothing_behind(monkeypatch, error):
    def raising(*args, **kwargs):
        raise error

    lm = tiny_lm("gpt2")
    monkeypatch.setattr(torch.autograd, "grad", raising)
    with unchanged(lm.model), pytest.raises(type(error)):
        engram.rewrite(lm, FACTS, "ultraedit", layers=[1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": 0.0}, SettingError, "learning_rate=0.0"),
        ({"rate": 1.0}, SettingError, "ultraedit has no setting 'rate'"),
        ({"targets": ["up_porj"]}, SettingError, "did you mean"),
        ({"layers": [7]}, UnsupportedModelError, "layer=7 does not exist"),
        ({"learning_rate": 1e300}, NonFiniteError, "NaN or infinity"),
    ],
)
def test_mistakes_are_explained(settings, error, message):
    with pytest.raises(error, match=message):
        engram.rewrite(tiny_lm("llama"), FACTS, "ultraedit", **{"layers": [1], **settings})


def test_an_empty_target_is_a_mistake_of_the_fact():
    with pytest.raises(FactError, match="is empty"):
        engram.rewrite(tiny_lm("gpt2"), Fact("tower", "The {} is in", " "), "ultraedit")


def test_every_preset_makes_a_config():
    for model in published("ultraedit"):
        settings = {
            name: value
            for name, value in preset("ultraedit", model).items()
            if name not in ("layers", "depth")
        }
        read(UltraEditConfig, settings, "ultraedit")
    assert preset("ultraedit", "mistralai/Mistral-7B-v0.1")["layers"] == [29, 30]


@pytest.mark.parametrize("transposed", ["gpt2", "llama"])
def test_a_change_is_out_by_in_however_the_weight_is_stored(transposed):
    lm = tiny_lm(transposed)
    edit = engram.rewrite(lm, FACTS, "ultraedit", layers=[1])
    (delta,) = edit.deltas.values()
    assert delta.shape == tuple(as_linear(lm.parts.mlp_out(1)).shape)
