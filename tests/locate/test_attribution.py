"""Estimates are what they say: first order, corrected where asked, marked as estimates, and
replaced where screened.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import engram
from engram.engine.attention import Attention, capture_attention, short_attention_in_eager
from engram.engine.recording import record_run
from engram.engine.suffix import Suffix
from engram.errors import UnsupportedModelError
from engram.locate.settings import TraceConfig
from engram.locate.trace_input import TracePrompt
from engram.locate.tracing import trace_prompts
from tests.helpers.tiny import EXPERTS, FAMILIES, tiny_lm

PROMPT, SUBJECT = "The tower is in the", "tower"
UNWATCHED = (
    "bloom",
    "codegen",
    "falcon",
    "gpt_neo",
    "gptj",
    "mpt",
)  # do not call transformers' attention interface
EVERY = ("residual", "mlp", "attention", "head", "neuron")
GIVEN = {
    "subject": SUBJECT,
    "target": "the",
    "metric": "log_probability",
    "neurons": [(0, 3), (1, 30)],
    "window": 1,
}


def noise(lm, scale, samples=2):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(
        samples, 4, lm.parts.embed.embedding_dim, dtype=torch.float64, generator=generator
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2", "bloom", "opt-350m-like"])
def test_a_small_change_is_estimated_exactly(family, direction):
    """The error is of second order: a corruption ten times smaller leaves a relative error about
    ten times smaller.
    """
    lm = tiny_lm(family, torch.float64)
    errors = []
    for scale in (1e-2, 1e-3):
        given = {**GIVEN, "noise": noise(lm, scale), "sites": EVERY, "direction": direction}
        exact, estimate = (
            engram.trace(lm, PROMPT, method=method, **given) for method in ("exact", "attribution")
        )
        assert estimate.method == "attribution" and estimate.low_score == exact.low_score
        gaps = [
            (exact.scores[site].double() - estimate.scores[site].double()).abs().max()
            for site in EVERY
        ]
        sizes = [exact.effects(site).double().abs().max() for site in EVERY]
        errors.append(
            [
                max(0.0, float(gap) - 2e-6) / float(size)
                for gap, size in zip(gaps, sizes, strict=True)
            ]
        )  # float32
    assert max(errors[1]) < 0.05
    assert all(small <= 0.2 * large + 1e-9 for large, small in zip(*errors, strict=True)), errors


def test_a_windows_estimate_is_the_sum_over_its_layers():
    lm = tiny_lm("gpt2", torch.float64)
    given = {
        **GIVEN,
        "noise": noise(lm, 0.5),
        "sites": ["mlp"],
        "method": "attribution",
        "neurons": (),
    }
    single = engram.trace(lm, PROMPT, **given).effects("mlp")
    window = engram.trace(lm, PROMPT, **{**given, "window": 2}).effects("mlp")
    first = len(single) - 5  # tokens in front of the subject have no effect in either
    torch.testing.assert_close(
        window[first:, 1:-1], (single[:, :-2] + single[:, 1:-1])[first:], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_estimated_and_left_as_it_was(family):
    lm = tiny_lm(family)
    sites = EVERY[:4] if family in EXPERTS else EVERY
    given = {**GIVEN, "neurons": GIVEN["neurons"] if "neuron" in sites else ()}
    implementation = lm.model.config._attn_implementation
    trace = engram.trace(
        lm, PROMPT, sites=sites, noise=noise(lm, 1.0), method="attribution", **given
    )
    for site in sites:
        assert trace.scores[site].isfinite().all() and trace.effects(site).abs().max() > 1e-6
    given = {
        **given,
        "neurons": (),
        "sites": ["residual"],
        "method": "attribution",
        "correction": "query-key",
    }
    if family.split("-")[0] in UNWATCHED:
        with pytest.raises(
            UnsupportedModelError, match="not hand to transformers' attention interface"
        ):
            engram.trace(lm, PROMPT, noise=noise(lm, 1.0), **given)
    else:
        corrected = engram.trace(lm, PROMPT, noise=noise(lm, 1.0), **given)
        assert corrected.scores["residual"].isfinite().all()
        assert not torch.equal(corrected.scores["residual"], trace.scores["residual"])
    assert lm.model.config._attn_implementation == implementation
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def attention(softcap=None, rows=2, heads=2, tokens=5, size=3):
    generator = torch.Generator().manual_seed(3)
    q, k, v, q_new, k_new, gradient = (
        2 * torch.randn(rows, heads, tokens, size, dtype=torch.float64, generator=generator)
        for _ in range(6)
    )
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    return (
        Attention(q, k, v, torch.empty(0), mask, 0.7, softcap),
        q_new,
        k_new,
        gradient.transpose(1, 2),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_correction_is_the_softmaxs_own_change_minus_its_slope(softcap):
    """One position at a time, by autograd and a second softmax."""
    seen, q_new, k_new, gradient = attention(softcap)

    def metric(query, key):
        weights = (seen.scores(query, key) + seen.mask).softmax(-1)
        return ((weights @ seen.value_bhtk).transpose(1, 2) * gradient).sum((1, 2, 3))

    query, key = (x.clone().requires_grad_() for x in (seen.query_bhtk, seen.key_bhtk))
    slope_q, slope_k = torch.autograd.grad(metric(query, key).sum(), (query, key))
    before = metric(seen.query_bhtk, seen.key_bhtk)
    wanted = torch.zeros(2, 5, dtype=torch.float64)
    for i in range(5):
        query, key = seen.query_bhtk.clone(), seen.key_bhtk.clone()
        query[:, :, i], key[:, :, i] = q_new[:, :, i], k_new[:, :, i]
        linear_q = (slope_q[:, :, i] * (q_new - seen.query_bhtk)[:, :, i]).sum((1, 2))
        linear_k = (slope_k[:, :, i] * (k_new - seen.key_bhtk)[:, :, i]).sum((1, 2))
        wanted[:, i] = (
            metric(query, seen.key_bhtk)
            - before
            - linear_q
            + metric(seen.query_bhtk, key)
            - before
            - linear_k
        )
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(seen.beyond_first_order(gradient, q_new, k_new), wanted)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "mistral-short-window"])
def test_watching_attention_changes_nothing(family):
    lm = tiny_lm(family, torch.float64)
    ids = torch.tensor([lm.encode(PROMPT).ids])
    with torch.no_grad():
        plain = lm.model(ids).logits
        with capture_attention(lm) as seen:
            torch.testing.assert_close(lm.model(ids).logits, plain, atol=1e-5, rtol=1e-5)
        assert torch.equal(lm.model(ids).logits, plain)
    assert len(seen) == lm.n_layers
    assert all(each.query_bhtk.shape == each.key_bhtk.shape for each in seen), (
        "one key head a query head"
    )


def test_screening_computes_the_most_promising_cells():
    lm = tiny_lm("gpt2", torch.float64)
    given = {**GIVEN, "noise": noise(lm, 1.0), "sites": ["residual", "head"], "neurons": ()}
    exact = engram.trace(lm, PROMPT, **given)
    estimate = engram.trace(lm, PROMPT, method="attribution", **given)
    screened = engram.trace(lm, PROMPT, screen=7, **given)
    assert screened.method == "screened"
    effects = torch.cat([estimate.effects(site).flatten() for site in ("residual", "head")]).abs()
    least = effects.sort(descending=True).values[6]
    for site in ("residual", "head"):
        chosen = estimate.effects(site).abs() >= least - 1e-9
        assert torch.equal(
            screened.exact[site] & (estimate.effects(site) != 0),
            chosen & (estimate.effects(site) != 0),
        )
        wanted = torch.where(chosen, exact.scores[site], estimate.scores[site])
        torch.testing.assert_close(screened.scores[site], wanted, atol=1e-6, rtol=0)


def test_screening_every_cell_is_the_exact_trace():
    lm = tiny_lm("llama", torch.float64)
    given = {**GIVEN, "noise": noise(lm, 1.0), "sites": EVERY}
    exact, screened = (
        engram.trace(lm, PROMPT, **given),
        engram.trace(lm, PROMPT, screen=10**6, **given),
    )
    for site in EVERY:
        torch.testing.assert_close(screened.scores[site], exact.scores[site], atol=1e-6, rtol=0)
        assert screened.exact[site].all()


@pytest.mark.parametrize(
    "settings", [{}, {"correction": "query-key"}, {"direction": "noise"}, {"screen": 5}]
)
def test_prompts_estimated_together_are_those_estimated_alone(settings):
    lm = tiny_lm("gpt2", torch.float64)
    texts = [
        (PROMPT, SUBJECT),
        ("Paris is the city of", "Paris"),
        ("The river is", "river"),
        ("The guitar is in the", "guitar"),
    ]
    prompts = [TracePrompt(text, subject, "the") for text, subject in texts]
    method = "exact" if "screen" in settings else "attribution"
    config = TraceConfig.of(
        noise=1.0, samples=2, method=method, metric="log_probability", **settings
    )
    together = {t.prompt: t for t in trace_prompts(lm, prompts, config, facts_per_batch=4)}
    for prompt in prompts:
        (alone,) = trace_prompts(lm, [prompt], config)
        for site, table in alone.scores.items():
            torch.testing.assert_close(together[prompt.text].scores[site], table, atol=1e-5, rtol=0)


def test_a_saved_estimate_says_that_it_is_one(tmp_path):
    lm = tiny_lm("gpt2")
    trace = engram.trace(lm, PROMPT, subject=SUBJECT, noise=1.0, screen=3)
    trace.save(tmp_path / "trace.safetensors")
    again = engram.CausalTrace.load(tmp_path / "trace.safetensors")
    assert again.method == "screened" and again.settings["screen"] == 3
    assert all(torch.equal(again.exact[site], trace.exact[site]) for site in trace.exact)
    assert again.to_dict() == replace(trace).to_dict()


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.split("-")[0] not in UNWATCHED]
)
@pytest.mark.parametrize("tokens", [3, 64, 70])
def test_short_attention_written_out_is_the_fused_kernels(family, tokens):
    """With and without keys in front, up to the length from which the kernel takes over, and beyond
    it.
    """
    lm = tiny_lm(family, torch.float64)
    ids_bt = (torch.arange(2 * tokens).view(2, tokens) * 31 + 5) % 300
    recording = record_run(lm, ids_bt)
    for start in (0, tokens // 2):
        suffix = Suffix(recording, start, tokens - start)
        with torch.no_grad():
            plain = suffix.block(1, suffix.states(1))
            before = lm.model.config._attn_implementation
            with short_attention_in_eager(lm):
                assert (lm.model.config._attn_implementation != before) == (before == "sdpa")
                written_out = suffix.block(1, suffix.states(1))
        assert lm.model.config._attn_implementation == before
        torch.testing.assert_close(written_out, plain, atol=1e-6, rtol=1e-6)
