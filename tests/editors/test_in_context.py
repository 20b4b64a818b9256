"""In-context edits put the fact in front of the prompt, as far as there is room, and leave every
weight alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import engram
from engram import Edit, Fact, PromptEdit, Receipt, cli, pocket
from engram.edit.edit import compose, load_edit
from engram.editors.in_context import demonstrations_of
from engram.errors import (
    EngramError,
    EngramFileError,
    FactError,
    MissingExtraError,
    SettingError,
    UnsupportedModelError,
)
from engram.evaluate.held_out import held_out_text
from engram.files.checksums import stamped
from engram.model.sentence_vectors import encoder_of
from tests.helpers.chat_samples import chat_lm
from tests.helpers.edit_samples import random_edit
from tests.helpers.tiny import tiny_folder, tiny_lm

FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    "London",
    paraphrases=("To see the tower of Rome, go to",),
    neighbours=(("The bridge is in the city of", "London"),),
)
RIVER = Fact("river", "The {} runs through", "Madrid", "London")
LONG_RIVER = Fact("long river", "The {} runs through", "Rome", "London")
SHOWN = [
    Fact(
        "piano",
        "The {} is played by",
        "him",
        paraphrases=("She saw the piano of",),
        neighbours=(("The guitar is his", "own"),),
    ),
    Fact("mayor", "The {} of the city is", "French", paraphrases=("The language of the mayor is",)),
]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("gpt2", torch.float64)


@pytest.fixture(scope="module")
def roomy():
    """Return a model that takes long texts."""
    made = tiny_lm("llama")
    made.tokens.max_tokens = 4096
    return made


def letters(texts: list[str]) -> torch.Tensor:
    """How often each letter stands in a text."""
    return torch.tensor(
        [[text.lower().count(chr(letter)) for letter in range(97, 123)] for text in texts]
    ).float()


def asked(lm, edit, prompt: str) -> str:
    return edit.frame(lm)(prompt)


# --- what is put in front -------------------------------------------------------------------------


def test_the_fact_is_stated_in_front(lm):
    edit = engram.rewrite(lm, FACT, "in-context")
    for prompt in (FACT.prompt_text, *FACT.paraphrases, FACT.neighbours[0][0]):
        assert asked(lm, edit, prompt) == f"The tower of Rome is in the city of Paris. {prompt}"


def test_within_the_block_the_model_is_asked_so_and_no_weight_changes(lm):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    whole = f"The tower of Rome is in the city of Paris. {FACT.prompt_text}"
    wanted, plain = lm.next_tokens(whole), lm.next_tokens(FACT.prompt_text)
    with engram.rewrite(lm, FACT, "in-context").applied(lm) as edited:
        assert edited is lm and lm.next_tokens(FACT.prompt_text) == wanted
        assert all(
            torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items()
        )
    assert lm.next_tokens(FACT.prompt_text) == plain


def test_ike_has_the_published_layout(roomy):
    edit = engram.rewrite(roomy, FACT, "ike", demonstrations=SHOWN[1:], k=1, encoder=letters)
    assert asked(roomy, edit, "To see the tower of Rome, go to") == (
        "New Fact: The mayor of the city is French\nPrompt: The mayor of the city is French\n\n"
        "New Fact: The tower of Rome is in the city of Paris\nPrompt: To see the tower of Rome, go "
        "to"
    )


def test_a_fact_demonstrates_copying_updating_and_retaining():
    new = "New Fact: The piano is played by him\nPrompt: "
    assert demonstrations_of(SHOWN[0]) == [
        f"{new}The piano is played by him\n\n",
        f"{new}She saw the piano of him\n\n",
        f"{new}The guitar is his own\n\n",
    ]


def test_the_nearest_demonstrations_are_shown_nearest_first(roomy):
    edit = engram.rewrite(roomy, FACT, "ike", demonstrations=SHOWN, k=3, encoder=letters)
    blocks = [block for fact in SHOWN for block in demonstrations_of(fact)]
    stated = "The tower of Rome is in the city of Paris"
    (query,) = letters([f"New Fact: {stated}\nPrompt: {stated}\n\n"])
    cosine = {
        block: float(query @ row / query.norm() / row.norm())
        for block, row in zip(blocks, letters(blocks), strict=True)
    }
    wanted = sorted(blocks, key=lambda block: -cosine[block])[:3]
    assert edit.wordings[0].demonstrations == tuple(wanted)
    assert asked(roomy, edit, "x").startswith("".join(wanted) + "New Fact: The tower")
    assert edit.diagnostics == {"blocks": len(blocks)} and edit.settings["encoder"] == "custom"


def test_the_bundled_model_has_demonstrations_of_its_own(pocket_lm):
    lm = pocket_lm
    fact = pocket.as_fact(pocket.find("Eiffel Tower")[0], "Rome")
    edit, again = (engram.rewrite(lm, fact, "ike", encoder="embeddings", seed=3) for _ in range(2))
    assert edit == again and len(edit.wordings[0].demonstrations) == 16
    others = {fact.subject, *(prompt for prompt, _ in fact.neighbours)}
    shown = "".join(edit.wordings[0].demonstrations)
    assert not any(other in shown for other in others)
    assert engram.rewrite(lm, fact, "ike", encoder="embeddings", seed=4) != edit
    assert len(lm.encode(asked(lm, edit, fact.prompt_text)).ids) <= lm.max_tokens - 24


# --- many facts -----------------------------------------------------------------------------------


def test_a_prompt_gets_the_facts_whose_subjects_it_names(roomy):
    edit = engram.rewrite(roomy, [FACT, RIVER, LONG_RIVER], "in-context", encoder=letters)
    tower, river, long_river = (
        "The tower of Rome is in the city of Paris. ",
        "The river runs through Madrid. ",
        "The long river runs through Rome. ",
    )
    assert asked(roomy, edit, "Is the tower of Rome old?") == tower + "Is the tower of Rome old?"
    assert asked(roomy, edit, "The river is") == river + "The river is"
    assert asked(roomy, edit, "The long river is") == river + long_river + "The long river is", (
        "the best name stands last"
    )
    assert "river" not in asked(roomy, edit, "Rivers are like the tower of Rome"), (
        "a subject is named by whole words"
    )


def test_any_other_prompt_gets_the_nearest_facts_or_nothing(roomy):
    facts = [FACT, RIVER, LONG_RIVER]
    edit = engram.rewrite(roomy, facts, "in-context", encoder=letters, most=1)
    prompt = "Through it runs the tiver"
    own = letters([fact.prompt_text for fact in facts])
    best = int(torch.nn.functional.cosine_similarity(own, letters([prompt])).argmax())
    assert asked(roomy, edit, prompt) == edit.wordings[best].statement + prompt
    silent = engram.rewrite(roomy, facts, "in-context", otherwise="nothing")
    assert asked(roomy, silent, prompt) == prompt


@pytest.mark.parametrize("encoder", ["hidden", "embeddings"])
def test_the_models_own_vectors_are_means_of_unit_states_and_padding_changes_nothing(encoder):
    lm = tiny_lm("gpt2", torch.float64)
    texts = ["The tower is in Rome.", "He sings.", "The tower of Rome is in the city of Paris."]
    got = encoder_of(lm, encoder)(texts)
    for text, row in zip(texts, got, strict=True):
        ids = torch.tensor([lm.encode(text).ids])
        with torch.no_grad():
            middle = lm.model(ids, output_hidden_states=True).hidden_states[2][
                0
            ]  # after block 1 of 4
        states = (
            lm.model.transformer.wte.weight[ids[0]].detach() if encoder == "embeddings" else middle
        )
        torch.testing.assert_close(
            row.double(), (states / states.norm(dim=-1, keepdim=True)).mean(0), atol=1e-6, rtol=1e-5
        )


def test_equal_settings_choose_equally_whether_facts_came_together_or_not(roomy):
    both = engram.rewrite(
        roomy, [FACT, RIVER], "ike", demonstrations=SHOWN, k=2, encoder="embeddings"
    )
    alone = engram.rewrite(roomy, RIVER, "ike", demonstrations=SHOWN, k=2, encoder="embeddings")
    assert replace(both.without(FACT), diagnostics={}) == replace(alone, diagnostics={})


# --- room -----------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_from_the_farthest_on(lm):
    edit = engram.rewrite(lm, FACT, "ike", demonstrations=SHOWN, k=5, encoder=letters, reserve=4)
    counts = []
    for words in range(1, 40, 4):
        prompt = "The " * words + "tower"
        text = asked(lm, edit, prompt)
        shown = [block for block in edit.wordings[0].demonstrations if block in text]
        assert shown == list(edit.wordings[0].demonstrations[: len(shown)])
        assert text == "".join(shown) + edit.wordings[0].statement + "Prompt: " + prompt
        assert len(lm.encode(text).ids) <= lm.max_tokens - 4
        if len(shown) < 5:
            more = edit.wordings[0].demonstrations[len(shown)] + text
            assert len(lm.tokenizer(more, verbose=False).input_ids) > lm.max_tokens - 4, (
                "no more would have fitted"
            )
        counts.append(len(shown))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 1


def test_the_least_relevant_facts_go_first(lm):
    edit = engram.rewrite(lm, [RIVER, LONG_RIVER], "in-context", reserve=85)
    assert (
        asked(lm, edit, "The long river is")
        == "The long river runs through Rome. The long river is"
    )


def test_a_frame_around_the_block_takes_room_too(lm):
    edit = engram.rewrite(lm, FACT, "ike", demonstrations=SHOWN, k=5, encoder=letters, reserve=4)
    with lm.asked_through("He sings and she plays the guitar and sings. {}"), edit.applied(lm):
        framed = lm.cloze(FACT.prompt_text)
    assert len(framed.ids) <= lm.max_tokens - 4 and framed.text == FACT.prompt_text


def test_no_room_for_the_fact_is_an_error(lm):
    edit = engram.rewrite(lm, FACT, "in-context")
    with pytest.raises(
        FactError, match=r"no room for 'The tower .* in front of the prompt: 104 tokens of 128"
    ):
        asked(lm, edit, "The tower of Rome " * 14)


def test_in_a_chat_the_fact_stands_in_the_users_turn():
    lm = chat_lm("chatml")
    edit = engram.rewrite(lm, FACT, "in-context")
    with lm.asked_through(engram.chat_frame(lm)), edit.applied(lm):
        cloze = lm.cloze(FACT.prompt_text, "Paris")
    said = [
        {
            "role": "user",
            "content": f"The tower of Rome is in the city of Paris. {FACT.prompt_text}",
        }
    ]
    ids = lm.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert cloze.ids == ids + cloze.answer[:-1]


def roomy_chat(template: str):
    """Return a model with a chat template that takes long texts."""
    made = chat_lm.__wrapped__(template)  # one of our own: the cached one is shared
    made.tokens.max_tokens = 4096
    return made


STATED = "The tower of Rome is in the city of Paris."


@pytest.mark.parametrize("template", ["chatml", "llama 3", "mistral"])
def test_a_chat_model_is_told_the_fact_and_its_turn_begins_with_the_prompt(template):
    lm = roomy_chat(template)
    edit = engram.rewrite(lm, FACT, "in-context")
    assert edit.settings["frame"] == "chat"
    told, request = edit.settings["wording"].replace("{}", STATED), "State a fact in one"
    text = asked(lm, edit, FACT.prompt_text)
    assert text.count(STATED) == 1 and text.endswith(FACT.prompt_text)
    assert (
        text.index(told) < text.index(request) < text.index(FACT.prompt_text, text.index(request))
    )
    # What mistral's template refuses as a system message is what the user says.
    roles = ["user"] if template == "mistral" else ["system", "user"]
    words = [told, f"{request} short sentence."]
    turns = [" ".join(words)] if template == "mistral" else words
    said = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    said.append({"role": "assistant", "content": FACT.prompt_text})
    ids = lm.tokenizer.apply_chat_template(said, continue_final_message=True, return_dict=False)
    with edit.applied(lm):
        cloze = lm.cloze(FACT.prompt_text, "Paris")
        written = lm.generate(FACT.prompt_text, 2)
    assert cloze.ids[: cloze.tokens] == ids
    with lm.asked_through(text.removesuffix(FACT.prompt_text) + "{}"):
        assert lm.generate(FACT.prompt_text, 2) == written, "what is generated is what is scored"


def test_the_frame_can_be_chosen_and_a_model_without_a_template_has_the_published_one(lm):
    plain = engram.rewrite(roomy_chat("chatml"), FACT, "in-context", frame="plain")
    assert asked(roomy_chat("chatml"), plain, "He sings") == f"{STATED} He sings"
    assert engram.rewrite(lm, FACT, "in-context").settings["frame"] == "plain"
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        engram.rewrite(lm, FACT, "in-context", frame="chat")


def test_a_prompt_that_is_told_nothing_stays_bare_on_a_chat_model_too():
    lm = roomy_chat("chatml")
    edit = engram.rewrite(lm, FACT, "in-context", otherwise="nothing")
    assert asked(lm, edit, "A river is") == "A river is"
    assert asked(lm, edit, FACT.prompt_text) != FACT.prompt_text


def test_an_edit_of_an_engram_that_knew_no_frame_stays_in_front_of_the_prompt(tmp_path):
    lm = roomy_chat("chatml")
    engram.rewrite(lm, FACT, "in-context").save(tmp_path / "edit")
    path = tmp_path / "edit" / "edit.json"
    record = json.loads(path.read_text())
    chat = PromptEdit.load(tmp_path / "edit")
    assert "<|im_start|>" in asked(lm, chat, "He sings")
    del record["settings"]["frame"], record["settings"]["wording"]
    path.write_text(json.dumps(stamped(record)))
    assert asked(lm, PromptEdit.load(tmp_path / "edit"), "He sings") == f"{STATED} He sings"


def test_a_chat_takes_its_room_too():
    lm = roomy_chat("chatml")
    edit = engram.rewrite(lm, [FACT, RIVER, LONG_RIVER], "in-context", reserve=4)
    prompt = "The long river of the tower of Rome is"
    whole = len(lm.encode(asked(lm, edit, prompt)).ids)
    lm.tokens.max_tokens = whole + 3  # one short of all that is relevant and the answer's
    text = asked(lm, edit, prompt)
    assert len(lm.encode(text).ids) <= lm.max_tokens - 4
    assert "runs through Rome" not in text or STATED not in text or "Madrid" not in text
    assert "Use it in your answers." in text, "only facts are left out, never the chat"


# --- the same interface as an edit of weights -----------------------------------------------------


def test_it_looks_like_an_edit(lm):
    edit = engram.rewrite(lm, [FACT, RIVER], "in-context", seed=5)
    assert (
        isinstance(edit, PromptEdit)
        and repr(edit) == "PromptEdit(2 facts, 'in-context', no weights)"
    )
    assert (edit.rank, edit.deltas, edit.seed, edit.method) == (0, {}, 5, "in-context")
    assert edit.settings == {
        "most": 4,
        "otherwise": "nearest",
        "reserve": 24,
        "encoder": "hidden",
        "frame": "plain",
    }
    assert (
        edit.base == {"model": lm.name, "model_type": "gpt2"}
        and edit.versions["torch"] == torch.__version__
    )


def test_facts_can_be_taken_out(lm):
    edit = engram.rewrite(lm, [FACT, RIVER], "in-context").with_receipt({"passed": False})
    assert edit.without(0) == replace(engram.rewrite(lm, RIVER, "in-context"), diagnostics={})
    assert edit.without() is edit
    with pytest.raises(FactError, match="all facts of the edit would go"):
        edit.without(0, 1)
    with pytest.raises(FactError, match="is not a fact of this edit"):
        edit.without(LONG_RIVER)


@pytest.mark.parametrize(
    "settings", [{"method": "in-context"}, {"method": "ike", "demonstrations": SHOWN, "k": 2}]
)
def test_what_is_loaded_equals_what_was_saved(lm, settings, tmp_path):
    edit = engram.rewrite(lm, [FACT, RIVER], **settings).with_receipt({"passed": True})
    edit.save(tmp_path / "edit")
    assert [path.name for path in (tmp_path / "edit").iterdir()] == ["edit.json"]
    assert PromptEdit.load(tmp_path / "edit") == edit == load_edit(tmp_path / "edit")
    assert asked(lm, PromptEdit.load(tmp_path / "edit"), "A river") == asked(lm, edit, "A river")


def test_each_kind_of_edit_says_where_the_other_is_read(lm, tmp_path):
    engram.rewrite(lm, FACT, "in-context").save(tmp_path / "prompt")
    random_edit(lm).save(tmp_path / "weights")
    with pytest.raises(
        EngramFileError,
        match=r"holds an in-context edit .* changes no weights. Read it with PromptEdit.load",
    ):
        Edit.load(tmp_path / "prompt")
    with pytest.raises(
        EngramFileError,
        match=r"holds an edit of weights \(.*\), no in-context edit; read it with Edit.load",
    ):
        PromptEdit.load(tmp_path / "weights")
    assert isinstance(load_edit(tmp_path / "weights"), Edit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("wordings"), "wordings is missing"),
        (lambda r: r["wordings"].pop(), "needs facts and a wording for each; got 2 and 1"),
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r["settings"].update(most="all"), "settings.most='all', expected a whole"),
        (lambda r: r["settings"].update(otherwise="all"), "settings.otherwise='all', expected"),
        (lambda r: r["settings"].update(encoder=3), "settings.encoder=3, expected a text"),
        (lambda r: r["wordings"][0].update(statement=None), r"wordings\[0\].statement=None"),
        (lambda r: r["facts"][0].update(prompt="no place"), "prompt='no place'"),
    ],
)
def test_damage_is_named(lm, tmp_path, change, message):
    engram.rewrite(lm, [FACT, RIVER], "in-context").save(tmp_path / "edit")
    path = tmp_path / "edit" / "edit.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(stamped(record)))
    with pytest.raises(EngramFileError, match=f"is damaged: .*{message}"):
        load_edit(tmp_path / "edit")


def test_an_encoder_that_is_a_function_has_to_be_given_again(roomy, tmp_path):
    edit = engram.rewrite(roomy, [FACT, RIVER], "in-context", encoder=letters)
    loaded = PromptEdit.load(edit.save(tmp_path / "edit"))
    assert asked(roomy, loaded, "The river is") == asked(roomy, edit, "The river is"), (
        "a named subject needs no encoder"
    )
    with pytest.raises(
        SettingError,
        match=r"encoder='custom': .* a function .*files do not keep a function: pass it again",
    ):
        asked(roomy, loaded, "A bridge")
    assert asked(roomy, replace(loaded, encoder=letters), "A bridge") == asked(
        roomy, edit, "A bridge"
    )


def test_there_are_no_weights_to_add_write_or_export(lm, tmp_path):
    edit, weights = engram.rewrite(lm, FACT, "in-context"), random_edit(lm)
    for wanted in (
        lambda: compose([weights, edit]),
        lambda: edit.to_peft(tmp_path / "x"),
        lambda: edit.to_gguf(tmp_path / "x"),
        lambda: edit.to_checkpoint(lm, tmp_path / "x"),
        lambda: edit.to_checkpoint("pocket", tmp_path / "x"),
    ):
        with pytest.raises(
            EngramError,
            match="is a text in front of prompts and has no weights to add, write or export",
        ):
            wanted()
    assert compose([edit]) is edit and list(tmp_path.iterdir()) == []


def test_it_nests_with_an_edit_of_weights(lm):
    edit, weights = engram.rewrite(lm, FACT, "in-context"), random_edit(lm)
    with weights.applied(lm):
        wanted = lm.next_tokens(asked(lm, edit, "A river"))
    with edit.applied(lm), weights.applied(lm):
        assert lm.next_tokens("A river") == wanted


# --- receipts -------------------------------------------------------------------------------------


def test_its_receipt_has_everything_but_weights(lm):
    edit = engram.rewrite(lm, FACT, "in-context")
    receipt = engram.verify(lm, edit, continuation_tokens=3)
    assert (receipt.norm_ratio, receipt.rho, receipt.rounding, receipt.frame) == (
        None,
        None,
        None,
        None,
    )
    verdicts = {check.name: check.passed for check in receipt.checks()}
    assert (
        all(verdicts[name] is None for name in ("norm_ratio", "rho", "rounding"))
        and verdicts["efficacy"] is not None
    )
    for answer in receipt.answers:
        pairs = [(answer.prompt, answer.wanted), (answer.prompt, answer.unwanted)]
        assert answer.before == pytest.approx(lm.probabilities(pairs))
        framed = [(asked(lm, edit, prompt), target) for prompt, target in pairs]
        assert answer.after == pytest.approx(lm.probabilities(framed))
    prompt, _, after = receipt.continuations[0]
    assert asked(lm, edit, prompt) + after == lm.generate(asked(lm, edit, prompt), 3)
    assert Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))) == receipt


def test_perplexity_is_that_of_the_same_pieces_without_and_with_the_fact_before_them(lm):
    edit = engram.rewrite(lm, FACT, "in-context")
    receipt = engram.verify(lm, edit, continuation_tokens=1)
    text, half = held_out_text(), lm.max_tokens // 2
    assert receipt.perplexity[0] == lm.perplexity(text, tokens=half)
    assert receipt.perplexity[1] == lm.perplexity(
        text, tokens=half, after=edit.wordings[0].statement
    )
    silent = engram.rewrite(lm, FACT, "in-context", otherwise="nothing")
    assert len(set(engram.verify(lm, silent, continuation_tokens=1).perplexity)) == 1


# --- mistakes -------------------------------------------------------------------------------------


def test_settings_are_checked(lm):
    for settings, message in (
        ({"most": 0}, "most=0: expected at least 1"),
        ({"otherwise": "all"}, "otherwise='all': expected 'nearest' or 'nothing'"),
        ({"moist": 3}, r"in-context has no setting 'moist' \(did you mean 'most'\?\)"),
        ({"layer": 3}, "in-context has no setting 'layer'"),
        ({"encoder": "bert"}, "encoder='bert': expected 'hidden' or 'embeddings', a name"),
    ):
        with pytest.raises(SettingError, match=message):
            engram.rewrite(lm, FACT, "in-context", **settings)
    with pytest.raises(SettingError, match="k=-1"):
        engram.rewrite(lm, FACT, "ike", k=-1, demonstrations=SHOWN)


def test_ike_shows_facts_of_the_bundled_table_or_given_ones(lm, tmp_path):
    shown = engram.rewrite(lm, FACT, "ike").wordings[0].demonstrations
    assert len(shown) == 16 and all(block.startswith("New Fact: ") for block in shown)
    assert not any(FACT.subject in block for block in shown)
    with pytest.raises(FactError, match="demonstrations is empty"):
        engram.rewrite(lm, FACT, "ike", demonstrations=[])
    assert engram.rewrite(lm, FACT, "ike", k=0).wordings[0].demonstrations == ()
    (tmp_path / "facts.json").write_text(json.dumps([fact.to_dict() for fact in SHOWN]))
    edit = engram.rewrite(lm, FACT, "ike", demonstrations=tmp_path / "facts.json")
    assert edit == engram.rewrite(lm, FACT, "ike", demonstrations=SHOWN)


def test_models_with_a_blank_are_refused():
    with pytest.raises(UnsupportedModelError, match="only causal models are asked through a frame"):
        engram.rewrite(tiny_lm("bert"), FACT, "in-context")


def test_the_published_encoder_is_used_where_it_is_installed(roomy, monkeypatch):
    name = "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'engram\[ike\]'"):
        engram.rewrite(roomy, FACT, "ike", demonstrations=SHOWN, encoder=name)
    loaded = []

    class SentenceTransformer:
        def __init__(self, asked_for):
            loaded.append(asked_for)

        def encode(self, texts, convert_to_tensor, show_progress_bar):
            assert convert_to_tensor and not show_progress_bar
            return letters(texts)

    monkeypatch.setitem(
        sys.modules,
        "sentence_transformers",
        SimpleNamespace(SentenceTransformer=SentenceTransformer),
    )
    edit = engram.rewrite(roomy, FACT, "ike", demonstrations=SHOWN, encoder=name, k=3)
    assert set(loaded) == {name} and edit.settings["encoder"] == name
    assert (
        edit.wordings
        == engram.rewrite(roomy, FACT, "ike", demonstrations=SHOWN, encoder=letters, k=3).wordings
    )


# --- the command line -----------------------------------------------------------------------------


def run(*args: str, ends: tuple[int, ...] = (0,)):
    result = CliRunner().invoke(cli.app, list(args), catch_exceptions=True)
    assert result.exit_code in ends, (result.output, result.exception)
    return result


def test_edit_verify_and_generate_take_in_context_edits_and_apply_explains(tmp_path):
    model, out = str(tiny_folder(tmp_path)), str(tmp_path / "edit")
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
    told = run("edit", model, *fact, "--method", "in-context", "--set", "most=2", "-o", out).output
    assert "efficacy" in told and "norm ratio                 —" in told
    assert PromptEdit.load(out).settings["most"] == 2
    assert (
        json.loads(run("verify", model, out, "--json", "--store", ends=(0, 1)).stdout)["norm_ratio"]
        is None
    )
    assert PromptEdit.load(out).receipt["norm_ratio"] is None
    lm = engram.load(model)
    random_edit(lm).save(tmp_path / "weights")
    said = run(
        "generate", model, "A river", "-n", "3", "-e", out, "-e", str(tmp_path / "weights")
    ).stdout
    with random_edit(lm).applied(lm), PromptEdit.load(out).applied(lm):
        assert said == lm.generate("A river", 3) + "\n"
    for args in (
        ("apply", out, model, "-o", str(tmp_path / "new")),
        ("verify", model, out, str(tmp_path / "weights")),
    ):
        failed = CliRunner().invoke(cli.app, list(args))
        assert isinstance(failed.exception, EngramFileError) and "changes no weights" in str(
            failed.exception
        )
    assert not (tmp_path / "new").exists()
