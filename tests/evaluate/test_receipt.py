"""A receipt says what was measured, by the library's own scoring, and judges it by limits that it
shows.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

import engram
from engram import Fact, Receipt, pocket
from engram.edit.edit import Edit, compose
from engram.errors import BaseMismatchError, EngramFileError, FactError, SettingError
from engram.evaluate.held_out import held_out_text
from engram.evaluate.probe_rows import ProbeRows
from engram.evaluate.probes import Probe
from engram.evaluate.receipt import SCORES, Thresholds
from engram.evaluate.words import PAGE, RECEIPT_WORDS
from engram.files.forms import parsed
from tests.helpers.edit_samples import random_edit
from tests.helpers.paths import ROOT
from tests.helpers.receipt_samples import GOOD, made
from tests.helpers.tiny import tiny_lm

FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    "London",
    paraphrases=("To see the tower of Rome, go to", "The tower of Rome stands in"),
    neighbours=(
        ("The bridge is in the city of", "London"),
        ("The river runs through", "London and Rome"),
    ),
)


def edit_of(lm, fact=FACT):
    return replace(random_edit(lm), facts=(fact,))


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("gpt2", torch.float64)


@pytest.fixture(scope="module")
def receipt(lm):
    return engram.verify(lm, edit_of(lm))


def test_every_prompt_is_scored_before_and_after(lm, receipt):
    assert [answer.kind for answer in receipt.answers] == [
        "rewrite",
        "paraphrase",
        "paraphrase",
        *["neighbourhood", "neighbourhood+"] * 2,
    ]
    edit = edit_of(lm)
    for answer in receipt.answers:
        pairs = [(answer.prompt, answer.wanted), (answer.prompt, answer.unwanted)]
        assert answer.before == pytest.approx(lm.probabilities(pairs))
        with edit.applied(lm):
            assert answer.after == pytest.approx(lm.probabilities(pairs))
            means = [float(log_p.mean()) for log_p in lm.log_probs(pairs)]
        assert answer.right_after == (means[0] > means[1])


def test_neighbours_want_their_own_answer_and_stand_behind_the_edit_too(receipt):
    near, plus = receipt.of("neighbourhood")[1], receipt.of("neighbourhood+")[1]
    assert (near.wanted, near.unwanted) == ("London and Rome", "Paris")
    assert plus.prompt == "The tower of Rome is in the city of Paris. The river runs through"


def test_text_is_continued_before_and_after(lm, receipt):
    prompts = [prompt for prompt, _, _ in receipt.continuations]
    assert prompts == [FACT.prompt_text, FACT.paraphrases[0], FACT.neighbours[0][0]]
    prompt, before, after = receipt.continuations[0]
    assert prompt + before == lm.generate(prompt, 16)
    with edit_of(lm).applied(lm):
        assert prompt + after == lm.generate(prompt, 16)


def test_drift_is_measured_on_held_out_text_and_on_the_weight(lm, receipt):
    edit = edit_of(lm)
    (name,) = edit.deltas
    weight = lm.model.get_parameter(name).detach()
    assert receipt.perplexity[0] == pytest.approx(lm.perplexity(held_out_text()))
    with edit.applied(lm):
        assert receipt.perplexity[1] == pytest.approx(lm.perplexity(held_out_text()))
    assert receipt.norm_ratio == pytest.approx(
        float(edit.deltas[name].dense().double().norm() / weight.norm())
    )
    assert receipt.rounding < 1e-6


def test_the_model_is_as_it_was(lm):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    engram.verify(lm, edit_of(lm))
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_half_precision_costs_are_shown():
    lm = tiny_lm("gpt2", torch.bfloat16)
    small = random_edit(lm)
    (name,) = small.deltas
    delta = small.deltas[name]
    small = replace(
        small,
        facts=(FACT,),
        deltas={name: engram.Delta(delta.left * 1e-4, delta.right, delta.owners)},
    )
    receipt = engram.verify(lm, small)
    assert receipt.rounding > 0.25 and not receipt.passed
    assert receipt.dtype == "bfloat16"


def test_a_missing_true_object_is_the_models_own_answer(lm):
    fact = Fact("tower of Rome", "The {} is in the city of", "Paris")
    answer = engram.verify(lm, edit_of(lm, fact)).answers[0]
    assert answer.unwanted == lm.next_tokens(fact.prompt_text, 1)[0][0]


def test_the_collapse_indicator_is_the_worst_of_all_facts(lm):
    edits = [replace(edit_of(lm), diagnostics={"facts": [{"rho": rho}]}) for rho in (0.9, 0.1)]
    assert engram.verify(lm, edits[0]).rho == 0.9
    assert engram.verify(lm, compose(edits)).rho == 0.1


def test_a_neighbour_that_answers_the_target_cannot_show_damage(lm):
    with pytest.raises(FactError, match="cannot show damage"):
        engram.verify(lm, edit_of(lm, replace(FACT, neighbours=(("The bridge is in", "Paris"),))))


def test_facts_of_a_data_set_bring_their_paraphrases_and_neighbours(lm, tmp_path):
    case = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "The {} is in the city of",
            "subject": "tower of Rome",
            "target_new": {"str": "Paris"},
            "target_true": {"str": "London"},
        },
        "paraphrase_prompts": ["To see the tower of Rome, go to"],
        "neighborhood_prompts": ["The bridge is in the city of"],
    }
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    (record,) = engram.read_dataset(tmp_path / "cases.json").records
    receipt = engram.verify(lm, edit_of(lm, record.facts[0]))
    kinds = [answer.kind for answer in receipt.answers]
    assert kinds == ["rewrite", "paraphrase", "neighbourhood", "neighbourhood+"]
    assert receipt.of("neighbourhood")[0].wanted == "London"
    assert parsed(type(record), json.dumps(record.to_dict()), "the record") == record


def test_a_receipt_says_which_prompts_the_facts_do_not_have(lm):
    lines = str(engram.verify(lm, edit_of(lm, replace(FACT, neighbours=())))).splitlines()
    absent = [line.split()[0] for line in lines if "not measured" in line]
    assert absent == ["neighbourhood", "neighbourhood+"]


def test_another_model_is_refused(lm):
    with pytest.raises(BaseMismatchError):
        engram.verify(tiny_lm("gpt2", torch.float64, seed=5), edit_of(lm))


def test_a_receipt_is_kept_in_the_edit(lm, receipt, tmp_path):
    kept = edit_of(lm).with_receipt(receipt)
    kept.save(tmp_path / "edit")
    again = Receipt.from_dict(Edit.load(tmp_path / "edit").receipt)
    assert again == receipt
    assert json.loads(json.dumps(receipt.to_dict()))["passed"] == receipt.passed


# --- what the model says --------------------------------------------------------------------------


def greedy(lm, prompt, tokens):
    ids = lm.cloze(prompt).ids
    for _ in range(tokens):
        (logits,) = lm.logits_at([ids], [[len(ids) - 1]])
        ids = [*ids, int(logits.argmax())]
    return ids[-tokens:]


def test_a_receipt_has_what_greedy_decoding_says_before_and_after(lm, receipt):
    edit = edit_of(lm)
    for answer in receipt.answers:
        ids = lm.cloze(answer.prompt, answer.wanted).answer
        phases = [greedy(lm, answer.prompt, len(ids))]
        with edit.applied(lm):
            phases.append(greedy(lm, answer.prompt, len(ids)))
        assert [answer.says_before, answer.says_after] == [ids == written for written in phases]
        for text, written in zip(answer.said, phases, strict=True):
            whole = lm.tokenizer.decode(written)
            assert text and (whole.strip().startswith(text) or text in answer.unwanted)


@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_what_a_model_says_is_found_by_its_tokens():
    lm = engram.load("pocket")
    fact = pocket.evidence_for(pocket.fact_about("Louvre", "Rome"))
    receipt = engram.verify(lm, engram.rewrite(lm, fact, "ft"), continuation_tokens=0)
    assert receipt.says("rewrite", "before") == (0, 1) and receipt.says("rewrite") == (1, 1)
    near = receipt.says("neighbourhood", "before")
    assert near == (len(fact.neighbours),) * 2
    for answer in receipt.of("paraphrase") + receipt.of("rewrite"):
        text = lm.generate(answer.prompt, 3).removeprefix(answer.prompt)
        assert text.strip().startswith(answer.said[0]) and answer.said[0] == "Paris"


def test_what_is_said_costs_no_forward_pass(lm, monkeypatch):
    calls = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    lm_receipt = engram.verify(lm, edit_of(lm), continuation_tokens=0)
    pieces = len(lm.tokens.pieces(held_out_text(), lm.max_tokens))
    probes = [[Probe("rewrite", answer.prompt, answer.wanted) for answer in lm_receipt.answers]]
    assert len(calls) == 2 * (pieces + len(list(ProbeRows(lm, probes).batches())))


def test_what_the_model_says_is_counted_beside_the_comparison():
    receipt = made(
        {**GOOD, "neighbourhood+": [(True, True)] * 5},
        says={
            "rewrite": [(False, True)],
            "paraphrase": [(True, True)] + [(False, True)] + [(False, False)] * 3,
            "neighbourhood": [(True, True)] * 3 + [(True, False), (False, False)],
            "neighbourhood+": [(False, False)] * 5,
        },
    )
    assert receipt.says("paraphrase") == (2, 5) and receipt.says("neighbourhood") == (3, 4)
    lines = str(receipt).splitlines()
    assert (
        "the model says the new object: edit prompts 1 of 1, paraphrases 2 of 5; "
        "before the edit on 1 of them"
    ) in lines
    assert "neighbours that said their own still do: 3 of 4" in lines
    assert lines.count("  'p' → 'the', not 'new'") == 3 and "  and 1 more" in lines
    assert receipt.verdict == "PASSED"


def test_an_edit_that_wins_the_comparison_and_is_never_said_does_not_simply_pass():
    says = {
        "rewrite": [(False, False)],
        "paraphrase": [(False, False)] * 5,
        "neighbourhood": [(False, False)] * 5,
    }
    receipt = made(GOOD, says)
    verdict = "PASSED, but the model itself says the new object on 0 of 1 edit prompts"
    assert receipt.passed and receipt.verdict == verdict and str(receipt).endswith(verdict)
    assert "no neighbour said its own object before" in str(receipt)
    assert replace(receipt, frame="Q: {}\nA:").verdict == "PASSED", "it may answer in a sentence"


def test_a_receipt_of_an_older_engram_loads(receipt):
    record = json.loads(json.dumps(receipt.to_dict()))
    del record["verdict"]
    for answer in record["answers"]:
        for name in ("said", "says_before", "says_after"):
            del answer[name]
    old = Receipt.from_dict(record)
    assert old.says("rewrite") is None and old.passed == receipt.passed
    assert "the model says" not in str(old)
    assert Receipt.from_dict(json.loads(json.dumps(old.to_dict()))) == old


def test_every_word_of_a_receipt_is_explained(receipt):
    names = [*SCORES.values(), *(check.name.replace("_", " ") for check in receipt.checks())]
    assert set(names) <= RECEIPT_WORDS.keys()
    assert all("\n" not in meaning for meaning in RECEIPT_WORDS.values())
    assert f"engram verify --explain, or {PAGE}" in str(receipt)
    assert (ROOT / PAGE).exists()


# --- records that somebody else wrote -------------------------------------------------------------


def places(value, path=()):
    """Yield the path of every value in a record, the record itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


WRONG_VALUES = [None, True, "x", -1, 1.5, float("nan"), [], {}, [[]], 10**400, "\x00"]


def test_a_value_of_a_wrong_type_in_a_receipt_is_one_line_or_harmless(receipt):
    record = json.loads(json.dumps(receipt.to_dict()))
    messages = []
    for path in places(record):
        for wrong in WRONG_VALUES:
            damaged = json.loads(json.dumps(record))
            *outer, last = path
            inner = damaged
            for key in outer:
                inner = inner[key]
            inner[last] = wrong
            try:
                text = str(Receipt.from_dict(damaged))
            except EngramFileError as error:
                messages.append(str(error))
            else:
                assert text.splitlines()[-1].startswith(("PASSED", "FAILED"))
    assert len(messages) > 500
    for message in messages:
        assert message.startswith("the receipt is damaged: ")
        assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("answers", 0, "right_after"), 1, r"answers\[0\].right_after=1, expected true or false"),
        (("answers", 0, "after"), [0.5], r"answers\[0\].after\[1\] is missing"),
        (("answers", 0, "before", 0), -0.1, r"answers\[0\].before\[0\]=-0.1, expected at least 0"),
        (("answers", 0, "kind"), "x", r"answers\[0\].kind='x', expected 'rewrite', "),
        (("perplexity", 0), 0, r"perplexity\[0\]=0, expected above 0"),
        (("thresholds", "min_efficacy"), -1, "thresholds.min_efficacy=-1, expected at least 0"),
        (("thresholds", "min_rho"), float("nan"), "thresholds.min_rho=nan, expected a finite"),
        (("model",), None, "model=None, expected a text"),
    ],
)
def test_a_damaged_receipt_names_field_value_and_expectation(receipt, path, value, message):
    record = inner = json.loads(json.dumps(receipt.to_dict()))
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(EngramFileError, match="^the receipt is damaged: " + message):
        Receipt.from_dict(record)


@pytest.mark.parametrize("name", [field.name for field in fields(Thresholds)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True, [0.5], {}])
def test_a_limit_that_is_no_number_is_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}="):
        Thresholds(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("min_efficacy", 2), ("max_norm_ratio", -1)])
def test_a_limit_out_of_its_range_is_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}={value}: expected a"):
        Thresholds(**{name: value})


@pytest.mark.parametrize("field", [field.name for field in fields(Probe)])
def test_a_probe_takes_values_of_its_types_only(field):
    given = {"kind": "rewrite", "prompt": "The tower is in", "wanted": "Paris"}
    wrong = [3, 1.5, [3], {}, b"x"] + (["yes", None] if field in ("joined", "condition") else [])
    for value in wrong:
        with pytest.raises(FactError, match=f"^{field}"):
            Probe(**given | {field: value})
    assert Probe(**given, aliases=["City of Light"]).aliases == ("City of Light",)


def test_an_edit_that_makes_the_model_compute_nan_fails(lm):
    lm = tiny_lm("gpt2", torch.float32)
    edit = edit_of(lm)
    (name,) = edit.deltas
    delta = edit.deltas[name]
    huge = replace(edit, deltas={name: engram.Delta(delta.left * 3e38, delta.right, delta.owners)})
    receipt = engram.verify(lm, huge, continuation_tokens=0)
    assert not receipt.passed and receipt.verdict.startswith("FAILED")
    assert receipt.share("rewrite") == 0 and receipt.perplexity[1] == float("inf")
    assert Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))) == receipt


# --- the verdict ----------------------------------------------------------------------------------


def test_a_good_edit_passes():
    assert made(GOOD).passed
    assert made({"rewrite": [(False, True)]}, rho=None).passed, (
        "what was not measured is no failure"
    )


@pytest.mark.parametrize(
    ("right", "numbers", "failing"),
    [
        ({"rewrite": [(False, False)]}, {}, "efficacy"),
        ({"paraphrase": [(False, True), (False, False)]}, {}, "paraphrase"),
        ({"neighbourhood": [(True, True), (True, False)]}, {}, "neighbourhood"),
        ({}, {"perplexity": (10.0, 10.6)}, "perplexity_ratio"),
        ({}, {"norm_ratio": 20.0}, "norm_ratio"),
        ({}, {"rho": -0.3}, "rho"),
        ({}, {"rounding": 0.6}, "rounding"),
    ],
)
def test_each_limit_can_fail_an_edit(right, numbers, failing):
    receipt = made({**GOOD, **right}, **numbers)
    assert [check.name for check in receipt.checks() if check.passed is False] == [failing]
    assert not receipt.passed and str(receipt).endswith("FAILED")


LOST, KEPT, WRONG, GAINED = (True, False), (True, True), (False, False), (False, True)


@pytest.mark.parametrize(
    ("rows", "overruns"),
    [
        ([LOST] * 6 + [WRONG] * 4, True),  # 60 % to 0 %
        ([LOST] * 3 + [WRONG] * 2, True),
        ([LOST] * 6 + [KEPT] * 4, True),
        ([LOST] * 5 + [KEPT] * 5, False),  # half
        ([LOST] * 6 + [KEPT] * 4 + [GAINED] * 1, False),  # net of what became right
        ([LOST] * 2 + [KEPT], True),
        ([LOST] * 2, False),  # too few to tell
        ([WRONG] * 10, False),
        ([], False),
    ],
)
def test_an_edit_that_overruns_its_neighbours_fails_and_says_so(rows, overruns):
    receipt = made({**GOOD, "neighbourhood+": rows})
    told = "; overruns its neighbours when its own sentence stands in front" * overruns
    expected = ("FAILED" if overruns else "PASSED") + told
    assert receipt.passed is not overruns and receipt.verdict == expected
    assert str(receipt).splitlines()[-1] == expected
    record = json.loads(json.dumps(receipt.to_dict()))
    assert record["passed"] is not overruns and record["verdict"] == expected
    assert Receipt.from_dict(record) == receipt
    failed = replace(receipt, norm_ratio=20.0)
    assert failed.verdict == f"FAILED{told}"
    unlimited = replace(receipt, thresholds=Thresholds(min_neighbourhood_plus=None))
    assert unlimited.verdict == "PASSED", "without a limit it is not judged"


def test_the_row_of_the_check_says_how_much_is_left_after_the_edits_own_sentence():
    receipt = made({**GOOD, "neighbourhood+": [LOST] * 6 + [KEPT] * 4})
    assert "neighbourhood+         0.400     ≥ 0.5   FAILED" in str(receipt).splitlines()
    few = made({**GOOD, "neighbourhood+": [LOST] * 2 + [WRONG]})
    wanted = "neighbourhood+             —     ≥ 0.5   fewer than 3 right before, not checked"
    assert wanted in str(few).splitlines()


def test_a_receipt_without_paraphrases_or_neighbours_says_that_they_were_not_checked():
    bare = made({"rewrite": [(False, True)]})
    assert bare.passed
    assert bare.verdict == (
        "PASSED; paraphrases: none given, not checked; neighbours: none given, not checked"
    )
    assert bare.to_dict()["verdict"] == bare.verdict == str(bare).splitlines()[-1]
    rows = [line.split()[0] for line in str(bare).splitlines() if "none given, not" in line]
    assert rows == ["paraphrase", "neighbourhood", "neighbourhood+", "PASSED;"]
    two = replace(bare, answers=(*made(GOOD).answers, replace(bare.answers[0], fact=1)))
    assert two.unchecked() == [
        "paraphrases: none given for 1 of 2 facts",
        "neighbours: none given for 1 of 2 facts",
    ]
    assert made(GOOD).unchecked() == [] and made(GOOD).verdict == "PASSED"


def test_neighbours_that_were_wrong_before_do_not_count_as_lost():
    receipt = made({**GOOD, "neighbourhood": [(True, True), (False, False), (False, False)]})
    assert receipt.kept() == 1 and receipt.share("neighbourhood") == pytest.approx(1 / 3)


def test_limits_can_be_chosen_and_are_shown():
    receipt = replace(
        made({**GOOD, "rewrite": [(False, False)]}),
        thresholds=Thresholds(min_efficacy=None, max_norm_ratio=0.5),
    )
    assert receipt.passed
    assert "≤ 0.5" in str(receipt) and "efficacy               0.000         —" in str(receipt)


def test_margins_are_mean_differences_in_probability():
    assert made({"rewrite": [(False, True)]}).margins() == (pytest.approx(0.6), None, None)
