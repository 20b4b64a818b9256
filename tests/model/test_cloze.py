"""Every kind of model is asked for an object in its own way, and answers as transformers' own
forward pass does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import engram
from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.model.language_model import LanguageModel
from tests.helpers.tiny import (
    ENCODER_DECODER,
    EVERY,
    MASKED,
    MASKING,
    STATE_SPACE,
    TOKENIZERS,
    make_model,
    tiny_folder,
    tiny_lm,
)

PROMPT = "The tower of Rome is in"
PAIRS = [
    (PROMPT, "Paris"),
    ("The river runs through", "Madrid"),
    ("In Trenčín their mother tongue is", "French"),
    (PROMPT, "Madrid"),
    ("She plays the piano and he plays the", "guitar"),
]
NEW_KINDS = [*STATE_SPACE, *MASKED, *ENCODER_DECODER]


def shown(lm: LanguageModel, ids: list[int]) -> list[str]:
    return lm.tokenizer.convert_ids_to_tokens(ids)


@torch.no_grad()
def plain_logits(lm: LanguageModel, ids: list[int], decoder_ids: list[int] | None) -> Tensor:
    """[t, v] logits of one forward pass as transformers documents it."""
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    if decoder_ids is not None:
        inputs["decoder_input_ids"] = torch.tensor([decoder_ids])
    return lm.model(**inputs).logits[0]


# -- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("target", [None, "Paris", "Madrid", " Zdeno Chára"])
def test_a_causal_model_continues_the_prompt(tokenizer, target):
    lm = tiny_lm("llama", tokenizer=tokenizer)
    cloze, head = lm.cloze(PROMPT, target), lm.encode(PROMPT)
    answer = [] if target is None else lm.target_ids(PROMPT, target)
    assert (
        cloze.ids == head.ids + answer[:-1]
        and cloze.answer == answer
        and cloze.tokens == len(head.ids)
    )
    assert cloze.read == list(range(len(head.ids) - 1, len(cloze.ids)))
    assert cloze.decoder_ids is None and cloze.offsets[: len(head.ids)] == head.offsets


@pytest.mark.parametrize("target", [None, "Paris", "Madrid", "Zdeno Chára"])
@pytest.mark.parametrize(
    "tokenizer", [each for each in MASKING if "mask" in each or each == "word piece"]
)
def test_a_masked_model_gets_one_mask_for_each_token_of_the_target_in_its_place(tokenizer, target):
    lm = tiny_lm("bert", tokenizer=tokenizer)
    cloze, mask = lm.cloze(PROMPT, target), lm.tokenizer.mask_token_id
    assert [i for i, each in enumerate(cloze.ids) if each == mask] == cloze.read
    assert len(cloze.read) == max(1, len(cloze.answer)) and cloze.tokens == len(cloze.ids)
    filled = dict(zip(cloze.read, cloze.answer, strict=False))
    if target is not None:
        joint = lm.tokenizer(f"{PROMPT} {target}.")["input_ids"]
        assert [filled.get(i, each) for i, each in enumerate(cloze.ids)] == joint


@pytest.mark.parametrize("tokenizer", ["byte-level with mask", "byte-level with greedless mask"])
def test_a_mask_stands_for_the_space_in_front_of_the_object_too(tokenizer):
    lm = tiny_lm("roberta", tokenizer=tokenizer)
    assert shown(lm, lm.cloze(PROMPT).ids)[-4:] == ["Ġin", "<mask>", ".", "</s>"]


def test_a_target_that_would_merge_with_the_text_behind_it_is_tokenised_alone():
    lm = tiny_lm("bert")
    lm.cloze_template = "{} [MASK]s."
    assert shown(lm, lm.cloze(PROMPT, "Paris").answer) == ["Paris"]
    assert shown(lm, lm.cloze(PROMPT, "Paris").ids)[-4:] == ["[MASK]", "s", ".", "[SEP]"]


def test_t5_fills_its_first_blank():
    lm = tiny_lm("t5")
    cloze = lm.cloze(PROMPT, "Madrid")
    assert cloze.ids == lm.tokenizer(f"{PROMPT} <extra_id_0>.")["input_ids"]
    assert shown(lm, cloze.answer) == ["▁", "M", "a", "d", "r", "i", "d"]
    assert shown(lm, cloze.decoder_ids) == ["<pad>", "<extra_id_0>", "▁", "M", "a", "d", "r", "i"]
    assert cloze.read == list(range(1, 8)) and cloze.tokens == len(cloze.ids)


def test_bart_writes_the_text_anew_up_to_the_object():
    lm = tiny_lm("bart")
    cloze, prompt = lm.cloze(PROMPT, "Paris"), lm.tokenizer(PROMPT)["input_ids"][:-1]
    start = lm.model.generation_config.decoder_start_token_id
    assert cloze.decoder_ids == [start, *prompt, *cloze.answer[:-1]]
    assert lm.tokenizer.decode(cloze.answer) == " Paris"
    assert cloze.read[0] == len(prompt) and len(cloze.read) == len(cloze.answer)


def test_a_model_that_was_tuned_to_answer_is_asked_the_bare_prompt():
    lm = tiny_lm("t5")
    lm.cloze_template, lm.cloze_decoder = "{}", ""
    cloze = lm.cloze("Where is the tower of Rome?", "Paris")
    assert cloze.ids == lm.tokenizer("Where is the tower of Rome?")["input_ids"]
    assert (
        shown(lm, cloze.decoder_ids) == ["<pad>"]
        and shown(lm, cloze.answer) == ["▁Paris"]
        and cloze.read == [0]
    )


def test_the_token_forced_on_a_decoder_comes_after_its_start():
    lm = tiny_lm("bart")
    lm.model.generation_config.forced_bos_token_id = 7
    lm.cloze_decoder = ""
    assert lm.cloze(PROMPT).decoder_ids == [lm.model.generation_config.decoder_start_token_id, 7]


@pytest.mark.parametrize("target", [None, "Madrid"])
@pytest.mark.parametrize("family", ["gpt2", *NEW_KINDS])
def test_places_in_the_prompt_are_places_in_the_clozes_text(family, target):
    lm = tiny_lm(family)
    cloze = lm.cloze(PROMPT, target)
    assert cloze.text.startswith(PROMPT) and len(cloze.offsets) == len(cloze.ids)
    touched = {at for a, b in cloze.offsets for at in range(a, b)}
    assert touched >= {at for at, letter in enumerate(PROMPT) if letter != " "}
    special = set(lm.tokenizer.all_special_ids) - {lm.tokenizer.mask_token_id}
    for each, (a, b) in zip(cloze.ids, cloze.offsets, strict=True):
        if each in special and cloze.text[a:b] != "<extra_id_0>":
            assert (a, b) == (0, 0)


# -- what is answered ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_logits_are_those_of_a_plain_forward_pass(family):
    lm = tiny_lm(family)
    cloze = lm.cloze(PROMPT, "Madrid")
    decoder_bt = None if cloze.decoder_ids is None else torch.tensor([cloze.decoder_ids] * 2)
    with torch.no_grad():
        got = lm.cloze_logits(torch.tensor([cloze.ids] * 2), cloze.read, decoder_bt)
    expected = plain_logits(lm, cloze.ids, cloze.decoder_ids)[cloze.read]
    torch.testing.assert_close(got, expected.expand(2, -1, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", *NEW_KINDS])
def test_many_are_asked_as_one_by_one(family):
    """Prompts of several lengths, the same prompt twice, objects of several tokens."""
    lm = tiny_lm(family, torch.float64)
    together = lm.log_probs(PAIRS)
    for pair, got in zip(PAIRS, together, strict=True):
        (alone,) = lm.log_probs([pair])
        torch.testing.assert_close(got, alone, atol=1e-6, rtol=0)
        cloze = lm.cloze(*pair)
        logits = plain_logits(lm, cloze.ids, cloze.decoder_ids)[cloze.read]
        expected = logits.log_softmax(-1)[range(len(cloze.answer)), cloze.answer]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    whole = [float(each.sum().exp()) for each in together]
    assert lm.probabilities(PAIRS) == pytest.approx(whole, rel=1e-6)


def test_one_prompt_and_many_objects_are_one_forward_of_a_masked_model():
    lm, rows = tiny_lm("bert"), []
    lm.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    lm.log_probs([(PROMPT, "Paris"), (PROMPT, "Rome"), (PROMPT, "London")])
    assert rows == [1]


@pytest.mark.parametrize("family", NEW_KINDS)
def test_next_tokens_are_the_most_probable_in_the_blank(family):
    lm = tiny_lm(family)
    (top, p), (_, second) = lm.next_tokens(PROMPT, k=2)
    cloze = lm.cloze(PROMPT)
    (at,) = cloze.read
    expected = plain_logits(lm, cloze.ids, cloze.decoder_ids)[at].softmax(-1)
    assert top == lm.tokenizer.decode([int(expected.argmax())])
    assert p == pytest.approx(float(expected.max()), abs=1e-6) and second <= p


def test_an_encoder_decoder_model_generates_its_answer():
    lm = tiny_lm("bart")
    batch = lm.tokenizer(PROMPT, return_tensors="pt")
    expected = lm.model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
    )
    assert lm.generate(PROMPT, max_new_tokens=5) == lm.tokenizer.decode(
        expected[0], skip_special_tokens=True
    )


@pytest.mark.parametrize("family", ["roberta", "t5", "mamba"])
def test_a_folder_says_which_kind_of_model_it_holds(family, tmp_path):
    lm = engram.load(tiny_folder(tmp_path, family))
    made = tiny_lm(family)
    assert lm.kind == made.kind and type(lm.model) is type(made.model)
    torch.testing.assert_close(lm.log_probs(PAIRS), made.log_probs(PAIRS), atol=1e-5, rtol=1e-5)


def test_positions_that_stand_for_padding_are_not_counted_as_room_for_text():
    lm = tiny_lm("roberta")
    assert lm.max_tokens == lm.model.config.max_position_embeddings - lm.tokenizer.pad_token_id - 1
    words = " ".join(["a"] * 2 * lm.max_tokens)
    with pytest.raises(FactError, match=f"the model takes at most {lm.max_tokens}"):
        lm.cloze(words)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_an_empty_target_is_refused_by_every_kind(family):
    with pytest.raises(FactError, match="target=' ' is empty"):
        tiny_lm(family).cloze(PROMPT, " ")


@pytest.mark.parametrize("template", ["[MASK].", "Answer: {} [MASK].", "{} {} [MASK]."])
def test_a_template_begins_with_the_prompt(template):
    lm = tiny_lm("bert")
    with pytest.raises(SettingError, match=r"expected \{\} once, in front"):
        lm.cloze_template = template
    assert lm.cloze_template == "{} [MASK]."


def test_a_template_has_the_blank_that_the_kind_needs():
    with pytest.raises(
        SettingError, match=r"expected the mask token '\[MASK\]' once; a longer answer repeats it"
    ):
        tiny_lm("bert").cloze_template = "{} [MASK] [MASK]."
    with pytest.raises(
        SettingError,
        match=r"frame='Q: A:' has 0 places for the prompt, expected exactly one '\{\}'",
    ):
        tiny_lm("gpt2").cloze_template = "Q: A:"


def test_only_an_encoder_decoder_model_has_a_decoder_to_begin_for():
    with pytest.raises(
        SettingError,
        match="only an encoder-decoder model has a decoder to begin for; this is a masked one",
    ):
        tiny_lm("bert").cloze_decoder = "{}"
    with pytest.raises(SettingError, match=r"expected \{\}, the prompt, at most once"):
        tiny_lm("t5").cloze_decoder = "{} {}"


def test_a_decoder_whose_start_nobody_knows_is_refused():
    lm = tiny_lm("t5")
    lm.model.config.decoder_start_token_id = lm.model.generation_config.decoder_start_token_id = (
        None
    )
    with pytest.raises(
        UnsupportedModelError,
        match=r"does not say which token its decoder starts with; set lm\.model\.config",
    ):
        lm.cloze(PROMPT)


def test_a_masked_model_needs_a_mask_token():
    with pytest.raises(
        UnsupportedModelError, match="has no mask token, which a masked model is asked with"
    ):
        LanguageModel(make_model("bert"), TOKENIZERS["byte-level"]())


def test_what_makes_no_sense_for_a_kind_says_so():
    with pytest.raises(
        UnsupportedModelError,
        match="tiny-bert is a masked model: it fills blanks and does not write on",
    ):
        tiny_lm("bert").generate(PROMPT)
    with pytest.raises(
        UnsupportedModelError,
        match="tiny-bert is a masked model, and perplexity is that of reading a text",
    ):
        tiny_lm("bert").perplexity(PROMPT)
    with pytest.raises(
        UnsupportedModelError, match="tiny-t5 is an encoder-decoder model, and perplexity"
    ):
        tiny_lm("t5").perplexity(PROMPT)


# -- the examples in the docstrings ----------------------------------------------------------------


def test_the_documented_ids_are_what_tokenizers_give(pocket_lm):
    cloze = pocket_lm.cloze("The tower is in", "New Zealand")
    assert cloze.ids == [413, 275, 1921, 356, 318, 1606] and cloze.answer == [1606, 4492]
    assert cloze.read == [4, 5] and cloze.tokens == 5
    masked = tiny_lm("bert").cloze("The tower is in", "He sings")
    assert masked.ids == [2, 118, 148, 132, 131, 4, 4, 9, 3] and masked.read == [5, 6]
    written = tiny_lm("t5").cloze("The tower is in", "Paris")
    assert written.ids == [64, 94, 78, 77, 98, 3, 8, 1] and written.decoder_ids == [0, 98]
    assert written.answer == [61] and written.read == [1]
