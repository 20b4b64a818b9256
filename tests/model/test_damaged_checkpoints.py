"""A damaged checkpoint is loaded to the same weights and config, or refused in one line; no other
exception, and no wait without end.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import engram
from engram.errors import EngramError
from engram.model.loading import load_shapes
from tests.helpers.tiny import make_model, tiny_folder

FAMILIES = ("gpt2", "llama", "t5", "bert")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
HOME = Path("model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of each family, and "sharded", whose weights are two files."""
    home = tmp_path_factory.mktemp("whole")
    folders = {family: tiny_folder(home, family) for family in FAMILIES}
    folders["sharded"] = Path(shutil.copytree(folders["gpt2"], home / "sharded"))
    (folders["sharded"] / WEIGHTS).unlink()
    make_model("gpt2").save_pretrained(folders["sharded"], max_shard_size="100KB")
    assert len(list(folders["sharded"].glob("*.safetensors"))) == 2
    return folders


class Late(BaseException):
    """No Exception: what turns those of other libraries into lines must not catch it."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where the block waits without end."""

    def late(*_: object) -> None:
        raise Late(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path) -> engram.LanguageModel | str:
    """Return the model, or the line that refuses it; loading shapes ends in one of them too."""
    loaded: Any = None
    with within(60):
        for load in (load_shapes, engram.load):
            try:
                loaded = load(folder)
            except EngramError as error:
                loaded = str(error)
            assert not isinstance(loaded, str) or len(loaded.splitlines()) == 1, loaded
    return loaded


def refused(folder: Path, *words: str) -> None:
    line = outcome(folder)
    assert isinstance(line, str) and all(word in line for word in words), line


# --- bytes of the weights


def headed(raw: bytes, header: Any, length: int | None = None) -> bytes:
    """Return weights with another header."""
    data = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def edited(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    change(header)
    return headed(raw, header)


NAME = "transformer.h.0.ln_1.bias"
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "a header cut": lambda raw: raw[:100],
    "a byte short": lambda raw: raw[:-1],
    "half": lambda raw: raw[: len(raw) // 2],
    "a byte too many": lambda raw: raw + b"\0",
    "zeros": lambda raw: b"\0" * len(raw),
    "a page": lambda raw: b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "a brace flipped": lambda raw: raw[:8] + b"[" + raw[9:],
    "the longest header": lambda raw: struct.pack("<Q", 2**64 - 1) + raw[8:],
    "a header of a gigabyte": lambda raw: struct.pack("<Q", 2**30) + raw[8:],
    "a header too short": lambda raw: struct.pack("<Q", 10) + raw[8:],
    "a header of nothing": lambda raw: struct.pack("<Q", 0) + raw[8:],
    "a list": lambda raw: headed(raw, []),
    "a number": lambda raw: headed(raw, 1),
    "no tensors": lambda raw: headed(raw, {}),
    "nested": lambda raw: headed(raw, b"[" * 100_000 + b"]" * 100_000),
    "no text": lambda raw: headed(raw, b"\xff\xfe\xfd"),
    "backwards": lambda raw: edited(raw, lambda h: h[NAME]["data_offsets"].reverse()),
    "after the end": lambda raw: edited(raw, lambda h: h[NAME].update(data_offsets=[0, 2**62])),
    "negative": lambda raw: edited(raw, lambda h: h[NAME].update(data_offsets=[-128, 0])),
    "another size": lambda raw: edited(raw, lambda h: h[NAME].update(dtype="F16")),
    "no such dtype": lambda raw: edited(raw, lambda h: h[NAME].update(dtype="F33")),
    "another shape": lambda raw: edited(raw, lambda h: h[NAME].update(shape=[33])),
    "a shape that overflows": lambda raw: edited(raw, lambda h: h[NAME].update(shape=[2**62, 64])),
    "a shape of text": lambda raw: edited(raw, lambda h: h[NAME].update(shape="32")),
    "no offsets": lambda raw: edited(raw, lambda h: h[NAME].pop("data_offsets")),
    "whole numbers": lambda raw: edited(raw, lambda h: h[NAME].update(dtype="I32")),
}


@pytest.mark.parametrize("case", BYTES)
@pytest.mark.parametrize("which", ["gpt2", "sharded"])
def test_damaged_weights_are_refused_by_the_name_of_their_file(
    case: str, which: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole[which], tmp_path / HOME))
    files = sorted(folder.glob("*.safetensors"))
    path = next(path for path in files if NAME.encode() in path.read_bytes())
    path.write_bytes(BYTES[case](path.read_bytes()))
    refused(folder, str(folder if case in ("no tensors", "whole numbers") else path))


# --- the index


def to(name: Any) -> Callable[[Path], object]:
    """Return a change of an index: it names another file for one tensor."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NAME] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


def indexed(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (indexed(""), "no JSON"),
    "no JSON": (indexed("{"), "no JSON"),
    "a list": (indexed("[]"), "expected an object"),
    "nested": (indexed("[" * 100_000), "no JSON"),
    "no map": (indexed("{}"), "weight_map is missing"),
    "a list as map": (indexed('{"weight_map": []}'), "weight_map"),
    "nothing as map": (indexed('{"weight_map": null}'), "weight_map"),
    "an empty map": (indexed('{"weight_map": {}}'), "names no file"),
    "a number as name": (to(5), "expected a text"),
    "a list as name": (to(["a"]), "expected a text"),
    "no name": (to(""), "no name of a file"),
    "an absolute name": (to("/etc/passwd"), "no name of a file"),
    "a name above": (to("../victim.safetensors"), "no name of a file"),
    "a name above, hidden": (to("x/../../victim.safetensors"), "no name of a file"),
    "of another system": (to("C:\\victim.safetensors"), "no name of a file"),
    "a zero byte": (to("a\0.safetensors"), "no name of a file"),
    "a missing shard": (to("model-00009-of-00009.safetensors"), "is missing"),
    "pickled": (to("pytorch_model.bin"), "expected a safetensors file"),
    "the folder": (to("."), "expected a safetensors file"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_damaged_index_is_refused(case: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["sharded"], tmp_path / HOME))
    shutil.copy(whole["gpt2"] / WEIGHTS, tmp_path / "victim.safetensors")
    change, words = INDEXES[case]
    change(folder)
    refused(folder, words)


def test_a_tensor_in_two_shards_is_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["sharded"], tmp_path / HOME))
    shutil.copy(whole["gpt2"] / WEIGHTS, folder / "all.safetensors")
    to("all.safetensors")(folder)
    refused(folder, "both have", "all.safetensors")


# --- things that are no files


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_link_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def as_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def as_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


THINGS = (as_folder, as_pipe, as_device, as_link_out, as_link_to_nothing, as_circle)


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", [*FILES, WEIGHTS, INDEX, "model-00002-of-00002.safetensors"])
def test_only_regular_files_of_the_folder_are_opened(
    name: str, thing: Callable[[Path], None], whole: dict[str, Path], tmp_path: Path
) -> None:
    which = "gpt2" if (whole["gpt2"] / name).exists() else "sharded"
    folder = Path(shutil.copytree(whole[which], tmp_path / HOME))
    thing(folder / name)
    refused(folder, name)


def test_a_link_to_the_folder_itself_is_followed(whole: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(whole["gpt2"])
    assert isinstance(outcome(tmp_path / "link"), engram.LanguageModel)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("{}")])
def test_a_model_that_is_no_folder_is_refused(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "model")
    refused(tmp_path / "model", "is no folder")


# --- JSON


TEXTS = {
    "empty": b"",
    "cut": b'{"model_type": "gp',
    "a list": b"[]",
    "nothing": b"null",
    "a number": b"3",
    "nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("name", FILES)
def test_damaged_json_is_refused(
    case: str, name: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole["gpt2"], tmp_path / HOME))
    (folder / name).write_bytes(TEXTS[case])
    refused(folder, name.removesuffix("_config.json").removesuffix(".json"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_missing_file_is_refused(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["gpt2"], tmp_path / HOME))
    (folder / name).unlink()
    refused(folder, name.removesuffix(".json"))


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "beams": ("generation_config.json", {"num_beams": "a"}),
    "end": ("generation_config.json", {"eos_token_id": "a"}),
    "penalty": ("generation_config.json", {"repetition_penalty": -5}),
    "length": ("tokenizer_config.json", {"model_max_length": "a"}),
    "template": ("tokenizer_config.json", {"chat_template": 5}),
    "pad": ("tokenizer_config.json", {"pad_token": 5}),
    "class": ("tokenizer_config.json", {"tokenizer_class": ["a"]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_field_of_the_wrong_type_is_refused(
    case: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole["gpt2"], tmp_path / HOME))
    name, changes = WRONG[case]
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    refused(folder, name.removesuffix("_config.json"))


VALUES = ("a", -1, 0, 1.5, 10**9, 2**70, None, True, [], {}, [[1]], "[" * 1000)


def fields_of(folder: Path) -> list[str]:
    return sorted(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_a_number_of_layers_that_is_none_is_refused(
    value: Any, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole["gpt2"], tmp_path / HOME))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layer": value}))
    refused(folder, "n_layer")


HUGE: dict[str, tuple[str, dict[str, Any], str]] = {
    # what a config may ask transformers to make, before it is compared with any weight
    "positions times positions": ("gpt_neo", {"max_position_embeddings": 10**6}, "wpe.weight"),
    "angles of positions": ("gptj", {"n_positions": 10**9}, "n_positions|64 GB of tables"),
    "angles of a head": ("llama", {"head_dim": 10**9}, "k_proj.weight"),
    "kinds of attention": (
        "gpt_neo",
        {"attention_types": [[["global"], 10**9]]},
        "attention_types",
    ),
    "layers": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    "layers of the decoder": ("t5", {"num_decoder_layers": 10**9}, "num_decoder_layers"),
    "labels": ("gpt2", {"num_labels": 10**9}, "num_labels=1000000000"),
    "experts": ("mixtral", {"num_local_experts": 10**9}, "1000000000 x 32 x 48 in the config"),
    "buckets": ("t5", {"relative_attention_num_buckets": 10**9}, "1000000000 x 4 in the config"),
    "an epsilon of NaN": ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
    "other weights": ("gpt2", {"transformers_weights": "../a.safetensors"}, "transformers_weights"),
    "no such activation": ("gpt2", {"activation_function": "a"}, "activation_function='a'"),
}


@pytest.mark.parametrize("case", HUGE)
def test_a_config_that_asks_for_too_much_is_refused_at_once(case: str, tmp_path: Path) -> None:
    family, changes, match = HUGE[case]
    folder = tiny_folder(tmp_path, family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    line = outcome(folder)
    assert isinstance(line, str) and re.search(match, line), line


# --- and at random


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one thing in a checkpoint; return what."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    kind = draw.choice(["flip", "cut", "insert", "key", "key", "key"])
    raw = path.read_bytes()
    # where the header is, half of the time: most bytes are numbers
    at = draw.randrange(len(raw) if draw.random() < 0.5 else min(len(raw), 4000))
    if kind == "key" and path.suffix == ".json":
        tree = json.loads(raw)
        where, node = [], tree
        while isinstance(node, dict | list) and node and (not where or draw.random() < 0.7):
            key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
            parent, node = node, node[key]
            where.append(key)
        value = draw.choice([*VALUES, "remove"])
        if value == "remove":
            del parent[key]
        else:
            parent[key] = value
        path.write_text(json.dumps(tree))
        return f"{path.name}: {where} = {value!r:.40}"
    if kind == "cut":
        path.write_bytes(raw[:at])
    elif kind == "insert":
        path.write_bytes(raw[:at] + draw.randbytes(3) + raw[at:])
    else:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :])
    return f"{path.name}: {kind} at {at}"


@pytest.mark.parametrize(("seed", "times"), [(0, 40), pytest.param(1, 400, marks=pytest.mark.slow)])
def test_whatever_is_damaged_the_same_model_is_loaded_or_none(
    seed: int, times: int, whole: dict[str, Path], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    loaded = {which: outcome(folder).model for which, folder in whole.items()}
    for i in range(times):
        which = draw.choice(sorted(whole))
        folder = Path(shutil.copytree(whole[which], tmp_path / str(i)))
        what = damage(folder, draw)
        lm = outcome(folder)
        if not isinstance(lm, str):
            check_same(lm.model, loaded[which], folder, whole[which], f"{i} {which} {what}")
        shutil.rmtree(folder)


def check_same(got: Any, wanted: Any, folder: Path, whole: Path, what: str) -> None:
    """Fail unless the weights in memory are those of the files and the config is the file's."""
    state, expected = got.state_dict(), wanted.state_dict()
    assert state.keys() == expected.keys(), what
    # by where they are: tied weights are one
    places = {
        tensor.data_ptr(): name
        for name, tensor in state.items()
        if not torch.equal(tensor, expected[name])
    }
    files = [path.name for path in folder.glob("*.safetensors")]
    same = all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files)
    # a number may have become another one: nothing in a checkpoint says which was meant
    assert len(places) <= (0 if same else 2), (what, places)
    if (folder / "config.json").read_bytes() == (whole / "config.json").read_bytes():
        assert got.config.to_dict() | {"_name_or_path": ""} == wanted.config.to_dict() | {
            "_name_or_path": ""
        }, what
