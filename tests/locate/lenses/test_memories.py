"""Neurons, value vectors and the tokens they speak for are those of the matrices written out."""

from __future__ import annotations

import json

import pytest
import torch

import engram
from engram.errors import NonFiniteError, SettingError, UnsupportedModelError
from engram.locate.lenses.memories import Memory, ValueVector, vocabulary_scores
from engram.modules.weights import as_linear
from tests.helpers.tiny import DENSE, EXPERTS, tiny_lm

TEXT = "The tower of Rome is in the city of"
LAYER = 2
NORMED_OUTPUT = {"gemma2", "gemma2-short-window", "gemma3_text", "olmo2", "olmo3"}


def keys_by_hand(lm, layer=LAYER):
    """Input of the MLP output matrix [t, f] and what the matrix makes of it [t, d], by one plain
    hook.
    """
    caught = {}
    module = lm.parts.mlp_out(layer)
    handle = module.register_forward_hook(
        lambda m, args, out: caught.update(keys=args[0], out=out.clone())
    )
    ids = lm.encode(TEXT).ids
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    handle.remove()
    bias = 0 if module.bias is None else module.bias.detach()
    return caught["keys"].view(len(ids), -1), caught["out"].view(len(ids), -1) - bias


@pytest.mark.parametrize("family", DENSE)
def test_neurons_are_ranked_by_how_far_they_move_the_stream(family):
    lm = tiny_lm(family, torch.float64)
    keys_tf, out_td = keys_by_hand(lm)
    f = keys_tf.shape[1]
    found = engram.memories(lm, TEXT, LAYER, position=3, neurons=f, k=2)
    values_fd = as_linear(lm.parts.mlp_out(LAYER)).T.detach()
    strengths = [float(abs(keys_tf[3, i]) * values_fd[i].pow(2).sum().sqrt()) for i in range(f)]
    assert [each.strength for each in found.neurons] == pytest.approx(
        sorted(strengths, reverse=True)
    )
    for each in found.neurons:
        assert each.strength == pytest.approx(strengths[each.value.neuron])
        assert each.coefficient == pytest.approx(float(keys_tf[3, each.value.neuron]))
    assert sum(each.share for each in found.neurons) == pytest.approx(1)
    whole = sum(each.coefficient * values_fd[each.value.neuron] for each in found.neurons)
    torch.testing.assert_close(whole, out_td[3])  # all memories together are the MLP's output


@pytest.mark.parametrize("family", DENSE)
def test_raw_scores_are_products_with_the_unembedding(family):
    lm = tiny_lm(family, torch.float64)
    value_d = as_linear(lm.parts.mlp_out(LAYER))[:, 5].detach()
    if "opt-350m" in family:
        value_d = lm.model.model.decoder.project_out(value_d).detach()
    scores = [float(row @ value_d) for row in lm.model.get_output_embeddings().weight.detach()]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    said = engram.promotes(lm, LAYER, 5, k=4, norm=False)
    for found, ids in ((said.promotes, order[:4]), (said.suppresses, order[:-5:-1])):
        assert [token for token, _ in found] == lm.token_strings(ids)
        assert [score for _, score in found] == pytest.approx([scores[i] for i in ids])


@pytest.mark.parametrize("family", DENSE)
def test_scores_through_the_norm_are_the_derivative_of_the_logits(family):
    """The definition itself: how logits change when a small step along v is added to a state.

    A norm also divides by the state's size, whose own change shrinks all logits alike; at a state
    orthogonal to v (and to the all-ones vector, which some norms take out) it does not change to
    first order, and what is left is v's own direction.
    """
    lm = tiny_lm(family, torch.float64)
    value_d = as_linear(lm.parts.mlp_out(LAYER))[:, 5].detach()
    state_d = torch.randn(
        lm.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    basis_d2 = torch.linalg.qr(torch.stack([torch.ones_like(value_d), value_d], 1))[0]
    state_d = state_d - basis_d2 @ (basis_d2.T @ state_d)

    def logits(hidden):
        for module in (lm.parts.norm, lm.parts.project_out):
            hidden = hidden if module is None else module(hidden)
        return hidden @ lm.parts.unembedding.weight.T

    _, derivative_v = torch.autograd.functional.jvp(logits, state_d, value_d)
    found_v = vocabulary_scores(lm, value_d[None])[0].detach()
    assert float(torch.cosine_similarity(found_v, derivative_v, dim=0)) == pytest.approx(
        1, abs=1e-9
    )


def test_the_bias_scaling_and_soft_cap_of_logits_stay_outside():
    lm = tiny_lm("gptj", torch.float64)
    before = engram.promotes(lm, LAYER, 5)
    with torch.no_grad():
        lm.parts.unembedding.bias.add_(torch.arange(320))
    assert engram.promotes(lm, LAYER, 5) == before


@pytest.mark.parametrize("family", DENSE)
def test_it_is_said_where_a_norm_follows(family):
    found = engram.memories(tiny_lm(family), TEXT, LAYER, neurons=2, k=2)
    assert found.output_norm == (family in NORMED_OUTPUT)
    assert ("before the norm of the MLP's output" in str(found)) == found.output_norm


def test_positions_count_from_both_ends():
    lm = tiny_lm()
    tokens = lm.token_strings(lm.encode(TEXT).ids)
    last, same = engram.memories(lm, TEXT, LAYER), engram.memories(lm, TEXT, LAYER, len(tokens) - 1)
    assert last == same and last.token == tokens[-1] and last.position == len(tokens) - 1


def test_a_negative_coefficient_pushes_the_other_way():
    value = ValueVector(0, 7, 1.0, True, (("up", 2.0),), (("down", -3.0),))
    assert Memory(0.5, 0.5, 0.1, value).pushes == (("up", 2.0),)
    assert Memory(-0.5, 0.5, 0.1, value).pushes == (("down", 3.0),)


def test_they_can_be_read_and_kept():
    found = engram.memories(tiny_lm(), TEXT, LAYER, neurons=3, k=4)
    lines = str(found).splitlines()
    assert lines[0] == f"layer 2 at token {found.token!r} (position {found.position})"
    assert [int(line.split()[0]) for line in lines[2:]] == [
        each.value.neuron for each in found.neurons
    ]
    kept = json.loads(json.dumps(found.to_dict()))
    assert kept["neurons"][0]["value"]["promotes"] == [
        [*pair] for pair in found.neurons[0].value.promotes
    ]
    value = found.neurons[0].value
    alone = engram.promotes(tiny_lm(), LAYER, value.neuron, 4)
    assert [token for token, _ in alone.promotes] == [token for token, _ in value.promotes]
    assert [score for _, score in alone.suppresses] == pytest.approx(
        [score for _, score in value.suppresses]
    )
    assert str(alone).splitlines()[0] == f"layer 2, neuron {alone.neuron}"
    assert json.loads(json.dumps(alone.to_dict()))["neuron"] == alone.neuron


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_have_no_single_matrix(family):
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        engram.memories(tiny_lm(family), TEXT, LAYER)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        engram.promotes(tiny_lm(family), LAYER, 0)


def test_mistakes_are_explained():
    lm = tiny_lm()
    with pytest.raises(
        UnsupportedModelError, match="layer=4 does not exist; this model has layers 0 to 3"
    ):
        engram.memories(lm, TEXT, 4)
    with pytest.raises(SettingError, match=r"position=40: the text has \d+ tokens, numbered 0 to"):
        engram.memories(lm, TEXT, LAYER, 40)
    with pytest.raises(
        SettingError, match=r"neurons=0: the number to show, from 1 to the layer's \d+"
    ):
        engram.memories(lm, TEXT, LAYER, neurons=0)
    with pytest.raises(
        SettingError, match="k=321: the number of tokens to show, from 1 to the vocabulary's 320"
    ):
        engram.memories(lm, TEXT, LAYER, k=321)
    with pytest.raises(
        SettingError, match=r"neuron=-1 does not exist; layer 2 has neurons 0 to \d+"
    ):
        engram.promotes(lm, LAYER, -1)
    lm.kind = "encoder-decoder"
    with pytest.raises(
        UnsupportedModelError, match=r"tiny-gpt2 is of kind encoder-decoder: engram\.memories"
    ):
        engram.memories(lm, TEXT, LAYER)


def test_numbers_that_are_not_finite():
    lm = tiny_lm()
    with torch.no_grad():
        lm.parts.mlp_out(0).weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        engram.memories(lm, TEXT, LAYER)
