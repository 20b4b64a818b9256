"""A ledger says which facts are in each other's way, and facts that it says so of do spoil each
other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import engram
from engram import Delta, Fact, pocket
from engram.edit.base import describe_base
from engram.edit.edit import Edit, compose
from engram.errors import BaseMismatchError
from engram.evaluate.canary import Canary
from engram.ledger import Ledger
from engram.ledger.conflicts import NEAR, overlaps, same_fact
from tests.helpers.edit_samples import fact, random_edit, tiny, weight_name

LM = tiny()
NAME = weight_name(LM, 1)


def keyed(keys_nf: torch.Tensor, *, seed: int = 1, joint: bool = False, **options) -> Edit:
    """Return an edit of as many facts as keys, whose columns read the keys as rank-one edits do:
    along them, slightly turned.
    """
    edit = random_edit(LM, rank=len(keys_nf), seed=seed, joint=joint, **options)
    (delta,) = edit.deltas.values()
    right_nf = keys_nf + 0.1 * delta.right
    return replace(
        edit, deltas={NAME: Delta(delta.left, right_nf, delta.owners)}, keys={NAME: keys_nf}
    )


def keys_of(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))


# --- the measure ----------------------------------------------------------------------------------


def test_overlap_is_what_a_change_does_to_another_key_over_what_it_does_to_its_own():
    acting, asked = keyed(keys_of(1, 3)), keyed(keys_of(2, 2), seed=2)
    found_nm = overlaps(acting, asked)
    delta, own_nf, others_mf = (
        acting.deltas[NAME],
        acting.keys[NAME].double(),
        asked.keys[NAME].double(),
    )
    for i in range(3):
        alone = torch.outer(delta.left[:, i], delta.right[i]).double()
        for j in range(2):
            assert float(found_nm[i, j]) == pytest.approx(
                float((alone @ others_mf[j]).norm() / (alone @ own_nf[i]).norm())
            )
            v = delta.right[i].double()
            assert float(found_nm[i, j]) == pytest.approx(
                float((v @ others_mf[j]).abs() / (v @ own_nf[i]).abs())
            )


def test_a_key_of_its_own_overlaps_wholly():
    edit = keyed(keys_of(1, 2))
    torch.testing.assert_close(overlaps(edit, edit).diagonal(), torch.ones(2, dtype=torch.float64))


def test_facts_solved_jointly_overlap_with_the_one_whose_key_is_nearest():
    keys_nf = keys_of(1, 3)
    joint, one = keyed(keys_nf, joint=True), keyed(keys_nf[1:2] + 0.05 * keys_of(3, 1), seed=2)
    found_n = overlaps(joint, one)[:, 0]
    matrix = joint.deltas[NAME].dense(torch.float64)
    expected = (matrix @ one.keys[NAME][0].double()).norm() / (matrix @ keys_nf[1].double()).norm()
    torch.testing.assert_close(
        found_n, torch.stack([torch.zeros(()), expected, torch.zeros(())]).double()
    )


def test_a_dense_change_is_measured_alike():
    edit = keyed(keys_of(1, 1))
    dense = replace(edit, deltas={NAME: Delta(edit.deltas[NAME].dense())})
    other = keyed(keys_of(2, 2), seed=2)
    torch.testing.assert_close(overlaps(dense, other), overlaps(edit, other), rtol=1e-5, atol=0)


def test_of_several_weights_the_largest_counts_and_a_fact_without_a_key_overlaps_nowhere():
    a, b = keyed(keys_of(1, 1)), keyed(keys_of(2, 1), seed=2)
    elsewhere = weight_name(LM, 2)
    far = random_edit(LM, (2,), seed=3)
    far = replace(far, keys={elsewhere: keys_of(5, 1)})
    both = compose([a, far])  # the second fact has a row of zeros at the first weight
    torch.testing.assert_close(
        overlaps(both, b), torch.cat([overlaps(a, b), torch.zeros(1, 1).double()])
    )
    two = compose([b, replace(far, keys={elsewhere: keys_of(5, 1)})])
    assert float(overlaps(both, two)[1, 1]) == pytest.approx(1.0)


def test_edits_without_keys_overlap_nowhere():
    a, b = keyed(keys_of(1, 2)), random_edit(LM, seed=2)
    assert not overlaps(a, b).any() and not overlaps(b, a).any()


# --- what is told ---------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "ledger", LM)


def test_facts_are_the_same_by_subject_and_relation():
    first = Fact("Tower", "The {} stands in", "Rome", relation="city")
    assert same_fact(first, Fact("Tower ", "The {} stands in", "Oslo"))
    assert same_fact(first, Fact("Tower", "Where is the {}? In", "Oslo", relation="city"))
    assert not same_fact(first, Fact("Tower", "The {} is made of", "stone", relation="material"))
    assert not same_fact(first, Fact("Bridge", "The {} stands in", "Oslo", relation="city"))
    assert not same_fact(replace(first, relation=None), Fact("Tower", "The {} is in", "Oslo"))


def test_the_same_fact_is_reported_with_its_place(ledger, caplog):
    several = random_edit(LM, rank=2, seed=1, joint=False)
    ledger.add(several)
    newer = replace(random_edit(LM, seed=2), facts=(replace(fact(11), target="Oslo"),))
    (conflict,) = ledger.conflicts(newer)
    assert (conflict.kind, conflict.entry, conflict.index, conflict.overlap) == (
        "same fact",
        1,
        1,
        None,
    )
    assert conflict.other.target == "City 11"
    assert str(conflict) == (
        "'The Tower 11 stands in' -> 'Oslo': same fact as 1.1, 'The Tower 11 stands in' -> 'City "
        "11'"
    )
    ledger.add(newer)
    assert str(conflict) in caplog.text
    ledger.remove("1.1")
    assert [each.entry for each in ledger.conflicts(newer)] == [2]


def test_edits_of_other_models_are_not_compared(ledger):
    with pytest.raises(
        BaseMismatchError, match=r"made on 'tiny-llama' \(llama\), the ledger is about 'tiny-gpt2'"
    ):
        ledger.conflicts(random_edit(tiny("llama")))


def test_near_keys_are_reported_from_either_side(ledger):
    keys_nf = keys_of(1, 3)
    ledger.add(keyed(keys_nf))
    ledger.remove("1.0")  # places are those of the whole entry
    near = keyed(keys_nf[2:] + 0.05 * keys_of(2, 1), seed=2)
    (conflict,) = ledger.conflicts(near)
    assert (conflict.kind, conflict.entry, conflict.index) == ("near keys", 1, 2)
    edit = ledger.show(1)
    assert conflict.overlap == pytest.approx(
        max(float(overlaps(edit, near)[2, 0]), float(overlaps(near, edit)[0, 2]))
    )
    assert (
        f"near keys as 1.2, 'The Tower 12 stands in' -> 'City 12' (overlap {conflict.overlap:.2f})"
        in str(conflict)
    )
    assert ledger.conflicts(near, near=2.0) == ()


def test_an_edit_made_on_top_is_not_warned_of_what_it_stands_on(ledger, caplog):

    ledger.add(keyed(keys_of(1, 1)))
    with ledger.applied(LM):
        base = describe_base(LM, [NAME])
    ledger.add(replace(keyed(keys_of(1, 1), seed=2), base=base), LM, canary=Canary(None, None))
    assert caplog.text == "" and ledger.list()[1].base_entries == (1,)


@pytest.mark.slow
@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_on_a_model_that_knows_facts_the_overlap_tells_which_edits_spoil_each_other(
    tmp_path, pocket_lm
):
    lm = pocket_lm
    wanted = [
        ("Dam Square", "city", "Rome"),
        ("Dam Square", "country", "Spain"),
        ("ABBA", "origin", "Chicago"),
    ]
    known = {(known.subject, known.relation): known for known in pocket.facts()}
    facts = [
        Fact(subject, known[subject, relation].trained()[0], target)
        for subject, relation, target in wanted
    ]
    edits = [engram.rewrite(lm, fact) for fact in facts]
    ledger = Ledger.create(tmp_path / "ledger", lm)
    ledger.add(edits[0])
    assert [each.kind for each in ledger.conflicts(edits[1])] == ["near keys"]
    assert ledger.conflicts(edits[2]) == ()

    def probability(of, *others):
        with compose([of, *others]).applied(lm):
            return lm.probabilities([(of.facts[0].prompt_text, of.facts[0].target)])[0]

    spoilt = min(probability(edits[0], edits[1]), probability(edits[1], edits[0]))
    beside = min(probability(edits[0], edits[2]), probability(edits[2], edits[0]))
    assert min(probability(edit) for edit in edits) > 0.9
    assert spoilt < 0.5 and beside > 0.9
    assert float(overlaps(edits[0], edits[1])) > NEAR > float(overlaps(edits[0], edits[2]))
