"""Values of many facts in one optimisation are those of each fact alone, and do what the formula
and the settings say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import engram
from engram import Fact
from engram.editors.closed_form.shifted_rows import TokenRows
from engram.editors.closed_form.values import (
    Value,
    ValueConfig,
    ValueSearch,
    optimise_value,
    optimise_values,
)
from engram.engine.replayable import replayable
from engram.errors import FactError, NonFiniteError, SettingError
from tests.helpers.chat_samples import chat_lm
from tests.helpers.naive import changed
from tests.helpers.rewrite_samples import CONTEXTS
from tests.helpers.tiny import DENSE, PARTLY_FLOAT32, tiny_lm
from tests.helpers.value_samples import FACTS, SITES, VARIED, end_of

# at the last block a change at the subject, where the object is read, can make it say any token
NEAR = [
    Fact("tower of Rome", "The {}", "the"),
    Fact("piano", "He plays the {}", "t"),
    Fact("river", "{}", "s"),
    Fact("Zdeno Chára", "It is said that {}", "c"),
]
FREE: dict[str, Any] = {
    "layer": 3,
    "steps": 20,
    "learning_rate": 0.2,
    "clamp": 50.0,
    "weight_decay": 0.01,
}


def values(
    lm: Any,
    facts: Any = FACTS,
    site: Any = "block",
    contexts: Any = CONTEXTS,
    layer: int = 1,
    **options: Any,
) -> list[Value]:
    how = {name: options.pop(name) for name in ("facts_per_batch",) if name in options}
    engine = options.pop("engine", "auto")
    found = dict(
        optimise_values(
            lm, facts, ValueSearch(layer, contexts, ValueConfig(**options), site, engine), **how
        )
    )
    return [found[i] for i in range(len(facts))]


def losses(value: Value) -> Tensor:
    return torch.tensor(value.losses, dtype=torch.float64)


def same(some: list[Value], other: list[Value], limit: float) -> None:
    """As many steps, the same terms at each, the same value, keys and outputs.

    After the first update the limit is a hundred times wider: Adam divides by |gradient| + 1e-8, so
        that where a gradient is
    near 0 rounding is large.
    """
    for mine, wanted in zip(some, other, strict=True):
        assert len(mine.losses) == len(wanted.losses), "another number of steps"
        torch.testing.assert_close(losses(mine)[:2], losses(wanted)[:2], atol=limit, rtol=limit)
        for name in ("start_d", "keys_cf", "outputs_cd"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(wanted, name), atol=limit, rtol=limit
            )
        later = 100 * limit
        torch.testing.assert_close(losses(mine), losses(wanted), atol=later, rtol=later)
        torch.testing.assert_close(mine.star_d, wanted.star_d, atol=later, rtol=later)
        torch.testing.assert_close(
            torch.tensor(mine.delta_norms), torch.tensor(wanted.delta_norms), atol=later, rtol=later
        )


# --- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "site"),
    [(family, "block") for family in VARIED]
    + [(family, site) for family in VARIED[:2] for site in ("mlp", "attention+mlp")],
)
def test_a_batch_gives_what_one_by_one_gives(family, site):
    lm = tiny_lm(family, torch.float64)
    limit = 1e-6 if family in PARTLY_FLOAT32 else 1e-8
    alone = [values(lm, [fact], site, steps=5)[0] for fact in FACTS]
    assert all(losses(value)[:, 1].std() > 1e-3 for value in alone), (
        "the value changes nothing: the comparison would be empty"
    )
    same(values(lm, site=site, steps=5), alone, limit)


def test_in_float32_too():
    lm = tiny_lm("gpt2")
    same(values(lm, steps=8), [values(lm, [fact], steps=8)[0] for fact in FACTS], 1e-5)


@pytest.mark.parametrize("engine", ["replay", "whole"])
def test_facts_that_stop_early_leave_and_the_others_go_on(engine):
    """Each stops where it stops alone; what leaves is frozen with its moments, and what stays does
    not notice.
    """
    lm = tiny_lm("gpt2", torch.float64)
    config = {**FREE, "steps": 16, "stop_loss": 2.0, "engine": engine}
    alone = [values(lm, [fact], **config)[0] for fact in NEAR]
    steps = [len(value.losses) for value in alone]
    assert len(set(steps)) >= 3 and min(steps) < 12 and max(steps) == 16, (
        f"stops at {steps}: the comparison would be empty"
    )
    same(values(lm, NEAR, **config), alone, 1e-8)
    for value in alone:
        assert all(total >= 2.0 for total, *_ in value.losses[:-1])
        assert (value.losses[-1][0] < 2.0) == (len(value.losses) < 16)


def test_each_fact_is_clamped_by_its_own_state():
    """The first update is longer than that, so that from the second pass on every change is as long
    as it may be.
    """
    lm = tiny_lm("gpt2", torch.float64)
    clamped = values(lm, steps=6, clamp=0.2)
    limits = [0.2 * float(value.start_d.norm()) for value in clamped]
    assert max(limits) > 1.05 * min(limits), "all states are of one length: the test would be empty"
    for value, limit in zip(clamped, limits, strict=True):
        assert value.delta_norms[1] == pytest.approx(limit, rel=1e-9) and max(
            value.delta_norms
        ) <= limit * (1 + 1e-9)
    same(clamped, [values(lm, [fact], steps=6, clamp=0.2)[0] for fact in FACTS], 1e-8)


def test_two_states_are_clamped_each_by_its_own_length():
    """PMET: a tiny clamp leaves each state its own share; the value that is reported is the
    MLP's.
    """
    lm = tiny_lm("gpt2", torch.float64)
    value = values(lm, FACTS[:1], "attention+mlp", steps=3, clamp=1e-3)[0]
    assert max(value.delta_norms) == pytest.approx(1e-3 * float(value.start_d.norm()))


@pytest.mark.parametrize("facts_per_batch", [1, 2, 3, 99])
def test_batches_of_any_size_give_the_same_and_cover_all(facts_per_batch):
    lm = tiny_lm("llama", torch.float64)
    found = list(
        optimise_values(
            lm,
            FACTS,
            ValueSearch(1, CONTEXTS, ValueConfig(steps=4), site="block"),
            facts_per_batch=facts_per_batch,
        )
    )
    assert sorted(i for i, _ in found) == list(range(len(FACTS)))
    same([value for _, value in sorted(found, key=lambda each: each[0])], values(lm, steps=4), 1e-8)


def test_values_come_a_batch_after_the_other():
    """So that whoever keeps them has them before the next batch is begun."""
    lm, begun = tiny_lm("gpt2"), []
    assert replayable(lm)  # which is tried once
    lm.model.get_input_embeddings().register_forward_hook(lambda *_: begun.append(1))
    made = optimise_values(
        lm, FACTS, ValueSearch(1, CONTEXTS, ValueConfig(steps=2), site="block"), facts_per_batch=1
    )
    assert not begun
    next(made)
    after_one = len(begun)
    next(made)
    assert len(begun) == 2 * after_one > 0


def test_no_facts_give_no_values():
    assert list(optimise_values(tiny_lm(), [], ValueSearch(1, CONTEXTS, ValueConfig()))) == []


def test_rows_that_are_too_long_below_each_other_run_whole():
    """A subject at the end of a long text and one at the start of another: aligned they pass the
    model's last position.
    """
    lm = tiny_lm("gpt2", torch.float64)
    filler = "The river runs through London. " * 4
    facts = [
        Fact("tower", filler + "A {}", "Paris"),
        Fact("piano", "The {} is old. " + filler, "Rome"),
    ]
    assert max(len(lm.encode(fact.prompt_text).ids) for fact in facts) > 64, (
        "they fit: the test would be empty"
    )
    same(
        values(lm, facts, contexts=("{}",), steps=3),
        [values(lm, [f], contexts=("{}",), steps=3)[0] for f in facts],
        1e-8,
    )


# --- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "site"),
    [(family, "block") for family in DENSE]
    + [(family, site) for family in VARIED for site in ("mlp", "attention+mlp")],
)
def test_replay_is_the_whole_model(family, site):
    lm = tiny_lm(family, torch.float64)
    limit = 1e-5 if family in PARTLY_FLOAT32 else 1e-8
    facts = [
        Fact("tower of Rome", "The {} is in", "Paris and London"),
        FACTS[2],
    ]  # near enough for the shortest window
    both = [
        values(lm, facts, site, CONTEXTS[:3], steps=3, engine=engine)
        for engine in ("replay", "whole")
    ]
    same(*both, limit)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("site", SITES)
def test_at_any_layer(layer, site):
    """At the last one nothing but the head is above the block, and only what is read at the subject
    can notice.
    """
    lm = tiny_lm("gpt2", torch.float64)
    facts = FACTS if layer < 3 else [Fact(fact.subject, "The {}", fact.target) for fact in FACTS]
    same(
        *(
            values(lm, facts, site, layer=layer, steps=3, engine=engine)
            for engine in ("replay", "whole")
        ),
        1e-8,
    )


@pytest.mark.parametrize("position", ["lookup", "last"])
def test_the_penalty_is_read_in_the_same_place_by_both_engines(position):
    lm = tiny_lm("llama", torch.float64)
    both = [
        values(lm, kl_position=position, steps=3, kl_weight=5.0, engine=engine)
        for engine in ("replay", "whole")
    ]
    same(*both, 1e-8)
    assert min(float(losses(value)[1:, 2].min()) for value in both[0]) > 1e-4, (
        "no penalty: the comparison would be empty"
    )


# --- the formula ----------------------------------------------------------------------------------


def shifted(lm: Any, module: Any, ids: list[int], at: int, delta_d: Tensor) -> Tensor:
    """Log-probabilities [t, v] of the whole model with delta added to a module's output at one
    position.
    """

    def add(out: Tensor) -> Tensor:
        out = out.clone()
        out.view(1, len(ids), -1)[0, at] += delta_d
        return out

    with torch.no_grad(), changed({module: add}):
        return lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("position", ["lookup", "last"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-350m-like"])
def test_the_losses_of_a_blocks_state_are_those_of_the_formula(family, position):
    """Every fact of a batch, recomputed from whole forward passes with its final delta added by a
    hook of the test's own.
    """
    lm = tiny_lm(family, torch.float64)
    block = lm.parts.blocks[1]
    for fact, value in zip(FACTS, values(lm, steps=5, kl_position=position), strict=True):
        target = lm.target_ids(fact.prompt_text, fact.target)
        nll = []
        for context in CONTEXTS:
            text = context.replace("{}", fact.prompt_text)
            ids = lm.encode(text).ids
            log_p = shifted(
                lm, block, ids + target[:-1], end_of(text, fact.subject, lm), value.delta_d
            )
            nll.append(
                -sum(float(log_p[len(ids) - 1 + t, token]) for t, token in enumerate(target))
                / len(target)
            )
        text = f"{fact.subject} is a"
        ids, at = lm.encode(text).ids, end_of(text, fact.subject, lm)
        edited, original = (
            shifted(lm, block, ids, at, delta_d) for delta_d in (value.delta_d, 0 * value.delta_d)
        )
        read = at if position == "lookup" else len(ids) - 1
        kl = 0.0625 * float((edited[read].exp() * (edited[read] - original[read])).sum())
        decay = 0.5 * float(value.delta_d.norm()) / float(value.start_d.norm()) ** 2
        total, *parts = value.losses[-1]
        assert parts == pytest.approx([sum(nll) / len(nll), kl, decay], rel=1e-8, abs=1e-9)
        assert total == pytest.approx(sum(parts))


@pytest.mark.parametrize("site", SITES)
def test_the_start_is_the_state_of_the_bare_prompt(site):
    lm = tiny_lm("gpt2", torch.float64)
    module = lm.parts.blocks[1] if site == "block" else lm.parts.mlp_out(1)
    for fact, value in zip(FACTS, values(lm, site=site, steps=1), strict=True):
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), changed({module: lambda out, seen=seen: seen.setdefault("out", out)}):
            lm.model(torch.tensor([lm.encode(fact.prompt_text).ids]))
        torch.testing.assert_close(
            value.start_d,
            seen["out"].view(-1, lm.d_model)[end_of(fact.prompt_text, fact.subject, lm)],
        )
        assert float(value.delta_d.norm()) == 0, "one pass is followed by no update"
        assert value.losses[0][2] == pytest.approx(0, abs=1e-12) and value.losses[0][3] == 0


def test_the_first_step_is_adams_on_a_gradient_taken_by_differences():
    lm = tiny_lm("gpt2", torch.float64)
    fact, block = FACTS[0], lm.parts.blocks[1]
    target, text = lm.target_ids(fact.prompt_text, fact.target), fact.prompt_text
    ids, at = lm.encode(text).ids, end_of(text, fact.subject, lm)

    def nll(delta_d: Tensor) -> float:
        log_p = shifted(lm, block, ids + target[:-1], at, delta_d)[len(ids) - 1 :]
        return -float(log_p[range(len(target)), target].mean())

    value = values(
        lm, [fact], contexts=("{}",), steps=2, kl_weight=0.0, weight_decay=0.0, clamp=1e9
    )[0]
    for i in (0, 7, 31):
        step_d = 1e-5 * torch.eye(lm.d_model, dtype=torch.float64)[i]
        slope = (nll(step_d) - nll(-step_d)) / 2e-5
        assert float(value.delta_d[i]) == pytest.approx(
            -0.5 * slope / (abs(slope) + 1e-8), rel=1e-4
        )


# --- when a fact is done --------------------------------------------------------------------------


def says(lm: Any, fact: Fact, delta_d: Tensor) -> bool:
    """Whether the target is the most probable text in every context, by whole forward passes."""
    target = lm.target_ids(fact.prompt_text, fact.target)
    for context in CONTEXTS:
        text = context.replace("{}", fact.prompt_text)
        ids = lm.encode(text).ids
        log_p = shifted(
            lm, lm.parts.blocks[3], ids + target[:-1], end_of(text, fact.subject, lm), delta_d
        )
        if log_p[len(ids) - 1 :].argmax(-1).tolist() != target:
            return False
    return True


def test_arg_max_ends_as_soon_as_the_object_is_said_everywhere():
    """The same path as without, cut at the first step at which the object is the most probable text
    in every context.
    """
    lm = tiny_lm("gpt2", torch.float64)
    given = {**FREE, "stop_loss": 0.0}
    cut, whole = values(lm, NEAR, stop="argmax", **given), values(lm, NEAR, **given)
    assert all(1 < len(value.losses) < 20 for value in cut), (
        "none stops early: the test would be empty"
    )
    assert len({len(value.losses) for value in cut}) > 1
    for fact, short, long in zip(NEAR, cut, whole, strict=True):
        torch.testing.assert_close(
            losses(short), losses(long)[: len(short.losses)], atol=1e-6, rtol=1e-6
        )
        assert says(lm, fact, short.delta_d)
        (before,) = values(lm, [fact], **{**given, "steps": len(short.losses) - 1})
        assert not says(lm, fact, before.delta_d)
    same(cut, [values(lm, [fact], stop="argmax", **given)[0] for fact in NEAR], 1e-8)


def test_adaptive_weighs_what_is_said_a_tenth_and_waits_for_the_penalty():
    lm = tiny_lm("gpt2", torch.float64)
    given, waiting = {**FREE, "kl_weight": 0.05, "stop_loss": 0.0}, []
    for fact, mine, usual in zip(
        NEAR, values(lm, NEAR, stop="adaptive", **given), values(lm, NEAR, **given), strict=True
    ):
        ratios = losses(mine)[:, 1] / losses(usual)[: len(mine.losses), 1]
        first = next(
            i for i, ratio in enumerate(ratios) if ratio < 0.5
        )  # up to here both go the same way
        torch.testing.assert_close(
            losses(mine)[:first], losses(usual)[:first], atol=1e-6, rtol=1e-6
        )
        assert float(ratios[first]) == pytest.approx(0.1)
        assert says(lm, fact, values(lm, [fact], **{**given, "steps": first + 1})[0].delta_d)
        assert not says(lm, fact, values(lm, [fact], **{**given, "steps": first})[0].delta_d)
        for total, nll, kl, decay in mine.losses:
            assert total == pytest.approx(nll + kl + decay)
        done = [kl <= 0.01 for _, _, kl, _ in mine.losses[first:]]
        assert not any(done[:-1]) and (done[-1] or len(mine.losses) == 20)
        waiting.append(not done[0])
    assert any(waiting) and not all(waiting), "the test would be empty"


def test_adaptive_ends_where_the_object_is_said_and_the_penalty_is_small():
    lm = tiny_lm("gpt2", torch.float64)
    given = {**FREE, "kl_weight": 0.0, "stop_loss": 0.0}
    both = values(lm, NEAR, stop="adaptive", **given), values(lm, NEAR, stop="argmax", **given)
    for without_penalty, argmax in zip(*both, strict=True):
        assert 1 < len(without_penalty.losses) == len(argmax.losses) < 20
        torch.testing.assert_close(without_penalty.star_d, argmax.star_d, atol=1e-6, rtol=1e-6)


# --- chats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "llama 3", "tight"])
def test_contexts_can_be_frames_with_text_behind_the_prompt(template):
    """The target stands behind the answer's header, as cloze spells it; the plain context is beside
    it in the batch.
    """
    lm = chat_lm(template)
    frame = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True
    )
    contexts = ("{}", frame, "He sings. {}")
    found = values(lm, FACTS[:3], contexts=contexts, steps=3)
    same(found, values(lm, FACTS[:3], contexts=contexts, steps=3, engine="whole"), 1e-4)
    for fact, value in zip(FACTS, found, strict=False):
        nll = []
        for context in contexts:
            framed = lm.cloze(fact.prompt_text, fact.target, frame=context)
            ids = framed.ids  # the prompt in its frame and the target but for its last token
            at = end_of(context.replace("{}", fact.prompt_text), fact.subject, lm)
            log_p = shifted(lm, lm.parts.blocks[1], ids, at, value.delta_d)
            read = [
                float(log_p[at, token])
                for at, token in zip(framed.read, framed.answer, strict=True)
            ]
            nll.append(-sum(read) / len(read))
        assert value.losses[-1][1] == pytest.approx(sum(nll) / len(nll), rel=1e-4)


# --- what is left behind, and mistakes ------------------------------------------------------------


def test_gradient_flags_and_hooks_are_as_before_between_and_after_batches():
    lm = tiny_lm("gpt2")
    lm.parts.mlp_out(0).weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    for _ in optimise_values(
        lm, FACTS, ValueSearch(1, CONTEXTS, ValueConfig(steps=2)), facts_per_batch=1
    ):
        assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
        )
        assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_caller_without_gradients_gets_the_same_values():
    lm = tiny_lm("gpt2", torch.float64)
    with torch.no_grad():
        found = values(lm, steps=3)
    same(found, values(lm, steps=3), 1e-12)
    assert not found[0].delta_d.requires_grad


def test_a_model_without_numbers_is_named_by_its_fact_and_flags_are_restored():
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        lm.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(
        NonFiniteError, match=r"value of '(river|piano)' is nan at step 0; nothing was changed"
    ):
        values(lm, FACTS[1:3])
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


@pytest.mark.parametrize("contexts", [(), ("A {}",), ("{}", "no place"), ("{}", "{} and {}")])
def test_contexts_without_a_place_are_refused(contexts):
    with pytest.raises(FactError, match=r"expected '\{\}' first and exactly one '\{\}' in each"):
        values(tiny_lm(), contexts=contexts)


def test_a_text_longer_than_the_model_takes_is_refused_before_it_runs():
    lm = tiny_lm("gpt2")
    context = "The river runs through London. " * 5
    length = len(lm.encode(f"{context} {FACTS[0].prompt_text}").ids)
    fact = Fact(
        "tower of Rome", "The {} is in the city of", "Paris " * (lm.max_tokens - length + 3)
    )
    with pytest.raises(
        FactError,
        match=r"in the longest context are \d+ tokens, the model takes at most 128; give shorter",
    ):
        values(lm, [fact], contexts=("{}", context + "{}"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"clamp": 0.0}, r"clamp=0\.0: expected above 0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
        ({"stop": "never"}, "stop='never': expected 'loss', 'argmax' or 'adaptive'"),
        ({"kl_position": "first"}, "kl_position='first': expected 'lookup' or 'last'"),
        ({"facts_per_batch": 0}, "facts_per_batch=0: at least one fact"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        values(tiny_lm(), **settings)


def test_one_facts_value_is_the_first_of_many():
    lm = tiny_lm("gpt2", torch.float64)
    same(
        [optimise_value(lm, FACTS[1], ValueSearch(1, CONTEXTS, ValueConfig(steps=3)))],
        values(lm, site="mlp", steps=3)[1:2],
        1e-8,
    )


def test_the_pocket_models_values_are_those_of_one_by_one(pocket_lm):
    """A trained model: 6 facts, until they are said."""
    lm = pocket_lm
    facts = [
        engram.pocket.as_fact(known, engram.pocket.counterfactual(known))
        for known in engram.pocket.facts()[::700]
    ]
    given = {"layer": 2, "contexts": ("{}", "It is cold. {}"), "steps": 6}
    many = values(lm, facts, **given)
    for i in (0, 3, 5):
        (one,) = values(lm, [facts[i]], **given)
        torch.testing.assert_close(losses(many[i]), losses(one), atol=1e-3, rtol=1e-3)
        assert torch.nn.functional.cosine_similarity(many[i].delta_d, one.delta_d, dim=0) > 0.999


def test_contexts_that_all_facts_share_are_run_once_and_give_the_same(monkeypatch):
    lm, contexts = (
        tiny_lm("gpt2", torch.float64),
        ["{}", "He plays the piano and sings. {}", "Long ago in London {}"],
    )
    facts = [
        Fact(subject, "The {} is in", "Paris")
        for subject in ("river", "piano", "tower", "guitar", "mayor", "city")
    ]
    tokens: list[int] = []
    lm.parts.blocks[0].register_forward_hook(
        lambda _, args, out: tokens.append(args[0].shape[:2].numel())
    )
    found = values(lm, facts, contexts=contexts, steps=3)
    together = sum(tokens)
    monkeypatch.setattr(TokenRows, "shared_prefixes", lambda rows: ([], 0))
    tokens.clear()
    same(found, values(lm, facts, contexts=contexts, steps=3), 1e-8)
    assert together < sum(tokens)
