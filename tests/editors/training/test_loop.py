"""Training methods score every target token at its own position and leave the model's inside as
they found it.
"""

from __future__ import annotations

import pytest
import torch

from engram import Fact
from engram.editors.training.loop import TrainingLoop, TuningConfig, forward_from
from engram.editors.training.target_rows import TargetBatch, batches_of, fact_rows, target_row
from engram.errors import FactError, SettingError
from engram.modules.frozen import frozen
from engram.modules.hooks import overlay_weight
from tests.helpers.tiny import DENSE, TOKENIZERS, tiny_lm
from tests.helpers.training import FACTS, all_said, answered


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_each_target_token_is_scored_at_its_own_position(tokenizer):
    lm = tiny_lm("gpt2", torch.float64, tokenizer)
    batch = TargetBatch.of(fact_rows(lm, FACTS))
    nll_p = batch.token_nll(batch.logits(lm)).detach()
    alone = [answered(lm, fact.prompt_text, fact.target) for fact in FACTS]
    assert max(map(len, alone)) > 1
    torch.testing.assert_close(nll_p, -torch.cat(alone))
    torch.testing.assert_close(
        batch.mean_by_row(nll_p), torch.stack([-each.mean() for each in alone])
    )
    assert batch.facts_p.tolist() == [i for i, each in enumerate(alone) for _ in each]


@pytest.mark.parametrize("family", DENSE)
def test_blocks_below_need_not_run_again(family):
    """From a block on, and through the whole model: the same logits and the same gradient."""
    lm = tiny_lm(family, torch.float64)
    batch = TargetBatch.of(fact_rows(lm, FACTS))
    module = lm.parts.mlp_out(2)
    generator = torch.Generator().manual_seed(0)
    shape = (32, 48) if module.weight.numel() == 32 * 48 else (32, module.weight.numel() // 32)
    delta_oi = (
        torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.1).requires_grad_()
    )
    results = []
    with frozen(lm.model):
        for engine in ("auto", "whole"):
            forward = forward_from(lm, batch, 2, engine)
            with overlay_weight(module, delta_oi):
                logits_pv = forward()
                (gradient,) = torch.autograd.grad(batch.token_nll(logits_pv).sum(), [delta_oi])
            results.append((logits_pv, gradient))
    torch.testing.assert_close(*(logits for logits, _ in results), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(gradient for _, gradient in results), atol=1e-6, rtol=1e-6)


def test_whether_all_is_said_is_what_the_model_says():
    lm = tiny_lm("gpt2")
    said = str(
        lm.tokenizer.decode(
            [lm.model(torch.tensor([lm.encode("He plays the").ids])).logits[0, -1].argmax()]
        )
    )
    for target in (said, "Paris"):
        batch = TargetBatch.of([target_row(lm, "He plays the", target)])
        with torch.no_grad():
            assert batch.all_top1(batch.logits(lm)) == all_said(lm, "He plays the", target)


def test_contexts_and_paraphrases_are_rows_of_their_fact():
    lm = tiny_lm("gpt2")
    fact = Fact(
        "piano", "He plays the {} and", "guitar", paraphrases=("The piano, the", "A piano and the")
    )
    rows = fact_rows(lm, [FACTS[0], fact], ("{}", "It is cold. {}"), paraphrases=1)
    texts = [lm.tokenizer.decode(row.ids[: row.read[0] + 1]) for row in rows]
    first, second = FACTS[0].prompt_text, fact.prompt_text
    assert texts == [
        first,
        f"It is cold. {first}",
        second,
        f"It is cold. {second}",
        "The piano, the",
    ]
    assert [row.fact for row in rows] == [0, 0, 1, 1, 1]


def test_every_row_is_dealt_out_once():
    lm = tiny_lm("gpt2")
    rows = fact_rows(lm, FACTS * 3)
    dealt = list(batches_of(rows, 4, torch.Generator().manual_seed(0)))
    assert [len(batch.sizes_b) for batch in dealt] == [4, 4, 1]
    assert sorted(torch.cat([batch.labels_p for batch in dealt]).tolist()) == sorted(
        label for row in rows for label in row.labels
    )


def descended(lm, delta_oi, locality=(), **settings):
    """Training of block 1's MLP output matrix, and the module that is trained."""
    config = TuningConfig(**settings)
    module = lm.parts.mlp_out(1)
    loop = TrainingLoop(lm, 1, config)
    with frozen(lm.model):
        targets = loop.task(fact_rows(lm, FACTS))
        unrelated = loop.task([target_row(lm, *pair) for pair in locality])
        with overlay_weight(module, delta_oi):
            return loop.descend([delta_oi], targets, unrelated)


def zeros(lm):
    from engram.modules.weights import as_linear

    return torch.zeros(as_linear(lm.parts.mlp_out(1)).shape, dtype=lm.dtype, requires_grad=True)


def test_adams_first_step_is_the_learning_rate_everywhere():
    lm = tiny_lm("gpt2", torch.float64)
    delta_oi = zeros(lm)
    descended(lm, delta_oi, epochs=1, learning_rate=0.01)
    torch.testing.assert_close(
        delta_oi.detach().abs(), torch.full_like(delta_oi, 0.01), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_locality_adds_its_gradient(kind):
    """One step's gradient, against autograd through whole passes of the test's own."""
    lm = tiny_lm("llama", torch.float64)
    pairs = [("Their mother tongue is", "French"), ("She plays the", "piano and sings")]
    delta_oi, changed = zeros(lm), {}
    with torch.no_grad():
        delta_oi += 0.02
    start = [answered(lm, *pair) for pair in pairs]
    with frozen(lm.model):
        config = TuningConfig(epochs=1, locality_loss=kind, locality_weight=0.5)
        loop = TrainingLoop(lm, 1, config)
        staying = loop.task([target_row(lm, *pair) for pair in pairs])
        before = [forward().log_softmax(-1).detach() for forward in staying.forwards]
        torch.testing.assert_close(-staying.batches[0].token_nll(before[0]), torch.cat(start))
        with overlay_weight(lm.parts.mlp_out(1), delta_oi):
            from engram.editors.training.loop import _locality_loss

            loss = _locality_loss(staying, 0, before if kind == "kl" else [])
            changed["ce"] = torch.stack([-answered(lm, *pair).mean() for pair in pairs]).mean()
            changed["kl"] = torch.stack(
                [_divergence(lm, *pair, before[0], i) for i, pair in enumerate(pairs)]
            ).mean()
    torch.testing.assert_close(loss.detach(), changed[kind])
    assert loss > 0


def _divergence(lm, prompt, answer, before_pv, row):
    """Mean KL(before || now) over an answer's positions."""
    head, ids = lm.encode(prompt).ids, lm.target_ids(prompt, answer)
    with torch.no_grad():
        now_pv = (
            lm.model(torch.tensor([head + ids[:-1]]), use_cache=False)
            .logits[0, len(head) - 1 :]
            .log_softmax(-1)
        )
    old_pv = before_pv[-len(ids) :] if row else before_pv[: len(ids)]
    return (
        torch.nn.functional.kl_div(now_pv, old_pv, log_target=True, reduction="none").sum(-1).mean()
    )


def test_locality_keeps_other_answers_where_they_were():
    pairs = [
        ("Their mother tongue is", "French"),
        ("She plays the", "piano"),
        ("The bridge is in", "Rome"),
    ]
    moved = {}
    for weight in (0.0, 10.0):
        lm = tiny_lm("gpt2", torch.float64)
        delta_oi = zeros(lm)
        before = torch.stack([answered(lm, *pair)[0] for pair in pairs])
        descended(
            lm, delta_oi, pairs, epochs=30, learning_rate=0.01, stop="never", locality_weight=weight
        )
        with overlay_weight(lm.parts.mlp_out(1), delta_oi):
            moved[weight] = (
                (torch.stack([answered(lm, *pair)[0] for pair in pairs]) - before).abs().mean()
            )
    assert moved[10.0] < 0.3 * moved[0.0]


def test_training_stops_when_every_target_is_said():
    lm = tiny_lm("gpt2")
    delta_oi = zeros(lm)
    descent = descended(lm, delta_oi, epochs=300, learning_rate=0.01, rows_per_batch=2)
    assert descent.stopped and len(descent.losses) < 300
    with overlay_weight(lm.parts.mlp_out(1), delta_oi):
        assert all(all_said(lm, fact.prompt_text, fact.target) for fact in FACTS)


def test_a_loss_that_is_low_enough_is_not_trained_on():
    lm = tiny_lm("gpt2")
    delta_oi = zeros(lm)
    descent = descended(lm, delta_oi, stop="loss", stop_loss=1e9)
    assert (
        descent.stopped and descent.steps == 0 and len(descent.losses) == 1 and not delta_oi.any()
    )


def test_never_stopping_takes_every_step():
    lm = tiny_lm("gpt2")
    descent = descended(lm, zeros(lm), stop="never", epochs=3, rows_per_batch=2)
    assert (descent.steps, len(descent.losses), descent.stopped) == (6, 3, False)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_model_held_still_gets_its_flags_and_modes_back(error):
    lm = tiny_lm("gpt2")
    lm.model.train()
    lm.parts.mlp(1).eval()
    lm.parts.mlp_out(0).weight.requires_grad_(False)
    modes = [module.training for module in lm.model.modules()]
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    try:
        with torch.no_grad(), frozen(lm.model):
            assert not any(module.training for module in lm.model.modules())
            assert not any(parameter.requires_grad for parameter in lm.model.parameters())
            assert torch.is_grad_enabled()
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert [module.training for module in lm.model.modules()] == modes
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"stop": "soon"}, "stop='soon': expected 'argmax'"),
        ({"locality_loss": "l2"}, "locality_loss='l2': expected 'kl'"),
        ({"contexts": "some"}, "contexts='some': expected a list or 'sampled'"),
    ],
)
def test_mistakes_are_explained(settings, message):
    with pytest.raises(SettingError, match=message):
        TuningConfig(**settings)


def test_a_context_needs_a_place_for_the_prompt():
    with pytest.raises(FactError, match=r"exactly one '{}' each"):
        TuningConfig(contexts=("{}", "He said")).settled(tiny_lm("gpt2"), 0)


def test_sampled_contexts_are_the_models_own():
    settled = TuningConfig(contexts="sampled").settled(tiny_lm("gpt2"), 0)
    assert settled.contexts[0] == "{}" and len(settled.contexts) == 21
