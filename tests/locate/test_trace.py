"""A causal trace is what the loop over cells says it is, and is saved, bounded and checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import engram
from engram.errors import EngramFileError, FactError, NonFiniteError, SettingError
from engram.locate.corruption import Corruptor, subject_embeddings
from engram.locate.settings import SubjectCorruption, default_window, window_layers
from engram.locate.trace import CausalTrace
from tests.helpers import naive
from tests.helpers.tiny import tiny_lm

PROMPTS = {  # where the subject stands -> prompt, subject
    "in the middle": ("The tower of Rome is in the city of", "tower of Rome"),
    "at the start": ("Rome is in the city of", "Rome"),
    "next to last": ("He plays the piano and", "piano"),
    "at the end": ("He plays the guitar", "guitar"),
}
SITES = {
    "residual": lambda lm, layer: lm.parts.blocks[layer],
    "mlp": lambda lm, layer: lm.parts.mlp(layer),
    "attention": lambda lm, layer: lm.parts.attention(layer),
}


def draw_noise(lm, rule, shape, seed=1, subjects=None):
    """Noise of a rule, [samples, subject tokens, d]; `shape` is (samples, subject tokens)."""
    config = SubjectCorruption(noise=rule, samples=shape[0], seed=seed, noise_subjects=subjects)
    return Corruptor(lm, config)(shape[1])


def naive_table(lm, trace, noise, site, target_ids=None):
    ids = lm.encode(trace.prompt).ids
    answer = target_ids or lm.target_ids(trace.prompt, trace.answer)
    sites = [SITES[site](lm, layer) for layer in range(lm.n_layers)]
    window = 1 if site == "residual" else trace.window
    return naive.trace(
        lm.model,
        lm.parts.embed,
        sites,
        ids + answer[:-1],
        len(ids),
        trace.subject_range,
        noise,
        answer,
        window,
    )


@pytest.mark.parametrize("where", PROMPTS)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "opt"])
def test_the_sweep_is_the_loop_over_cells(family, where):
    lm = tiny_lm(family, torch.float64)
    prompt, subject = PROMPTS[where]
    tokens = engram.trace(lm, prompt, subject=subject, samples=1, sites=["residual"]).subject_range
    noise = torch.randn(
        3,
        tokens[1] - tokens[0],
        lm.d_model,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    trace = engram.trace(lm, prompt, subject=subject, noise=noise, window=3)
    answer = [int(lm.logits_at([lm.encode(prompt).ids], [[len(trace.tokens) - 1]])[0].argmax())]
    limit = 1e-6 if family in ("gptj", "gemma2") else 1e-7  # scores are kept in float32
    for site in SITES:
        torch.testing.assert_close(
            trace.scores[site], naive_table(lm, trace, noise, site, answer), atol=limit, rtol=0
        )


@pytest.mark.parametrize("window", [1, 2, 10])
def test_windows_of_any_width_are_those_of_the_loop(window):
    lm = tiny_lm("gpt2", torch.float64)
    prompt, subject = PROMPTS["in the middle"]
    noise = draw_noise(
        lm, 0.5, (2, len(engram.trace(lm, prompt, subject=subject, samples=1).corrupted))
    )
    trace = engram.trace(lm, prompt, subject=subject, noise=noise, window=window, target="Paris")
    for site in ("mlp", "attention"):
        torch.testing.assert_close(
            trace.scores[site], naive_table(lm, trace, noise, site), atol=1e-7, rtol=0
        )


def test_a_target_of_several_tokens_is_scored_as_a_whole():
    lm = tiny_lm("gpt2", torch.float64)
    prompt, subject = PROMPTS["in the middle"]
    assert len(lm.target_ids(prompt, "Paris and London")) > 2
    span = engram.trace(lm, prompt, subject=subject, samples=1).subject_range
    noise = draw_noise(lm, 0.5, (2, span[1] - span[0]))
    trace = engram.trace(
        lm, prompt, subject=subject, noise=noise, target="Paris and London", window=2
    )
    assert trace.answer == " Paris and London"
    for site in SITES:
        wanted = naive_table(lm, trace, noise, site)
        torch.testing.assert_close(
            trace.scores[site] / wanted, torch.ones_like(wanted), atol=1e-5, rtol=0
        )


def test_clean_and_corrupted_scores_frame_the_table():
    lm = tiny_lm("gpt2", torch.float64)
    trace = engram.trace(lm, "The tower of Rome is in the city of", subject="Rome", noise=1.0)
    first, _ = trace.subject_range
    table = trace.scores["residual"]
    assert trace.high_score > trace.low_score
    assert first > 0 and torch.all(table[:first] == trace.low_score), (
        "nothing in front of the subject was corrupted"
    )
    assert torch.all(table[:-1, -1] == np.float32(trace.low_score)), (
        "the last block's output is read at the end only"
    )
    assert float(table[-1, -1]) == pytest.approx(trace.high_score, abs=1e-7)


def test_one_noise_sample_leaves_the_clean_run_clean():
    lm = tiny_lm("gpt2")
    one, ten = (
        engram.trace(lm, PROMPTS["at the start"][0], subject="Rome", noise=1.0, samples=n)
        for n in (1, 10)
    )
    assert one.high_score == pytest.approx(ten.high_score, abs=1e-6)
    assert one.low_score != pytest.approx(one.high_score, abs=1e-6)


def test_memory_is_bounded_without_changing_a_number():
    lm = tiny_lm("llama", torch.float64)
    prompt, subject = PROMPTS["in the middle"]
    calls = []
    few, many = (
        engram.trace(
            lm,
            prompt,
            subject=subject,
            samples=4,
            rows_per_batch=rows,
            progress=lambda *at: calls.append(at),
        )
        for rows in (8, None)
    )
    assert calls[0][1] <= 2 and calls[-1][1] == calls[-1][2]
    for site in SITES:
        torch.testing.assert_close(few.scores[site], many.scores[site], atol=1e-7, rtol=0)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    lm = tiny_lm("gpt2")
    prompt, subject = PROMPTS["in the middle"]
    first, again, other = (
        engram.trace(lm, prompt, subject=subject, seed=seed).scores["residual"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tracing_leaves_no_hook_behind_and_no_weight_changed():
    lm = tiny_lm("gpt2")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"):
        engram.trace(
            lm,
            "Rome is in",
            subject="Rome",
            progress=lambda *at: (_ for _ in ()).throw(RuntimeError("stop")),
        )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_the_subjects_place_can_be_chosen():
    lm = tiny_lm("gpt2")
    prompt = "Rome is not Rome, and"
    spans = {
        o: engram.trace(lm, prompt, subject="Rome", occurrence=o, samples=1).corrupted
        for o in ("first", "last", "all")
    }
    assert set(spans["first"]) | set(spans["last"]) == set(spans["all"])
    assert max(spans["first"]) < min(spans["last"])


def test_the_subjects_last_token_alone_is_one_row_of_the_table():
    lm = tiny_lm("gpt2")
    prompt, subject = PROMPTS["in the middle"]
    full = engram.trace(lm, prompt, subject=subject)
    row = engram.trace(lm, prompt, subject=subject, positions="subject_last")
    at = full.subject_range[1] - 1
    assert row.positions == [at]
    for site in SITES:
        torch.testing.assert_close(row.scores[site][0], full.scores[site][at], atol=1e-6, rtol=0)


# --- windows and noise ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("centre", "layers"),
    [(0, (0, 5)), (4, (0, 9)), (5, (0, 10)), (24, (19, 29)), (43, (38, 48)), (47, (42, 48))],
)
def test_windows_are_those_of_the_released_code(centre, layers):
    assert window_layers(centre, 10, 48) == layers


def test_a_window_never_spans_a_small_model():
    assert [default_window(layers) for layers in (2, 8, 12, 24, 32, 48)] == [1, 3, 4, 8, 10, 10]


def test_noise_is_the_released_codes_stream():
    lm = tiny_lm("gpt2")
    noise = draw_noise(lm, 1.0, (10, 3), seed=1)
    stream = np.random.RandomState(1).randn(10, 3, lm.d_model)
    assert np.array_equal(noise.numpy(), stream)
    assert noise[0, 0, :3].tolist() == pytest.approx([1.62434536, -0.61175641, -0.52817175])


def test_s3_is_three_standard_deviations_of_the_subjects_embeddings():
    lm = tiny_lm("gpt2", torch.float64)
    subjects = ["Rome", "the piano"]
    rows = [lm.model.transformer.wte.weight[i].detach() for s in subjects for i in lm.encode(s).ids]
    wanted = 3 * float(torch.stack(rows).std())
    assert float(draw_noise(lm, "s3", (4, 2), 1, subjects)[0, 0, 0]) == pytest.approx(
        wanted * 1.62434536, rel=1e-6
    )


def test_uniform_noise_is_absolute():
    noise = draw_noise(tiny_lm("gpt2"), "u0.1", (10, 4))
    assert float(noise.abs().max()) <= 0.1
    assert noise[0, 0, 0] == pytest.approx(-0.0165955990)


@pytest.mark.parametrize("rule", ["m", "t10"])
def test_matched_noise_has_the_embeddings_mean_and_covariance(rule):
    """4,000 draws in 32 dimensions: entries are off by at most 0.13 of the largest variance;
    seeded, so always the same.
    """
    lm = tiny_lm("gpt2", torch.float64)
    subjects = [
        "Rome is in the city of Paris",
        "He plays the guitar and sings",
        "their mother tongue is French",
    ]
    embeddings = subject_embeddings(lm, subjects)
    drawn = draw_noise(lm, rule, (1000, 4), 1, subjects).flatten(0, 1)
    wanted = torch.cov(embeddings.T)
    assert (drawn.mean(0) - embeddings.mean(0)).abs().max() < 0.2 * wanted.max().sqrt()
    assert (torch.cov(drawn.T) - wanted).abs().max() < 0.2 * wanted.max()


def test_heavy_tails_follow_the_seed_and_are_the_released_codes_by_default():
    """Student's t noise is normal noise times one factor a token; both parts have to be drawn anew
    where the seed changes. The released code takes the factors from RandomState(2), its seed
    being 1.
    """
    lm, subjects = tiny_lm("gpt2", torch.float64), ["Rome is in the city of Paris"]

    def factors(seed):
        mean = subject_embeddings(lm, subjects).mean(0)
        heavy, normal = (
            draw_noise(lm, rule, (5, 3), seed, subjects) - mean for rule in ("t5", "m")
        )
        return (heavy.norm(dim=-1) / normal.norm(dim=-1)).numpy()

    chi = np.random.RandomState(2).chisquare(5, size=15).reshape(5, 3)
    np.testing.assert_allclose(factors(1), np.sqrt(3 / chi), rtol=1e-9)
    assert not np.isclose(factors(3), factors(1)).any()


# --- files and errors -----------------------------------------------------------------------------


def test_a_saved_trace_is_read_back(tmp_path):
    trace = engram.trace(tiny_lm("gpt2"), "Rome is in the city of", subject="Rome")
    trace.save(tmp_path / "trace.safetensors")
    again = CausalTrace.load(tmp_path / "trace.safetensors")
    assert again.to_dict() == trace.to_dict()
    (tmp_path / "junk").write_text("no trace")
    with pytest.raises(EngramFileError, match="is not a saved causal trace"):
        CausalTrace.load(tmp_path / "junk")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subject": "Paris"}, "subject 'Paris' is not in the prompt"),
        ({"subject": "rome"}, "did you mean 'Rome'"),
        ({"subject": " "}, "is empty"),
        ({"subject": "Rome", "target": " "}, "target=' ' is empty"),
        ({"subject": "Rome", "noise": "x3"}, "noise='x3' is not a rule"),
        (
            {"subject": "Rome", "noise": torch.zeros(10, 7, 32)},
            r"shape \(10, 7, 32\), expected \[samples, ",
        ),
        ({"subject": "Rome", "window": 0}, "window=0"),
        ({"subject": "Rome", "samples": 0}, "samples=0"),
    ],
)
def test_mistakes_are_explained(settings, message):
    with pytest.raises((FactError, SettingError), match=message):
        engram.trace(tiny_lm("gpt2"), "Rome is in the city of", **settings)


def test_a_model_that_overflows_is_reported():
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        lm.model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        engram.trace(lm, "Rome is in the city of", subject="Rome", noise=1.0)
