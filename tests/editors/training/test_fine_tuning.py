"""Fine-tuning makes every target token the most probable at its place, within its bounds, and
computes on a model it gives back.
"""

from __future__ import annotations

import math

import pytest
import torch

import engram
from engram.editors.presets import preset, published
from engram.editors.training.fine_tuning import FineTuningConfig
from engram.errors import FactError, NonFiniteError, SettingError, UnsupportedModelError
from engram.settings import read
from tests.helpers.tiny import DENSE, TOKENIZERS, tiny_lm
from tests.helpers.training import FACTS, all_said, interrupted, mean_nll, unchanged

METHODS = ("ft", "ft-l", "ft-w", "locft-bf")
QUICK = {"layer": 1, "learning_rate": 0.01, "epochs": 200}


@pytest.mark.parametrize("family", DENSE)
def test_the_edited_model_is_the_one_that_was_trained(family):
    """Its loss, text by text, is what the next epoch would have found; and it has fallen."""
    lm = tiny_lm(family, torch.float64)
    settings = {"layer": 1, "learning_rate": 0.01, "stop": "never"}
    with unchanged(lm.model):
        edit, longer = (
            engram.rewrite(lm, FACTS, "ft", **settings, epochs=epochs) for epochs in (8, 9)
        )
    with edit.applied(lm):
        loss = mean_nll(lm, FACTS)
    assert loss == pytest.approx(longer.diagnostics["losses"][-1], rel=1e-5)
    assert loss < 0.98 * edit.diagnostics["losses"][0]


def test_the_edited_model_says_every_target():
    lm = tiny_lm("llama")
    edit = engram.rewrite(lm, FACTS, "ft", **QUICK)
    assert edit.diagnostics["stopped"]
    with edit.applied(lm):
        assert all(all_said(lm, fact.prompt_text, fact.target) for fact in FACTS)


def test_whole_passes_give_the_same_edit():
    lm = tiny_lm("llama", torch.float64)
    one, other = (
        engram.rewrite(lm, FACTS, "ft", layer=2, epochs=5, engine=engine).deltas
        for engine in ("replay", "whole")
    )
    (name,) = one
    torch.testing.assert_close(one[name].dense(), other[name].dense(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_it_is_adam_on_the_matrix_itself(reference):
    """Against a loop of the test's own that trains a copy's weight, forward pass by forward
    pass.
    """
    lm = tiny_lm("gpt2", torch.float64)
    settings = {
        "layer": 1,
        "learning_rate": 0.002,
        "epochs": 6,
        "weight_decay": 0.01,
        "norm_constraint": 0.006,
    }
    edit = engram.rewrite(lm, FACTS, "ft", **settings, reference=reference, stop="never")
    twin = tiny_lm("gpt2", torch.float64)
    weight = twin.parts.mlp_out(1).weight
    start, losses = weight.detach().clone(), []
    targets = [f" {fact.target}" for fact in FACTS]
    padded = dict(
        zip(
            FACTS,
            twin.tokenizer(targets, padding=True, padding_side="right")["input_ids"],
            strict=True,
        )
    )
    optimiser = torch.optim.Adam([weight], lr=0.002, weight_decay=0.01)
    for _ in range(6):
        nll = []
        for fact in FACTS:
            head = twin.encode(fact.prompt_text).ids
            if reference:
                log_p = twin.model(torch.tensor([head])).logits[0, -1].log_softmax(-1)
                nll.append(-log_p[padded[fact]].mean())
            else:
                ids = twin.target_ids(fact.prompt_text, fact.target)
                log_p = twin.model(torch.tensor([head + ids[:-1]])).logits[0].log_softmax(-1)
                nll.append(
                    -sum(log_p[len(head) - 1 + t, token] for t, token in enumerate(ids)) / len(ids)
                )
        loss = sum(nll) / len(nll)
        optimiser.zero_grad()
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimiser.step()
        with torch.no_grad():
            weight.copy_(weight.clamp(start - 0.006, start + 0.006))
        losses.append(loss.item())
    assert edit.diagnostics["losses"] == pytest.approx(losses, rel=1e-7)
    (delta,) = edit.deltas.values()
    torch.testing.assert_close(delta.dense().T, weight.detach() - start, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_entry_leaves_its_bounds(dtype):
    lm = tiny_lm("gpt2", dtype)
    edit = engram.rewrite(lm, FACTS, "ft-l", **{**QUICK, "epochs": 20}, norm_constraint=0.003)
    (delta,) = edit.deltas.values()
    assert float(delta.dense().abs().max()) == torch.tensor(0.003, dtype=dtype).item()


def test_weight_decay_shrinks_the_weight():
    lm = tiny_lm("gpt2")
    norms = []
    for decay in (0.0, 10.0):
        edit = engram.rewrite(
            lm,
            FACTS,
            "ft",
            layer=1,
            epochs=10,
            learning_rate=0.01,
            weight_decay=decay,
            stop="never",
        )
        with edit.applied(lm):
            norms.append(float(lm.parts.mlp_out(1).weight.detach().norm()))
    assert norms[1] < 0.9 * norms[0]


def test_the_same_seed_gives_the_same_edit():
    lm = tiny_lm("gpt2")
    settings = {"layer": 1, "rows_per_batch": 2, "epochs": 4}
    first, again, other = (
        engram.rewrite(lm, FACTS, "locft-bf", **settings, seed=seed) for seed in (0, 0, 3)
    )
    assert first == again
    assert first.deltas != other.deltas


def test_facts_are_edited_together_and_go_together():
    edit = engram.rewrite(tiny_lm("gpt2"), FACTS, "ft", layer=1, epochs=2)
    (delta,) = edit.deltas.values()
    assert delta.is_dense and delta.owners == ((0, 1, 2),)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_is_kept_with_its_recipe(method, tmp_path):
    lm = tiny_lm("gpt2")
    edit = engram.rewrite(
        lm, FACTS, method, layer=1, epochs=2, locality=[("She plays the", "piano")]
    )
    assert edit.method == method
    loaded = engram.Edit.load(edit.save(tmp_path / "edit"))
    assert loaded == edit
    again = {name: value for name, value in loaded.settings.items() if name != "layer"}
    assert engram.rewrite(lm, FACTS, method, layer=1, **again).deltas == edit.deltas


# --- as published ---------------------------------------------------------------------------------


def test_the_reference_stops_by_its_losses():
    """A batch below `stop_loss` is not stepped on; the last epoch is the one whose mean is
    below.
    """
    lm = tiny_lm("gpt2")
    settings = {
        "layer": 1,
        "epochs": 300,
        "learning_rate": 0.02,
        "reference": True,
        "stop_loss": 4.0,
    }
    edit = engram.rewrite(lm, FACTS[:1], "ft", **settings)
    losses = edit.diagnostics["losses"]
    assert losses[-1] < 4.0 and all(loss >= 4.0 for loss in losses[:-1])
    assert edit.diagnostics["steps"] == len(losses) - 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_reference_takes_a_target_for_a_bag_at_the_prompts_end(tokenizer):
    """First loss, against the released formula: padded targets, everything but the unknown token
    counts.
    """
    lm = tiny_lm("gpt2", torch.float64, tokenizer)
    targets = [f" {fact.target}" for fact in FACTS]
    ids_bn = lm.tokenizer(targets, padding=True, return_tensors="pt", padding_side="right")[
        "input_ids"
    ]
    unknown = lm.tokenizer.unk_token_id
    counted = (
        torch.ones_like(ids_bn, dtype=torch.float64)
        if unknown is None
        else (ids_bn != unknown).double()
    )
    losses = []
    for fact, ids, mask in zip(FACTS, ids_bn, counted, strict=True):
        with torch.no_grad():
            log_p = (
                lm.model(torch.tensor([lm.encode(fact.prompt_text).ids]))
                .logits[0, -1]
                .log_softmax(-1)
            )
        losses.append(float(-(log_p[ids] * mask).sum() / mask.sum()))
    edit = engram.rewrite(lm, FACTS, "ft", layer=1, epochs=1, reference=True)
    assert edit.diagnostics["losses"][0] == pytest.approx(sum(losses) / 3, rel=1e-9)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_an_interrupted_training_leaves_nothing_behind(monkeypatch, error):
    lm = tiny_lm("gpt2")
    lm.parts.mlp_out(0).weight.requires_grad_(False)
    interrupted(monkeypatch, error)
    with unchanged(lm.model), pytest.raises(type(error)):
        engram.rewrite(lm, FACTS, "ft", layer=1)


def test_half_precision_models_train_in_float32():
    lm = tiny_lm("llama", torch.bfloat16)
    edit = engram.rewrite(lm, FACTS, "ft", layer=1, epochs=3)
    (delta,) = edit.deltas.values()
    assert delta.left.dtype == torch.float32 and delta.dense().any()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epoch": 3}, SettingError, r"ft has no setting 'epoch' \(did you mean 'epochs'\?\)"),
        ({"norm_constraint": 0.0}, SettingError, "norm_constraint=0.0: expected above 0"),
        (
            {"layer": 9},
            UnsupportedModelError,
            "layer=9 does not exist; this model has layers 0 to 3",
        ),
        ({"contexts": ["He said"]}, FactError, "exactly one '{}' each"),
        ({"locality": [("She plays the", " ")]}, FactError, "target=' ' is empty"),
        ({"learning_rate": 1e30, "epochs": 3}, NonFiniteError, "Try a smaller learning_rate"),
    ],
)
def test_mistakes_are_explained(settings, error, message):
    with pytest.raises(error, match=message):
        engram.rewrite(tiny_lm("gpt2"), FACTS, "ft", **{"layer": 1, **settings})


def test_models_without_one_matrix_say_why_not():
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        engram.rewrite(tiny_lm("mixtral"), FACTS, "ft")


@pytest.mark.parametrize(
    ("method", "model", "expected"),
    [
        ("ft", "openai-community/gpt2-xl", {"layer": 1, "epochs": 25, "learning_rate": 5e-4}),
        ("ft", "EleutherAI/gpt-j-6B", {"layer": 21}),
        ("ft-l", "gpt2-xl", {"layer": 0, "norm_constraint": 5e-4}),
        ("ft-l", "gpt2-large", {"layer": 0, "norm_constraint": 1e-3}),
        ("ft-l", "gpt2-medium", {"layer": 0, "norm_constraint": 2e-3}),
        ("ft-l", "EleutherAI/gpt-j-6B", {"layer": 0, "norm_constraint": 5e-5}),
        (
            "locft-bf",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            {"layer": 22, "rows_per_batch": 100, "epochs": 25},
        ),
    ],
)
def test_presets_are_the_published_settings(method, model, expected):
    assert preset(method, model).items() >= expected.items()


def test_the_weight_decay_of_ft_w_is_the_papers_at_ten_thousand_facts():
    assert preset("ft-w", "gpt-j-6b")["weight_decay"] == pytest.approx(
        math.exp(0.15589562) * 10_000**-0.87028798, rel=0.01
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_makes_a_config(method):
    for model in published(method):
        settings = {
            name: value
            for name, value in preset(method, model).items()
            if name not in ("layer", "depth")
        }
        read(FineTuningConfig, settings, method)
