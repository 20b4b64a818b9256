"""LoRA trains peft's adapters on matrices of any orientation, and hands back a low-rank edit and
the very same model.
"""

from __future__ import annotations

import pytest
import torch

import engram
from engram.editors.presets import preset, published
from engram.editors.training.lora import LoraEditConfig, adapted
from engram.editors.training.matrices import matrix_names
from engram.errors import NonFiniteError, SettingError, UnsupportedModelError
from engram.settings import read
from tests.helpers.tiny import DENSE, tiny_lm
from tests.helpers.training import FACTS, all_said, interrupted, mean_nll, unchanged

QUICK = {"layers": [1, 2], "rank": 4, "learning_rate": 0.01, "epochs": 200}


@pytest.mark.parametrize("family", DENSE)
def test_the_edited_model_is_the_one_that_was_trained(family):
    """Its loss, text by text, is what the next epoch would have found; and it has fallen."""
    lm = tiny_lm(family, torch.float64)
    settings = {"layers": [1, 2], "rank": 4, "learning_rate": 0.01, "stop": "never"}
    with unchanged(lm.model):
        edit, longer = (
            engram.rewrite(lm, FACTS, "lora", **settings, epochs=epochs) for epochs in (8, 9)
        )
    with edit.applied(lm):
        loss = mean_nll(lm, FACTS)
    assert loss == pytest.approx(longer.diagnostics["losses"][-1], rel=1e-5)
    assert loss < 0.98 * edit.diagnostics["losses"][0]


def test_the_edited_model_says_every_target():
    lm = tiny_lm("llama")
    edit = engram.rewrite(lm, FACTS, "lora", **QUICK)
    assert edit.diagnostics["stopped"] and edit.rank == 4 and len(edit.deltas) == 2
    with edit.applied(lm):
        assert all(all_said(lm, fact.prompt_text, fact.target) for fact in FACTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-square"])
def test_the_edit_does_what_the_adapters_did(family):
    """Logits of the model that wears the adapters, and of the one with the edit in its weights."""
    lm = tiny_lm(family, torch.float64)
    names = matrix_names(lm, [1, 2], ["mlp_out", "heads_out"])
    config = LoraEditConfig(rank=3, alpha=5.0)
    generator = torch.Generator().manual_seed(0)
    ids_bt = torch.tensor([lm.encode("The tower is in the city").ids])
    with adapted(lm, names, config, generator) as adapters, torch.no_grad():
        for _, b_or in adapters.values():
            b_or += torch.randn(b_or.shape, generator=generator, dtype=torch.float64)
        worn = lm.model(ids_bt).logits
        deltas = {f"{name}.weight": engram.Delta(5 / 3 * b, a) for name, (a, b) in adapters.items()}
    base = engram.edit.base.describe_base(lm, deltas)
    with engram.Edit(tuple(FACTS), "lora", {}, deltas, base).applied(lm), torch.no_grad():
        torch.testing.assert_close(lm.model(ids_bt).logits, worn)


def test_whole_passes_give_the_same_edit():
    lm = tiny_lm("llama", torch.float64)
    one, other = (
        engram.rewrite(lm, FACTS, "lora", layers=[2], epochs=5, engine=each).deltas
        for each in ("replay", "whole")
    )
    (name,) = one
    torch.testing.assert_close(one[name].dense(), other[name].dense(), atol=1e-7, rtol=1e-5)


def test_the_same_seed_gives_the_same_edit():
    lm = tiny_lm("gpt2")
    settings = {"layers": [1], "rows_per_batch": 2, "epochs": 4, "dropout": 0.5}
    torch.manual_seed(1)
    first = engram.rewrite(lm, FACTS, "lora", **settings, seed=0)
    torch.manual_seed(2)
    again, other = (engram.rewrite(lm, FACTS, "lora", **settings, seed=seed) for seed in (0, 3))
    assert first == again
    assert first.deltas != other.deltas


def test_dropout_is_off_unless_asked_for():
    lm = tiny_lm("gpt2")
    plain, zero, some = (
        engram.rewrite(lm, FACTS, "lora", layers=[1], epochs=5, **each).deltas
        for each in ({}, {"dropout": 0.0}, {"dropout": 0.5})
    )
    assert plain == zero and plain != some


def test_dropout_keeps_the_mean():
    from engram.editors.training.lora import _Dropout

    x = torch.ones(100, 100)
    dropped = _Dropout(0.25, torch.Generator().manual_seed(0))(x)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 4 / 3]))
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)  # 5 standard errors


def test_an_adapter_of_the_edit_says_the_targets_too(tmp_path):
    from peft import PeftModel

    lm = tiny_lm("llama")
    edit = engram.rewrite(lm, FACTS, "lora", **QUICK)
    ids_bt = torch.tensor([lm.encode(FACTS[0].prompt_text).ids])
    with edit.applied(lm), torch.no_grad():
        edited = lm.model(ids_bt).logits
    worn = PeftModel.from_pretrained(tiny_lm("llama").model, edit.to_peft(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(worn(ids_bt).logits, edited, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_an_interrupted_training_leaves_nothing_behind(monkeypatch, error):
    lm = tiny_lm("gpt2")
    lm.parts.mlp_out(0).weight.requires_grad_(False)
    interrupted(monkeypatch, error)
    with unchanged(lm.model), pytest.raises(type(error)):
        engram.rewrite(lm, FACTS, "lora", layers=[1])


def test_an_interrupted_injection_leaves_nothing_behind(monkeypatch):
    from peft.tuners.lora import LoraModel

    replace, calls = LoraModel._replace_module, []

    def raising(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(self, *args)

    monkeypatch.setattr(LoraModel, "_replace_module", raising)
    lm = tiny_lm("gpt2")
    with unchanged(lm.model), pytest.raises(KeyboardInterrupt):
        engram.rewrite(lm, FACTS, "lora", layers=[1, 2])


def test_a_model_that_wears_adapters_is_refused():
    from peft import LoraConfig, inject_adapter_in_model

    lm = tiny_lm("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), lm.model)
    with pytest.raises(
        UnsupportedModelError, match=r"has peft adapters already.*merge them into it first"
    ):
        engram.rewrite(lm, FACTS, "lora", layers=[1])


# --- which matrices -------------------------------------------------------------------------------


def test_targets_are_roles_or_the_familys_own_names():
    lm = tiny_lm("llama")
    assert matrix_names(lm, [2, 1], ["mlp_out"]) == [
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]
    assert matrix_names(lm, [1], ["heads_out", "down_proj", "mlp_out"]) == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert len(matrix_names(lm, "all", ["q_proj", "v_proj"])) == 2 * lm.n_layers
    assert matrix_names(tiny_lm("gpt2"), [0], ["c_proj"]) == [
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_proj",
    ]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"targets": ["q_prj"]},
            SettingError,
            r"no matrix 'q_prj' \(did you mean 'q_proj'\?\); it has mlp_out, heads_out, q_proj",
        ),
        ({"rank": 0}, SettingError, "rank=0"),
        ({"targets": []}, SettingError, r"targets=\[\]: expected at least 1 of them"),
        ({"dropout": 1.0}, SettingError, "dropout=1.0: expected below 1"),
        ({"layers": []}, SettingError, r"layers=\[\]: expected at least 1 of them"),
        ({"layers": [9]}, UnsupportedModelError, "layer=9 does not exist"),
        ({"ranks": 2}, SettingError, r"lora has no setting 'ranks' \(did you mean 'rank'\?\)"),
    ],
)
def test_mistakes_are_explained(settings, error, message):
    with pytest.raises(error, match=message):
        engram.rewrite(tiny_lm("llama"), FACTS, "lora", **{"layers": [1], **settings})


def test_a_model_without_numbers_is_refused():
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.parts.norm.weight.fill_(float("inf"))
    with (
        unchanged(lm.model),
        pytest.raises(NonFiniteError, match=r"nothing was changed. Try a smaller learning_rate"),
    ):
        engram.rewrite(lm, FACTS, "lora", layers=[1])


def test_models_that_do_not_continue_a_text_say_why_not():
    with pytest.raises(
        UnsupportedModelError, match="a masked model: editing is offered for causal ones only"
    ):
        engram.rewrite(tiny_lm("bert"), FACTS, "lora", targets=["query"])


def test_mixtures_of_experts_can_be_adapted_in_their_attention():
    lm = tiny_lm("mixtral")
    edit = engram.rewrite(
        lm,
        FACTS,
        "lora",
        layers=[1, 2],
        targets=["heads_out", "q_proj"],
        learning_rate=0.01,
        epochs=10,
    )
    with edit.applied(lm):
        assert mean_nll(lm, FACTS) < 0.95 * edit.diagnostics["losses"][0]


@pytest.mark.parametrize(
    ("model", "epochs", "targets"),
    [
        ("Llama-2-7b-hf", 70, ["q_proj", "v_proj"]),
        ("Qwen2.5-7B", 60, ["q_proj", "v_proj"]),
        ("gpt2-xl", 30, ["c_attn"]),
    ],
)
def test_presets_are_the_published_settings(model, epochs, targets):
    found = preset("lora", model)
    assert (found["epochs"], found["targets"], found["layers"]) == (epochs, targets, "all")
    assert (found["rank"], found["alpha"], found["dropout"], found["learning_rate"]) == (
        8,
        32,
        0.1,
        5e-3,
    )


def test_every_preset_makes_a_config():
    for model in published("lora"):
        settings = {
            name: value
            for name, value in preset("lora", model).items()
            if name not in ("layers", "depth")
        }
        read(LoraEditConfig, settings, "lora")
