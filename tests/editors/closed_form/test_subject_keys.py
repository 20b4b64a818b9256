"""Keys and states at subjects are those of whole forward passes, whatever is edited below and
however rows are cut up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from engram.editors.closed_form import subject_keys as subject_states
from engram.editors.closed_form.subject_keys import SubjectStates
from tests.helpers.rewrite_samples import CONTEXTS
from tests.helpers.tiny import DENSE, PARTLY_FLOAT32, tiny_lm
from tests.helpers.value_samples import FACTS, SITES, VARIED, slowly


@torch.no_grad()
def disturb(lm: Any, layer: int) -> None:
    """Another weight of the MLP's output, as an edit leaves it."""
    module = lm.parts.mlp_out(layer)
    shape = module.weight.shape
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
    module.weight += 0.5 * noise / (shape[0] if isinstance(module, Conv1D) else shape[1]) ** 0.5


@pytest.mark.parametrize(
    ("family", "site", "engine"),
    [(family, "block", "replay") for family in DENSE]
    + [
        (family, site, engine)
        for family in VARIED
        for site in SITES
        for engine in ("replay", "whole")
    ],
)
def test_they_are_those_of_whole_forward_passes_over_the_edited_model(family, site, engine):
    """Layers 0, 1 and 3, each changed once it was read: later ones see it, the state is read at the
    last one.
    """
    lm, limit = tiny_lm(family, torch.float64), 1e-5 if family in PARTLY_FLOAT32 else 1e-10
    layers = [0, 1, 3]
    state_of = lm.parts.blocks[3] if site == "block" else lm.parts.mlp_out(3)
    facts, contexts = FACTS[:4:3], CONTEXTS[:2]
    states = SubjectStates(lm, facts, contexts, layers, site, engine)
    before = None
    for layer in layers:
        keys_ncf, states_nd = states.at(layer)
        for fact, keys_cf, state_d in zip(facts, keys_ncf, states_nd, strict=True):
            rows = [
                slowly(lm, context.replace("{}", fact.prompt_text), fact.subject, layer, state_of)
                for context in contexts
            ]
            torch.testing.assert_close(
                keys_cf, torch.stack([key for key, _ in rows]), atol=limit, rtol=limit
            )
            torch.testing.assert_close(state_d, rows[0][1], atol=limit, rtol=limit)
        assert before is None or (states_nd - before).abs().max() > 1e-3, (
            "the changes below are not seen"
        )
        before = states_nd
        disturb(lm, layer)


def test_they_come_in_the_order_of_the_facts():
    """However rows were sorted inside: each fact's are those it has alone."""
    lm = tiny_lm("llama", torch.float64)
    facts = [FACTS[i] for i in (3, 1, 0, 2, 4)]
    states = SubjectStates(lm, facts, CONTEXTS, [1, 2], "block", "auto")
    order = torch.tensor(states.chunks[0].facts)
    assert not torch.equal(order, order.argsort()), (
        "sorting twice puts them back: the test would be empty"
    )
    together = states.at(1)
    for i, fact in enumerate(facts):
        alone = SubjectStates(lm, [fact], CONTEXTS, [1, 2], "block", "auto").at(1)
        for mine, wanted in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[i], wanted[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 8, 13])
@pytest.mark.parametrize("engine", ["replay", "whole"])
def test_they_do_not_depend_on_how_many_rows_are_run_at_once(engine, rows, monkeypatch):
    lm = tiny_lm("llama", torch.float64)
    at_once = SubjectStates(lm, FACTS, CONTEXTS, [1, 2], "block", engine)
    monkeypatch.setattr(subject_states, "_ROWS", rows)
    in_parts = SubjectStates(lm, FACTS, CONTEXTS, [1, 2], "block", engine)
    assert len(at_once.chunks) == 1 < len(in_parts.chunks)
    for layer in (1, 2):
        for mine, wanted in zip(in_parts.at(layer), at_once.at(layer), strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-10, rtol=1e-10)
        disturb(lm, layer)


def test_half_precision_is_read_as_float32():
    keys_ncf, states_nd = SubjectStates(
        tiny_lm("llama", torch.bfloat16), FACTS, CONTEXTS, [1], "block", "auto"
    ).at(1)
    assert keys_ncf.dtype == states_nd.dtype == torch.float32
    assert keys_ncf.shape[:2] == (len(FACTS), len(CONTEXTS)) and not keys_ncf.requires_grad


def test_no_hook_is_left():
    lm = tiny_lm("gpt2")
    for engine in ("replay", "whole"):
        SubjectStates(lm, FACTS, CONTEXTS, [1], "attention+mlp", engine).at(1)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )
