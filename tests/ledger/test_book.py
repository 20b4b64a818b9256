"""A ledger holds the edits of one model: what is in force is the base plus their sum, whatever came
and went before.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import engram
from engram import Fact
from engram.edit.base import describe_base
from engram.edit.checkpoint import revert_checkpoint
from engram.edit.edit import Edit, compose
from engram.errors import (
    BaseMismatchError,
    CanaryError,
    EngramError,
    EngramFileError,
    FactError,
    SettingError,
)
from engram.evaluate.canary import Canary
from engram.ledger import Ledger
from engram.modules.fingerprints import fingerprint
from tests.helpers.edit_samples import random_edit, same_bits, tiny, weight_name, weights
from tests.helpers.tiny import tiny_folder, tiny_lm

LM = tiny()


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "ledger", LM)


_BASE = tiny()  # another copy of the same model, on which nothing is ever laid
NOTHING = Canary(
    max_perplexity_ratio=None, max_norm_ratio=None
)  # for the model above, which has no tokenizer to read text with


def on_top(lm: Any, edit: Edit) -> Edit:
    """Return the same change, as if it had been computed on the weights as they are now."""
    return replace(edit, base=describe_base(lm, edit.deltas))


def directly(edits: list[Edit], name: str) -> torch.Tensor:
    """Return a weight of the base plus a sum of changes, in float64 and by hand."""
    total = _BASE.model.get_parameter(name).detach().double()
    for edit in edits:
        if name in edit.deltas:
            total = total + edit.deltas[name].dense(torch.float64).T
    return total


# --- what is in it --------------------------------------------------------------------------------


def test_entries_are_numbered_as_they_come(ledger):
    first, second = (ledger.add(random_edit(LM, rank=2, seed=seed)) for seed in (1, 2))
    assert (first.number, second.number) == (1, 2)
    assert ledger.list() == (first, second)
    assert (
        first.facts[1].subject == "Tower 11" and first.facts[1].paraphrases == ()
    )  # the evidence is in the edit
    assert first.active == (0, 1) and first.status == "active" and first.method == "random"
    assert repr(ledger).endswith("base 'tiny-gpt2', 2 entries, 4 facts)")


def test_what_was_added_is_there_when_it_is_opened_again(ledger):
    edit = random_edit(LM, (0, 2), rank=2).with_receipt({"passed": True})
    ledger.add(edit)
    again = Ledger.open(ledger.folder)
    assert again.list() == ledger.list()
    assert again.show(1) == edit
    assert (ledger.folder / "edits" / "0001" / "edit.json").exists()
    lines = (ledger.folder / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["facts"][0]["target"] == "City 10"  # to be read without us


def test_what_is_in_force_is_one_edit_of_the_base(ledger):
    edits = [
        random_edit(LM, layers, rank=2, seed=i) for i, layers in enumerate([(1,), (0, 1), (2,)])
    ]
    for edit in edits:
        ledger.add(edit)
    assert ledger.edit().deltas == compose(edits).deltas
    with ledger.applied(LM):
        applied = weights(LM)
    for layer in range(3):
        name = weight_name(LM, layer)
        torch.testing.assert_close(applied[name].double(), directly(edits, name), rtol=0, atol=1e-7)


def test_an_empty_ledger_is_the_base(ledger):
    before = weights(LM)
    with ledger.applied(LM) as lm:
        assert lm is LM and same_bits(weights(LM), before)
    with pytest.raises(
        EngramError, match=r"nothing is in force in .*: the model with it is its base, 'tiny-gpt2'"
    ):
        ledger.edit()


# --- taking out -----------------------------------------------------------------------------------


def test_what_is_taken_out_leaves_what_had_been_without_it(ledger, tmp_path):
    edits = [random_edit(LM, (1,), rank=2, seed=seed, joint=False) for seed in range(4)]
    for edit in edits:
        ledger.add(edit)
    assert ledger.remove(2) == ()
    ledger.remove("4.0")
    without = Ledger.create(tmp_path / "other", LM)
    for edit in (edits[0], edits[2], edits[3].without(0)):
        without.add(edit)
    with ledger.applied(LM), torch.no_grad():
        one = weights(LM)
    with without.applied(LM):
        assert same_bits(one, weights(LM))
    assert [(entry.number, entry.status) for entry in ledger.list()] == [
        (1, "active"),
        (3, "active"),
        (4, "1 of 2 facts"),
    ]


def test_a_fact_is_taken_out_by_itself(ledger):
    edit = random_edit(LM, rank=2, joint=False)
    ledger.add(edit)
    ledger.remove(edit.facts[1])
    assert ledger.edit().deltas == edit.without(1).deltas
    with pytest.raises(
        FactError, match=r"is not in force; none of the 1 facts is about that subject"
    ):
        ledger.remove(edit.facts[1])
    with pytest.raises(
        FactError,
        match=r"-> 'Elsewhere' is not in force; 1.0: 'The Tower 10 stands in' -> 'City 10'",
    ):
        ledger.remove(replace(edit.facts[0], target="Elsewhere"))


def test_a_fact_in_force_twice_has_to_be_told_by_its_number(ledger):
    edit = random_edit(LM)
    ledger.add(edit)
    ledger.add(replace(random_edit(LM, seed=2), facts=edit.facts))
    with pytest.raises(
        FactError, match=r"is in force more than once, as 1\.0, 2\.0; give one of these"
    ):
        ledger.remove(edit.facts[0])
    ledger.remove("2.0")
    assert [entry.number for entry in ledger.list()] == [1]


def test_facts_solved_jointly_go_together_or_not_at_all(ledger):
    ledger.add(random_edit(LM, rank=2))
    with pytest.raises(EngramError, match="facts 0, 1 were solved jointly"):
        ledger.remove("1.0")
    assert ledger.list()[0].active == (0, 1)
    ledger.remove(1)
    assert ledger.list() == ()


def test_names_that_name_nothing_are_refused(ledger):
    ledger.add(random_edit(LM, rank=2, joint=False))
    for name in ("first", "1.x", "1.", "-1"):
        with pytest.raises(
            EngramError, match=rf"'{name}' names no entry; expected its number, such as 3, or '3.1'"
        ):
            ledger.remove(name)
    with pytest.raises(EngramError, match="there is no entry 7; the ledger has 1"):
        ledger.remove(7)
    ledger.remove("1.1")
    with pytest.raises(
        EngramError,
        match=r"1\.1 is not in force: entry 1 \(1 of 2 facts\) has 2 facts, .* 0 in force",
    ):
        ledger.remove("1.1")
    with pytest.raises(EngramError, match="there is no entry 9"):
        ledger.show(9)


def test_nothing_is_lost_until_it_is_pruned(ledger):
    edits = [random_edit(LM, seed=seed) for seed in (1, 2)]
    for edit in edits:
        ledger.add(edit)
    ledger.remove(1)
    assert ledger.show(1) == edits[0]
    assert [entry.status for entry in ledger.list(everything=True)] == ["removed", "active"]
    (ledger.folder / "edits" / "0007").mkdir()  # an `add` that was killed before it happened
    assert ledger.prune() == (1,) and ledger.prune() == ()
    assert [path.name for path in (ledger.folder / "edits").iterdir()] == ["0002"]
    with pytest.raises(
        EngramError,
        match="entry 1 was removed and its files were pruned; the history still names its facts",
    ):
        ledger.show(1)
    assert Ledger.open(ledger.folder).edit().deltas == edits[1].deltas
    assert [event.what for event in ledger.history()] == ["added", "added", "removed", "pruned"]
    assert ledger.add(edits[0]).number == 3  # numbers are never used again


def test_an_edit_counts_once(ledger):
    ledger.add(random_edit(LM))
    with pytest.raises(
        EngramError, match=r"the edit is in force already, as entry 1 \(active\); added twice"
    ):
        ledger.add(random_edit(LM))
    ledger.remove(1)
    assert ledger.add(random_edit(LM)).number == 2


# --- replacing ------------------------------------------------------------------------------------


def about(
    subject: str,
    target: str,
    *,
    seed: int,
    prompt: str = "The {} stands in",
    relation: str | None = None,
) -> Edit:
    return replace(
        random_edit(LM, seed=seed), facts=(Fact(subject, prompt, target, relation=relation),)
    )


def test_a_newer_fact_replaces_the_older_one_of_the_same_subject_and_relation(ledger):
    several = random_edit(LM, rank=3, joint=False, seed=1)
    ledger.add(several)
    newer = about("Tower 11", "Oslo", seed=2)
    entry = ledger.add(newer, replace=True)
    assert ledger.edit().deltas == compose([several.without(1), newer]).deltas
    event = ledger.history()[-1]
    assert (event.entry, event.gone) == (entry.number, ((1, 1),))


def test_a_relation_is_the_same_by_name_or_by_prompt(ledger):
    ledger.add(about("Tower", "Rome", seed=1, relation="city"))
    ledger.add(
        about("Tower", "brick", seed=2, prompt="The {} is made of", relation="material"),
        replace=True,
    )
    assert len(ledger.list()) == 2
    ledger.add(
        about("Tower", "Oslo", seed=3, prompt="In which city is the {}? In", relation="city"),
        replace=True,
    )
    assert [entry.facts[0].target for entry in ledger.list()] == ["brick", "Oslo"]
    ledger.add(about("Tower", "stone", seed=4, prompt="The {} is made of"), replace=True)
    assert [entry.facts[0].target for entry in ledger.list()] == ["Oslo", "stone"]


def test_what_cannot_go_alone_is_not_replaced(ledger):
    ledger.add(random_edit(LM, rank=2))
    with pytest.raises(EngramError, match="solved jointly"):
        ledger.add(about("Tower 11", "Oslo", seed=2), replace=True)
    assert len(ledger.list()) == 1 and len(ledger.history()) == 1


# --- on which weights an edit was made ------------------------------------------------------------


def test_an_edit_made_on_top_is_noted_and_leaves_exactly(ledger, caplog):
    first, second, third = (random_edit(LM, (1,), seed=seed) for seed in (1, 2, 3))
    ledger.add(first)
    with ledger.applied(LM):
        above = on_top(LM, second)
        name = weight_name(LM, 1)
        with above.applied(LM):
            as_made = LM.model.get_parameter(name).detach().clone()
    entry = ledger.add(above, LM, canary=NOTHING)
    assert entry.base_entries == (1,)
    with ledger.applied(LM):
        torch.testing.assert_close(LM.model.get_parameter(name).detach(), as_made)
    assert ledger.add(third).base_entries == ()

    left = ledger.remove(1)
    assert [entry.number for entry in left] == [2]
    assert "1.0 went, and entries 2 were made on top of it" in caplog.text
    assert ledger.history()[-1].dependents == (2,)
    assert ledger.edit().deltas == compose([second, third]).deltas
    with ledger.applied(LM):
        now = LM.model.get_parameter(name).detach().double()
        torch.testing.assert_close(now, directly([second, third], name), rtol=0, atol=1e-7)


def test_a_state_that_was_noted_is_known_again_without_the_model(ledger):
    ledger.add(random_edit(LM, seed=1), LM, canary=NOTHING)
    ledger.add(random_edit(LM, seed=2), LM, canary=NOTHING)
    with ledger.applied(LM):
        above = on_top(LM, random_edit(LM, seed=3))
    ledger.add(random_edit(LM, (2,), seed=4), LM, canary=NOTHING)
    assert ledger.add(above).base_entries == (1, 2)


def test_a_state_that_was_not_noted_takes_the_model(ledger):
    ledger.add(random_edit(LM, seed=1))
    with ledger.applied(LM):
        above = on_top(LM, random_edit(LM, seed=2))
    with pytest.raises(
        BaseMismatchError,
        match=r"neither the ledger's base, 'tiny-gpt2', nor .* give the model: add\(edit, lm\)",
    ):
        ledger.add(above)
    assert ledger.add(above, LM, canary=NOTHING).base_entries == (1,)


def test_ground_that_is_gone_is_warned_of(ledger, caplog):
    ledger.add(random_edit(LM, seed=1), LM, canary=NOTHING)
    with ledger.applied(LM):
        above = on_top(LM, random_edit(LM, seed=2))
    ledger.remove(1)
    assert ledger.add(above).base_entries == (1,)
    assert (
        "made on top of entries 1, of which some facts are no longer in force; verify it"
        in caplog.text
    )


def test_an_edit_does_not_replace_what_it_stands_on(ledger):
    ledger.add(about("Tower", "Rome", seed=1), LM, canary=NOTHING)
    with ledger.applied(LM):
        above = on_top(LM, about("Tower", "Oslo", seed=2))
    with pytest.raises(
        EngramError, match=r"made on top of entry 1, which it is to replace.*without=\['1\.0'\]"
    ):
        ledger.add(above, replace=True)
    with ledger.applied(LM, without=["1.0"]):
        beside = on_top(LM, about("Tower", "Oslo", seed=2))
    assert ledger.add(beside, replace=True).base_entries == ()
    assert [entry.number for entry in ledger.list()] == [2]


def test_edits_of_other_models_are_refused(ledger):
    with pytest.raises(
        BaseMismatchError,
        match=r"made on 'tiny-llama' \(llama\), the ledger is about 'tiny-gpt2' \(gpt2\)",
    ):
        ledger.add(random_edit(tiny("llama")))
    with pytest.raises(
        BaseMismatchError, match=r"which has no weight .*c_proj.weight of \[20, 16\]"
    ):
        ledger.add(random_edit(tiny(d_ff=20)))
    with pytest.raises(
        BaseMismatchError, match=r"neither the ledger's base.*make it again, on the unedited model"
    ):
        ledger.add(random_edit(tiny(seed=5)), LM)
    with pytest.raises(
        BaseMismatchError,
        match=r"made in bfloat16, the ledger's base is in float32: load the model in float32",
    ):
        ledger.add(random_edit(tiny(dtype=torch.bfloat16)))
    assert ledger.history() == ()


def test_the_model_has_to_be_the_unedited_base(ledger, tmp_path):
    ledger.add(random_edit(LM, seed=1))
    with ledger.applied(LM):
        for mistake in (
            lambda: ledger.applied(LM),
            lambda: ledger.add(random_edit(LM, seed=2), LM),
            lambda: Ledger.create(tmp_path / "other", LM),
        ):
            with pytest.raises(
                BaseMismatchError,
                match=r"edits are applied to 'tiny-gpt2' at the moment .* leave their `with` block",
            ):
                mistake()
    with (
        pytest.raises(BaseMismatchError, match="not the weight that the edit was made on"),
        ledger.applied(tiny(seed=5)),
    ):
        pass
    assert len(ledger.history()) == 1 and not (tmp_path / "other").exists()


# --- the canary -----------------------------------------------------------------------------------

PROSE = "The bridge is in Rome, and the river runs through London. She plays the piano."


@pytest.fixture(scope="module")
def reader():
    return tiny_lm("gpt2")


@pytest.fixture
def watched(tmp_path, reader):
    return Ledger.create(tmp_path / "watched", reader, canary=Canary(1.2, 0.5, PROSE))


def test_the_canary_is_measured_with_everything_in_force(watched, reader):
    one, two = random_edit(reader, seed=1), random_edit(reader, (1, 2), seed=2)
    watched.add(one, reader)
    entry = watched.add(two, reader)
    both = compose([one, two])
    before = reader.perplexity(PROSE)
    with both.applied(reader):
        assert entry.canary["perplexity_ratio"] == pytest.approx(reader.perplexity(PROSE) / before)
        state = {name: fingerprint(reader.model.get_parameter(name)) for name in both.deltas}
    ratios = [
        float(
            delta.dense(torch.float64).norm()
            / reader.model.get_parameter(name).detach().double().norm()
        )
        for name, delta in both.deltas.items()
    ]
    assert entry.canary["norm_ratio"] == pytest.approx(max(ratios))
    assert watched.history()[-1].state == state


def louder(edit: Edit, times: float) -> Edit:
    deltas = {
        name: engram.Delta(times * d.left, d.right, d.owners) for name, d in edit.deltas.items()
    }
    return replace(edit, deltas=deltas)


def test_an_edit_that_damages_the_model_is_rolled_back(watched, reader):
    good = random_edit(reader, seed=1)
    watched.add(good, reader)
    before, bad = weights(reader), louder(random_edit(reader, seed=2), 300)
    with pytest.raises(
        CanaryError,
        match=r"entry 2 was rolled back: with it, .*norm_ratio is \d.*, at most 0.5 allowed",
    ):
        watched.add(bad, reader, replace=True)
    assert same_bits(weights(reader), before)
    assert [entry.number for entry in watched.list()] == [1]
    assert watched.edit().deltas == good.deltas
    entry = watched.list(everything=True)[1]
    assert (
        entry.status == "rolled back" and entry.active == () and watched.show(2) == bad
    )  # nothing is lost
    event = watched.history()[-1]
    assert (
        event.what == "rolled back"
        and event.canary["norm_ratio"] > 0.5
        and "norm_ratio" in event.tripped[-1]
    )


def test_a_rolled_back_edit_replaces_nothing(watched, reader):
    good = random_edit(reader, seed=1)
    watched.add(good, reader)
    with pytest.raises(CanaryError):
        watched.add(
            replace(louder(random_edit(reader, seed=2), 300), facts=good.facts),
            reader,
            replace=True,
        )
    assert watched.list()[0].active == (0,)


def test_limits_can_be_set_for_one_edit_or_not_judged(watched, reader):
    bad = louder(random_edit(reader, seed=2), 300)
    entry = watched.add(bad, reader, canary=Canary(None, 1e6))
    assert set(entry.canary) == {"norm_ratio"}
    watched.remove(1)
    assert watched.add(bad).canary == {}  # without a model nothing is measured
    with pytest.raises(EngramError, match="without a model to measure it on; pass lm, too"):
        watched.add(random_edit(reader), canary=NOTHING)


def test_a_sum_that_does_not_fit_is_rolled_back(tmp_path):
    lm = tiny_lm("gpt2", torch.float16)
    book = Ledger.create(tmp_path / "ledger", lm, canary=Canary(text=PROSE))
    with pytest.raises(CanaryError, match=r"rolled back: with it, .*does not fit float16"):
        book.add(louder(random_edit(lm), 1e8), lm)
    assert book.list() == ()


def test_limits_of_a_ledger_are_kept(watched):
    assert Ledger.open(watched.folder).canary == Canary(1.2, 0.5, PROSE)


def test_impossible_limits_are_refused():
    for name in ("max_norm_ratio", "max_perplexity_ratio"):
        for value, expected in (
            (0, "above 0"),
            (-1.0, "above 0"),
            (float("nan"), "a finite number"),
            (float("inf"), "a finite number"),
            ("1", "a number"),
            (True, "a number"),
            ([1.0], "a number"),
        ):
            with pytest.raises(SettingError, match=rf"^{name}=.*: expected {expected}$"):
                Canary(**{name: value})
    with pytest.raises(SettingError, match="text=3: expected a text"):
        Canary(text=3)
    with pytest.raises(SettingError, match="text=' ' is empty"):
        Canary(text=" ")


# --- as a checkpoint, as an adapter ---------------------------------------------------------------


def test_it_becomes_a_checkpoint_or_an_adapter(tmp_path):
    folder = tiny_folder(tmp_path)
    lm = engram.load(folder)
    book = Ledger.create(tmp_path / "ledger", lm)
    edits = [random_edit(lm, (1, 2), seed=seed) for seed in (1, 2, 3)]
    for edit in edits:
        book.add(edit)
    book.remove(2)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), book.applied(lm):
        wanted, there = lm.model(ids).logits, weights(lm)
    written = book.materialise(tmp_path / "edited")
    assert same_bits(weights(engram.load(written)), there)
    revert_checkpoint(written, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert same_bits(weights(engram.load(book.materialise(tmp_path / "of-memory", lm))), there)
    adapter = book.to_peft(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), adapter
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_everything_in_force_is_one_file_for_llama_cpp(ledger, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf, see the extra of that name")
    for seed in (1, 2):
        ledger.add(random_edit(LM, seed=seed))
    written = ledger.to_gguf(tmp_path / "book.gguf")
    assert written.read_bytes() == ledger.edit().to_gguf(tmp_path / "edit.gguf").read_bytes()


# --- folders --------------------------------------------------------------------------------------


def test_folders_that_are_no_ledger_say_so(ledger, tmp_path):
    with pytest.raises(EngramFileError, match=r"ledger is a ledger already; Ledger.open\("):
        Ledger.create(ledger.folder, LM)
    with pytest.raises(
        EngramFileError,
        match=r"is no ledger: it has no ledger.json. Ledger.create\(folder, lm\) makes one",
    ):
        Ledger.open(tmp_path)
    about = json.loads((ledger.folder / "ledger.json").read_text())
    (ledger.folder / "ledger.json").write_text(json.dumps({**about, "format_version": 2}))
    with pytest.raises(
        EngramFileError, match="format_version=2, this engram reads 1; pip install --upgrade engram"
    ):
        Ledger.open(ledger.folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(
        EngramFileError, match="holds other files; expected an empty folder, or none"
    ):
        Ledger.create(tmp_path / "thesis", LM)


def test_damage_is_named(ledger):
    ledger.add(random_edit(LM, seed=1))
    ledger.add(random_edit(LM, seed=2))
    random_edit(LM, seed=3).save(ledger.folder / "edits" / "0001")
    with pytest.raises(
        EngramFileError, match="0001 is not the edit that was added; take it from a backup"
    ):
        Ledger.open(ledger.folder).edit()
    lines = (ledger.folder / "history.jsonl").read_text().splitlines()
    (ledger.folder / "history.jsonl").write_text(
        "\n".join([lines[0], lines[1][:40], lines[1]]) + "\n"
    )
    with pytest.raises(
        EngramFileError, match=r"history.jsonl, line 2, is damaged: .*take the ledger from a backup"
    ):
        Ledger.open(ledger.folder).list()


# --- any sequence ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_random_sequences_leave_the_base_bit_for_bit_and_give_the_direct_sum(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # what is tested here is no crash
    before, generator = weights(LM), random.Random(0)
    pool = [
        random_edit(
            LM,
            generator.choice([(0,), (1,), (0, 2)]),
            rank=rank,
            seed=seed,
            joint=generator.random() < 0.3,
        )
        for seed, rank in enumerate([1, 1, 2, 3, 1, 2, 1, 4])
    ]
    names = [weight_name(LM, layer) for layer in range(3)]
    for sequence in range(1000):
        if sequence % 50 == 0:  # a ledger lives through fifty of them
            book = Ledger.create(tmp_path / str(sequence), LM)
            there: dict[int, Edit] = {}
        for _ in range(generator.randint(1, 4)):
            what = generator.choice(["add", "add", "remove", "remove fact", "apply"])
            if (
                what == "add"
                and (fresh := [edit for edit in pool if edit not in there.values()])
                and len(there) < 5
            ):
                edit = generator.choice(fresh)
                if not {fact for held in there.values() for fact in held.facts} & set(edit.facts):
                    there[book.add(edit).number] = edit
            elif what == "remove" and there:
                book.remove(number := generator.choice(list(there)))
                del there[number]
            elif what == "remove fact" and there:
                edit = there[number := generator.choice(list(there))]
                separate = all(
                    len(owners) == 1 for delta in edit.deltas.values() for owners in delta.owners
                )
                if separate and len(edit.facts) > 1:
                    gone = generator.choice(edit.facts)
                    book.remove(gone)
                    there[number] = edit.without(gone)
            else:
                with book.applied(LM):
                    for name in names:
                        now = LM.model.get_parameter(name).detach().double()
                        torch.testing.assert_close(
                            now, directly(list(there.values()), name), rtol=0, atol=1e-6
                        )
        assert same_bits(weights(LM), before)
        assert [entry.number for entry in book.list()] == sorted(there)
    reopened = Ledger.open(book.folder)
    assert reopened.list() == book.list() and reopened.history() == book.history()
