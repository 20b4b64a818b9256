"""An edit goes to the hub with a card that says what its receipt says, without paths and tokens."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import engram
from engram import Edit, Fact
from engram.edit.edit import compose, load_edit
from engram.errors import EngramError
from engram.evaluate.hub import push
from engram.evaluate.model_card import model_card
from engram.evaluate.receipt import Receipt
from tests.helpers.command_line import failing, run
from tests.helpers.edit_samples import random_edit, tiny
from tests.helpers.fake_hub import TOKEN, FakeHub, serving
from tests.helpers.receipt_samples import GOOD, made

# the hub's library uploads large files by an old name of an argument
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
BAD = {**GOOD, "paraphrase": [(False, False)] * 5}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose server is not ours
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def sample(seed: int = 1, **more: Any) -> Edit:
    return replace(random_edit(tiny("llama"), seed=seed), **more)


def of_model(edit: Edit, name: str) -> Edit:
    return replace(edit, base={**edit.base, "model": name})


def head_and_text(card: str) -> tuple[dict[str, Any], str]:
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_what_is_downloaded_is_the_edit(hub: FakeHub, tmp_path: Path) -> None:
    edit = of_model(sample(receipt=made(GOOD).to_dict()), "owner/model")
    assert push(edit, "me/tower", private=True) == f"{hub.url}/me/tower"
    files = hub.files["me/tower"]
    assert files.keys() == {"README.md", "edit.json", "deltas.safetensors"}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    assert Edit.load(tmp_path) == edit
    assert files["README.md"].decode() == model_card(edit, "me/tower")
    assert hub.visibility == {"me/tower": "private"}


def test_a_second_push_replaces_the_first(hub: FakeHub) -> None:
    push(sample(seed=1), "me/tower")
    first = dict(hub.files["me/tower"])
    push(sample(seed=2), "tower")  # without an owner it is one's own
    assert hub.files.keys() == {"me/tower"} and hub.visibility == {"me/tower": None}
    assert hub.files["me/tower"]["edit.json"] != first["edit.json"]


def test_no_path_and_no_token_is_uploaded(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    here = str(tmp_path / "model")
    receipt = replace(made(GOOD), model=here).to_dict()
    edit = of_model(sample(settings={"corpus": str(tmp_path / "mine.txt"), "n": [here]}), here)
    edit = compose([edit, of_model(sample(seed=2), here)]).with_receipt(receipt)
    push(edit, "me/tower")
    everything = b"".join(hub.files["me/tower"].values())
    assert str(tmp_path).encode() not in everything and TOKEN.encode() not in everything
    record = json.loads(hub.files["me/tower"]["edit.json"])
    assert record["base"]["model"] == record["receipt"]["model"] == "model"
    assert record["settings"]["parts"][0]["settings"] == {"corpus": "mine.txt", "n": ["model"]}


def test_the_head_is_for_the_hub() -> None:
    edit = of_model(sample(), "owner/model")
    head, text = head_and_text(model_card(edit, "me/tower"))
    assert head == {
        "base_model": "owner/model",
        "base_model_relation": "adapter",
        "library_name": "engram",
        "tags": ["engram", "model-editing", "knowledge-editing", "random"],
    }
    assert "hf download me/tower --local-dir edit" in text
    assert "engram verify owner/model edit" in text
    # a short name stays in the commands: the hub's weights may be others than the pip package's
    head, text = head_and_text(model_card(of_model(edit, "smollm2"), "me/tower"))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "engram verify smollm2 edit" in text
    # of a model that is not on the hub there is nothing to link to
    assert "base_model" not in head_and_text(model_card(of_model(edit, "pocket"), "me/tower"))[0]


@pytest.mark.parametrize(
    ("receipt", "says"),
    [
        (None, "Receipt: none, the edit was not verified"),
        (made(GOOD), "Receipt: PASSED"),
        (made(BAD), "Receipt: FAILED"),
        (
            made(
                GOOD,
                says={"rewrite": [(False, False)]}
                | dict.fromkeys(("paraphrase", "neighbourhood"), [(False, False)] * 5),
            ),
            "Receipt: PASSED, but the model",
        ),
    ],
    ids=["none", "passed", "failed", "caution"],
)
def test_the_card_says_what_the_receipt_says(receipt: Receipt | None, says: str) -> None:
    edit = sample()
    text = model_card(edit.with_receipt(receipt) if receipt else edit, "me/tower")
    assert f"**{says}" in text
    assert (str(receipt) in text) if receipt else "was not measured" in text


def test_texts_cannot_change_the_card() -> None:
    evil = "a | b\n# Title `code` <script> $(touch x)"
    fact = Fact(evil, "The {} is in", "*Rome*")
    text = model_card(sample(facts=(fact,), method="x`|y"), "me/tower")
    (row,) = [line for line in text.splitlines() if line.startswith("| The a")]
    assert row.replace("\\|", "").count("|") == 4 and "<script>" not in row
    (title,) = [line for line in text.splitlines() if line.startswith("# ")]
    assert title.startswith("# a ")
    (command,) = [line for line in text.splitlines() if line.startswith("engram generate")]
    words = shlex.split(command)  # a shell would run what is in double quotes
    assert words[3] == fact.prompt_text.replace("\n", " ") and "'" in command


def test_many_facts_are_counted() -> None:
    facts = tuple(Fact(f"Tower {i}", "The {} is in", "Rome") for i in range(30))
    edit = random_edit(tiny(), rank=30, joint=False)
    text = model_card(replace(edit, facts=facts), "me/towers")
    assert text.count("| The Tower ") == 20 and "and 10 more in `edit.json`" in text
    assert "Tower 0 → Rome and 29 more" in text


def test_an_edit_by_text_has_a_card_of_its_own(
    hub: FakeHub, tmp_path: Path, pocket_lm: Any
) -> None:
    edit = engram.rewrite(pocket_lm, Fact("Miles Davis", "{} plays the", "piano"), "in-context")
    push(edit, "me/piano")
    for name, contents in hub.files["me/piano"].items():
        (tmp_path / name).write_bytes(contents)
    assert load_edit(tmp_path) == edit
    text = hub.files["me/piano"]["README.md"].decode()
    assert "No weight changes" in text and "--gguf" not in text


def test_without_a_token_nothing_is_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(EngramError, match=r"^no token .*HF_TOKEN.*hf auth login"):
        push(sample(), "me/tower")
    assert not hub.tokens


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ({"/api/repos/create": 403}, r"refused 'me/tower' \(403\).*may not write there"),
        ({"/api/repos/create": 500}, r"refused 'me/tower' \(500\)"),
        ({"/api/models/me/tower/commit": 403}, r"refused 'me/tower' \(403\)"),
        ({"/large": 500}, r"refused 'me/tower': Error while uploading 'deltas.safetensors'"),
        ({"/api/validate-yaml": 400}, r"refused 'me/tower': Invalid metadata"),
    ],
)
def test_a_refusal_is_one_line(hub: FakeHub, refuses: dict[str, int], message: str) -> None:
    hub.refuses = refuses
    with pytest.raises(EngramError, match=message) as raised:
        push(sample(), "me/tower")
    assert "\n" not in str(raised.value) and TOKEN not in str(raised.value)


def test_a_wrong_token_is_not_printed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("hf_secret", "hf_\x01secret", "hf_sécret"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        with pytest.raises(EngramError) as raised:
            push(sample(), "me/tower")
        assert "secret" not in str(raised.value) and "sécret" not in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/to wer", "", "--x"])
def test_a_wrong_name_is_one_line(hub: FakeHub, name: str) -> None:
    with pytest.raises(EngramError, match="is no name of a repository: expected OWNER/NAME"):
        push(sample(), name)
    assert not hub.files


def test_no_network_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(EngramError, match=r"the hub cannot be reached .*HF_ENDPOINT") as raised:
        push(sample(), "me/tower")
    assert "\n" not in str(raised.value)


def test_the_command_prints_the_address(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = str(sample().save(tmp_path / "edit"))
    ended = run("push", folder, "me/tower")
    assert ended.stdout == f"edit: {hub.url}/me/tower\n" and "has no receipt" in ended.stderr
    document = json.loads(run("push", folder, "me/other", "--private", "--json", "-q").stdout)
    assert document == {"url": f"{hub.url}/me/other", "repo": "me/other"}
    assert hub.visibility == {"me/tower": None, "me/other": "private"}
    assert "no edit" in failing(monkeypatch, capsys, "push", str(tmp_path), "me/tower")
