"""Chat models are asked through their tokenizer's own template: the tokens are those that the model
was trained to see.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import engram
from engram import Fact, Receipt, cli
from engram.editors.contexts import sample_contexts
from engram.errors import SettingError, UnsupportedModelError
from engram.model.chat import REQUEST
from tests.helpers.chat_samples import TEMPLATES, chat_lm
from tests.helpers.edit_samples import random_edit
from tests.helpers.tiny import TEXT, TOKENIZERS, tiny_lm

PROMPT = "The tower of Rome is in the city of"
FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    "London",
    neighbours=(("The bridge is in", "London"),),
)

everywhere = pytest.mark.parametrize(
    ("template", "tokenizer"),
    [(template, tokenizer) for template in TEMPLATES for tokenizer in sorted(TOKENIZERS)],
)


def templated(lm, *said: str, **options) -> list[int]:
    """Token ids of a conversation by transformers' own words, user first, with at most one start
    token in front.
    """
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ids = lm.tokenizer.apply_chat_template(turns, return_dict=False, **options)
    starts = lm.tokenizer("").input_ids[:1]  # what this tokenizer begins every text with
    return ids if not starts or ids[:1] == starts else starts + ids


@everywhere
def test_a_prompt_is_asked_as_the_template_has_a_user_say_it(template, tokenizer):
    lm = chat_lm(template, tokenizer)
    wanted = templated(lm, PROMPT, add_generation_prompt=True)
    with lm.asked_through(engram.chat_frame(lm)):
        assert lm.cloze(PROMPT).ids == wanted
    assert wanted.count(lm.tokenizer.bos_token_id) <= 1


@everywhere
@pytest.mark.parametrize("target", ["Paris", " Paris", "Madrid", "Zdeno Chára"])
def test_an_answer_is_the_tokens_that_the_template_has_the_model_say(template, tokenizer, target):
    lm = chat_lm(template, tokenizer)
    with lm.asked_through(engram.chat_frame(lm)):
        cloze = lm.cloze(PROMPT, target)
    whole, answered = cloze.ids + cloze.answer[-1:], templated(lm, PROMPT, target.strip())
    assert answered[: len(whole)] == whole
    follows = lm.tokenizer.convert_ids_to_tokens(answered[len(whole) :])
    assert all(
        token in lm.tokens.special_texts or not token.strip("ĠĊ▁ \n") for token in follows
    ), "nothing of the target is left out"


@everywhere
def test_a_continued_turn_begins_with_the_prompt_and_goes_on_as_plain_text(template, tokenizer):
    lm = chat_lm(template, tokenizer)
    with lm.asked_through(engram.chat_frame(lm, "continue")):
        cloze = lm.cloze(PROMPT, "Paris")
    assert (
        cloze.ids == templated(lm, REQUEST, PROMPT, continue_final_message=True) + cloze.answer[:-1]
    )
    assert cloze.answer == lm.target_ids(PROMPT, "Paris")
    end = cloze.tokens - 1
    assert cloze.offsets[end][1] == len(PROMPT)


def test_a_systems_message_comes_first():
    lm = chat_lm("chatml")
    assert engram.chat_frame(lm, system="Be brief.").startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}"
    )
    with pytest.raises(
        SettingError, match="refuses a conversation of system, user: no system here"
    ):
        engram.chat_frame(chat_lm("mistral"), system="Be brief.")


def test_mistakes_are_explained():
    with pytest.raises(
        UnsupportedModelError, match="has no chat template, so the model is asked in plain text"
    ):
        engram.chat_frame(tiny_lm("gpt2"))
    with pytest.raises(SettingError, match="style='shout': expected 'answer' or 'continue'"):
        engram.chat_frame(chat_lm(), "shout")


def test_a_template_that_does_not_keep_the_prompt_is_refused(monkeypatch):
    lm = chat_lm("chatml")
    for text, count in (
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", 2),
        ("hello", 0),
    ):
        monkeypatch.setattr(lm.tokenizer, "chat_template", text)
        with pytest.raises(UnsupportedModelError, match=f"in which it occurs {count} times"):
            engram.chat_frame(lm)


# --- edits ----------------------------------------------------------------------------------------


def test_half_of_the_contexts_are_in_the_chat():
    lm = chat_lm("chatml")
    frame, plain = engram.chat_frame(lm, "continue"), sample_contexts(lm, seed=3)
    contexts = engram.chat_contexts(lm, seed=3)
    assert contexts[:2] == ("{}", frame) and len(contexts) == len(plain) + 1
    assert all(context.count("{}") == 1 for context in contexts)
    assert [context.removeprefix(frame[:-2]) for context in contexts[2:]] == list(plain[1:])
    assert sum(context.startswith(frame[:-2]) for context in contexts[2:]) == len(plain) // 2
    assert set(engram.chat_contexts(lm, styles=("answer", "continue"))) > {
        frame,
        engram.chat_frame(lm),
    }


def test_an_edit_made_in_chat_contexts_is_made_on_their_tokens():
    lm = chat_lm("llama 3", "byte-level with BOS")
    contexts = ["{}", engram.chat_frame(lm, "continue")]
    edit = engram.rewrite(
        lm, FACT, layer=1, contexts=contexts, corpus=TEXT.splitlines() * 4, tokens=200, steps=3
    )
    assert edit.settings["contexts"] == contexts


def test_a_receipt_says_what_it_was_taken_through():
    lm = chat_lm("chatml")
    edit, frame = replace(random_edit(lm), facts=(FACT,)), engram.chat_frame(lm)
    plain, chat = engram.verify(lm, edit), engram.verify(lm, edit, frame=frame)
    assert plain.frame is None and "wrapped in" not in str(plain)
    assert chat.frame == frame and str(chat).startswith(f"prompts are wrapped in {frame!r}")
    assert Receipt.from_dict(json.loads(json.dumps(chat.to_dict()))) == chat
    pairs = [(PROMPT, "Paris"), (PROMPT, "London")]
    with lm.asked_through(frame):
        # batches of other sizes differ in the last digits of float32
        assert chat.answers[0].before == pytest.approx(lm.probabilities(pairs), rel=1e-5)
        with edit.applied(lm):
            assert chat.answers[0].after == pytest.approx(lm.probabilities(pairs), rel=1e-5)
        assert engram.verify(lm, edit) == chat, "a block around the call is a frame as well"
    assert chat.perplexity == plain.perplexity


def test_a_receipt_through_a_function_has_its_name():
    lm = tiny_lm("gpt2")

    def politely(prompt):
        return f"Please: {prompt}"

    edit = replace(random_edit(lm), facts=(FACT,))
    assert engram.verify(lm, edit, frame=politely).frame.endswith("politely")


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    lm, folder = chat_lm("chatml"), tmp_path_factory.mktemp("chat") / "model"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def run(*args: str, ends: tuple[int, ...] = (0,)):
    result = CliRunner().invoke(cli.app, list(args), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in ends, result.output
    return result


def test_edit_verify_and_generate_in_the_chat(folder, tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text((TEXT + "\n") * 40, encoding="utf8")
    fact = [
        "-s",
        "tower of Rome",
        "-p",
        "The {} is in the city of",
        "-t",
        "Paris",
        "--old-target",
        "London",
    ]
    options = ["--layer", "1", "--corpus", str(corpus), "--set", "steps=3", "--set", "tokens=200"]
    out = str(tmp_path / "edit")
    told = json.loads(run("edit", folder, *fact, *options, "--chat", "--json", "-o", out).stdout)
    lm = engram.load(folder)
    frame = engram.chat_frame(lm)
    assert told["plain"]["frame"] is None and told["chat"]["frame"] == frame
    edit = engram.Edit.load(out)
    assert Receipt.from_dict(edit.receipt) == Receipt.from_dict(told["chat"])
    assert edit.settings["contexts"] == list(engram.chat_contexts(lm))

    assert (
        json.loads(run("verify", folder, out, "--chat", "--json", ends=(0, 1)).stdout)["frame"]
        == frame
    )
    assert (
        "prompts are wrapped in '<|im_start|>user"
        in run("verify", folder, out, "--chat", ends=(0, 1)).output
    )
    said = run("generate", folder, PROMPT, "-n", "3", "--chat", "--edit", out).stdout
    with lm.asked_through(frame), edit.applied(lm):
        assert said == lm.generate(PROMPT, 3) + "\n"
