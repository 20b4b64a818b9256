"""`reference=True` is the released MEMIT, number by number: values, losses, keys, what is missing,
solutions, changes.
"""

from __future__ import annotations

import pytest
import torch

import engram
from engram import Fact
from engram.editors.closed_form.mass_settings import MassConfig
from engram.editors.closed_form.solver import Preservation, solve, solve_as_published
from engram.editors.closed_form.subject_keys import SubjectStates
from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_values
from engram.editors.second_moments.measure import SecondMoment
from tests.helpers import golden
from tests.helpers.golden import relative

LAYERS = (1, 2, 3)
NAME = "memit_tiny-gpt2"
CONFIG = ValueConfig(steps=20, clamp=0.75)
pytestmark = golden.needed


def facts() -> list[Fact]:
    return [
        Fact(r["subject"], r["prompt"], r["target_new"]["str"])
        for r in golden.inputs()["memit_records"]
    ]


def contexts() -> list[str]:
    return [template for group in golden.inputs()["memit_context_templates"] for template in group]


@pytest.fixture(scope="module")
def values():
    return dict(
        optimise_values(
            golden.model(), facts(), ValueSearch(LAYERS[-1], contexts(), CONFIG, site="block")
        )
    )


def moments() -> dict[int, torch.Tensor]:
    return {layer: golden.numbers(NAME)[f"layer{layer}/cov"] for layer in LAYERS}


def test_values_and_every_steps_losses(values):
    recorded = golden.numbers(NAME)
    for i, value in values.items():
        assert relative(value.start_d, recorded["z_target_init"][:, i]) < 1e-5
        assert relative(value.star_d, recorded["zs"][:, i]) < 1e-4
        cosine = torch.nn.functional.cosine_similarity(
            value.delta_d, recorded["z_delta"][:, i], dim=0
        )
        assert cosine > 0.9999
        losses = torch.tensor(value.losses, dtype=torch.float64)
        assert losses.shape == recorded[f"z{i}/losses"].shape, "another number of steps"
        assert relative(losses[:, 0], recorded[f"z{i}/losses"][:, 0]) < 1e-4


def test_keys_and_what_is_missing_at_the_first_layer(values):
    recorded, lm = golden.numbers(NAME), golden.model()
    keys_ncf, states_nd = SubjectStates(lm, facts(), contexts(), LAYERS, "block", "auto").at(
        LAYERS[0]
    )
    keys_nf = (keys_ncf[:, 0] + keys_ncf[:, 1:].mean(1)) / 2
    assert relative(keys_nf.T, recorded["layer1/keys"]) < 1e-5
    assert relative(states_nd.T, recorded["layer1/cur_zs"]) < 1e-5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("route", [solve, solve_as_published], ids=["ours", "published"])
def test_solutions_given_the_recorded_keys(layer, route):
    recorded = golden.numbers(NAME)
    moment = SecondMoment.from_matrix(recorded[f"layer{layer}/cov"])
    solved_nf = route(recorded[f"layer{layer}/keys"], Preservation(moment, weight=100.0))
    assert relative(solved_nf.T, recorded[f"layer{layer}/adj_k"]) < 1e-6


@pytest.mark.parametrize("reference", [True, False])
def test_the_edit_as_a_whole(reference):
    """Through the public call: every layer's residuals and solutions, and what the edited model
    says.
    """
    recorded, lm = golden.numbers(NAME), golden.model()
    edit = engram.rewrite(
        lm,
        facts(),
        method="memit",
        layers=LAYERS,
        contexts=contexts(),
        second_moments=moments(),
        preservation=100.0,
        steps=20,
        clamp=0.75,
        keys="halves",
        reference=reference,
        store=False,
    )
    for number, layer in enumerate(LAYERS):
        delta = edit.deltas[f"{lm.parts.mlp_out_name(layer)}.weight"]
        assert (
            relative(delta.left, recorded[f"layer{layer}/targets"] / (len(LAYERS) - number)) < 1e-3
        )
        assert relative(delta.right.T, recorded[f"layer{layer}/adj_k"]) < 1e-3
    assert (
        relative(
            edit.deltas["transformer.h.1.mlp.c_proj.weight"].dense(), recorded["layer1/delta_w"]
        )
        < 1e-3
    )
    with edit.applied(lm):
        for kind in ("new", "true"):
            pairs = [
                (fact.prompt_text, record[f"target_{kind}"]["str"])
                for fact, record in zip(facts(), golden.inputs()["memit_records"], strict=True)
            ]
            mine = torch.stack([log_p.mean() for log_p in lm.log_probs(pairs)])
            torch.testing.assert_close(
                mine, recorded[f"post/rewrite_{kind}"].to(mine), atol=1e-3, rtol=1e-3
            )


def test_settings_that_the_released_code_does_not_have_are_refused():
    with pytest.raises(engram.EngramError, match="reference=True is MEMIT as released"):
        MassConfig(reference=True, slack=0.1)
