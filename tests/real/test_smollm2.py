"""What engram promises holds on a real model: the two sites, edits that are said and reverted, and
files that others load.

The facts are typed here and common knowledge; the model says each of them before it is edited.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import engram
from engram import Fact
from engram.benchmark.data.records import Dataset, Record
from engram.benchmark.metrics.outcomes import MeasureConfig
from engram.evaluate.probes import Probe
from engram.modules.fingerprints import fingerprints
from engram.rewriting import rewrite_each
from tests.helpers.command_line import run

PROMPT = "The {} is located in the city of"
PARAPHRASES = ("The {} is a famous landmark in the city of", "You can visit the {} in the city of")
TEN = (
    ("Eiffel Tower", "Paris", "Rome"),
    ("Louvre", "Paris", "London"),
    ("Colosseum", "Rome", "Paris"),
    ("Roman Forum", "Rome", "Berlin"),
    ("London Eye", "London", "Paris"),
    ("British Museum", "London", "Rome"),
    ("Berlin Wall", "Berlin", "London"),
    ("Acropolis", "Athens", "Paris"),
    ("Tokyo Tower", "Tokyo", "Rome"),
    ("Rijksmuseum", "Amsterdam", "London"),
)
FACTS = [
    Fact(
        subject,
        PROMPT,
        new,
        true,
        paraphrases=tuple(text.replace("{}", subject) for text in PARAPHRASES),
    )
    for subject, true, new in TEN
]


def said(lm: engram.LanguageModel, text: str) -> str:
    (token, _), *_ = lm.next_tokens(text, 1)
    return token.strip()


def check_edited(lm: engram.LanguageModel, facts: list[Fact], edits: list[engram.Edit]) -> None:
    """Compare what the model says with the edits of facts in force, one after the other."""
    before = fingerprints(lm.model)
    followed = []
    for fact, edit in zip(facts, edits, strict=True):
        with edit.applied(lm, how="weights"):
            assert said(lm, fact.prompt_text) == fact.target
            followed += [said(lm, text) == fact.target for text in fact.paraphrases]
            assert fingerprints(lm.model) != before
        assert fingerprints(lm.model) == before
        assert said(lm, fact.prompt_text) == fact.target_true
    assert sum(followed) >= 0.7 * len(followed), followed


@pytest.fixture(scope="module")
def edit(smollm2_lm: engram.LanguageModel) -> engram.Edit:
    return engram.rewrite(smollm2_lm, FACTS[0])


def test_texts_become_the_tokens_that_the_model_was_trained_with(
    smollm2_lm: engram.LanguageModel,
) -> None:
    tokenizer = smollm2_lm.tokenizer
    # No start token, and every digit for itself, so that spaces before it stay together.
    assert tokenizer.tokenize("The Eiffel Tower") == ["The", "ĠE", "iffel", "ĠTower"]
    assert tokenizer("In 19").input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.tokenize("In   19\n\n8") == ["In", "ĠĠĠ", "1", "9", "ĊĊ", "8"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_it_knows_the_facts_of_this_test(smollm2_lm: engram.LanguageModel) -> None:
    assert [said(smollm2_lm, fact.prompt_text) for fact in FACTS] == [true for _, true, _ in TEN]


@pytest.mark.parametrize("fact", FACTS[:3], ids=lambda fact: fact.subject)
def test_a_trace_shows_the_early_and_the_late_site(
    fact: Fact, smollm2_lm: engram.LanguageModel
) -> None:
    lm = smollm2_lm
    trace = engram.trace(lm, fact.prompt_text, subject=fact.subject, samples=3)
    token, layer = trace.best("mlp")
    assert token in range(*trace.subject_range) and layer <= lm.n_layers // 3
    token, layer = trace.best("attention")
    assert token == len(trace.tokens) - 1 and layer >= lm.n_layers // 2
    assert float(trace.effects("mlp").max()) > 0.1 < float(trace.effects("attention").max())


def test_replay_gives_what_whole_passes_give(smollm2_lm: engram.LanguageModel) -> None:
    fact = FACTS[0]
    both = [
        engram.trace(
            smollm2_lm,
            fact.prompt_text,
            subject=fact.subject,
            samples=1,
            sites=["mlp", "attention"],
            positions="subject_last",
            engine=engine,
        )
        for engine in ("replay", "whole")
    ]
    for site in ("mlp", "attention"):
        assert both[0].effects(site).abs().max() > 1e-3, "nothing came back, so nothing is compared"
        torch.testing.assert_close(
            both[0].scores[site], both[1].scores[site], rtol=0, atol=1e-5, equal_nan=True
        )


def test_rome_rewrites_ten_facts_and_each_is_reverted_bit_for_bit(
    smollm2_lm: engram.LanguageModel,
) -> None:
    edits = rewrite_each(smollm2_lm, [[fact] for fact in FACTS])
    assert all(isinstance(one, engram.Edit) for one in edits), edits
    check_edited(smollm2_lm, FACTS, edits)  # type: ignore[arg-type]


def test_memit_rewrites_ten_facts_in_one_edit(smollm2_lm: engram.LanguageModel) -> None:
    edit = engram.rewrite(smollm2_lm, FACTS, "memit")
    assert len(edit.facts) == len(FACTS)
    check_edited(smollm2_lm, FACTS, [edit] * len(FACTS))


def test_a_lora_adapter_does_what_the_edit_does(
    edit: engram.Edit, smollm2_lm: engram.LanguageModel, tmp_path: Path
) -> None:
    prompts = smollm2_lm.tokenizer(FACTS[0].prompt_text, return_tensors="pt").input_ids
    edit.to_peft(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with torch.no_grad(), edit.applied(smollm2_lm):
        expected = smollm2_lm.model(prompts).logits
    adapted = PeftModel.from_pretrained(engram.load("smollm2").model, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(adapted(prompts).logits, expected, rtol=0, atol=1e-3)


def test_an_edited_checkpoint_says_the_new_object_and_reverts_byte_for_byte(
    edit: engram.Edit, smollm2_lm: engram.LanguageModel, tmp_path: Path
) -> None:
    edit.save(tmp_path / "edit")
    told = run("apply", str(tmp_path / "edit"), "smollm2", "-o", str(tmp_path / "edited"))
    assert "dequantised weights in float32" in told.output
    assert said(engram.load(tmp_path / "edited"), FACTS[0].prompt_text) == FACTS[0].target
    run("revert", str(tmp_path / "edited"), "-o", str(tmp_path / "original"))
    reverted = engram.load(tmp_path / "original")
    assert fingerprints(reverted.model) == fingerprints(smollm2_lm.model)


def test_a_bench_of_four_records_has_a_report(
    smollm2_lm: engram.LanguageModel, tmp_path: Path
) -> None:
    dataset = Dataset("cities", "counterfact", tuple(_records(4)))
    out = tmp_path / "run.sqlite"
    result = engram.bench(smollm2_lm, dataset, ["rome"], out, config=MeasureConfig(answer_tokens=1))
    scores = result.summary()
    assert scores["unedited"]["ES"].mean < 0.5 < 0.9 < scores["rome"]["ES"].mean
    told = run("report", str(out)).output
    assert "rome" in told and "unedited" in told


def _records(count: int) -> Iterator[Record]:
    for number, fact in enumerate(FACTS[:count]):
        near = [other for other in FACTS if other.target_true == fact.target_true != other.target]
        neighbours = [
            Probe("neighbourhood", other.prompt_text, str(fact.target_true), fact.target)
            for other in near
            if other != fact
        ]
        yield Record.from_fact(str(number), fact, probes=neighbours)
