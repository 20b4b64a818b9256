"""GGUF files: what is loaded is what llama.cpp would, once unpacked it is an ordinary checkpoint,
and whoever wrote a damaged or hostile file gets a line.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engram
from engram.errors import EngramError
from engram.model import dequantised_gguf
from engram.model.loading import load_shapes
from tests.helpers.command_line import failing, run
from tests.helpers.gguf_samples import gguf, tensors, write_gguf
from tests.helpers.tiny import TOKENIZERS, make_model
from tests.model.test_damaged_checkpoints import refused

TEXTS = ("The tower is in the city of Paris.", "It's 1998.\n\n12  34", " a")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a cache of its own."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_file_in_float32_gives_every_bit_of_the_model_and_its_tokens(whole: Path) -> None:
    lm = engram.load(whole)
    expected = make_model("llama")
    ids = torch.tensor([[1, 2, 3, 4]])
    for name, weight in expected.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], weight), name
    assert torch.equal(lm.model(ids).logits, expected(ids).logits)
    assert lm.name == str(whole) and lm.dtype == torch.float32
    for text in TEXTS:
        assert lm.tokenizer(text).input_ids == TOKENIZERS["byte-level"]()(text).input_ids


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_weights_are_what_the_format_says(kind: str, tmp_path: Path) -> None:
    lm = engram.load(write_gguf(tmp_path / "tiny.gguf", quantised=kind))
    quantisation = gguf.GGMLQuantizationType[kind]
    original = tensors(make_model("llama"))
    for name, array in tensors(lm.model).items():
        expected = original[name]
        if expected.ndim == 2 and expected.shape[1] % gguf.GGML_QUANT_SIZES[quantisation][0] == 0:
            expected = gguf.dequantize(gguf.quantize(expected, quantisation), quantisation)
            assert not np.array_equal(expected, original[name])
        assert np.array_equal(array, expected), name


def test_a_file_is_dequantised_once_whatever_it_is_called(
    whole: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engram.load(whole)
    monkeypatch.setattr(dequantised_gguf._Gguf, "write", None)  # would be called
    monkeypatch.setitem(sys.modules, "gguf", None)
    other = shutil.copy(whole, tmp_path / "of another name")  # ollama's have no ending
    again = engram.load(other)
    assert again.name == str(other)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert [path.is_dir() for path in cache.iterdir()] == [True]


def test_another_file_and_another_version_of_ours_are_dequantised_again(
    whole: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engram.load(whole)
    engram.load(write_gguf(tmp_path / whole.name, quantised="Q8_0"))
    monkeypatch.setattr(dequantised_gguf, "_VERSION", 99)
    engram.load(whole)
    assert len(list(cache.iterdir())) == 3


def test_shapes_are_read_without_dequantising(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantised_gguf._Gguf, "_write_weights", None)
    lm = load_shapes(whole)
    assert (lm.n_layers, lm.d_model, lm.device.type) == (4, 32, "meta")
    assert not list(cache.iterdir())


def test_an_edited_checkpoint_is_a_plain_folder_and_reverts_to_the_dequantised_bytes(
    whole: Path, tmp_path: Path, cache: Path
) -> None:
    lm = engram.load(whole)
    name = "model.layers.1.mlp.down_proj.weight"
    fact = engram.Fact("tower", "The {} is in the city of", "Rome", "Paris")
    edit = engram.rewrite(lm, fact, "ft", layer=1, epochs=1)
    edit.save(tmp_path / "edit")
    shown = run("apply", str(tmp_path / "edit"), str(whole), "-o", str(tmp_path / "edited"))
    assert "dequantised weights in float32" in shown.output
    edited = engram.load(tmp_path / "edited")
    with edit.applied(lm):
        assert torch.equal(
            edited.model.get_parameter(name).detach(), lm.model.get_parameter(name).detach()
        )
    run("revert", str(tmp_path / "edited"), "-o", str(tmp_path / "original"))
    (home,) = cache.iterdir()
    for path in home.iterdir():
        assert (tmp_path / "original" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "edited").glob("*.gguf"))


def test_a_model_that_is_loaded_by_its_file_can_be_loaded_by_workers(whole: Path) -> None:
    from engram.runs.workers import ByName

    lm = engram.load(whole)
    assert torch.equal(ByName.of(lm).load().model.lm_head.weight, lm.model.lm_head.weight)


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "a file" / "cache"))
    with caplog.at_level(logging.WARNING):
        lm = engram.load(whole)
    assert "dequantised for this time only" in caplog.text
    assert torch.equal(lm.model.lm_head.weight, make_model("llama").lm_head.weight)


def test_nothing_stays_of_a_file_that_cannot_be_dequantised(
    whole: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(EngramError, match="No space left"):
            engram.load(whole)
    assert not list(cache.iterdir())
    engram.load(whole)


@pytest.mark.slow
def test_two_processes_dequantise_a_file_once(whole: Path, cache: Path) -> None:
    script = (
        "import sys, engram; from engram.model.dequantised_gguf import _Gguf; write = _Gguf.write\n"
        "def said(*args, **how): print('written'); write(*args, **how)\n"
        "_Gguf.write = said; engram.load(sys.argv[1])"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(whole)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    written = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(written).count("written") == 1
    assert len(list(cache.iterdir())) == 1


# --- the tokenizer


@pytest.mark.parametrize("bos", [True, False])
def test_texts_begin_with_a_start_token_where_the_file_says_so(bos: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", fields={"tokenizer.ggml.add_bos_token": bos})
    ids = engram.load(path).tokenizer("The tower").input_ids
    assert (ids[0] == 0) == bos and ids.count(0) == bos


def test_digits_of_a_smollm_tokenizer_stand_alone(tmp_path: Path) -> None:
    # Its merges hold the pair of two line ends, and Ġ before a digit.
    path = write_gguf(tmp_path / "tiny.gguf", fields={"tokenizer.ggml.pre": "smollm"})
    tokenizer = engram.load(path).tokenizer
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12\n\n3")
    assert [piece for piece, _ in split] == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_a_way_of_splitting_that_nobody_knows_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engram.load(write_gguf(tmp_path / "tiny.gguf", fields={"tokenizer.ggml.pre": "klingon"}))
    assert "'klingon', which transformers does not know" in caplog.text


def test_a_chat_template_comes_along(tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    path = write_gguf(tmp_path / "tiny.gguf", fields={"tokenizer.chat_template": template})
    tokenizer = engram.load(path).tokenizer
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "[Hi]"


# --- files of the wrong kind, and of people who mean no good


def header(*fields: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    count = len(fields) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(fields)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def listed(kind: int, count: int, values: bytes = b"") -> bytes:
    return field("tokens", 9, struct.pack("<IQ", kind, count) + values)


def tensor(name: str, start: int, size: int = 8, kind: int = 0) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, size, kind, start)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "no GGUF file"),
    "a page": (lambda raw: b"<!DOCTYPE html>", "no GGUF file"),
    "weights of another format": (lambda raw: b"\x08\0\0\0\0\0\0\0{}", "no GGUF file"),
    "a magic alone": (lambda raw: b"GGUF", "ends within its header"),
    "of version 1": (lambda raw: raw[:4] + b"\1\0\0\0" + raw[8:], "version 1"),
    "big-endian": (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "little-endian"),
    "half a header": (lambda raw: raw[:300], "cut or damaged"),
    "half the weights": (lambda raw: raw[: len(raw) * 2 // 3], "cut or damaged"),
    "a row short": (lambda raw: raw[:-200], "cut or damaged"),
    "2^62 fields": (lambda raw: header(count=1 << 62), "cut or damaged"),
    "2^62 tensors": (lambda raw: header(tensors=1 << 62), "cut or damaged"),
    "a list of 2^62 bytes": (lambda raw: header(listed(0, 1 << 62)), "items in all"),
    "a list of a million texts": (lambda raw: header(listed(8, 1 << 20)), "cut or damaged"),
    "ten million texts": (lambda raw: header(listed(8, 10**7, bytes(8 * 10**7))), "items in all"),
    "a text of 2^62 letters": (
        lambda raw: header(field("general.name", 8, struct.pack("<Q", 1 << 62))),
        "cut or damaged",
    ),
    "a circle of lists": (lambda raw: header(listed(9, 1, struct.pack("<IQ", 9, 1))), "of lists"),
    "a field twice": (lambda raw: header(field("a", 0, b"1"), field("a", 0, b"1")), "twice"),
    "a value of no kind": (lambda raw: header(field("a", 77, b"1234")), "unknown kind 77"),
    "a name of no text": (lambda raw: header(struct.pack("<Q", 2) + b"\xff\xfe"), "cut or"),
    "an odd alignment": (
        lambda raw: header(field("general.alignment", 4, struct.pack("<I", 3))),
        "power of two",
    ),
    "a tensor outside": (lambda raw: header(tensor("a", 1 << 60), tensors=1, count=0), "cut or"),
    "a tensor of 2^62 numbers": (
        lambda raw: header(tensor("a", 0, 1 << 62), tensors=1, count=0),
        "cut or damaged",
    ),
    "tensors in the same bytes": (
        lambda raw: header(tensor("a", 0), tensor("b", 0), tensors=2, count=0) + bytes(500),
        "bytes of another one",
    ),
    "two tensors of one name": (
        lambda raw: header(tensor("a", 0), tensor("a", 32), tensors=2, count=0) + bytes(500),
        "one name",
    ),
    "a quantisation of no kind": (
        lambda raw: header(tensor("a", 0, kind=77), tensors=1, count=0) + bytes(500),
        "unknown quantisation",
    ),
    "half a block": (
        lambda raw: header(tensor("a", 0, 48, kind=8), tensors=1, count=0) + bytes(500),
        "its blocks have 32",
    ),
}


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_bytes_are_refused_in_a_line(
    damage: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = BYTES[damage]
    (tmp_path / "bad.gguf").write_bytes(change(whole.read_bytes()))
    refused(tmp_path / "bad.gguf", "bad.gguf", words)
    assert "this time only" not in caplog.text


HUGE = 1 << 31
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an adapter": ({"fields": {"general.type": "adapter"}}, "expected a model"),
    "one of three parts": ({"fields": {"split.count": 3}}, "one of 3 parts"),
    "of no known architecture": ({"architecture": "clip"}, "'clip', which transformers does not"),
    "no architecture": ({"architecture": ""}, "has no general.architecture"),
    "two billion layers": ({"fields": {"llama.block_count": HUGE}}, "at most"),
    "a layer too many": ({"fields": {"llama.block_count": 5}}, "holds"),
    "no layers": ({"fields": {"llama.block_count": 0}}, "num_hidden_layers=0"),
    "no number of layers": ({"fields": {"llama.block_count": None}}, "holds"),
    "a width of two billion": ({"fields": {"llama.embedding_length": HUGE}}, "holds"),
    "heads that do not divide": ({"fields": {"llama.attention.head_count": 5}}, "not a multiple"),
    "no heads": ({"fields": {"llama.attention.head_count": 0}}, "cannot be dequantised"),
    "no tokens": ({"fields": {"tokenizer.ggml.tokens": None}}, "has no tokenizer.ggml.tokens"),
    "another tokenizer": ({"fields": {"tokenizer.ggml.model": "klingon"}}, "klingon"),
    "a text for a number": ({"fields": {"llama.feed_forward_length": "wide"}}, "intermediate_size"),
    "a matrix missing": ({"changes": {"blk.1.ffn_up.weight": None}}, "holds"),
    "a bias that has no place": ({"changes": {"blk.1.attn_q.bias": np.ones(32, "f4")}}, "holds"),
    "a name with a path": ({"changes": {"../../passwd": np.ones(32, "f4")}}, "holds"),
    "a matrix of another shape": (
        {"changes": {"blk.1.ffn_up.weight": np.ones((32, 48), "f4")}},
        "model.layers.1.mlp.up_proj.weight (32 x 48 in the file, 48 x 32 in the config)",
    ),
    "a name for another": (
        {"changes": {"blk.1.ffn_up.weight": None, "other": np.ones((48, 32), "f4")}},
        "lack",
    ),
    "no number": ({"changes": {"output_norm.weight": np.full(32, np.nan, "f4")}}, "NaN"),
}


@pytest.mark.parametrize("damage", WRONG)
def test_a_header_that_is_no_model_is_refused_in_a_line(
    damage: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how, words = WRONG[damage]
    path = write_gguf(tmp_path / "bad.gguf", **how)
    with pytest.raises(EngramError) as error:
        engram.load(path)
    line = str(error.value)
    assert words in line and "bad.gguf" in line and len(line.splitlines()) == 1, line
    assert "this time only" not in caplog.text and not list(cache.iterdir())


def test_a_missing_package_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EngramError, match=r"'gguf' is not installed. Run: pip install 'engram\[gg"):
        engram.load(whole)


def test_a_folder_that_holds_a_gguf_file_alone_says_how_to_load_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(whole, folder)
    refused(folder, "config.json is missing", str(folder / whole.name))


def test_files_that_are_no_files_are_refused_in_a_line(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.gguf", "does not exist")
    (tmp_path / "circle.gguf").symlink_to("circle.gguf")
    refused(tmp_path / "circle.gguf", "does not exist")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "is a pipe")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "config.json is missing")


def test_other_files_beside_a_gguf_file_are_not_read(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("[")
    assert engram.load(tmp_path / "tiny.gguf").n_layers == 4


def test_a_command_says_what_is_wrong_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    told = failing(monkeypatch, capsys, "plan", str(tmp_path / "bad.gguf"))
    assert told.startswith("engram: ") and told.count("\n") == 1 and "version 0" in told
