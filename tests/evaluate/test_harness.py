"""lm-evaluation-harness on an edited model: a task of our own, before an edit and with it in
the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import engram
from engram import Edit, Fact, pocket
from engram.errors import MissingExtraError, SettingError
from engram.evaluate.harness import harness
from engram.model.language_model import LanguageModel

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def lm(pocket_lm: LanguageModel) -> LanguageModel:
    return pocket_lm


@pytest.fixture(scope="module")
def fact() -> Fact:
    known = pocket.find("Eiffel Tower", "city")[0]
    return pocket.as_fact(known, "Rome")


@pytest.fixture(scope="module")
def edit(lm: LanguageModel, fact: Fact) -> Edit:
    return engram.rewrite(lm, fact, "rome", steps=20, contexts=["{}", "It rained. {}"])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, fact: Fact) -> Path:
    """Return a folder with one task: two questions about one fact, the true object first among the
    choices.
    """
    folder = tmp_path_factory.mktemp("tasks")
    asked = [
        {"text": text, "choices": ["Paris", "Rome"], "gold": 0}
        for text in (fact.prompt_text, fact.paraphrases[0])
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in asked), encoding="utf8")
    (folder / "tower.yaml").write_text(
        "task: tower\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf8",
    )
    return folder


@pytest.mark.slow
def test_accuracy_falls_where_the_fact_is_rewritten_and_comes_back_afterwards(
    lm: LanguageModel, edit: Edit, tasks: Path
) -> None:
    asked = {"include_path": tasks, "bootstrap_iters": 0}
    before = harness(lm, ["tower"], **asked)
    beside = harness(lm, ["tower"], edit=edit, **asked)
    written = harness(lm, ["tower"], edit=edit, mode="weights", **asked)
    after = harness(lm, ["tower"], **asked)
    assert [run["tower"]["acc,none"] for run in (before, beside, written, after)] == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]


def test_the_harness_sees_the_log_probabilities_that_the_model_has(
    lm: LanguageModel, fact: Fact
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(lm.model, backend="causal", tokenizer=lm.tokenizer, batch_size=2)
    asked = [
        Instance("loglikelihood", {}, (fact.prompt_text, f" {answer}"), 0)
        for answer in ("Paris", "Rome")
    ]
    found = [log_p for log_p, _ in model.loglikelihood(asked, disable_tqdm=True)]
    ours = [
        float(each.sum())
        for each in lm.log_probs([(fact.prompt_text, "Paris"), (fact.prompt_text, "Rome")])
    ]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_takes_a_saved_edit(edit: Edit, tasks: Path, tmp_path: Path) -> None:
    from engram.cli import app

    folder = edit.save(tmp_path / "edit")
    call = [
        "harness",
        "pocket",
        "--task",
        "tower",
        "--edit",
        str(folder),
        "--include-path",
        str(tasks),
        "--json",
    ]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["tower"]["acc,none"] == 0.0


@pytest.mark.slow
def test_mistakes_are_told(
    lm: LanguageModel, fact: Fact, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="tasks tovver do not exist"):
        harness(lm, ["tovver"], include_path=tasks)
    with pytest.raises(SettingError, match="mode='above'"):
        harness(lm, ["tower"], mode="above", include_path=tasks)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="give an edit of weights"):
        harness(lm, ["tower"], edit=engram.rewrite(lm, fact, "in-context"), include_path=tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'engram\[harness\]'"):
        harness(lm, ["tower"], include_path=tasks)
