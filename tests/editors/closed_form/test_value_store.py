"""A value is found once: it is on disk before the next one, and anything that would change it gives
it another name.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from engram import Fact
from engram.editors.closed_form import value_search
from engram.editors.closed_form.value_store import ValueStore
from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_values
from engram.errors import EngramError
from engram.files import cache_folder
from tests.helpers.mass_samples import FACTS, rewrite
from tests.helpers.rewrite_samples import CONTEXTS
from tests.helpers.tiny import tiny_lm


@pytest.fixture
def asked(monkeypatch):
    """Return the facts whose values were optimised, batch after batch."""
    calls: list[list[Fact]] = []

    def counting(lm: Any, facts: Any, *args: Any, **options: Any) -> Any:
        calls.append(list(facts))
        return optimise_values(lm, facts, *args, **options)

    monkeypatch.setattr(value_search, "optimise_values", counting)
    return calls


def kept(path: Path) -> int:
    """Values that another process would see in the file."""
    with closing(sqlite3.connect(path)) as file:
        return int(file.execute("SELECT COUNT(*) FROM found").fetchone()[0])


def test_a_second_call_finds_all_values(asked, tmp_path):
    lm = tiny_lm("gpt2")
    first, second = (rewrite(lm, store=tmp_path / "values") for _ in range(2))
    assert (
        sorted(fact.subject for fact in asked[0]) == sorted(fact.subject for fact in FACTS)
        and len(asked) == 1
    )
    assert first == second
    rewrite(lm, [*FACTS, Fact("bridge", "The {} is in", "London")], store=tmp_path / "values")
    assert [fact.subject for fact in asked[1]] == ["bridge"], "only what is new"
    assert kept(tmp_path / "values") == 4


def test_new_and_old_values_come_back_in_the_order_of_the_facts(tmp_path):
    lm = tiny_lm("gpt2")
    rewrite(lm, FACTS[1:2], store=tmp_path / "values")
    assert rewrite(lm, FACTS[::-1], store=tmp_path / "values").without(0, 2).facts == (FACTS[1],)
    mixed, fresh = rewrite(lm, FACTS, store=tmp_path / "values"), rewrite(lm, FACTS)
    for mine, wanted in zip(mixed.deltas.values(), fresh.deltas.values(), strict=True):
        torch.testing.assert_close(mine.dense(), wanted.dense(), atol=1e-6, rtol=1e-3)


CHANGES: dict[str, dict[str, Any]] = {
    "prompt": {"facts": [replace(FACTS[0], prompt="The {} stands in")]},
    "subject": {"facts": [replace(FACTS[0], subject="tower")]},
    "target": {"facts": [replace(FACTS[0], target="London")]},
    "contexts": {"contexts": CONTEXTS[:3]},
    "order of contexts": {"contexts": (CONTEXTS[0], *CONTEXTS[:0:-1])},
    "layer": {"layers": [0, 1]},
    "site": {"site": "mlp"},
    **{
        name: {name: value}
        for name, value in {
            "steps": 4,
            "learning_rate": 0.4,
            "weight_decay": 0.4,
            "kl_weight": 0.1,
            "kl_position": "last",
            "clamp": 0.5,
            "stop": "argmax",
            "stop_loss": 0.1,
            "matmul": "bfloat16",
        }.items()
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_value_changes_its_name(change, asked, tmp_path):
    lm = tiny_lm("gpt2")
    rewrite(lm, FACTS[:1], store=tmp_path / "values")
    rewrite(lm, **{"facts": FACTS[:1], "store": tmp_path / "values", **CHANGES[change]})
    assert [len(facts) for facts in asked] == [1, 1]


def test_every_setting_of_the_optimisation_is_tried():
    assert set(ValueConfig.__dataclass_fields__) <= set(CHANGES)


@pytest.mark.parametrize(
    "same",
    [
        {"preservation": 5.0},
        {"method": "memit-seq"},
        {"layers": [1, 2]},
        {"engine": "whole"},
        {"facts_per_batch": 1},
        {"keys": "mean"},
    ],
    ids=str,
)
def test_what_does_not_change_a_value_does_not_change_its_name(same, asked, tmp_path):
    lm = tiny_lm("gpt2")
    rewrite(lm, store=tmp_path / "values")
    rewrite(lm, **{"store": tmp_path / "values", **same})
    assert [len(facts) for facts in asked] == [3]


def test_a_fact_may_say_more_about_itself(asked, tmp_path):
    lm = tiny_lm("gpt2")
    rewrite(lm, FACTS[:1], store=tmp_path / "values")
    rewrite(
        lm,
        [replace(FACTS[0], target_true="Rome", paraphrases=("Where?",))],
        store=tmp_path / "values",
    )
    assert [len(facts) for facts in asked] == [1]


@pytest.mark.parametrize(
    "changed", ["a weight", "dtype", "tokenizer", "an edit in force", "an edit beside the weights"]
)
def test_values_of_one_model_are_not_anothers(changed, asked, tmp_path):
    lm = tiny_lm("gpt2")
    edit = rewrite(lm, FACTS[1:], store=False, layers=[0])
    store, others = (
        tmp_path / "values",
        {
            "dtype": tiny_lm("gpt2", torch.float64),
            "tokenizer": tiny_lm(tokenizer="metaspace with BOS"),
        },
    )
    rewrite(lm, FACTS[:1], store=store)
    asked.clear()
    if changed == "a weight":
        with torch.no_grad():
            lm.model.transformer.h[3].ln_1.bias[0] += 1e-3
        rewrite(lm, FACTS[:1], store=store)
    elif changed == "an edit in force":
        rewrite(lm, FACTS[:1], store=store, past=[edit])
    elif changed == "an edit beside the weights":
        with edit.applied(lm, how="beside"):
            rewrite(lm, FACTS[:1], store=store)
    else:
        rewrite(others[changed], FACTS[:1], store=store)
    assert [len(facts) for facts in asked] == [1]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("facts_per_batch", [1, 2])
def test_a_killed_run_goes_on_where_it_was(facts_per_batch, asked, tmp_path):
    """Each value is in the file, for other processes too, by the time it is reported."""
    lm, store = tiny_lm("gpt2"), tmp_path / "values"

    def until_two(what: str, done: int, total: int) -> None:
        if what == "value":
            assert kept(store) == done
            if done == 2:
                raise KilledError

    with pytest.raises(KilledError):
        rewrite(lm, store=store, facts_per_batch=facts_per_batch, progress=until_two)
    assert kept(store) == 2
    seen = []
    resumed = rewrite(
        lm, store=store, facts_per_batch=facts_per_batch, progress=lambda *at: seen.append(at)
    )
    assert sum(len(facts) for facts in asked) == 3, "none is found twice"
    assert [at for at in seen if at[0] == "value"] == [("value", 2, 3), ("value", 3, 3)]
    assert resumed == rewrite(lm, store=False, facts_per_batch=facts_per_batch)


def test_what_is_kept_comes_back_bit_for_bit(tmp_path):
    lm, config = tiny_lm("gpt2", torch.float64), ValueConfig(steps=3)
    (_, value), *_ = optimise_values(lm, FACTS[:1], ValueSearch(1, CONTEXTS, config))
    with ValueStore(tmp_path / "values", lm) as store:
        name = store.name(FACTS[0], ValueSearch(1, CONTEXTS, config))
        assert store.get([name]) == [None]
        store.put(name, value)
        (found,) = store.get([name])
    assert (
        found is not None
        and torch.equal(found.start_d, value.start_d)
        and torch.equal(found.delta_d, value.delta_d)
    )
    assert (found.losses, found.delta_norms) == (value.losses, value.delta_norms)


def test_two_writers_share_a_file(tmp_path):
    lm, config = tiny_lm("gpt2"), ValueConfig(steps=1)
    values = dict(optimise_values(lm, FACTS, ValueSearch(1, CONTEXTS, config)))
    with ValueStore(tmp_path / "values", lm) as one, ValueStore(tmp_path / "values", lm) as two:
        names = [one.name(fact, ValueSearch(1, CONTEXTS, config)) for fact in FACTS]
        for i, name in enumerate(names):
            (one, two)[i % 2].put(name, values[i])
        assert all(one.get(names)) and all(two.get(names))


def test_without_a_store_nothing_is_touched(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    lm = tiny_lm("gpt2")
    for _ in range(2):
        rewrite(lm, store=False)
    assert [len(facts) for facts in asked] == [3, 3] and not (tmp_path / "cache").exists()


def test_by_default_the_cache_folder_has_it(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    for _ in range(2):
        rewrite(tiny_lm("gpt2"), store=True)
    assert [len(facts) for facts in asked] == [3] and kept(
        tmp_path / "values" / "values.sqlite"
    ) == 3


def test_a_folder_that_is_not_there_is_made(tmp_path):
    rewrite(tiny_lm("gpt2"), store=str(tmp_path / "new" / "values"))
    assert kept(tmp_path / "new" / "values") == 3


@pytest.mark.parametrize(
    "damage", ["not a database", "a folder", "a torn page", "a torn value", "no numbers"]
)
def test_a_damaged_store_is_explained(damage, tmp_path):
    lm, path = tiny_lm("gpt2"), tmp_path / "values"
    if damage == "not a database":
        path.write_bytes(b"nonsense" * 1000)
    elif damage == "a folder":
        path.mkdir()
    else:
        rewrite(lm, store=path)
        if damage == "a torn page":
            whole = path.read_bytes()
            path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        else:
            column = "tensors" if damage == "a torn value" else "losses"
            with closing(sqlite3.connect(path)) as file, file:
                file.execute(f"UPDATE found SET {column} = ?", (b"torn",))
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(
        EngramError,
        match=r"values cannot be kept in .*values: .*give store= another file, or False",
    ):
        rewrite(lm, store=path)
    assert before is None or path.read_bytes() == before, "it is not ours to delete"


@pytest.mark.parametrize("damage", ["a digit", "exchanged", "losses", "no bytes", "NaN"])
def test_a_damaged_value_of_the_cache_is_found_again(damage, asked, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    lm, path = tiny_lm("gpt2"), tmp_path / "values" / "values.sqlite"
    first = rewrite(lm, store=True)
    with closing(sqlite3.connect(path)) as file, file:
        (one, losses, data), (two, _, other) = file.execute("SELECT * FROM found LIMIT 2")
        tensors = load_tensors(data)
        if damage == "a digit":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif damage == "exchanged":
            data = other
        elif damage == "losses":
            losses = losses.replace("1", "2", 1)
        elif damage == "no bytes":
            data = "text"
        else:  # as an older engram wrote it, without a checksum
            data = save_tensors({"start": tensors["start"], "delta": tensors["delta"] / 0})
        file.execute("UPDATE found SET losses = ?, tensors = ? WHERE name = ?", (losses, data, one))
    asked.clear()
    assert rewrite(lm, store=True) == first
    assert [len(facts) for facts in asked] == [1] and "the value is found again" in caplog.text
    asked.clear()
    assert rewrite(lm, store=True) == first and not asked, "it was written again"


def test_a_value_of_an_older_engram_is_read_with_a_note(asked, tmp_path, caplog):
    lm, path = tiny_lm("gpt2"), tmp_path / "values"
    first = rewrite(lm, store=path)
    with closing(sqlite3.connect(path)) as file, file:
        for name, data in file.execute("SELECT name, tensors FROM found").fetchall():
            old = save_tensors(load_tensors(data))
            file.execute("UPDATE found SET tensors = ? WHERE name = ?", (old, name))
    asked.clear()
    assert rewrite(lm, store=path) == first and not asked
    assert caplog.text.count("has no checksum") == 1


@pytest.mark.parametrize("place", ["a device", "a file", "no database", "a pipe"])
def test_a_cache_that_cannot_be_used_costs_time_only(place, tmp_path, monkeypatch, caplog):
    folder = Path("/dev/null") if place == "a device" else tmp_path / "cache"
    if place == "a file":
        folder.write_text("mine")
    elif place in ("no database", "a pipe"):
        (folder / "values").mkdir(parents=True)
        path = folder / "values" / "values.sqlite"
        os.mkfifo(path) if place == "a pipe" else path.write_bytes(b"mine" * 1000)
    monkeypatch.setenv("ENGRAM_CACHE", str(folder))
    cache_folder._reported.clear()
    lm = tiny_lm("gpt2")
    expected = rewrite(lm, store=False)
    assert rewrite(lm, store=True) == expected and rewrite(lm, store=True) == expected
    assert caplog.text.count("cannot be written") == 1


def test_a_full_disk_loses_no_value(tmp_path, caplog):
    lm, config = tiny_lm("gpt2"), ValueConfig(steps=1)
    search = ValueSearch(1, CONTEXTS, config)
    values = dict(optimise_values(lm, FACTS, search))
    cache_folder._reported.clear()
    with ValueStore(tmp_path / "values", lm) as store:
        assert store._file is not None
        store._file.execute("PRAGMA max_page_count = 1")
        for number in range(200):
            store.put(str(number), values[0])
    assert caplog.text.count("is full") == 1


def test_a_pipe_as_a_store_is_refused(tmp_path):
    os.mkfifo(tmp_path / "values")
    with pytest.raises(EngramError, match=r"kept in .*expected a regular file"):
        rewrite(tiny_lm("gpt2"), store=tmp_path / "values")
