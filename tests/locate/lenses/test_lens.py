"""A lens reads the states that the library itself reports, by the model's own head, and says the
numbers of textbooks.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import engram
from engram.errors import FactError, NonFiniteError, SettingError, UnsupportedModelError
from engram.locate.lenses import vocabulary as module
from engram.locate.lenses.lens import LogitLens
from engram.locate.lenses.vocabulary import log_probs, residual_stream, score, settled
from tests.helpers.tiny import FAMILIES, tiny_lm

TEXT = "The tower of Rome is in the city of"


def states_by_the_library(lm, ids):
    """Return transformers' own hidden states [n_layers + 1][t, d]; its last one is normed already,
    so ours is caught by a hook.
    """
    caught = []
    handle = lm.parts.blocks[-1].register_forward_hook(lambda m, a, out: caught.append(out))
    with torch.no_grad():
        out = lm.model(torch.tensor([ids]), output_hidden_states=True)
    handle.remove()
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return [*(state[0] for state in out.hidden_states[: lm.n_layers]), last[0]], out.logits[0]


def norm_of(lm):
    norm = lm.model.get_submodule(lm.parts.layout.norm) if "opt-350m" not in lm.name else None
    return norm or (lambda states: states)


def raw_logits(lm, states):
    """Return the unembedding of states as they are, written out; scaling and soft cap by the
    config's names.
    """
    config = lm.model.config
    if "opt-350m" in lm.name:
        states = lm.model.model.decoder.project_out(states)
    logits = lm.model.get_output_embeddings()(states)
    if config.model_type in ("cohere", "cohere2"):
        logits = logits * config.logit_scale
    if config.model_type == "granite":
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):
        logits = config.final_logit_softcapping * torch.tanh(
            logits / config.final_logit_softcapping
        )
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_row_is_the_models_own_output(family):
    lm = tiny_lm(family)
    if family == "granite":  # a published one's; the config class has 1
        lm.model.config.logits_scaling = 8.0
    ids = lm.encode(TEXT).ids
    with torch.no_grad():
        wanted = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = log_probs(lm, residual_stream(lm, ids)[-1])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    read = engram.lens(lm, TEXT, k=3)
    torch.testing.assert_close(
        read.top_probabilities[-1], wanted.exp().topk(3).values, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(read.kl[-1], torch.zeros(len(ids)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_that_of_plain_hidden_states(family, norm):
    lm = tiny_lm(family, torch.float64)
    if family == "granite":
        lm.model.config.logits_scaling = 8.0
    ids = lm.encode(TEXT).ids
    states, own_logits = states_by_the_library(lm, ids)
    read = engram.lens(lm, TEXT, norm=norm, k=4)
    assert (
        read.rank.shape == read.entropy.shape == (lm.n_layers + 1, len(ids))
        and read.top_ids.shape[:2] == read.rank.shape
    )
    answers = [*ids[1:], int(own_logits[-1].argmax())]
    assert read.answer_ids.tolist() == answers
    final = Categorical(logits=own_logits)
    for row, state in enumerate(states):
        with torch.no_grad():
            here = Categorical(logits=raw_logits(lm, norm_of(lm)(state) if norm else state))
        torch.testing.assert_close(read.entropy[row], here.entropy(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read.kl[row], kl_divergence(final, here), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            read.probability[row], here.probs[range(len(ids)), answers], atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            read.top_probabilities[row], here.probs.sort(-1, descending=True)[0][:, :4]
        )
        order = here.probs.argsort(-1, descending=True).tolist()
        assert read.rank[row].tolist() == [
            order[at].index(answer) + 1 for at, answer in enumerate(answers)
        ]


def test_rank_and_probability_by_hand():
    log_tv = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]).log()
    for token, rank, p in ((3, 1, 0.4), (2, 2, 0.3), (0, 4, 0.1)):
        found_p, found_rank = score(log_tv, torch.tensor([token, token]))
        assert found_rank.tolist() == [rank, 1], "no token is more probable than one of four alike"
        torch.testing.assert_close(found_p, torch.tensor([p, 0.25]))


def test_the_first_row_after_which_nothing_changes_by_hand():
    top_lt = torch.tensor([[7, 1, 5], [7, 5, 2], [7, 3, 5], [7, 3, 9]])
    assert settled(top_lt).tolist() == [0, 2, 3]
    #  never another | changes to 3 in row 2 | in the last row


def test_entropy_and_kl_of_states_that_say_nothing_and_everything():
    """A raw state of zeros reads as the uniform distribution: log v nats of entropy."""
    lm = tiny_lm("gpt2", torch.float64)
    with torch.no_grad():
        lm.parts.embed.weight.zero_()
        lm.model.transformer.wpe.weight.zero_()
    read = engram.lens(lm, TEXT, norm=False)
    torch.testing.assert_close(read.entropy[0], torch.full_like(read.entropy[0], math.log(320)))
    assert read.rank[0].tolist() == [1] * len(read.tokens)


def test_a_target_is_scored_at_every_position():
    lm = tiny_lm("gpt2", torch.float64)
    read = engram.lens(lm, TEXT, target="Paris and London")
    first = lm.target_ids(TEXT, "Paris and London")[0]
    assert read.answer_ids.tolist() == [first] * len(read.tokens)
    assert set(read.answers) == set(lm.token_strings([first]))
    with torch.no_grad():
        wanted = lm.model(torch.tensor([lm.encode(TEXT).ids])).logits[0].softmax(-1)[:, first]
    torch.testing.assert_close(read.probability[-1], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3])
def test_positions_are_read_in_chunks_and_distributions_are_never_kept(at_once, monkeypatch):
    lm = tiny_lm("gpt2", torch.float64)
    whole = engram.lens(lm, TEXT)
    rows, tokens = whole.rank.shape
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", rows * 320 * at_once)
    shapes, own = [], lm.parts.head
    monkeypatch.setattr(
        lm.parts,
        "head",
        lambda states, **how: shapes.append(states.shape[:-1]) or own(states, **how),
    )
    chunked = engram.lens(lm, TEXT)
    assert shapes[0] == (), "the last position, for the model's own answer"
    assert {shape[0] for shape in shapes[1:]} == {rows} and max(
        shape[1] for shape in shapes[1:]
    ) == at_once
    assert sum(shape[1] for shape in shapes[1:]) == tokens
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(chunked, name), value)


def test_half_precision_is_read_in_single():
    read = engram.lens(tiny_lm("llama", torch.bfloat16), TEXT)
    assert read.probability.dtype == read.entropy.dtype == torch.float32
    assert engram.lens(tiny_lm("llama", torch.float64), TEXT).kl.dtype == torch.float64


def test_an_edit_is_seen_while_it_is_applied():
    lm = tiny_lm()
    before = engram.lens(lm, TEXT, target="Paris")
    with torch.no_grad():
        lm.parts.mlp_out(1).weight.mul_(3)
    after = engram.lens(lm, TEXT, target="Paris")
    assert torch.equal(after.probability[:2], before.probability[:2]) and not torch.equal(
        after.kl[2], before.kl[2]
    )


def test_it_can_be_read_and_kept():
    read = engram.lens(tiny_lm(), TEXT, k=3)
    assert isinstance(read, LogitLens) and read.labels() == ["in", "0", "1", "2", "3"]
    token, p = read.top(2, 4)[0]
    assert token == read.top_tokens[int(read.top_ids[2, 4, 0])] and p == float(
        read.top_probabilities[2, 4, 0]
    )
    lines = str(read).splitlines()
    assert lines[0].startswith(
        f"logit lens (with the last norm) at the last token, {read.tokens[-1]!r}; answer "
    )
    assert [line.split()[0] for line in lines[1:]] == ["layer", "in", "0", "1", "2", "3"]
    assert "raw states" in str(engram.lens(tiny_lm(), TEXT, norm=False))
    kept = json.loads(json.dumps(read.to_dict()))
    assert kept["rows"] == read.labels() and kept["rank"] == read.rank.tolist()
    assert kept["top"][2][4] == [[*pair] for pair in read.top(2, 4)]


def test_mistakes_are_explained():
    lm = tiny_lm()
    for k in (0, 321):
        with pytest.raises(
            SettingError,
            match=rf"k={k}: the number of tokens to keep, from 1 to the vocabulary's 320",
        ):
            engram.lens(lm, TEXT, k=k)
    with pytest.raises(FactError, match="target=' ' is empty"):
        engram.lens(lm, TEXT, target=" ")
    with pytest.raises(FactError, match="gives no tokens"):
        engram.lens(lm, "")
    lm.kind = "masked"
    with pytest.raises(
        UnsupportedModelError,
        match=r"tiny-gpt2 is of kind masked: engram.lens .* only a causal model",
    ):
        engram.lens(lm, TEXT)


def test_numbers_that_are_not_finite():
    lm = tiny_lm()
    with torch.no_grad():
        lm.parts.mlp_out(1).weight.fill_(float("nan"))
    with pytest.raises(
        NonFiniteError, match=r"tiny-gpt2 gives states that are not finite.*try dtype=torch.float32"
    ):
        engram.lens(lm, TEXT)
