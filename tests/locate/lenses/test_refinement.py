"""The states around every MLP are told apart as the blocks make them, and the four kinds are
counted as published.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import engram
from engram.errors import NonFiniteError, UnsupportedModelError
from engram.locate.lenses.refinement import KINDS, POINTS, Refinement
from tests.helpers.tiny import FAMILIES, tiny_lm

TEXT = "The tower of Rome is in the city of"
NO_SUM = {"bloom-postnorm", "opt-350m-like"}  # these norm the residual stream itself


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_SUM))
def test_the_points_of_a_block_are_its_input_attention_and_mlp(family):
    """By plain hooks: input, input + attention, MLP, and the block's own output, each through the
    model's own head.
    """
    lm = tiny_lm(family, torch.float64)
    scale = 1.0
    if family == "granite":  # a published one's; the config class has 1
        lm.model.config.residual_multiplier = scale = 0.22
        for block in lm.parts.blocks:
            block.residual_multiplier = scale
    ids = lm.encode(TEXT).ids
    caught = {}
    handles = []
    for layer, block in enumerate(lm.parts.blocks):
        for name, module in (
            ("block", block),
            ("attention", lm.parts.attention(layer)),
            ("mlp", lm.parts.mlp(layer)),
        ):
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out, key=(name, layer): caught.update({key: (a, copy(out))})
                )
            )
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    found = engram.refinement(lm, TEXT)
    answers = torch.tensor([*ids[1:], int(logits[-1].argmax())])

    def tensor(name, layer):
        return caught[name, layer][1].view(len(ids), -1)

    for layer in range(lm.n_layers):
        entering = caught["block", layer][0][0].view(len(ids), -1)
        points = {
            "entering": entering,
            "middle": entering + scale * tensor("attention", layer),
            "mlp": scale * tensor("mlp", layer),
            "leaving": tensor("block", layer),
        }
        for point, state in points.items():
            with torch.no_grad():
                p = lm.parts.head(state).softmax(-1)
            assert torch.equal(found.top_ids[point][layer], p.argmax(-1)), (point, layer)
            torch.testing.assert_close(
                found.probability[point][layer],
                p[range(len(ids)), answers].double(),
                atol=1e-5,
                rtol=1e-4,
            )


def copy(out):
    """Of a module's tensor: Falcon goes on to add to its MLP's in place."""
    return (out[0] if isinstance(out, tuple) else out).clone()


def test_it_agrees_with_the_lens():
    lm = tiny_lm("llama", torch.float64)
    for norm in (True, False):
        blocks, states = engram.refinement(lm, TEXT, norm=norm), engram.lens(lm, TEXT, norm=norm)
        assert torch.equal(blocks.top_ids["leaving"], states.top_ids[1:, :, 0])
        assert torch.equal(blocks.top_ids["entering"], states.top_ids[:-1, :, 0])
        assert torch.equal(blocks.rank["leaving"], states.rank[1:])
        torch.testing.assert_close(blocks.probability["entering"], states.probability[:-1])


def by_hand(entering, middle, mlp, leaving):
    ids = dict(
        zip(POINTS, (torch.tensor([row]) for row in (entering, middle, mlp, leaving)), strict=True)
    )
    names = {i: str(i) for i in range(10)}
    return Refinement(
        "a b c d",
        "m",
        True,
        list("abcd"),
        list("bcde"),
        ids,
        names,
        {"leaving": ids["leaving"] / 10},
        ids,
    )


def test_who_changed_it_and_the_four_kinds_by_hand():
    found = by_hand(
        entering=[1, 1, 1, 1], middle=[1, 2, 1, 2], mlp=[1, 3, 4, 5], leaving=[1, 2, 4, 6]
    )
    assert found.changed_by_attention.tolist() == [[False, True, False, True]]
    assert found.changed_by_mlp.tolist() == [[False, False, True, True]]
    one_position_each = {kind: table.tolist()[0] for kind, table in found.kinds().items()}
    assert one_position_each == {kind: [at == i for at in range(4)] for i, kind in enumerate(KINDS)}
    assert found.shares() == {
        "changed by attention": [0.5],
        "changed by MLP": [0.5],
        **{kind: [0.25] for kind in KINDS},
    }


def test_every_cell_is_of_exactly_one_kind():
    found = engram.refinement(tiny_lm(), TEXT)
    assert torch.stack([*found.kinds().values()]).sum(0).unique().tolist() == [1]


def test_a_target_is_scored():
    lm = tiny_lm()
    found = engram.refinement(lm, TEXT, target="Paris")
    torch.testing.assert_close(
        found.probability["leaving"], engram.lens(lm, TEXT, target="Paris").probability[1:]
    )


def test_it_can_be_read_and_kept():
    found = engram.refinement(tiny_lm(), TEXT)
    lines = str(found).splitlines()
    assert (
        lines[0].startswith(f"at token {found.tokens[-1]!r}; answer {found.answers[-1]!r}")
        and f"over all {len(found.tokens)} positions" in lines
    )
    kept = json.loads(json.dumps(found.to_dict()))
    assert kept["top"]["mlp"][2][-1] == found.top("mlp", 2) and kept["shares"] == found.shares()


@pytest.mark.parametrize("family", sorted(NO_SUM))
def test_a_block_that_norms_its_stream_is_refused(family):
    with pytest.raises(
        UnsupportedModelError, match=r"norm the stream in between.*engram.lens works"
    ):
        engram.refinement(tiny_lm(family), TEXT)
    assert engram.lens(tiny_lm(family), TEXT)


def test_blocks_of_one_part_are_refused():
    lm = tiny_lm()
    lm.parts.layout = replace(lm.parts.layout, attention="mlp")
    with pytest.raises(
        UnsupportedModelError, match=r"tiny-gpt2 \(gpt2\) have no attention and MLP to tell apart"
    ):
        engram.refinement(lm, TEXT)


def test_models_and_numbers_that_cannot_be_read():
    lm = tiny_lm()
    with torch.no_grad():
        lm.parts.mlp_out(1).weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        engram.refinement(lm, TEXT)
    lm.kind = "masked"
    with pytest.raises(UnsupportedModelError, match=r"of kind masked: engram\.refinement"):
        engram.refinement(lm, TEXT)
