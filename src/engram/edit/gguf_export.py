"""An edit as a LoRA adapter of llama.cpp: one GGUF file for `--lora`, beside a base that may be
quantised.

Knows the adapter's keys, and how llama.cpp names and orders the rows of weights; names are those of
the `gguf` package. Refuses to know edits: it sees changes of weights.
Source: llama.cpp, src/llama-adapter.cpp: it adds scale * B A x, with scale = alpha / rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.edit import lora_export
from engram.edit.changes import WeightChanges
from engram.errors import (
    BaseMismatchError,
    EngramFileError,
    MissingExtraError,
    UnsupportedModelError,
)
from engram.files.atomic import atomic_file, reserved
from engram.model.gguf_header import GgufHeader, read_header
from engram.modules.fingerprints import fingerprint

log = logging.getLogger(__name__)

# model_type -> llama.cpp's architecture, where the names differ
_ARCHITECTURES = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "mistral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
}
# llama.cpp rotates neighbouring pairs of a head in some architectures, transformers the two halves:
# the conversion reorders the rows of their queries and keys. Others keep theirs. Of an architecture
# in neither list we do not know it, and refuse.
_PAIRED = ("llama",)
_IN_ORDER = ("gemma2", "gemma3", "gpt2", "phi3", "qwen2", "qwen3", "stablelm")
_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k|qkv)\.weight")


def to_gguf(changes: WeightChanges, path: str | Path, *, base: str | Path | None = None) -> Path:
    """Write an adapter that does to the base what `changes` do: `llama-cli -m BASE --lora FILE`.

    A = right and B = left in float32, alpha = rank, so llama.cpp's scale is 1; nothing is rounded.
    All weights have the largest rank among them, the others padded with zeros. Half precision is
    not offered: a factor of a small change lies below what float16 can hold, and the file of one
    fact has 10 kB.

    Args:
        base: the GGUF file that the adapter is for. Its architecture is taken, the weights' names
            and shapes are compared with it, and a warning says so where its numbers are not those
            that the changes were computed on. None: the architecture follows from the model's type.
    Returns:
        The path; an existing adapter is replaced.
    Raises:
        MissingExtraError: the package `gguf` is not installed.
        UnsupportedModelError: an architecture or a weight that llama.cpp does not have, or whose
            rows it orders in a way that is not known here.
        BaseMismatchError: `base` is of another architecture, or lacks a weight or its shape.
        EngramFileError: `base` cannot be read, something else than an adapter is at `path`, or it
            cannot be written.
    """
    gguf = _package()
    header = None if base is None else _header(base)
    architecture = _architecture(changes.base["model_type"], header)
    names = _tensor_names(architecture, changes)
    factors, rank = lora_export.padded_factors(changes)
    tensors: dict[str, Tensor] = {}
    for name, (right, left) in factors.items():
        tensor = names[name]
        order = _row_order(architecture, tensor, left.shape[0], header)
        if base is not None:
            _check_base(base, tensor, order, changes.made_on(name))
        tensors[f"{tensor}.lora_a"] = right
        tensors[f"{tensor}.lora_b"] = left if order is None else left[order]
    size = sum(tensor.nbytes for tensor in tensors.values())
    with reserved(path, needs=size) as reserved_path:
        _refuse_other_files(reserved_path)
        with atomic_file(reserved_path) as fresh:
            writer = gguf.GGUFWriter(fresh, architecture)
            _describe(writer, changes.base, rank)
            for name, value in tensors.items():
                writer.add_tensor(name, value.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return Path(path)


def _describe(writer: Any, base: Mapping[str, Any], rank: int) -> None:
    """Say what the file is, and which base it belongs to: by its name on the hub, never a path."""
    gguf = _package()
    model = lora_export.public_name(base)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    owner, _, name = model.rpartition("/")
    writer.add_name(f"edit of {name}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    if owner:
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{model}")


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    return gguf


def _header(path: str | Path) -> GgufHeader:
    """Return the header of a GGUF file; its sizes are known to fit before another library reads it.

    Raises:
        EngramFileError: no GGUF, or damaged, or it cannot be read.
    """
    sizes = {int(kind): size for kind, size in _package().GGML_QUANT_SIZES.items()}
    try:
        return read_header(Path(path), sizes)
    except OSError as error:
        raise EngramFileError(f"{path} cannot be read ({error.strerror})") from error


def _architecture(model_type: str, header: GgufHeader | None) -> str:
    """Return llama.cpp's name of an architecture; that of the base's file, where there is one."""
    gguf = _package()
    known = gguf.MODEL_ARCH_NAMES.values()
    name = _ARCHITECTURES.get(model_type, model_type)
    if header is not None:
        given = header.architecture
        if name in known and given != name:
            raise BaseMismatchError(
                f"the base's file is of the architecture {given!r}, the edit is of {model_type!r}, "
                f"which is {name!r} there; give the GGUF file of the model that was edited"
            )
        name = given
    if name not in known:
        raise UnsupportedModelError(
            f"the package gguf knows no architecture of llama.cpp for model_type={model_type!r}; "
            "export the edit with to_peft, or apply it to a checkpoint"
        )
    return name


def _tensor_names(architecture: str, changes: WeightChanges) -> dict[str, str]:
    """Return parameter name -> llama.cpp's name of the tensor."""
    gguf = _package()
    (key,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    # The map is made for a number of blocks; the largest number in a name is enough.
    numbers = [int(number) for name in changes.deltas for number in re.findall(r"\d+", name)]
    mapping = gguf.get_tensor_name_map(key, max(numbers, default=0) + 1)
    names = {}
    for name in changes.deltas:
        tensor = mapping.get_name(name, try_suffixes=(".weight",))
        if tensor is None:
            raise UnsupportedModelError(
                f"llama.cpp's architecture {architecture!r} has no weight for {name!r}; export the "
                "edit with to_peft, or apply it to a checkpoint"
            )
        names[name] = tensor
    return names


def _row_order(
    architecture: str, tensor: str, rows: int, header: GgufHeader | None
) -> Tensor | None:
    """Return the order in which llama.cpp keeps a weight's rows; None: as transformers does.

    Of a head of 6 rows, 0 to 2 are rotated with 3 to 5 by transformers; llama.cpp keeps the pairs
    together: 0, 3, 1, 4, 2, 5.
    """
    rotated = _ROTATED.fullmatch(tensor)
    if rotated is None or architecture in _IN_ORDER:
        return None
    if architecture not in _PAIRED:
        raise UnsupportedModelError(
            f"it is not known here how llama.cpp orders the rows of {tensor} in {architecture!r}; "
            "edit another matrix, such as mlp_out, or apply the edit to a checkpoint"
        )
    key = f"{architecture}.attention.head_count" + "_kv" * (rotated[1] == "k")
    heads = None if header is None else header.fields.get(key)
    if not isinstance(heads, int) or not heads or rows % (2 * heads):
        raise UnsupportedModelError(
            f"llama.cpp reorders the rows of {tensor} by heads, and the edit does not say how many "
            "there are; give the base's GGUF file: base='model.gguf', or --base model.gguf"
        )
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def _check_base(
    path: str | Path, tensor: str, order: Tensor | None, made_on: Mapping[str, Any]
) -> None:
    """Raise if the base's file lacks the weight; warn if its numbers are others.

    Raises:
        BaseMismatchError: no such tensor, or of another shape.
    """
    gguf = _package()
    tensors = gguf.GGUFReader(path).tensors  # its header was read, and the numbers are not
    found = next((one for one in tensors if one.name == tensor), None)
    shape = made_on["shape"] if not made_on["transposed"] else made_on["shape"][::-1]
    given = None if found is None else [int(size) for size in reversed(found.shape)]
    if found is None or given != shape:
        what = "no such weight" if found is None else f"{given}"
        raise BaseMismatchError(
            f"{tensor} is {shape} in the edited model; {path} has {what}. Give the GGUF file of "
            "the model that was edited"
        )
    weight = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
    if order is not None:
        weight = weight[order.argsort()]
    weight = weight.T.contiguous() if made_on["transposed"] else weight
    if fingerprint(weight, getattr(torch, made_on["dtype"])) != made_on["sha256"]:
        log.warning(
            "%s of %s (%s) is not the weight that the edit was computed on: the adapter's effect "
            "there is close to the edit's if the file is a quantised copy of the same model, and "
            "unknown otherwise. An edit of engram.load(%r) is made for it",
            tensor,
            path,
            found.tensor_type.name,
            str(path),
        )


def _refuse_other_files(path: Path) -> None:
    """Raise if a file is at `path` that is no adapter: a base model has gigabytes."""
    if not path.exists():
        return
    if _header(path).fields.get("general.type") != "adapter":
        raise EngramFileError(
            f"{path} is a GGUF file, and no adapter; choose another name, or move it away"
        )
