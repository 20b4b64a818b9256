"""Where each tensor is in a checkpoint's safetensors files, so that one changes and every other
byte stays.

Knows the safetensors layout (8 bytes header length, JSON header, data). Refuses to know models and
edits.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engram.errors import EngramFileError, UnsupportedModelError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# in the order in which transformers looks for them: where both exist, the index is not read
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorBytes:
    """A tensor's bytes [begin, end) in `file`, a path inside the checkpoint's folder."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self, folder: Path) -> bytearray:
        """Return its bytes."""
        # These bytes alone: a shard may have gigabytes. A bytearray, since a tensor made of bytes,
        # which cannot be written, warns.
        data = bytearray(self.end - self.begin)
        with (folder / self.file).open("rb") as file:
            file.seek(self.begin)
            if file.readinto(data) != len(data):
                raise EngramFileError(
                    f"{folder / self.file} ends before {self.name!r} does; the checkpoint is "
                    "incomplete"
                )
        return data

    def tensor(self, folder: Path) -> Tensor:
        """Return the tensor, in its own dtype.

        Raises:
            UnsupportedModelError: not floating point, as in quantised checkpoints.
        """
        if self.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{self.name!r} is stored as {self.dtype}; an edit needs one of "
                f"{', '.join(_DTYPES)}. Edit the unquantised checkpoint"
            )
        return torch.frombuffer(self.read(folder), dtype=_DTYPES[self.dtype]).reshape(self.shape)

    def write(self, folder: Path, value: Tensor) -> None:
        """Put `value` over its bytes; no other byte of the file changes."""
        # reshape(-1) before view: a tensor of no dimension has no bytes to view otherwise
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert len(data) == self.end - self.begin, (
            f"{self.name}: {len(data)} bytes for a place of {self.end - self.begin}"
        )
        with (folder / self.file).open("r+b") as file:
            file.seek(self.begin)
            file.write(data)


def tensor_locations(folder: Path) -> dict[str, TensorBytes]:
    """Return every tensor that transformers would load from `folder`, by its name there.

    Raises:
        EngramFileError: no safetensors weights, or damaged ones.
    """
    if (folder / _SINGLE).is_file():
        files = {_SINGLE}
    elif (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            files = set(index["weight_map"].values())
        except (ValueError, LookupError, AttributeError) as error:
            raise EngramFileError(f"{folder / _INDEX} is damaged: {error!r}") from error
    else:
        raise EngramFileError(_no_weights(folder))
    return {place.name: place for file in sorted(files) for place in _header(folder, file)}


def find(name: str, among: dict[str, TensorBytes]) -> TensorBytes:
    """Return the tensor of parameter `name`; checkpoints may lack the base model's prefix
    ("transformer.") or add one.

    Raises:
        EngramFileError: no such tensor, or several.
    """
    if name in among:
        return among[name]
    # "h.0.mlp.c_proj.weight" is "transformer.h.0.mlp.c_proj.weight" of the model with a head.
    # By suffix and never by the number of a layer alone: several candidates are an error.
    near = [
        place
        for key, place in among.items()
        if name.endswith(f".{key}") or key.endswith(f".{name}")
    ]
    if len(near) != 1:
        what = f"no tensor {name!r}"
        if near:
            what = f"several that may be {name!r}: {', '.join(place.name for place in near)}"
        first = ", ".join(sorted(among)[:4])
        raise EngramFileError(
            f"the checkpoint has {what} (its tensors: {first}, ...); expected a checkpoint of the "
            "model that the edit was made on"
        )
    return near[0]


def _header(folder: Path, file: str) -> list[TensorBytes]:
    path = folder / file
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            # checked before it is read: a damaged length may ask for all memory there is
            length = int.from_bytes(handle.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header of {length} bytes is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        # The header counts offsets from its own end; here they count from the file's start.
        tensors = []
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > size:
                raise ValueError(f"{name!r} ends after the file")
            shape = tuple(entry["shape"])
            tensors.append(TensorBytes(name, file, entry["dtype"], shape, begin, end))
        return tensors
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngramFileError(
            f"{path} is not a whole safetensors file: {error}. Download the checkpoint once more"
        ) from error


def _no_weights(folder: Path) -> str:
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickled:
        return (
            f"{folder} has its weights as pickle ({', '.join(pickled[:3])}), which engram does not "
            "open. "
            "Convert them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return f"{folder} holds no {_SINGLE} or {_INDEX}; expected a checkpoint that transformers saved"
