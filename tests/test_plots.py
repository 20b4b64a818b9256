"""Pictures show the numbers they are given, labelled as in the paper, without touching global state."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

from engram.locate.causal_trace import CausalTrace


@pytest.fixture
def trace():
    generator = torch.Generator().manual_seed(0)
    scores = {site: 0.1 + 0.8 * torch.rand(4, 48, generator=generator) for site in ("residual", "mlp", "attention")}
    return CausalTrace(
        prompt="The $ Needle\nis", subject="$ Needle", answer=" Seattle", model="some/gpt2-xl",
        tokens=["The", " $", " Needle", "\nis"], positions=[0, 1, 2, 3], subject_range=(1, 3), corrupted=[1, 2],
        scores=scores, low_score=0.1, high_score=0.9, window=10, samples=10,
    )  # fmt: skip


def maps(figure):
    return [ax for ax in figure.axes if ax.get_title()[:9] == "Restoring"]


def test_three_sites_side_by_side(trace):
    figure = trace.plot()
    assert len(maps(figure)) == 3
    for ax, (_, scores) in zip(maps(figure), trace.scores.items(), strict=True):
        mesh = ax.collections[0]
        assert np.array_equal(mesh.get_array().reshape(4, 48), scores.numpy())
        assert mesh.get_clim() == (trace.low_score, pytest.approx(float(scores.max())))
        assert ax.yaxis_inverted(), "the first token is on top"


def test_one_site(trace):
    figure = trace.plot("mlp")
    (ax,) = maps(figure)
    assert ax.get_xlabel() == "centre of 10 restored MLP layers"
    assert figure.get_size_inches().tolist() == [3.5, 2.0] and figure.dpi == 200


def test_subject_tokens_carry_a_star_and_layers_are_counted_from_zero(trace):
    ax = maps(trace.plot("residual"))[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["The", r" \$*", " Needle*", r"\nis"]
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(layer) for layer in range(0, 42, 5)]
    assert ax.get_xlabel() == "single restored layer of gpt2-xl"


def test_the_answer_is_named_and_the_picture_is_written(trace, tmp_path):
    figure = trace.plot()
    assert [ax.get_title() for ax in figure.axes].count("p(Seattle)") == 3
    for name in ("trace.png", "trace.pdf", "trace.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_letters_of_other_scripts_are_drawn(trace, tmp_path):
    shown = CausalTrace(**{**vars(trace), "tokens": ["Zdeno", " Chára", " Москва", " Ω"]})
    shown.plot().savefig(tmp_path / "trace.png")


def test_drawing_changes_no_global_setting(trace):
    before = dict(matplotlib.rcParams)
    trace.plot()
    assert dict(matplotlib.rcParams) == before


def test_a_trace_without_effect_is_drawn(trace):
    flat = CausalTrace(**{**vars(trace), "scores": {"mlp": torch.full((4, 3), 0.1)}})
    assert flat.plot()
