"""The files of a checkpoint's folder, checked before another library opens one of them.

Somebody else wrote them: a name leads to a regular file inside the folder, JSON is JSON, and
weights are whole safetensors files. Pickled weights are never opened: they may run any code.
Knows file names and headers. Refuses to know models and tokenizers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from safetensors import SafetensorError, safe_open

from engram.checks import briefly
from engram.errors import EngramFileError
from engram.files.forms import parsed, read_json
from engram.files.names import check_regular, inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERT = (
    "Convert them, if you trust their author: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)
MOST_LAYERS = 10_000  # more would take minutes to build, and no model has them
_COUNTS = re.compile(r"^n_layers?$|layers$|^num_labels$|^attention_types$")
_AGAIN = "Download the checkpoint again"
_READ = {".jinja", ".json", ".model", ".py", ".safetensors", ".txt"}  # what transformers may open
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class _Config:
    """What is checked of config.json before transformers reads it."""

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | dict[str, Any] | None = None
    torch_dtype: str | dict[str, Any] | None = None
    transformers_weights: str | None = None


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


@dataclass(frozen=True)
class _TokenizerConfig:
    """What transformers does not check itself before it is used; so of `_Generation`."""

    model_max_length: int | float | None = None
    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None


@dataclass(frozen=True)
class _Generation:
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | list[int] | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: Annotated[int, Ge(1)] | None = None
    repetition_penalty: Annotated[float, Gt(0)] | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None


# small files, some of which transformers ignores where they are damaged; it parses tokenizer.json
_FORMS: dict[str, Any] = {
    "added_tokens.json": dict[str, int],
    "generation_config.json": _Generation,
    "special_tokens_map.json": dict[str, Any],
    "tokenizer_config.json": _TokenizerConfig,
}


def check_folder(
    folder: Path, *, weights: bool = True, variant: str | None = None
) -> dict[str, str]:
    """Raise unless everything that transformers may read from a checkpoint's folder can be read.

    Args:
        weights: whether there have to be weights.
        variant: of the weights' file names, as transformers has it: "fp16".
    Returns:
        The dtype of each tensor of the weights, as safetensors calls it; none without weights.
    Raises:
        EngramFileError: a damaged file, one that is no regular file in the folder, or pickled
            weights. OSError: a file cannot be opened.
    """
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if path.suffix in _READ:
            check_regular(inside(folder, path.relative_to(folder).as_posix()))
    for name, form in _FORMS.items():
        if (folder / name).exists():
            read_json(folder / name, form, advice=_AGAIN)
    path = folder / "config.json"
    if not path.exists():
        raise EngramFileError(
            f"{path} is missing; expected a checkpoint that transformers saved{_gguf_in(folder)}"
        )
    check_config(read_json(path, dict[str, Any], advice=_AGAIN), path)
    if not weights and not any((folder / name).exists() for name in _names(variant)):
        return {}
    homes: dict[str, Path] = {}
    dtypes: dict[str, str] = {}
    for path in weight_files(folder, variant):
        for tensor, dtype in _tensors(path).items():
            # two files with one tensor: nobody knows which of them a model is loaded from
            if homes.setdefault(tensor, path) is not path:
                raise EngramFileError(f"{path} and {homes[tensor]} both have {tensor!r}. {_AGAIN}")
            dtypes[tensor] = dtype
    return dtypes


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors files that transformers reads a checkpoint's weights from.

    Args:
        variant: as for `check_folder`.
    Raises:
        EngramFileError: none, only pickled ones, or a damaged index.
    """
    single, index = _names(variant)
    # in the order in which transformers looks for them: where both exist, it ignores the index
    if os.path.lexists(folder / single):
        return [inside(folder, single)]
    if not os.path.lexists(folder / index):
        raise EngramFileError(_no_weights(folder, single, index))
    contents: _Index = read_json(inside(folder, index), _Index, advice=_AGAIN)
    shards: list[Path] = []
    for name in sorted(set(contents.weight_map.values())):
        path = inside(folder, name)
        if path.suffix != ".safetensors":
            raise EngramFileError(f"{folder / index} names {name!r}; expected a safetensors file")
        if not path.exists():
            raise EngramFileError(f"{path}, which {index} names, is missing. {_AGAIN}")
        shards.append(path)
    if not shards:
        raise EngramFileError(f"{folder / index} names no file. {_AGAIN}")
    return shards


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Raise where a config.json names something that must not reach transformers.

    It makes lists as long as some of the numbers say while it reads a config.

    Args:
        config: the contents of config.json.
        where: the file, for the message.
    Raises:
        EngramFileError: names the field.
    """
    form: _Config = parsed(_Config, json.dumps(config), where, advice=_AGAIN)
    if form.transformers_weights is not None:
        raise EngramFileError(
            f"{where} has transformers_weights={briefly(form.transformers_weights)}, a file of "
            "weights by another name than transformers gives them; expected no such field"
        )
    for field, dtype in (("dtype", form.dtype), ("torch_dtype", form.torch_dtype)):
        known = getattr(torch, str(dtype).removeprefix("torch."), None)
        if isinstance(dtype, str) and not getattr(known, "is_floating_point", False):
            raise EngramFileError(
                f"{where} has {field}={briefly(dtype)}; expected a floating point of torch such as "
                "'float32'"
            )
    for field, value in _leaves("", config):
        expected = None
        if isinstance(value, float) and value != value:
            expected = "a number"
        elif isinstance(value, int) and value > MOST_LAYERS and _COUNTS.search(field):
            expected = f"at most {MOST_LAYERS}"
        if expected:
            raise EngramFileError(f"{where} has {field}={value}; expected {expected}. {_AGAIN}")


def _leaves(field: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the plain values of nested JSON, each with the name of the nearest field."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(field, inner)
    else:
        yield field, value


def _names(variant: str | None) -> tuple[str, str]:
    """Return the names of a whole file of weights and of an index of several."""
    if variant is None:
        return SINGLE, INDEX
    return f"model.{variant}.safetensors", f"{SINGLE}.index.{variant}.json"


def _tensors(path: Path) -> dict[str, str]:
    """Return the dtype of each tensor in a safetensors file."""
    check_regular(path)
    try:
        # It reads the header alone, and refuses one that does not fit the file's length.
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        reason = re.sub(r"^Error while deserializing header: ", "", str(error))
        raise EngramFileError(
            f"{path} is not a whole safetensors file ({reason}). {_AGAIN}"
        ) from error


def _no_weights(folder: Path, single: str, index: str) -> str:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has its weights as pickle ({', '.join(pickled[:3])}), which engram does not "
            f"open, since they may run any code. {CONVERT}"
        )
    return (
        f"{folder} holds no {single} or {index}; expected a checkpoint that transformers saved"
        f"{_gguf_in(folder)}"
    )


def _gguf_in(folder: Path) -> str:
    """Return a hint at a GGUF file in a folder, which is loaded by its own name."""
    files = sorted(folder.glob("*.gguf"))
    return f". To load the GGUF file that it holds, name it: {files[0]}" if files else ""
