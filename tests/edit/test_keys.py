"""The keys of an edit go where its facts go: into files, out with facts taken out, together in
compositions.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engram
from engram.edit.edit import Edit, compose
from engram.edit.folder_format import change_identity
from engram.errors import EngramError, EngramFileError, NonFiniteError
from tests.helpers.edit_samples import random_edit, tiny, weight_name
from tests.helpers.rewrite_samples import CONTEXTS, FACT, moment_of
from tests.helpers.tiny import tiny_lm

LM = tiny()


def keyed(layers: tuple[int, ...] = (1,), **options: Any) -> Edit:
    edit = random_edit(LM, layers, **options)
    generator = torch.Generator().manual_seed(options.get("seed", 1))
    return replace(
        edit,
        keys={name: torch.randn(len(edit.facts), 24, generator=generator) for name in edit.deltas},
    )


def test_an_edit_needs_no_keys() -> None:
    assert random_edit(LM).keys == {}


def test_keys_that_do_not_fit_are_refused() -> None:
    edit = keyed(rank=2)
    (name,) = edit.deltas
    with pytest.raises(
        EngramError,
        match=r"keys of 'other', which the edit does not change; it changes transformer",
    ):
        replace(edit, keys={"other": torch.ones(2, 24)})
    with pytest.raises(
        EngramError, match=r"\[3, 24\]; expected one row a fact, \[facts, in\] = \[2, 24\]"
    ):
        replace(edit, keys={name: torch.ones(3, 24)})
    with pytest.raises(EngramError, match=r"float16 .* in float32 or float64"):
        replace(edit, keys={name: torch.ones(2, 24, dtype=torch.float16)})
    with pytest.raises(NonFiniteError, match=r"keys of .* hold NaN or infinity"):
        replace(edit, keys={name: torch.full((2, 24), torch.nan)})


def test_keys_count_in_equality_and_not_in_identity() -> None:
    edit = keyed()
    other = replace(edit, keys={name: 2 * key_nf for name, key_nf in edit.keys.items()})
    assert edit == keyed() and edit != other and edit != replace(edit, keys={}) and edit != 3
    assert change_identity(edit.deltas) == change_identity(other.deltas)


def test_rows_go_with_their_facts() -> None:
    edit = keyed((0, 2), rank=3, joint=False)
    rest = edit.without(1)
    assert all(torch.equal(rest.keys[name], edit.keys[name][[0, 2]]) for name in edit.deltas)


def test_composed_edits_give_their_keys_back() -> None:
    a, b = keyed((1,), rank=2, seed=1), keyed((0, 1), rank=1, seed=2)
    both = compose([a, b])
    shared, bs_own = weight_name(LM, 1), weight_name(LM, 0)
    assert torch.equal(both.keys[shared], torch.cat([a.keys[shared], b.keys[shared]]))
    assert torch.equal(both.keys[bs_own], torch.cat([torch.zeros(2, 24), b.keys[bs_own]]))
    assert both.without(*b.facts) == a and both.without(*a.facts) == b


def test_a_part_without_keys_takes_those_of_its_weights_away() -> None:
    both = compose([keyed((0, 1), seed=1), random_edit(LM, (1,), seed=2)])
    assert list(both.keys) == [weight_name(LM, 0)]


def test_rome_keeps_the_key_it_solved_at() -> None:
    lm = tiny_lm("gpt2", torch.float64)
    other = engram.Fact("bridge", "The {} is in", "London")
    edit = engram.rewrite(
        lm, [FACT, other], layer=1, contexts=CONTEXTS, second_moments={1: moment_of(lm)}, steps=2
    )
    (name,) = edit.deltas
    seen = []
    hook = lm.parts.mlp_out(1).register_forward_hook(
        lambda module, args, out: seen.append(args[0][0])
    )
    for context in CONTEXTS:  # the last token of "... the tower of Rome" is where the subject ends
        lm.model(torch.tensor([lm.encode(context.replace("{}", "The tower of Rome")).ids]))
    hook.remove()
    torch.testing.assert_close(
        edit.keys[name][0], torch.stack([key_tf[-1] for key_tf in seen]).mean(0)
    )
    assert edit.keys[name].shape == (2, 48)


def test_keys_are_kept_beside_the_deltas(tmp_path: Path) -> None:
    edit = keyed((0, 2), rank=2)
    edit.save(tmp_path / "edit")
    assert sorted(path.name for path in (tmp_path / "edit").iterdir()) == [
        "deltas.safetensors",
        "edit.json",
        "keys.safetensors",
    ]
    assert Edit.load(tmp_path / "edit") == edit
    replace(edit, keys={}).save(tmp_path / "edit")
    assert not (tmp_path / "edit" / "keys.safetensors").exists()
    assert Edit.load(tmp_path / "edit").keys == {}


def test_damaged_keys_are_named(tmp_path: Path) -> None:
    folder = keyed().save(tmp_path / "edit")
    os.truncate(folder / "keys.safetensors", 90)
    with pytest.raises(
        EngramFileError,
        match=r"keys.safetensors is damaged: its sha256 is not the one in edit.json",
    ):
        Edit.load(folder)
    (folder / "keys.safetensors").unlink()
    with pytest.raises(
        EngramFileError, match=r"keys.safetensors cannot be read .*the edit is incomplete"
    ):
        Edit.load(folder)
    recipe = json.loads((folder / "edit.json").read_text())
    del recipe["keys_sha256"], recipe["checksum"]  # as an older engram wrote it
    (folder / "edit.json").write_text(json.dumps(recipe))
    assert Edit.load(folder).keys == {}
