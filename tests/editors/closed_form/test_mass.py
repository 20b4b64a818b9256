"""Every row of the mass editors' table is what its formula says, layer after layer, and edits go on
top of edits.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import engram
from engram import Edit, Fact
from engram.edit.base import describe_base
from engram.editors.closed_form import mass_settings
from engram.editors.closed_form.inputs import MomentSource
from engram.editors.closed_form.mass_settings import MassConfig, settings_of
from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_values
from engram.editors.presets import preset, preset_layers, published
from engram.errors import (
    EngramError,
    FactError,
    NonFiniteError,
    SettingError,
    UnsupportedModelError,
)
from engram.model.language_model import LanguageModel
from engram.settings import read
from tests.helpers.edit_samples import same_bits, weights
from tests.helpers.mass_samples import FACTS, moments, rewrite
from tests.helpers.rewrite_samples import CONTEXTS, FACT
from tests.helpers.tiny import EXPERTS, PARTLY_FLOAT32, STATE_SPACE, tiny_lm
from tests.helpers.value_samples import slowly

OTHERS = [Fact("bridge", "The {} is in", "London"), Fact("Zdeno Chára", "{} was born in", "Paris")]
METHODS = ("memit", "emmet", "memit-seq", "alphaedit", "pmet")
NORMED = (
    "gemma2-short-window",
    "opt-350m-like",
    "olmo2",
)  # a norm between the MLP's output and the residual stream
VARIED = ("gpt2", "llama", "gpt_neox", "gptj", "gemma2-short-window", "bloom", "opt-350m-like")


def weight(lm: Any, layer: int) -> str:
    return f"{lm.parts.mlp_out_name(layer)}.weight"


def relative(mine: Tensor, wanted: Tensor) -> float:
    return float((mine - wanted).norm() / wanted.norm())


# --- against a slow loop of the test's own --------------------------------------------------------


def slow_keys(lm: Any, facts: Any, layer: int, state_of: Any) -> tuple[Tensor, Tensor]:
    """[f, n]: half the bare prompt's key, half the contexts' mean; [d, n] states of the bare
    prompts.
    """
    keys, states = [], []
    for fact in facts:
        rows = [
            slowly(lm, context.replace("{}", fact.prompt_text), fact.subject, layer, state_of)
            for context in CONTEXTS
        ]
        keys.append(0.5 * rows[0][0] + 0.5 * torch.stack([key for key, _ in rows[1:]]).mean(0))
        states.append(rows[0][1])
    return torch.stack(keys, 1), torch.stack(states, 1)


def slow_edit(
    lm: Any,
    facts: Any,
    layers: list[int],
    config: MassConfig,
    past: dict[int, Tensor] | None = None,
) -> list[Tensor]:
    """Return the changes [d, f] layer by layer: whole forward passes over a copy of the model,
    dense LU, nothing shared with engram.
    """
    values = dict(
        optimise_values(
            lm, facts, ValueSearch(layers[-1], CONTEXTS, config.value, site=config.site)
        )
    )
    targets_dn = torch.stack([values[i].star_d for i in range(len(facts))], 1)
    copy = LanguageModel(deepcopy(lm.model), lm.tokenizer, lm.name)
    state_of = (
        copy.parts.blocks[layers[-1]] if config.site == "block" else copy.parts.mlp_out(layers[-1])
    )
    changes = []
    for number, layer in enumerate(layers):
        keys_fn, states_dn = slow_keys(copy, facts, layer, state_of)
        left = len(layers) - number
        share = {"even": 1 / left, "root": 1 / left**0.5, "all": 1.0}[config.share]
        c_ff, eye = moments(lm)[layer].matrix_ff, torch.eye(len(keys_fn), dtype=torch.float64)
        ridge = config.ridge or config.relative_ridge * c_ff.diagonal().sum()
        kept_ff = keys_fn @ keys_fn.T
        if past:
            kept_ff = kept_ff + past[layer] @ past[layer].T
        if config.projects:
            sizes_f, directions_ff = torch.linalg.eigh(c_ff)
            rank = int((sizes_f.cumsum(0) <= (1 - config.null_energy) * sizes_f.sum()).sum())
            projector_ff = directions_ff[:, :rank] @ directions_ff[:, :rank].T
            solved_fn = torch.linalg.solve(
                projector_ff @ kept_ff + ridge * eye, projector_ff @ keys_fn
            )
        else:
            held_ff = config.weight(len(keys_fn)) * c_ff + ridge * eye
            solved_fn = torch.linalg.solve(held_ff + kept_ff, keys_fn)
        changes.append(share * (targets_dn - states_dn) @ solved_fn.T)
        module = copy.parts.mlp_out(layer)
        with torch.no_grad():
            module.weight += changes[-1].T if isinstance(module, Conv1D) else changes[-1]
    return changes


def knobs(edit: Edit) -> dict[str, Any]:
    """Return the settings of the computation, out of an edit's recipe."""
    known = {*MassConfig.__dataclass_fields__, *ValueConfig.__dataclass_fields__} - {"value"}
    return {name: value for name, value in edit.settings.items() if name in known}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", VARIED)
def test_a_row_of_the_table_is_the_slow_loop(family, method):
    """Layers 0, 1 and 2: what is missing is measured at the last one after lower ones were written,
    and shared out.
    """
    lm = tiny_lm(family, torch.float64)
    edit = rewrite(lm, method=method, keys="halves")
    config = read(MassConfig, knobs(edit), method)
    assert list(edit.deltas) == [weight(lm, layer) for layer in (0, 1, 2)]
    for delta, wanted_df in zip(
        edit.deltas.values(), slow_edit(lm, FACTS, [0, 1, 2], config), strict=True
    ):
        assert relative(delta.dense(), wanted_df) < (1e-5 if family in PARTLY_FLOAT32 else 1e-8)


ROWS: dict[str, dict[str, Any]] = {  # what each method is, written out
    "memit": {
        "slack": 1.0,
        "share": "even",
        "site": "block",
        "ridge": 0.0,
        "null_energy": None,
        "stop": "loss",
    },
    "emmet": {
        "slack": 0.1,
        "share": "all",
        "site": "block",
        "ridge": 0.0,
        "null_energy": None,
        "stop": "loss",
    },
    "memit-seq": {
        "slack": 1.0,
        "share": "even",
        "site": "block",
        "ridge": 0.0,
        "null_energy": None,
        "stop": "loss",
    },
    "alphaedit": {
        "preservation": 0.0,
        "share": "even",
        "site": "block",
        "ridge": 0.0,
        "relative_ridge": 0.01,
        "null_energy": 0.9,
        "stop": "loss",
    },
    "pmet": {
        "slack": 1.0,
        "share": "root",
        "site": "attention+mlp",
        "ridge": 0.0,
        "null_energy": None,
        "stop": "adaptive",
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_what_makes_a_method(method):
    settings = rewrite(tiny_lm(), method=method, steps=1).settings
    assert {name: settings[name] for name in ROWS[method]} == ROWS[method]
    assert settings["keys"] == "both" and not settings["norm_anchor"] and not settings["reference"]


@pytest.mark.parametrize("share", ["even", "root", "all"])
def test_shares_and_ridges_and_relative_preservation(share):
    lm = tiny_lm("gpt2", torch.float64)
    given = {"share": share, "ridge": 0.5, "relative_preservation": 2.0, "slack": 0.25}
    config = MassConfig(**given, value=ValueConfig(steps=3, clamp=0.75))
    wanted = slow_edit(lm, FACTS, [1, 2], config)
    assert config.weight(48) == 24
    for delta, wanted_df in zip(
        rewrite(lm, layers=[2, 1], keys="halves", **given).deltas.values(), wanted, strict=True
    ):
        assert relative(delta.dense(), wanted_df) < 1e-8


def test_reference_is_the_default_up_to_rounding():
    lm = tiny_lm("gpt2", torch.float64)
    for mine, published_one in zip(
        rewrite(lm, keys="halves").deltas.values(),
        rewrite(lm, reference=True).deltas.values(),
        strict=True,
    ):
        assert relative(mine.dense(), published_one.dense()) < 1e-9


def test_both_engines_give_the_same_edit():
    lm = tiny_lm("llama", torch.float64)
    for mine, whole in zip(
        rewrite(lm).deltas.values(), rewrite(lm, engine="whole").deltas.values(), strict=True
    ):
        assert relative(mine.dense(), whole.dense()) < 1e-6


# --- what an edit does ----------------------------------------------------------------------------


def state_at_subject(lm: Any, fact: Fact, module: Any, context: str = "{}") -> Tensor:
    return slowly(lm, context.replace("{}", fact.prompt_text), fact.subject, 0, module)[1]


@pytest.mark.parametrize(
    ("family", "method", "site"),
    [(family, "memit", site) for family in (*VARIED, "olmo2") for site in ("block", "mlp")]
    + [("gpt2", method, "block") for method in ("emmet", "memit-seq", "pmet")],
)
def test_without_slack_the_edited_model_has_the_value_at_the_subject(family, method, site):
    lm = tiny_lm(family, torch.float64)
    if family in NORMED and site == "block":
        pytest.skip(
            "a norm stands between what is written and the block's output: see the warning below"
        )
    given = {"steps": 4, "stop": "loss", "clamp": 2.0, "kl_weight": 0.0625}
    values = dict(
        optimise_values(lm, FACTS, ValueSearch(1, ("{}",), ValueConfig(**given), site=site))
    )
    edit = rewrite(lm, method=method, layers=[1], contexts=("{}",), slack=0.0, site=site, **given)
    module = lm.parts.blocks[1] if site == "block" else lm.parts.mlp_out(1)
    before = [state_at_subject(lm, fact, module) for fact in FACTS]
    limit = 1e-5 if family in PARTLY_FLOAT32 else 1e-7
    with edit.applied(lm):
        for i, fact in enumerate(FACTS):
            after = state_at_subject(lm, fact, module)
            assert (after - before[i]).norm() > 0.1 * before[i].norm(), (
                "it hardly moves: the comparison would be empty"
            )
            torch.testing.assert_close(after, values[i].star_d, atol=limit, rtol=limit)


@pytest.mark.parametrize("family", ["gpt2", "gptj", *NORMED])
def test_a_norm_behind_the_mlps_output_is_warned_of(family, caplog):
    """There a value for the block's output cannot be written; one for the MLP's can."""
    rewrite(tiny_lm(family), steps=1)
    assert ("one for the MLP's can: site='mlp'" in caplog.text) == (family in NORMED)
    caplog.clear()
    rewrite(tiny_lm(family), steps=1, site="mlp")
    assert not caplog.text


@pytest.mark.parametrize("keys", ["mean", "halves", "both"])
def test_which_keys_are_sent_to_the_value(keys):
    lm = tiny_lm("gpt2", torch.float64)
    edit = rewrite(lm, layers=[1], slack=0.0, keys=keys)
    (delta,) = edit.deltas.values()
    values = dict(
        optimise_values(
            lm, FACTS, ValueSearch(1, CONTEXTS, ValueConfig(steps=3, clamp=0.75), site="block")
        )
    )
    for i, fact in enumerate(FACTS):
        rows = [
            slowly(lm, c.replace("{}", fact.prompt_text), fact.subject, 1, lm.parts.blocks[1])[0]
            for c in CONTEXTS
        ]
        bare_f, rest_f = rows[0], torch.stack(rows[1:]).mean(0)
        sent = {
            "mean": [torch.stack(rows).mean(0)],
            "halves": [(bare_f + rest_f) / 2],
            "both": [bare_f, rest_f],
        }[keys]
        for key_f in sent:
            torch.testing.assert_close(
                delta.dense() @ key_f, values[i].delta_d, atol=1e-8, rtol=1e-7
            )
        kept_f = sent[0] if keys != "both" else (bare_f + rest_f) / 2
        torch.testing.assert_close(edit.keys[weight(lm, 1)][i], kept_f, atol=1e-10, rtol=1e-10)


def test_slack_leaves_the_share_that_leverage_says():
    lm = tiny_lm("gpt2", torch.float64)
    edit = rewrite(lm, FACT, layers=[1], preservation=200.0, keys="halves")
    key_f = edit.keys[weight(lm, 1)][0]
    leverage = float(key_f @ torch.linalg.solve(moments(lm)[1].matrix_ff, key_f))
    (value,) = dict(
        optimise_values(
            lm, [FACT], ValueSearch(1, CONTEXTS, ValueConfig(steps=3, clamp=2.0), site="block")
        )
    ).values()
    (delta,) = edit.deltas.values()
    torch.testing.assert_close(
        delta.dense() @ key_f, value.delta_d * leverage / (leverage + 200), atol=1e-9, rtol=1e-8
    )


def test_alphaedit_stays_in_the_null_space_and_says_its_rank():
    lm = tiny_lm("gpt2", torch.float64)
    edit = rewrite(lm, method="alphaedit", null_energy=0.7)
    for layer in (0, 1, 2):
        basis_fr = moments(lm)[layer].null_space(energy=0.7)
        assert edit.diagnostics["layers"][str(layer)]["rank"] == basis_fr.shape[1] > 0
        delta_df = edit.deltas[weight(lm, layer)].dense()
        assert relative(delta_df @ basis_fr @ basis_fr.T, delta_df) < 1e-10
    assert "rank" not in rewrite(lm, steps=1).diagnostics["layers"]["0"]


def test_a_null_space_of_rank_0_is_refused():
    with pytest.raises(
        EngramError,
        match=r"the null space of C has rank 0 at .*null_threshold=1e-09.*raise the threshold",
    ):
        rewrite(tiny_lm(), method="alphaedit", null_threshold=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_each_fact_has_a_column_of_its_own(method):
    lm = tiny_lm("gpt2")
    edit = rewrite(lm, method=method)
    without = edit.without(1)
    assert without.facts == (FACTS[0], FACTS[2])
    for name, delta in edit.deltas.items():
        assert delta.owners == ((0,), (1,), (2,))
        assert torch.equal(without.deltas[name].left, delta.left[:, [0, 2]])
        assert torch.equal(without.deltas[name].right, delta.right[[0, 2]])
        assert torch.equal(without.keys[name], edit.keys[name][[0, 2]])


def test_what_is_left_without_a_fact_is_the_solution_in_which_its_key_stays():
    """Fact 1's residual is 0 there: the change of the others, with fact 1's key as one more that
    shall not move.
    """
    lm = tiny_lm("gpt2", torch.float64)
    edit = rewrite(lm, layers=[1], preservation=50.0, keys="halves")
    keys_fn = edit.keys[weight(lm, 1)].T
    (delta,) = edit.deltas.values()
    held_ff = 50 * moments(lm)[1].matrix_ff + keys_fn[:, 1:2] @ keys_fn[:, 1:2].T
    two_fn = keys_fn[:, [0, 2]]
    wanted_df = delta.left[:, [0, 2]] @ torch.linalg.solve(held_ff + two_fn @ two_fn.T, two_fn).T
    assert relative(edit.without(1).deltas[weight(lm, 1)].dense(), wanted_df) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_not_changed(method):
    lm = tiny_lm("llama")
    lm.parts.mlp_out(0).weight.requires_grad_(False)
    flags, before = [p.requires_grad for p in lm.model.parameters()], weights(lm)
    edit = rewrite(lm, method=method)
    assert edit.base == describe_base(lm, edit.deltas)
    rewrite(lm, OTHERS, method=method, past=[edit])
    assert same_bits(weights(lm), before)
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bytes(method, tmp_path):
    lm = tiny_lm("gpt2")
    first = rewrite(lm, method=method, store=tmp_path / "values")
    assert first == rewrite(lm, method=method, store=tmp_path / "values"), (
        "values from the store are others"
    )
    assert first == rewrite(lm, method=method)


def test_an_edit_says_how_it_went(tmp_path):
    lm = tiny_lm("gpt2")
    edit = rewrite(lm)
    layers = edit.diagnostics["layers"]
    assert list(layers) == ["0", "1", "2"] and all(layers[each]["norm"] > 0 for each in layers)
    assert layers["0"]["missing"] > layers["2"]["missing"], "lower layers bring the states nearer"
    assert [each["steps"] for each in edit.diagnostics["facts"]] == [3, 3, 3]
    assert edit.settings["second_moments"]["1"] == moments(lm)[1].source and edit.settings[
        "layers"
    ] == [0, 1, 2]
    edit.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit") == edit


def test_progress_is_reported():
    seen: list[tuple[str, int, int]] = []
    rewrite(tiny_lm(), facts_per_batch=2, progress=lambda *at: seen.append(at))
    assert seen == [("value", i, 3) for i in range(4)] + [("layer", i, 3) for i in range(4)]


def test_half_precision_is_edited_in_float32():
    lm = tiny_lm("llama", torch.bfloat16)
    edit = rewrite(lm)
    assert all(delta.left.dtype == torch.float32 for delta in edit.deltas.values())
    wide = rewrite(tiny_lm("llama", torch.float32))
    for mine, wanted in zip(edit.deltas.values(), wide.deltas.values(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(
            mine.dense().flatten(), wanted.dense().flatten(), dim=0
        )
        assert cosine > 0.9


def test_facts_of_one_subject_are_said_to_be_averaged(caplog):
    lm = tiny_lm("gpt2", torch.float64)
    facts = [FACT, replace(FACT, target="London"), FACTS[1]]
    with caplog.at_level(logging.WARNING, "engram.editors.closed_form.mass"):
        edit = rewrite(lm, facts, layers=[1], slack=0.0)
    assert "1 subjects have several facts (tower of Rome, ...): they share a key" in caplog.text
    assert edit.diagnostics["shared_subjects"] == ["tower of Rome"]
    (delta,) = edit.deltas.values()
    torch.testing.assert_close(
        delta.dense() @ edit.keys[weight(lm, 1)][0], delta.left[:, :2].mean(1), atol=1e-8, rtol=1e-7
    )
    caplog.clear()
    rewrite(lm, steps=1)
    assert not caplog.text


# --- edits on edits -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["memit-seq", "alphaedit"])
def test_methods_that_remember_solve_with_the_keys_of_earlier_edits(method):
    """The slow loop on the edited model, with the earlier facts' keys among those that shall not
    move.
    """
    lm = tiny_lm("gpt2", torch.float64)
    first = rewrite(lm, method=method, keys="halves")
    second = rewrite(lm, OTHERS, method=method, past=[first], keys="halves")
    config = read(MassConfig, knobs(second), method)
    past = {layer: first.keys[weight(lm, layer)].T for layer in (0, 1, 2)}
    with first.applied(lm):
        wanted = slow_edit(lm, OTHERS, [0, 1, 2], config, past)
    for delta, wanted_df in zip(second.deltas.values(), wanted, strict=True):
        assert relative(delta.dense(), wanted_df) < 1e-7


@pytest.mark.parametrize("method", ["memit-seq", "alphaedit"])
def test_methods_that_remember_move_earlier_keys_less(method):
    lm = tiny_lm("gpt2", torch.float64)
    first = rewrite(lm, method=method)

    def moved(edit: Edit) -> float:
        return sum(
            float((delta.dense() @ first.keys[name].T).norm())
            for name, delta in edit.deltas.items()
        )

    settings = {"preservation": 1.0} if method == "memit-seq" else {"ridge": 0.01}
    remembering = rewrite(lm, OTHERS, method=method, past=[first], **settings)
    with first.applied(lm):
        forgetting = rewrite(lm, OTHERS, method=method, **settings)
    assert moved(remembering) < 0.7 * moved(forgetting)
    if method == "memit-seq":
        memit = rewrite(lm, OTHERS, past=[first], **settings)
        assert moved(memit) == pytest.approx(moved(forgetting), rel=1e-6), (
            "MEMIT does not look at earlier keys"
        )


def test_keys_of_several_edits_are_remembered_composed_or_not():
    lm = tiny_lm("gpt2", torch.float64)
    first, second = (
        rewrite(lm, FACTS[:2], "memit-seq"),
        rewrite(lm, FACTS[2:], "memit-seq", layers=[1]),
    )
    apart = rewrite(lm, OTHERS, "memit-seq", past=[first, second])
    together = rewrite(lm, OTHERS, "memit-seq", past=[engram.compose([first, second])])
    for one, other in zip(apart.deltas.values(), together.deltas.values(), strict=True):
        assert relative(one.dense(), other.dense()) < 1e-9


LATER: dict[str, dict[str, Any]] = {
    "rome": {"layer": 1},
    "memit": {"layers": [1, 2], "store": False},
    "memit-seq": {"layers": [1, 2], "store": False},
    "ft": {"layer": 1, "epochs": 3},
}


@pytest.mark.parametrize("method", LATER)
def test_an_edit_made_on_top_of_another_composes_with_it(method):
    """It is described by the unedited weights; together they are what the second one is on the
    edited model.
    """
    lm = tiny_lm("gpt2", torch.float64)
    first = rewrite(lm, FACTS[:2], layers=[0, 1])
    closed_form = {"contexts": CONTEXTS, "second_moments": moments(lm), "steps": 3}
    given = {**LATER[method], **({} if method == "ft" else closed_form)}
    second = engram.rewrite(lm, OTHERS, method=method, past=[first], **given)
    assert second.base == describe_base(lm, second.deltas)
    ids = torch.tensor([lm.encode(OTHERS[0].prompt_text).ids])
    with torch.no_grad():
        with engram.compose([first, second]).applied(lm):
            composed = lm.model(ids).logits
        with first.applied(lm):
            if method != "memit-seq":
                made_there = engram.rewrite(lm, OTHERS, method=method, **given)
                with made_there.applied(lm):
                    torch.testing.assert_close(lm.model(ids).logits, composed, atol=1e-7, rtol=1e-7)
            with second.applied(lm):
                torch.testing.assert_close(lm.model(ids).logits, composed, atol=1e-9, rtol=1e-9)
        with first.applied(lm):
            assert (lm.model(ids).logits - composed).abs().max() > 1e-4, (
                "the second edit does nothing"
            )


def test_past_edits_without_keys_are_refused_where_keys_are_needed():
    lm = tiny_lm("gpt2")
    tuned = engram.rewrite(lm, FACT, method="ft", layer=1, epochs=2)
    message = (
        r"past\[1\], Edit.*'ft'.*does not hold the keys of its facts at "
        r"'transformer\.h\.1\.mlp\.c_proj\.weight'"
    )
    for method in ("memit-seq", "alphaedit"):
        with pytest.raises(SettingError, match=message):
            rewrite(lm, OTHERS, method, past=[rewrite(lm, FACTS[1:], layers=[2]), tuned])
    assert rewrite(lm, OTHERS, "memit-seq", layers=[0, 2], past=[tuned]).settings["past"] == 1, (
        "it changes no other layer"
    )
    assert rewrite(lm, OTHERS, "memit", past=[tuned])


def test_the_anchor_gives_every_value_the_norm_of_the_first_edits():
    lm = tiny_lm("gpt2", torch.float64)
    first = rewrite(lm, layers=[1], norm_anchor=True)
    assert first == replace(rewrite(lm, layers=[1]), settings=first.settings), (
        "the first edit is the anchor"
    )
    given = {"layers": [1], "contexts": ("{}",), "slack": 0.0, "steps": 5, "past": [first]}
    free, anchored = rewrite(lm, OTHERS, **given), rewrite(lm, OTHERS, norm_anchor=True, **given)
    norm = first.diagnostics["target_norm"]
    assert anchored.diagnostics["target_norm"] == pytest.approx(norm, rel=1e-9)
    assert free.diagnostics["target_norm"] != pytest.approx(norm, rel=1e-3)
    with engram.compose([first, anchored]).applied(lm):
        for fact in OTHERS:
            assert float(state_at_subject(lm, fact, lm.parts.blocks[1]).norm()) == pytest.approx(
                norm, rel=1e-6
            )


def test_an_anchor_that_is_not_there_is_a_mistake():
    lm = tiny_lm("gpt2")
    with pytest.raises(
        SettingError,
        match=r"norm_anchor=True: past\[0\], Edit.* does not hold the norm of its values",
    ):
        rewrite(lm, OTHERS, past=[rewrite(lm).without(0)], norm_anchor=True)


# --- settings -------------------------------------------------------------------------------------


def test_a_model_without_a_preset_is_edited_between_two_shares_of_its_depth():
    assert rewrite(tiny_lm(), layers=None, depth=[0.25, 0.6]).settings["layers"] == [1, 2]
    assert rewrite(tiny_lm(), layers=None).settings["layers"] == [0]
    assert rewrite(tiny_lm(), layers=None, depth=[0.5, 0.8]).settings["layers"] == [2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_every_published_model_makes_a_config(method):
    lm = tiny_lm()
    for model in published(method):
        settings = {
            name: value
            for name, value in settings_of(method, model, {}).items()
            if name != "corpus"
        }
        layers = preset_layers(settings, lm.n_layers, "layers")
        assert layers == sorted(set(layers)) and isinstance(
            read(MassConfig, settings, method), MassConfig
        )


PUBLISHED = [  # method, model, layers, then what was released
    (
        "memit",
        "openai-community/gpt2-xl",
        [13, 14, 15, 16, 17],
        {"steps": 20, "clamp": 0.75, "preservation": 20000},
    ),
    (
        "memit",
        "EleutherAI/gpt-j-6B",
        [3, 4, 5, 6, 7, 8],
        {"steps": 25, "clamp": 0.75, "preservation": 15000},
    ),
    (
        "memit",
        "EleutherAI/gpt-neox-20b",
        [6, 7, 8, 9, 10],
        {"steps": 20, "clamp": 0.3, "preservation": 20000},
    ),
    (
        "memit",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        [4, 5, 6, 7, 8],
        {"learning_rate": 0.1, "preservation": 15000},
    ),
    (
        "memit",
        "meta-llama/Llama-2-7b-hf",
        [4, 5, 6, 7, 8],
        {"weight_decay": 1e-3, "clamp": 4.0, "preservation": 15000},
    ),
    ("emmet", "gpt2-xl", [17], {"preservation": 10000, "slack": 0.1, "steps": 20, "share": "all"}),
    ("emmet", "gpt-j-6b", [5], {"preservation": 100000, "slack": 0.1, "steps": 25}),
    (
        "alphaedit",
        "gpt2-xl",
        [13, 14, 15, 16, 17],
        {"null_threshold": 2e-2, "null_energy": None, "ridge": 10.0, "steps": 20},
    ),
    (
        "alphaedit",
        "/data/gpt-j-6b/",
        [3, 4, 5, 6, 7, 8],
        {"null_threshold": 2e-2, "ridge": 10.0, "preservation": 0.0},
    ),
    (
        "alphaedit",
        "Qwen2.5-7B-Instruct",
        [4, 5, 6, 7, 8],
        {"ridge": 1.0, "weight_decay": 1e-3, "clamp": 4.0},
    ),
    (
        "pmet",
        "gpt-j-6b",
        [3, 4, 5, 6, 7, 8],
        {"steps": 30, "learning_rate": 0.2, "kl_weight": 1.0, "preservation": 15000},
    ),
    (
        "pmet",
        "llama-2-7b-hf",
        [4, 5, 6, 7, 8],
        {"steps": 20, "clamp": 1.0, "share": "root", "stop": "adaptive"},
    ),
]


@pytest.mark.parametrize(("method", "model", "layers", "released"), PUBLISHED)
def test_presets_are_the_publishedsettings_of(method, model, layers, released):
    settings = settings_of(method, model, {})
    assert preset_layers(settings, tiny_lm().n_layers, "layers") == layers
    config = read(MassConfig, settings, method)
    flat = {**vars(config.value), **vars(config)}
    assert {name: flat[name] for name in released} == released


@pytest.mark.parametrize(
    ("method", "model", "given", "wanted"),
    [
        (
            "alphaedit",
            "gpt2-xl",
            {"null_energy": 0.9},
            {"null_energy": 0.9, "null_threshold": None},
        ),
        (
            "alphaedit",
            "tiny",
            {"null_threshold": 0.1},
            {"null_energy": None, "null_threshold": 0.1},
        ),
        (
            "memit",
            "gpt2-xl",
            {"relative_preservation": 0.5},
            {"preservation": None, "relative_preservation": 0.5},
        ),
        ("memit", "tiny", {"preservation": 7.0}, {"preservation": 7.0}),
        (
            "alphaedit",
            "tiny",
            {"relative_preservation": 0.5},
            {"preservation": None, "relative_preservation": 0.5},
        ),
    ],
)
def test_what_a_caller_says_outranks_the_presets_other_way_of_saying_it(
    method, model, given, wanted
):
    settings = settings_of(method, model, given)
    preset_layers(settings, tiny_lm().n_layers, "layers")
    settings.pop("contexts", None)
    config = read(MassConfig, settings, method)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"step": 3}, SettingError, r"memit has no setting 'step' \(did you mean 'steps'\?\)"),
        ({"layer": 3}, SettingError, r"no setting 'layer' \(did you mean 'layers'\?\)"),
        ({"shares": 3}, SettingError, r"no setting 'shares' \(did you mean 'share'\?\)"),
        ({"share": "half"}, SettingError, "share='half': expected 'even', 'root' or 'all'"),
        ({"keys": "bare"}, SettingError, "keys='bare': expected 'halves', 'mean' or 'both'"),
        (
            {"site": "attention"},
            SettingError,
            r"site='attention': expected 'mlp', 'block' or 'attention\+mlp'",
        ),
        ({"preservation": -1.0}, SettingError, "preservation=-1.0: expected at least 0"),
        ({"slack": -1.0}, SettingError, "slack=-1.0: expected at least 0"),
        ({"reference": True, "ridge": 1.0}, SettingError, "reference=True is MEMIT as released"),
        (
            {"slack": 0.0, "ridge": 1.0},
            SettingError,
            r"ridge=1\.0 without slack or preservation: every key is met exactly",
        ),
        (
            {"method": "alphaedit", "ridge": 0.0},
            SettingError,
            "ridge=0: nothing would hold a change in the null space",
        ),
        (
            {"null_energy": 0.9, "null_threshold": 0.1},
            SettingError,
            r"null_energy=0\.9, null_threshold=0\.1: give one of them",
        ),
        ({"null_energy": 1.5, "ridge": 1.0}, SettingError, "null_energy=1.5: expected below 1"),
        ({"steps": 0}, SettingError, "steps=0"),
        ({"facts_per_batch": 0}, SettingError, "facts_per_batch=0"),
        ({"layers": []}, SettingError, r"layers=\[\]: expected at least 1 of them"),
        ({"layers": 3}, SettingError, "layers=3: expected a list"),
        ({"layers": "all"}, SettingError, "layers='all': expected a list"),
        (
            {"layers": [9]},
            UnsupportedModelError,
            "layer=9 does not exist; this model has layers 0 to 3",
        ),
        (
            {"second_moments": {1: torch.eye(48)}},
            EngramError,
            r"has layers \[1\], .* give that of layer 0, 2 too",
        ),
        ({"contexts": ("A {}",)}, FactError, "expected '{}' first"),
        (
            {"method": "memits"},
            EngramError,
            r"method='memits': expected .* \(did you mean 'memit'\?\)",
        ),
    ],
)
def test_mistakes_are_explained(settings, error, message):
    with pytest.raises(error, match=message):
        rewrite(tiny_lm(), **settings)


def test_exact_keys_leave_no_room_for_past_ones():
    lm = tiny_lm("gpt2")
    with pytest.raises(
        SettingError, match="slack=0 meets every key exactly and leaves no room for past keys"
    ):
        rewrite(lm, OTHERS, "memit-seq", slack=0.0, past=[rewrite(lm)])


def test_mistakes_are_found_before_anything_is_measured(monkeypatch):
    lm = tiny_lm("gpt2")
    tuned = engram.rewrite(lm, FACT, method="ft", layer=1, epochs=2)
    monkeypatch.setattr(
        MomentSource, "moments", lambda *_: pytest.fail("second moments were measured")
    )
    mistakes: list[dict[str, Any]] = [
        {"facts": [Fact("tower", "A " * 200 + "{} is", "old")]},
        {"layers": []},
        {"method": "memit-seq", "past": [tuned]},
        {"norm_anchor": True, "past": [tuned]},
    ]
    for mistake in mistakes:
        with pytest.raises(EngramError):
            rewrite(lm, **mistake)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [EXPERTS[0], *STATE_SPACE[:1]])
def test_models_without_one_mlp_output_matrix_say_why_not(family, method):
    with pytest.raises(
        UnsupportedModelError, match=r"mixture of experts|no MLP|state-space|state space"
    ):
        engram.rewrite(tiny_lm(family), FACT, method=method, contexts=CONTEXTS, store=False)


def test_a_model_without_numbers_is_refused():
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        lm.model.transformer.ln_f.weight.fill_(float("inf"))
    before = weights(lm)
    with pytest.raises(NonFiniteError, match="nothing was changed"):
        rewrite(lm)
    assert same_bits(weights(lm), before)


def test_the_released_order_of_operations_is_to_be_had_whatever_a_preset_says(monkeypatch):
    monkeypatch.setattr(
        mass_settings,
        "preset",
        lambda method, model: {"depth": [0.3, 0.3], "keys": "both", "clamp": 1.0},
    )
    assert settings_of("memit", "tiny", {})["keys"] == "both"
    assert "keys" not in settings_of("memit", "tiny", {"reference": True})  # MassConfig's own
    assert MassConfig(reference=True).keys == "halves"


def test_a_published_table_replaces_the_default_s_other_form_of_a_setting():
    settings = preset("alphaedit", "meta-llama-3-8b-instruct")
    assert settings["null_threshold"] == 2e-2 and "null_energy" not in settings
    assert "relative_preservation" not in preset("memit", "gpt2-xl")


def test_a_text_in_front_of_prompts_is_no_past():
    words = engram.rewrite(tiny_lm("gpt2"), FACTS[:1], "in-context")
    with pytest.raises(EngramError, match="is a text in front of prompts"):
        engram.rewrite(tiny_lm("gpt2"), FACTS[:1], "memit", past=[words])
