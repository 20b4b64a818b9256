"""Hooks see, change, and are gone when the block ends, however it ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engram.modules.hooks import StopForward, overlay, record, substitute


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_record_keeps_inputs_and_outputs(model):
    x = torch.randn(2, 3, 4)
    with record(model, inputs=["2"], outputs=["0", "2"]) as seen:
        out = model(x)
    assert torch.equal(seen["0"], model[0](x))
    assert torch.equal(seen["2:input"], model[0](x).relu())
    assert torch.equal(seen["2"], out)
    assert hooks_left(model) == 0


def test_record_keeps_copies_that_later_arithmetic_in_place_cannot_reach(model):
    with record(model, outputs=["2"]) as seen:
        out = model(torch.randn(1, 4))
        out.detach().add_(1)
    assert not torch.equal(seen["2"], out)


def test_record_with_stop_ends_the_forward_pass_as_soon_as_all_is_seen(model):
    later = []
    model[2].register_forward_hook(lambda *_: later.append(1))
    with record(model, outputs=["0"], stop=True) as seen:
        model(torch.randn(1, 4))
        later.append("not reached")
    assert "0" in seen
    assert later == []


def test_record_without_stop_does_not_swallow_somebody_elses_stop(model):
    with pytest.raises(StopForward), record(model, outputs=["0"]):
        raise StopForward
    assert hooks_left(model) == 0


def test_a_misspelt_module_leaves_no_hook_behind(model):
    with pytest.raises(AttributeError, match="nope"), record(model, outputs=["0", "nope"]):
        pass
    assert hooks_left(model) == 0


def test_substitute_changes_the_output_and_only_inside_the_block(model):
    x = torch.randn(2, 4)
    before = model(x)
    with substitute({model[0]: lambda out: out * 0}):
        assert torch.equal(model(x), model[2](torch.zeros(2, 6)))
    assert torch.equal(model(x), before)


def test_an_exception_inside_the_block_removes_the_hooks(model):
    with pytest.raises(KeyboardInterrupt), substitute({model[0]: lambda out: out}):
        raise KeyboardInterrupt
    assert hooks_left(model) == 0


def test_substitute_leaves_the_rest_of_a_tuple_alone():
    class Two(nn.Module):
        def forward(self, x):
            return x, "cache"

    module = Two()
    with substitute({module: lambda out: out + 1}):
        out, rest = module(torch.zeros(2))
    assert torch.equal(out, torch.ones(2))
    assert rest == "cache"


@pytest.mark.parametrize("flat", [False, True], ids=["[b, t, i]", "[b * t, i]"])
def test_overlay_gives_every_row_its_own_merged_weight(model, flat):
    left, right = torch.randn(3, 6, 2), torch.randn(3, 2, 4)
    x = torch.randn(3, 5, 4)
    with overlay(model[0], left, right):
        got = model[0](x.reshape(-1, 4) if flat else x).view(3, 5, 6)
    for b in range(3):
        weight = model[0].weight + left[b] @ right[b]
        torch.testing.assert_close(got[b], x[b] @ weight.T + model[0].bias, atol=1e-5, rtol=1e-5)
