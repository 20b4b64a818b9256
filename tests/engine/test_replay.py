"""The engine gives the model's own numbers, on every family, whichever positions and rows are run
again.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import engram
from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_value
from engram.engine.recording import record_run
from engram.engine.replayable import replayable
from engram.engine.shared_prompts import record_shared_prefixes
from engram.engine.suffix import Suffix
from engram.facts import Fact
from engram.model.tokens import pad_right
from engram.modules.hooks import substitute
from tests.helpers.tiny import DENSE, FAMILIES, PARTLY_FLOAT32, crossed, tiny_lm

# Families whose own code computes a part in float32, whatever the model's dtype: there 1e-10 is
# beyond reach.


def tolerance(family: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-5
    return 3e-6 if family in PARTLY_FLOAT32 else 1e-10  # of float32, as CPUs differ


PROMPT, SUBJECT = "The tower of Rome is in the city of", "tower of Rome"
CONTEXTS = ["{}", "A long time ago. {}", "He sings. {}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_replayed(family):
    assert replayable(tiny_lm(family))


@pytest.mark.parametrize(("family", "dtype"), crossed(FAMILIES, torch.float64, torch.float32))
def test_a_trace_by_replay_is_the_trace_by_whole_forward_passes(family, dtype):
    lm = tiny_lm(family, dtype)
    both = [
        engram.trace(lm, PROMPT, subject=SUBJECT, noise=0.5, samples=2, window=3, engine=engine)
        for engine in ("replay", "whole")
    ]
    for site in both[0].scores:
        assert both[0].effects(site).abs().max() > 1e-7, (
            "the noise changes nothing: the comparison would be empty"
        )
        torch.testing.assert_close(
            both[0].scores[site], both[1].scores[site], atol=tolerance(family, dtype), rtol=0
        )


@pytest.mark.parametrize("prompt", ["The {} is in", "The {}"])
@pytest.mark.parametrize("kl_position", ["lookup", "last"])
@pytest.mark.parametrize(
    "contexts", [["{}"], CONTEXTS, ["{}", "A {}"]], ids=["bare", "several", "two"]
)
def test_every_shape_of_batch_gives_the_same_value(prompt, kl_position, contexts):
    """Prompts shorter and longer than the penalty's own, subjects at the end, one context and
    several.
    """
    lm = tiny_lm("llama", torch.float64)
    fact, config = (
        Fact("tower of Rome", prompt, "in Paris"),
        ValueConfig(steps=4, kl_position=kl_position),
    )
    both = [
        optimise_value(lm, fact, ValueSearch(1, contexts, config, engine=engine))
        for engine in ("replay", "whole")
    ]
    torch.testing.assert_close(
        *(torch.tensor(each.losses, dtype=torch.float64) for each in both), atol=1e-8, rtol=1e-7
    )


@pytest.mark.parametrize(("family", "dtype"), crossed(DENSE, torch.float64, torch.float32))
def test_a_value_by_replay_is_the_value_by_whole_forward_passes(family, dtype):
    """Rows whose subjects end at different positions, several target tokens, the loss at every
    step.
    """
    lm, limit = tiny_lm(family, dtype), tolerance(family, dtype)
    fact = Fact(
        "tower of Rome", "The {} is in", "Paris and London"
    )  # near enough for the shortest window
    both = [
        optimise_value(lm, fact, ValueSearch(1, CONTEXTS, ValueConfig(steps=4), engine=engine))
        for engine in ("replay", "whole")
    ]
    losses = [torch.tensor(value.losses, dtype=torch.float64) for value in both]
    assert losses[0][:, 1].std() > 1e-6, "the value changes nothing: the comparison would be empty"
    torch.testing.assert_close(losses[0][0], losses[1][0], atol=10 * limit, rtol=10 * limit)
    later = max(
        100 * limit, 1e-6
    )  # Adam divides by |gradient| + 1e-8, so that gradients near 0 make rounding large
    torch.testing.assert_close(losses[0], losses[1], atol=later, rtol=later)
    torch.testing.assert_close(both[0].star_d, both[1].star_d, atol=later, rtol=later)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("starts", [3, [2, 5]], ids=["one start", "two starts"])
def test_a_changed_state_has_the_consequences_it_has_in_the_model(family, starts):
    """Change what enters block 1 at the suffix: the blocks above, replayed, say what the model
    itself says.
    """
    lm, limit = tiny_lm(family, torch.float64), tolerance(family, torch.float64)
    texts = ["The river runs through London.", "She plays the piano and sings."]
    ids_bt = pad_right([lm.encode(text).ids[:9] for text in texts])
    suffix = Suffix(record_run(lm, ids_bt), starts, 4)
    first = [starts] * 2 if isinstance(starts, int) else starts
    shift_btd = torch.zeros(*ids_bt.shape, lm.d_model, dtype=lm.dtype)
    for row, start in enumerate(first):
        shift_btd[row, start : start + 4] = torch.randn(
            4, lm.d_model, generator=torch.Generator().manual_seed(row)
        )
    with substitute({lm.parts.blocks[0]: lambda out: out + shift_btd}):
        wanted = record_run(lm, ids_bt)
    hidden = suffix.states(1) + torch.stack(
        [shift_btd[row, start : start + 4] for row, start in enumerate(first)]
    )
    with torch.no_grad():
        for layer in range(1, lm.n_layers):
            last = suffix.last_positions(layer, hidden)
            hidden = suffix.block(layer, hidden)
            expected = torch.stack(
                [wanted.hidden[layer + 1][row, s : s + 4] for row, s in enumerate(first)]
            )
            torch.testing.assert_close(hidden, expected, atol=limit, rtol=limit)
            torch.testing.assert_close(last, expected[:, -1:], atol=limit, rtol=limit)


def test_a_model_that_surprises_us_falls_back_to_whole_forward_passes(caplog):
    lm = tiny_lm("llama")
    inner = lm.parts.blocks[2].forward
    lm.parts.blocks[2].forward = lambda *args, strange=None, **kwargs: (
        inner(*args, **kwargs) * strange.mean()
    )
    lm.parts.blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "strange": torch.ones(args[0].shape[1])}),
        with_kwargs=True,
    )
    with caplog.at_level("DEBUG", logger="engram.engine.suffix"):
        assert not replayable(lm)
    assert "whole forward passes" in caplog.text
    assert (
        engram.trace(lm, PROMPT, subject=SUBJECT, noise=0.5, samples=2)
        .scores["mlp"]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("starts", [3, [2, 5]], ids=["one start", "two starts"])
def test_any_columns_of_a_block_can_be_read_alone(family, starts):
    """In any order and twice too: equal to the whole block there, in every block and with masks of
    the blocks' own.
    """
    lm, limit = tiny_lm(family, torch.float64), tolerance(family, torch.float64)
    texts = [
        "The river runs through London and Rome.",
        "She plays the piano; he plays the guitar and sings.",
    ]
    suffix = Suffix(
        record_run(lm, pad_right([lm.encode(text).ids[:13] for text in texts])), starts, 8
    )
    columns_br = torch.tensor([[0, 3, 7], [4, 1, 1]])
    with torch.no_grad():
        for layer in range(lm.n_layers):
            wanted = suffix.block(layer, suffix.states(layer))[torch.arange(2)[:, None], columns_br]
            read = suffix.at_columns(layer, suffix.states(layer), columns_br)
            torch.testing.assert_close(read, wanted, atol=limit, rtol=limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_up_to_a_block_and_some_of_its_rows_are_parts_of_the_whole(family):
    lm, limit = tiny_lm(family, torch.float64), tolerance(family, torch.float64)
    texts = [
        "The river runs through London and Rome.",
        "She plays the piano; he plays the guitar.",
        "A B C 1 2 3 4 5 6 7",
    ]
    ids_bt = pad_right([lm.encode(text).ids[:9] for text in texts])
    whole, cut = record_run(lm, ids_bt), record_run(lm, ids_bt, until=2)
    assert (len(cut.hidden), len(cut.keys), len(cut.calls)) == (4, 3, 3)
    for mine, wanted in zip(
        cut.hidden + cut.keys + cut.values,
        whole.hidden[:4] + whole.keys[:3] + whole.values[:3],
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, atol=limit, rtol=limit)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )
    for recording in (cut, whole):
        for rows in ([2], [2, 0], [0, 1, 2]):
            some = recording.select(torch.tensor(rows), 1)
            again = some.select(
                torch.arange(len(rows)).flip(0), 2
            )  # twice, the second time turned round
            suffix, turned = Suffix(some, 4, 3), Suffix(again, 4, 3)
            with torch.no_grad():
                for layer in (1, 2):
                    leaving = suffix.block(layer, suffix.states(layer))
                    torch.testing.assert_close(
                        leaving, whole.hidden[layer + 1][rows, 4:7], atol=limit, rtol=limit
                    )
                torch.testing.assert_close(
                    turned.block(2, turned.states(2)), leaving.flip(0), atol=limit, rtol=limit
                )


def test_a_selection_of_a_recording_lets_the_rest_go():
    """Neither the blocks below nor the other rows are held any longer, by the recorded arguments
    either.
    """
    lm = tiny_lm("llama")
    recording = record_run(lm, torch.arange(40).view(4, 10))
    below, inside = (weakref.ref(recording.keys[layer]) for layer in (0, 3))
    kept = recording.select(torch.tensor([1]), 2)
    del recording
    gc.collect()
    assert below() is None and inside() is None
    assert len(kept.keys[3]) == 1 and kept.keys[0].numel() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_begin_alike_are_recorded_as_they_are_alone(family):
    """Rows 0, 3, 6 begin with nothing in common, 1, 4, 7 with three tokens, 2, 5, 8 with five;
    behind them they differ in length.
    """
    lm, limit = tiny_lm(family, torch.float64), tolerance(family, torch.float64)
    draw, vocabulary = torch.Generator().manual_seed(0), int(lm.model.config.vocab_size)
    beginnings = ([], [3, 4, 5], [6, 7, 8, 9, 3])
    rows = []
    for length in (4, 6, 5):
        rest = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        rows += [[*beginning, *rest] for beginning in beginnings]
    module = lm.parts.site_module_name("attention", 1)
    found = record_shared_prefixes(
        lm, rows, [0, 3, 5], layer=1, length=12, inputs=[lm.parts.block_name(2)], outputs=[module]
    )
    for row, ids in enumerate(rows):
        alone = record_run(lm, pad_right([ids]), inputs=[lm.parts.block_name(2)], outputs=[module])
        start, end = len(beginnings[row % 3]), len(ids)
        pairs = [
            (found.hidden[n][row, start:end], alone.hidden[n][0, start:])
            for n in range(1, lm.n_layers + 1)
        ]
        pairs += [(found.keys[n][row, :, :end], alone.keys[n][0]) for n in range(1, lm.n_layers)]
        pairs += [
            (found.values[n][row, :, :end], alone.values[n][0]) for n in range(1, lm.n_layers)
        ]
        pairs += [
            (found.seen[name][row, start:end], alone.seen[name].view(end, -1)[start:])
            for name in alone.seen
        ]
        assert len(pairs) == 3 * lm.n_layers
        for there, expected in pairs:
            torch.testing.assert_close(there, expected, rtol=limit, atol=limit)
