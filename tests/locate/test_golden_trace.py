"""Traces are the released code's: every cell of every table within 1e-5 of a probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import engram
from tests.helpers import golden

TABLES = {
    "residual": {"none": 10},
    "mlp": {"mlp": 10, "mlp_w3": 3},
    "attention": {"attn": 10, "attn_w4": 4},
}
pytestmark = golden.needed


def test_the_noise_level_is_the_released_codes():
    from engram.locate.corruption import subject_embeddings

    recorded = golden.numbers("trace_tiny-gpt2")
    spread = subject_embeddings(golden.model(), golden.inputs()["trace_noise_subjects"]).std()
    assert float(spread) == pytest.approx(float(recorded["embedding_std"]), rel=1e-6)


@pytest.mark.parametrize("engine", ["replay", "whole"])
@pytest.mark.parametrize("i", range(5))
def test_every_site_and_window(i, engine):
    """With the recorded noise, and with noise drawn by our own rule."""
    recorded, prompt = golden.numbers("trace_tiny-gpt2"), golden.inputs()["trace_prompts"][i]
    own = {"noise": "s3", "noise_subjects": golden.inputs()["trace_noise_subjects"]}
    given = {"noise": recorded[f"{i}/noise_raw"] * float(recorded["noise_level"])}
    for site, tags in TABLES.items():
        for tag, window in tags.items():
            for noise in (given, own) if engine == "replay" else (given,):
                trace = engram.trace(
                    golden.model(),
                    prompt["prompt"],
                    subject=prompt["subject"],
                    sites=[site],
                    window=window,
                    engine=engine,
                    **noise,
                )
                assert trace.subject_range == tuple(recorded[f"{i}/subject_range"].tolist())
                assert trace.high_score == pytest.approx(
                    float(recorded[f"{i}/high_score"]), abs=1e-5
                )
                assert trace.low_score == pytest.approx(
                    float(recorded[f"{i}/{tag}/low_score"]), abs=1e-5
                )
                torch.testing.assert_close(
                    trace.scores[site], recorded[f"{i}/{tag}/scores"].float(), atol=1e-5, rtol=0
                )


def test_uniform_noise():
    recorded, prompt = golden.numbers("trace_tiny-gpt2"), golden.inputs()["trace_prompts"][0]
    level = float(recorded["noise_level"])
    for noise in (f"u{level!r}", recorded["0/noise_raw_uniform"] * level):
        trace = engram.trace(
            golden.model(),
            prompt["prompt"],
            subject=prompt["subject"],
            sites=["residual"],
            noise=noise,
        )
        torch.testing.assert_close(
            trace.scores["residual"], recorded["0/none_uniform/scores"].float(), atol=1e-5, rtol=0
        )


def test_noise_in_place_of_embeddings():
    recorded, prompt = golden.numbers("trace_tiny-gpt2"), golden.inputs()["trace_prompts"][0]
    noise = recorded["0/noise_raw"] * float(recorded["noise_level"])
    trace = engram.trace(
        golden.model(),
        prompt["prompt"],
        subject=prompt["subject"],
        sites=["residual"],
        noise=noise,
        replace=True,
    )
    first = trace.subject_range[0]
    torch.testing.assert_close(
        trace.scores["residual"][first:, :-1],
        recorded["0/none_replace/scores"].float()[first:, :-1],
        atol=1e-5,
        rtol=0,
    )


def test_the_subjects_last_token_alone():
    recorded, prompt = golden.numbers("trace_tiny-gpt2"), golden.inputs()["trace_prompts"][0]
    noise = recorded["0/noise_raw"] * float(recorded["noise_level"])
    trace = engram.trace(
        golden.model(),
        prompt["prompt"],
        subject=prompt["subject"],
        sites=["residual"],
        noise=noise,
        positions="subject_last",
    )
    torch.testing.assert_close(
        trace.scores["residual"], recorded["0/none_subject_last/scores"].float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("severed", ["mlp", "attention"])
@pytest.mark.parametrize("i", range(5))
def test_severed_paths(i, severed):
    """The released code freezes to the states of one draw of noise while the run has the next one
    of the same stream.
    """
    recorded, prompt = golden.numbers("trace_tiny-gpt2"), golden.inputs()["trace_prompts"][i]
    stream, level = np.random.RandomState(1), float(recorded["noise_level"])
    shape = recorded[f"{i}/noise_raw"].shape
    first, second = (torch.from_numpy(stream.randn(*shape)) * level for _ in range(2))
    trace = engram.trace(
        golden.model(),
        prompt["prompt"],
        subject=prompt["subject"],
        sites=["residual"],
        severed=severed,
        noise=second,
        frozen_noise=first,
        positions="subject_last",
    )
    wanted = recorded[f"{i}/severed_{'mlp' if severed == 'mlp' else 'attn'}"].float()
    torch.testing.assert_close(
        trace.scores[f"residual, {severed} severed"][0], wanted, atol=1e-5, rtol=0
    )
