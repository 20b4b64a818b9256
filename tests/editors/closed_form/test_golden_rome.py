"""`reference=True` is the released ROME, number by number: keys, value, every step's loss
terms, factors, logits.
"""

from __future__ import annotations

import pytest
import torch

import engram
from engram import Fact
from engram.editors.closed_form.rome import RomeConfig, rank_one_update
from engram.editors.closed_form.values import ValueSearch
from engram.editors.contexts import RELEASED
from engram.editors.second_moments.measure import SecondMoment, load_npz, second_moments
from tests.helpers import golden
from tests.helpers.golden import relative

FILES = {
    "float32": ("rome_tiny-gpt2", torch.float32),
    "float64": ("rome_tiny-gpt2.f64", torch.float64),
}
# keys, value, factors; the reference inverts C in float32, whose condition is up to 1e6
LIMITS = {
    "float32": {"key": 1e-5, "value": 1e-4, "factors": 1e-3},
    "float64": dict.fromkeys(("key", "value", "factors"), 1e-8),
}
LAYER = 2
pytestmark = golden.needed


def record(i: int) -> Fact:
    given = golden.inputs()["rome_records"][i]
    return Fact(given["subject"], given["prompt"], given["target_new"]["str"])


@pytest.mark.parametrize("precision", FILES)
@pytest.mark.parametrize("i", range(10))
def test_keys_value_losses_and_factors(i, precision):
    name, dtype = FILES[precision]
    recorded, limit = golden.numbers(name), LIMITS[precision]
    if f"{i}/u" not in recorded:
        pytest.skip(f"record {i} is not in {name}")
    moment = SecondMoment.from_matrix(recorded["mom2"])
    contexts = golden.inputs()["rome_context_templates"]
    update = rank_one_update(
        golden.model(dtype),
        record(i),
        ValueSearch(LAYER, contexts),
        moment,
        RomeConfig(reference=True),
    )
    value = update.value
    assert relative(update.key_f, recorded[f"{i}/k_star"]) < limit["key"]
    assert relative(value.start_d, recorded[f"{i}/target_init"]) < limit["key"]
    assert relative(value.star_d, recorded[f"{i}/v_star"]) < limit["value"]
    losses = torch.tensor(value.losses, dtype=torch.float64)
    assert losses.shape == recorded[f"{i}/losses"].shape, "another number of steps"
    for column in range(4):  # total, nll, kl, weight decay
        assert relative(losses[:, column], recorded[f"{i}/losses"][:, column]) < limit["value"]
    assert relative(torch.tensor(value.delta_norms), recorded[f"{i}/delta_norms"]) < max(
        limit["value"], 1e-6
    )
    assert relative(update.right_f, recorded[f"{i}/u"]) < limit["factors"]
    assert relative(update.left_d, recorded[f"{i}/v"]) < limit["factors"]


@pytest.mark.parametrize("precision", FILES)
@pytest.mark.parametrize("i", range(10))
def test_logits_after_the_edit(i, precision):
    """Through the public call that other models are held against."""
    name, dtype = FILES[precision]
    recorded = golden.numbers(name)
    if f"{i}/post/logits_last" not in recorded:
        pytest.skip(f"record {i} is not in {name}")
    lm, fact = golden.model(dtype), record(i)
    edit = engram.rewrite(
        lm,
        [fact],
        method="rome",
        reference=True,
        layer=LAYER,
        contexts=golden.inputs()["rome_context_templates"],
        second_moments={LAYER: recorded["mom2"]},
    )
    ids = lm.encode(fact.prompt_text).ids
    with edit.applied(lm):
        (logits,) = lm.logits_at([ids], [[len(ids) - 1]])
    limit = LIMITS[precision]["factors"] if precision == "float32" else 1e-8
    torch.testing.assert_close(
        logits[0].double(), recorded[f"{i}/post/logits_last"].double(), atol=limit, rtol=limit
    )


def test_second_moment_of_the_corpus(tmp_path):
    recorded = golden.numbers("rome_tiny-gpt2")
    measured = second_moments(
        golden.model(),
        [LAYER],
        golden.inputs()["corpus"],
        int(recorded["mom2_count"]),
        cache_dir=tmp_path,
    )[LAYER]
    assert measured.count == int(recorded["mom2_count"])
    assert relative(measured.matrix_ff, recorded["mom2"]) < 1e-5


def test_published_statistics_files_are_read():
    path = golden.FOLDER / "data/stats_tiny-llama_layer2.npz"
    if not path.exists():
        pytest.skip("no statistics file here")
    moment = load_npz(path)
    assert moment.count > 0
    assert moment.matrix_ff.shape[0] == moment.matrix_ff.shape[1]
    assert moment.condition() > 1


def test_contexts_are_as_many_and_as_long_as_released():
    assert RELEASED == ((5, 10), (10, 10))
    assert len(golden.inputs()["rome_context_templates"]) == 1 + sum(count for _, count in RELEASED)
