"""Records measured in one batch, each row with its own record's edit, have the numbers that they
have one by one.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import engram
from engram import pocket
from engram.benchmark import measure as measuring
from engram.benchmark.batched import can_batch, measure_batched
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.data.records import Record
from engram.benchmark.measure import Unit, measure
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.benchmark.one_by_one import measure_one
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.errors import EngramError, FactError, SettingError
from engram.evaluate.probes import Probe
from engram.facts import Fact
from engram.model.generation import Writing, pads_on_the_left, write
from engram.model.language_model import LanguageModel
from engram.modules.hooks import per_row_edits
from engram.rewriting import rewrite_each
from tests.helpers.tiny import DENSE, mostly_slow, tiny_lm

ASKED = MeasureConfig(answer_tokens=2, texts=True, text_tokens=12, drift_every=1)


def record(number: int) -> Record:
    """Answers of one and of several tokens, a neighbour, a text to write on."""
    subject = ("tower", "river", "bridge of Rome")[number % 3]
    fact = Fact(subject, "The {} is located in", "Madrid" if number % 2 else "Paris", "London")
    probes = (
        Probe("rewrite", fact.prompt_text, fact.target, "London"),
        Probe(
            "paraphrase", f"It's what she said: the {subject} runs through", fact.target, "London"
        ),
        Probe("neighbourhood", "The city is in", "London", fact.target),
    )
    return Record(str(number), (fact,), probes, (f"The {subject}", "She plays"))


def random_edit(
    lm: LanguageModel, number: int, layers: tuple[int, ...], *, dense: bool = False
) -> Edit:
    """Low-rank (or dense) changes of MLP output matrices, large enough to be seen."""
    draw = torch.Generator().manual_seed(number)
    deltas = {}
    for layer in layers:
        name = f"{lm.parts.mlp_out_name(layer)}.weight"
        shape = describe_base(lm, [name])["tensors"][name]
        out, into = reversed(shape["shape"]) if shape["transposed"] else shape["shape"]
        left, right = (
            torch.randn(out, 1, generator=draw) / 4,
            torch.randn(1, into, generator=draw) / 4,
        )
        deltas[name] = Delta(left @ right) if dense else Delta(left, right)
    return Edit((record(number).facts[0],), "made up", {}, deltas, describe_base(lm, deltas))


def assert_alike(some: Outcome, others: Outcome) -> None:
    for one, other in zip(some.readings, others.readings, strict=True):
        for name in ("wanted", "unwanted", "correct", "kl"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None), name
            assert a is None or a == pytest.approx(b, rel=1e-4, abs=1e-5), name
        assert one.answer == other.answer
    assert some.texts == others.texts
    for name in ("perplexity", "drift", "fluency", "consistency", "essence"):
        a, b = getattr(some, name), getattr(others, name)
        assert (a is None) == (b is None), name
        assert a is None or a == pytest.approx(b, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("family", mostly_slow(DENSE))
def test_of_every_family(family: str) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    records = [record(n) for n in range(3)]
    edits = [random_edit(lm, 0, (1,)), random_edit(lm, 1, (1, 2)), random_edit(lm, 2, (2,))]
    together = measure_batched(lm, records, edits, ASKED, drifts=[True, False, True])
    for n, (before, after) in enumerate(together):
        plain, base = measure_one(lm, records[n], None, ASKED, drift=n != 1)
        edited, _ = measure_one(lm, records[n], edits[n], ASKED, drift=n != 1, base=base)
        assert_alike(before, plain)
        assert_alike(after, edited)
        assert before.readings != after.readings


def test_dense_changes_ride_along_beside_low_rank_ones() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float64)
    records = [record(n) for n in range(2)]
    edits = [random_edit(lm, 0, (1,), dense=True), random_edit(lm, 1, (1,))]
    assert all(can_batch(lm, edit) for edit in edits)
    for n, (_, after) in enumerate(
        measure_batched(lm, records, edits, ASKED, drifts=[False, False])
    ):
        _, base = measure_one(lm, records[n], None, ASKED)
        assert_alike(after, measure_one(lm, records[n], edits[n], ASKED, base=base)[0])


def test_the_model_is_left_as_it_was() -> None:
    lm = tiny_lm("llama")
    before = {name: each.clone() for name, each in lm.model.state_dict().items()}
    measure_batched(lm, [record(0)], [random_edit(lm, 0, (1,))], ASKED, drifts=[True])
    assert all(torch.equal(each, before[name]) for name, each in lm.model.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )


@pytest.mark.parametrize("method", ["rome", "memit", "pmet", "ultraedit"])
def test_edits_made_in_a_batch_are_those_made_alone(method: str, pocket_lm: LanguageModel) -> None:
    lm = pocket_lm
    facts = [each.facts[0] for each in pocket_benchmark().records[:3]]
    settings = {} if method == "ultraedit" else {"steps": 3, "contexts": ["{}", "It rained. {}"]}
    if method in ("memit", "pmet"):
        settings["store"] = False
    together = rewrite_each(lm, [[fact] for fact in facts], method, **settings)
    if method == "ultraedit":  # standardised over the facts of the batch: one alone has no spread
        assert all(
            isinstance(edit, Edit) and edit.facts == (fact,)
            for edit, fact in zip(together, facts, strict=True)
        )
        return
    for fact, made in zip(facts, together, strict=True):
        alone = engram.rewrite(lm, fact, method, **settings)
        assert isinstance(made, Edit)
        assert made.facts == alone.facts
        assert made.settings == alone.settings
        for name, delta in alone.deltas.items():
            gap = (
                made.deltas[name].dense(torch.float64) - delta.dense(torch.float64)
            ).norm() / delta.norm()
            assert gap < 1e-4


def test_one_fact_that_cannot_be_edited_does_not_cost_the_others(pocket_lm: LanguageModel) -> None:
    lm = pocket_lm
    good = pocket_benchmark().records[0].facts[0]
    bad = Fact("Paris", "word " * 200 + "{} is", "Rome", "London")  # longer than the model takes
    made = rewrite_each(lm, [[bad], [good]], "rome", steps=1, contexts=["{}"])
    assert isinstance(made[0], FactError)
    assert isinstance(made[1], Edit)
    with pytest.raises(SettingError, match="no setting 'stepz'"):
        rewrite_each(lm, [[good]], "rome", stepz=1)
    with pytest.raises(EngramError, match="expected '"):
        rewrite_each(lm, [[good]], "romee")


def test_a_record_whose_edit_fails_counts_with_the_unedited_models_answers(
    pocket_lm: LanguageModel,
) -> None:
    lm = pocket_lm
    fact = Fact("Paris", "word " * 200 + "{} is", "Rome", "London")
    broken = Record(
        "broken", (fact,), (Probe("rewrite", "The Louvre is in the city of", "Rome", "Paris"),)
    )
    (found,) = measure(
        lm,
        Unit(((1, broken),), "rome", {"steps": 1, "contexts": ["{}"]}),
        MeasureConfig(answer_tokens=1),
    )
    assert found.error is not None
    assert found.after == found.before


def test_an_editor_does_not_see_what_its_edit_is_measured_by() -> None:
    lm, seen = tiny_lm("gpt2"), []

    def rewrite_each(lm, facts, method, **settings):
        seen.extend(facts)
        return [random_edit(lm, 0, (1,))]

    measured = record(0)
    assert measured.facts[0].paraphrases and measured.facts[0].neighbours
    with patch.object(measuring, "rewrite_each", rewrite_each):
        list(measure(lm, Unit(((0, measured),), "ike"), MeasureConfig(answer_tokens=1)))
    assert [(fact.paraphrases, fact.neighbours) for (fact,) in seen] == [((), ())]


def test_an_edit_that_ruins_the_model_fails_every_probe_and_costs_nobody_else() -> None:
    lm = tiny_lm("gpt2")
    nan, good = random_edit(lm, 0, (1,)), random_edit(lm, 1, (1,))
    (name,) = nan.deltas
    ruin = replace(
        nan, deltas={name: Delta(nan.deltas[name].left * 1e30, nan.deltas[name].right * 1e30)}
    )
    with patch.object(measuring, "rewrite_each", lambda *args, **settings: [ruin, good]):
        first, second = measure(
            lm,
            Unit(((1, record(0)), (2, record(1))), "rome"),
            MeasureConfig(answer_tokens=1, drift_every=0),
        )
    assert first.error is not None
    assert all(each.wanted == each.unwanted and each.correct == 0 for each in first.after.readings)
    assert second.error is None
    assert second.after != second.before


def test_texts_do_not_depend_on_who_is_written_beside_them(pocket_lm: LanguageModel) -> None:
    lm = pocket_lm
    prompts = ["Paris is", "The first years of Wolfgang Amadeus Mozart were spent in", "In Rome,"]
    rows = [
        Writing(tuple(lm.encode(prompt).ids), 12, seed)
        for prompt in prompts
        for seed in (None, 1, 2)
    ]
    together = write(lm, rows)
    assert pads_on_the_left(lm)
    assert together == [write(lm, [row])[0] for row in rows]
    assert together[1] != together[2], "each text has its own draws"
    assert together == write(lm, rows), "the same seeds give the same texts"


def test_greedy_writing_is_what_the_library_writes(pocket_lm: LanguageModel) -> None:
    lm = pocket_lm
    prompt = pocket.facts()[0].prompts()[0].replace("{}", pocket.facts()[0].subject)
    (ids,) = write(lm, [Writing(tuple(lm.encode(prompt).ids), 6)])
    said, _, _ = str(lm.tokenizer.decode(ids)).partition(
        "<|endoftext|>"
    )  # behind which the library does not go on
    assert prompt + said == lm.generate(prompt, 6)


def test_rows_carry_their_owners_changes_in_any_order() -> None:
    layer = torch.nn.Linear(3, 2)
    left, right, x = torch.randn(2, 2, 1), torch.randn(2, 1, 3), torch.randn(3, 4, 3)
    for change in ((left, right), left @ right):
        with per_row_edits({layer: change})([1, 0, 1]):
            got = layer(x)
        for row, owner in enumerate([1, 0, 1]):
            wanted = x[row] @ (layer.weight + left[owner] @ right[owner]).T + layer.bias
            torch.testing.assert_close(got[row], wanted)
