"""Where each tensor is in a checkpoint's safetensors files, so that one changes and every other
byte stays.

Knows the safetensors layout (8 bytes header length, JSON header, data). Refuses to know models and
edits.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from engram.checks import checked
from engram.edit.forms import Unsigned
from engram.errors import EngramFileError, UnsupportedModelError
from engram.files.names import check_regular, inside, open_regular
from engram.model.checkpoint_files import weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "Download the checkpoint once more"


class _Entry(TypedDict):
    dtype: str
    shape: list[Unsigned]
    data_offsets: Annotated[list[Unsigned], Len(2, 2)]


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
        with open_regular(inside(folder, self.file)) as file:
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
        if self.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{self.name!r} is stored as {self.dtype}; an edit needs one of "
                f"{', '.join(DTYPES)}. Edit the unquantised checkpoint"
            )
        dtype = DTYPES[self.dtype]
        if self.begin == self.end:  # frombuffer refuses nothing
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.read(folder), dtype=dtype).reshape(self.shape)

    def write(self, folder: Path, value: Tensor) -> None:
        """Put `value` over its bytes in a copy of the checkpoint; no other byte changes.

        Args:
            folder: of the copy: its files are new ones, which nothing else shares.
        """
        data = bytes_of(value)
        assert len(data) == self.end - self.begin, (
            f"{self.name}: {len(data)} bytes for a place of {self.end - self.begin}"
        )
        # The file's name was read from the checkpoint's index: whatever it says, nothing outside
        # of the copy is written.
        with inside(folder, self.file).open("r+b") as file:
            file.seek(self.begin)
            file.write(data)


def bytes_of(value: Tensor) -> bytes:
    """Return a tensor's bytes as safetensors stores them."""
    # reshape(-1) before view: a tensor of no dimension has no bytes to view otherwise
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_locations(folder: Path) -> dict[str, TensorBytes]:
    """Return every tensor that transformers would load from `folder`, by its name there.

    Raises:
        EngramFileError: no safetensors weights, damaged ones, or files outside of `folder`.
    """
    files = [path.relative_to(folder).as_posix() for path in weight_files(folder)]
    locations: dict[str, TensorBytes] = {}
    for place in (place for file in files for place in _places(folder, file)):
        # Two files with one tensor: nobody knows which of them a model is loaded from.
        if (other := locations.setdefault(place.name, place)) is not place:
            raise EngramFileError(
                f"{folder} has the tensor {place.name!r} twice, in {other.file} and {place.file}; "
                "download the checkpoint once more"
            )
    return locations


def find(name: str, among: Mapping[str, TensorBytes]) -> TensorBytes:
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


def header_of(folder: Path, file: str) -> bytes:
    """Return the JSON header of a safetensors file that is whole.

    Raises:
        EngramFileError: not inside `folder`, no regular file, cut, or a header whose sizes, offsets
            and shapes do not fit each other and the file.
    """
    path = inside(folder, file)
    try:
        check_regular(path)  # before the library opens it: a pipe would make it wait
        # The library reads a header with care: its length, overlaps, holes, shapes and sizes. It
        # maps the file and reads no tensor.
        with safe_open(path, framework="np"), open_regular(path) as handle:
            return handle.read(int.from_bytes(handle.read(8), "little"))
    except (OSError, SafetensorError) as error:
        raise EngramFileError(
            f"{path} is not a whole safetensors file: {error}. {_AGAIN}"
        ) from error


def entries_of(header: bytes | str, where: Path) -> dict[str, Any]:
    """Return what the header of a safetensors file says about each tensor.

    Raises:
        EngramFileError: no such header, or one with two tensors of one name.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        # The format forbids it, and a library may take either of the two.
        if len(dict(pairs)) < len(pairs):
            raise ValueError("its header has a name twice")
        return dict(pairs)

    try:
        entries = json.loads(header, object_pairs_hook=unique)
        entries.pop("__metadata__", None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise EngramFileError(
            f"{where} is not a whole safetensors file: {error}. {_AGAIN}"
        ) from error
    return dict(checked(f"header of {where}", entries, dict[str, _Entry], EngramFileError))


def _places(folder: Path, file: str) -> list[TensorBytes]:
    header = header_of(folder, file)
    places = []
    for name, entry in entries_of(header, folder / file).items():
        # The header counts offsets from its own end; here they count from the file's start.
        begin, end = (8 + len(header) + offset for offset in entry["data_offsets"])
        places.append(TensorBytes(name, file, entry["dtype"], tuple(entry["shape"]), begin, end))
    return places
