"""The header of a GGUF file, walked before another library opens the file.

Somebody else wrote it. Readers of GGUF believe every size that a file declares: a list of 2^60
numbers keeps them busy without end, and tensors that share bytes unpack to more than any memory.
Here each size is compared with the bytes that are there.
Knows the format, version 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
Refuses to know models.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from engram.checks import briefly
from engram.errors import EngramFileError
from engram.files.names import open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# kind of a value -> how struct reads it; kind 8 is text, 9 a list
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _LIST = 8, 9
# Readers keep an object for each item: 2^21 of them are about a gigabyte. Gemma's list of merges,
# the longest that we know, has 515,000.
_MOST_ITEMS = 1 << 21
_MOST_DIMENSIONS = 4
LISTED = "a list"  # in the place of a list's value
_ALIGNMENT = 32  # bytes; where general.alignment gives no other


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it: `start` counts from the first tensor's place."""

    name: str
    shape: tuple[int, ...]
    kind: int  # number of its quantisation
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself; the value of a list is `LISTED`."""

    fields: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))


def is_gguf(path: str | Path) -> bool:
    """Return whether `path` is a file that begins as GGUF does, or has the ending `.gguf`."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:  # ollama keeps such files without an ending
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Return the header of a GGUF file whose every size was found to fit the file.

    Args:
        block_sizes: kind of quantisation -> (numbers in a block, bytes of a block).
    Raises:
        EngramFileError: no GGUF, cut or damaged; one line that says where. OSError: it cannot be
            opened.
    """
    with open_regular(path) as file:
        start = file.read(24)
        if start[:4] != MAGIC:
            raise EngramFileError(f"{path} is no GGUF file: it begins with {briefly(start[:4])}")
        if len(start) < 24:
            raise EngramFileError(f"{path} is damaged: it ends within its header. {_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, block_sizes).header()


_AGAIN = "Download it again"


class _Reader:
    """A place in the bytes of a header."""

    def __init__(
        self, path: Path, data: mmap.mmap, block_sizes: Mapping[int, tuple[int, int]]
    ) -> None:
        self.path, self.data, self.block_sizes = path, data, block_sizes
        self.at, self.items = len(MAGIC), 0

    def header(self) -> GgufHeader:
        version = self.number("<I")
        if version not in _VERSIONS:
            raise self.wrong(
                f"version {version}; expected {' or '.join(map(str, _VERSIONS))}, little-endian"
            )
        tensors, fields = self.number("<Q"), self.number("<Q")
        # of each at least: length of a name, kind, and the shortest value
        self.fits(24 * tensors + 13 * fields, f"{tensors} tensors and {fields} fields")
        found: dict[str, Any] = {}
        for _ in range(fields):
            name = self.text("name of a field")
            if name in found:
                raise self.wrong(f"the field {briefly(name)} twice")
            found[name] = self.value(name, self.number("<I"))
        described = tuple(self.tensor() for _ in range(tensors))
        self.check_places(described, found.get("general.alignment", _ALIGNMENT))
        return GgufHeader(found, described)

    def wrong(self, what: str) -> EngramFileError:
        return EngramFileError(f"{self.path} cannot be read as GGUF: it has {what}. {_AGAIN}")

    def fits(self, size: int, what: str) -> None:
        """Raise unless `size` bytes are left."""
        if size > len(self.data) - self.at:
            raise EngramFileError(
                f"{self.path} is cut or damaged: at byte {self.at:,} it announces {size:,} bytes "
                f"for {what}, and it has {len(self.data):,} in all. {_AGAIN}"
            )

    def number(self, form: str) -> Any:
        size = struct.calcsize(form)
        self.fits(size, "a number")
        self.at += size
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def text(self, what: str) -> str:
        length = self.number("<Q")
        self.fits(length, f"the {what}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.wrong(f"the {what} {briefly(raw)}, which is no text") from None

    def value(self, name: str, kind: int) -> Any:
        if kind == _TEXT:
            return self.text(f"value of {briefly(name)}")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _LIST:
            raise self.wrong(f"a value of unknown kind {kind} in {briefly(name)}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind not in _SCALARS and kind != _TEXT:
            raise self.wrong(f"a list of kind {kind} in {briefly(name)}, such as a list of lists")
        self.items += count
        if self.items > _MOST_ITEMS:
            raise self.wrong(f"lists of {self.items:,} items in all; expected {_MOST_ITEMS:,}")
        size = 8 if kind == _TEXT else struct.calcsize(_SCALARS[kind])
        self.fits(count * size, f"{count:,} items of {briefly(name)}")
        if kind == _TEXT:
            for _ in range(count):
                length = self.number("<Q")
                self.fits(length, f"the texts of {briefly(name)}")
                self.at += length
        else:
            self.at += count * size
        return LISTED

    def tensor(self) -> GgufTensor:
        name = self.text("name of a tensor")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.wrong(f"{dimensions} dimensions in the tensor {briefly(name)}")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        return GgufTensor(name, shape, self.number("<I"), self.number("<Q"))

    def check_places(self, tensors: tuple[GgufTensor, ...], alignment: Any) -> None:
        """Raise unless the tensors are in the file, each in bytes of its own."""
        power = isinstance(alignment, int) and alignment > 0 and alignment.bit_count() == 1
        if not power:
            raise self.wrong(f"general.alignment={briefly(alignment)}; expected a power of two")
        self.at += -self.at % alignment
        end = 0
        for tensor in sorted(tensors, key=lambda one: one.start):
            name = briefly(tensor.name)
            if tensor.kind not in self.block_sizes:
                raise self.wrong(f"the tensor {name} in the unknown quantisation {tensor.kind}")
            numbers, size = self.block_sizes[tensor.kind]
            if tensor.numel == 0 or tensor.shape[0] % numbers:
                raise self.wrong(f"the shape {tensor.shape} of {name}; its blocks have {numbers}")
            if tensor.start < end:
                raise self.wrong(f"the tensor {name} in the bytes of another one")
            end = tensor.start + tensor.numel // numbers * size
            self.fits(end, f"the tensors up to {name}")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self.wrong("two tensors of one name")
