"""Tracing models that are not causal transformers: state-space, masked and encoder-decoder ones,
against a naive loop.
"""

from __future__ import annotations

import pytest
import torch

import engram
from engram.engine.replayable import replayable
from engram.errors import FactError, UnsupportedModelError
from tests.helpers import naive
from tests.helpers.tiny import ENCODER_DECODER, MASKED, STATE_SPACE, crossed, tiny_lm

PROMPT, SUBJECT = "The tower is in the", "tower"
# Mamba keeps its stream in float32, whatever the model's dtype; tables are float32 everywhere
FLOAT32 = 1e-5


def forward(lm, cloze):
    """Logits at the read positions through the library's own call."""
    kwargs = (
        {}
        if cloze.decoder_ids is None
        else {"decoder_input_ids": torch.tensor([cloze.decoder_ids])}
    )
    return (
        lm.model(input_ids=torch.tensor([cloze.ids]), use_cache=False, **kwargs)
        .logits[0, cloze.read]
        .double()
    )


def forward_masked(lm, cloze):
    return lm.model(input_ids=torch.tensor([cloze.ids])).logits[0, cloze.read].double()


@torch.no_grad()
def naive_table(lm, trace, cloze, site, noise, direction="denoise"):
    """[tokens, layers] probability of the answer, one forward pass a cell and sample, hooks of its
    own.
    """
    run = forward_masked if lm.kind == "masked" else forward
    modules = [
        lm.model.get_submodule(lm.parts.site_module_name(site, layer))
        for layer in range(lm.n_layers)
    ]
    b, e = trace.subject_range
    table = torch.zeros(len(trace.tokens), lm.n_layers)

    def hooked(embed, chosen, put):
        seen = {}
        hooks = {module: (lambda out, m=module: put(m, out, seen)) for module in chosen}
        with naive.changed({**embed, **hooks}):
            return run(lm, cloze), seen

    def keep(module, out, seen):
        seen[module] = out.clone()
        return out

    for sample in noise:

        def corrupt(out, sample=sample):
            out = out.clone()
            out[:, b:e] = (out[:, b:e].double() + sample).to(out.dtype)
            return out

        clean, corrupted = {}, {lm.parts.embed: corrupt}
        decoder_reads_subject = lm.kind == "encoder-decoder" and "{}" in lm.cloze_decoder
        if decoder_reads_subject:
            words = lm.token_strings(cloze.decoder_ids)
            start = next(
                i for i in range(len(words)) if "".join(words[i:]).lstrip().startswith(SUBJECT)
            )

            def corrupt_decoder(out, sample=sample, start=start):
                out = out.clone()
                out[:, start : start + e - b] += sample.to(out.dtype)
                return out

            corrupted[lm.model.get_decoder().get_input_embeddings()] = corrupt_decoder
        base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        _, states = hooked(source, modules, keep)
        for token in range(len(trace.tokens)):
            for layer, module in enumerate(modules):

                def put(m, out, seen, token=token, states=states):
                    out = out.clone()
                    out.view(len(cloze.ids), -1)[token] = states[m].view(len(cloze.ids), -1)[token]
                    return out

                logits, _ = hooked(base, [module], put)
                answer = torch.tensor(cloze.answer)
                table[token, layer] += logits.log_softmax(-1).gather(
                    -1, answer[:, None]
                ).sum().exp().float() / len(noise)
    return table


def noise_for(lm, trace):
    width = lm.parts.embed.embedding_dim
    tokens = trace.subject_range[1] - trace.subject_range[0]
    return torch.randn(
        2, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(
    ("family", "direction"), crossed([*STATE_SPACE, *MASKED, *ENCODER_DECODER], "denoise", "noise")
)
def test_every_kind_is_the_naive_loop(family, direction):
    lm = tiny_lm(family, torch.float64)
    first = engram.trace(lm, PROMPT, subject=SUBJECT, target="the", samples=1, noise=1.0)
    noise = noise_for(lm, first)
    trace = engram.trace(
        lm, PROMPT, subject=SUBJECT, target="the", noise=noise, window=1, direction=direction
    )
    assert list(trace.scores) == list(lm.parts.site_names())
    cloze = lm.cloze(PROMPT, "the")
    assert len(trace.tokens) == cloze.tokens
    for site in trace.scores:
        wanted = naive_table(lm, trace, cloze, site, noise, direction)
        torch.testing.assert_close(trace.scores[site], wanted, atol=FLOAT32, rtol=0)
        assert (wanted - trace.baseline).abs().max() > 1e-6, (
            f"{site} changes nothing: the comparison would be empty"
        )


@pytest.mark.parametrize("family", [*STATE_SPACE, *MASKED, *ENCODER_DECODER])
def test_every_kind_is_estimated_averaged_and_left_as_it_was(family):
    lm = tiny_lm(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    given = {
        "subject": SUBJECT,
        "target": "the",
        "noise": 5e-5,
        "samples": 2,
        "window": 1,
        "metric": "log_probability",
    }
    exact = engram.trace(lm, PROMPT, **given)
    estimate = engram.trace(lm, PROMPT, **given, method="attribution")
    for site, table in exact.scores.items():
        error = (table - estimate.scores[site]).abs().max()
        assert error <= 0.1 * exact.effects(site).abs().max() + 5e-6, site
    facts = [
        engram.Fact(s, "The {} is in the", "city") for s in ("tower", "river", "bridge", "guitar")
    ]
    average = engram.average_trace(lm, facts, keep="all", noise=0.5, samples=2, window=1)
    alone = {t.prompt: t for t in average.traces}
    for fact in facts:
        one = engram.trace(
            lm,
            fact.prompt_text,
            subject=fact.subject,
            noise=0.5,
            samples=2,
            window=1,
            noise_subjects=[f.subject for f in facts],
        )
        for site, table in one.scores.items():
            torch.testing.assert_close(
                alone[fact.prompt_text].scores[site], table, atol=1e-5, rtol=0
            )
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )


@pytest.mark.parametrize("family", [*MASKED, *ENCODER_DECODER])
def test_heads_and_severed_paths_of_encoders(family):
    lm = tiny_lm(family, torch.float64)
    given = {"subject": SUBJECT, "target": "the", "noise": 1.0, "samples": 2}
    heads = engram.trace(lm, PROMPT, sites=["head"], **given).effects("head")
    assert heads.shape[1:] == (lm.n_layers, lm.parts.n_heads) and heads.abs().max() > 1e-9
    severed = engram.trace(lm, PROMPT, sites=["residual"], severed=["mlp", "attention"], **given)
    for module in ("mlp", "attention"):
        assert not torch.allclose(
            severed.scores[f"residual, {module} severed"], severed.scores["residual"]
        )


@pytest.mark.parametrize("family", [*STATE_SPACE, *MASKED, *ENCODER_DECODER])
def test_they_run_through_whole_forward_passes(family):
    lm = tiny_lm(family)
    assert not replayable(lm)
    with pytest.raises(
        UnsupportedModelError, match=r"engine='replay': .* cannot be replayed; leave out engine"
    ):
        engram.trace(lm, PROMPT, subject=SUBJECT, noise=1.0, engine="replay")


@pytest.mark.parametrize("family", [*MASKED, *ENCODER_DECODER])
def test_tokens_behind_the_subject_are_the_prompts_own(family):
    """Neither the blank, nor what stands behind it, nor specials are corrupted."""
    lm = tiny_lm(family)
    settings = {"subject": "in", "occurrence": "last", "noise": 1.0, "samples": 1}
    with pytest.raises(FactError, match=r"^extra_tokens=9: expected at most \d, as many") as raised:
        engram.trace(lm, PROMPT, **settings, extra_tokens=9)
    most = int(str(raised.value).partition("at most ")[2][0])
    trace = engram.trace(lm, PROMPT, **settings, extra_tokens=most, sites="residual")
    words = [trace.tokens[trace.positions.index(at)] for at in trace.corrupted]
    assert "".join(words).replace("▁", " ").replace("##", "").replace(" ", "").endswith("the")


@pytest.mark.parametrize("family", STATE_SPACE)
def test_state_space_models_have_their_projections_and_no_heads(family):
    lm = tiny_lm(family)
    assert "mixer" in lm.parts.site_names() and "in_proj" in lm.parts.site_names()
    for site in ("mlp", "attention", "head", "neuron"):
        neurons = [(0, 0)] if site == "neuron" else ()
        with pytest.raises(UnsupportedModelError, match=r"no site|no heads|no neurons"):
            engram.trace(lm, PROMPT, subject=SUBJECT, sites=[site], neurons=neurons, noise=1.0)


@pytest.mark.parametrize("family", ["bart"])
def test_a_decoder_that_begins_with_the_prompt_is_corrupted_too(family):
    """Otherwise it would read the answer off the subject there, and nothing the encoder does would
    matter.
    """
    lm = tiny_lm(family, torch.float64)
    given = {
        "subject": SUBJECT,
        "target": "the",
        "noise": 1.0,
        "samples": 2,
        "sites": ["residual"],
        "metric": "log_probability",
    }
    assert "{}" in lm.cloze_decoder
    with_decoder = engram.trace(lm, PROMPT, **given)
    lm.cloze_decoder = ""
    without = engram.trace(lm, PROMPT, **given)
    assert (
        with_decoder.high_score != without.high_score
        and with_decoder.low_score != with_decoder.high_score
    )


@pytest.mark.parametrize("family", [*MASKED, *ENCODER_DECODER])
def test_another_subject_of_as_many_tokens_takes_its_place(family):
    lm = tiny_lm(family, torch.float64)
    other = next(
        word
        for word in (
            "river",
            "bridge",
            "guitar",
            "piano",
            "mother",
            "capital",
            "city",
            "Rome",
            "Paris",
            "London",
        )
        if len(lm.cloze(PROMPT.replace(SUBJECT, word), "the").ids)
        == len(lm.cloze(PROMPT, "the").ids)
        and _fits(lm, word)
    )
    one = engram.trace(
        lm, PROMPT, subject=SUBJECT, target="the", corruption="subject", other_subject=other
    )
    two = engram.trace(
        lm,
        PROMPT.replace(SUBJECT, other),
        subject=other,
        target="the",
        corruption="subject",
        other_subject=SUBJECT,
        direction="noise",
    )
    for site in one.scores:
        torch.testing.assert_close(one.scores[site], two.scores[site], atol=1e-6, rtol=0)


def _fits(lm, word):
    try:
        engram.trace(
            lm,
            PROMPT,
            subject=SUBJECT,
            target="the",
            corruption="subject",
            other_subject=word,
            sites=["residual"],
        )
    except engram.EngramError:
        return False
    return True
