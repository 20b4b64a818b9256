"""Write a checkpoint's weights in a wider dtype, and back again to the last byte.

Pocket is stored in float16 and computed in float32, and so is many a checkpoint on a CPU. Widening
is exact, since every float16 and bfloat16 is a float32; so the same numbers come back, and with the
headers and the config as they were, the same bytes:

    before     model.safetensors: F16, config.json: "dtype": "float16"      texts, kept in a record
    after      model.safetensors: F32, config.json: "dtype": "float32"

Knows a checkpoint's headers, config and index. Refuses to know edits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.checks import checked
from engram.edit.forms import Dtype
from engram.edit.safetensors_layout import DTYPES, TensorBytes, bytes_of, entries_of, header_of
from engram.errors import EngramFileError, SettingError
from engram.files.forms import read_json
from engram.files.names import inside, read_text
from engram.model.checkpoint_files import INDEX
from engram.modules.fingerprints import dtype_name

CONFIG = "config.json"
Texts = dict[str, str]  # file -> the header of its weights, or all of it where it has none


def widened(folder: Path, locations: Mapping[str, TensorBytes], dtype: str) -> tuple[Texts, Texts]:
    """Return the texts of a checkpoint that another dtype changes: as they are, and in `dtype`.

    Raises:
        SettingError: no such dtype, or one that cannot hold every weight exactly.
    """
    wanted: torch.dtype = getattr(torch, checked("dtype", dtype, Dtype))
    for place in _floating(locations.values()):
        if torch.promote_types(DTYPES[place.dtype], wanted) != wanted:
            stored = dtype_name(DTYPES[place.dtype])
            raise SettingError(
                f"dtype={dtype!r}: {place.name} of {folder} is stored in {stored}, which {dtype} "
                "would round, and what is rounded away could not be reverted. Give a wider dtype, "
                "or none to keep the stored one"
            )
    files = {place.file for place in _floating(locations.values()) if _grows(place, wanted)}
    before = {file: header_of(folder, file).decode() for file in sorted(files)}
    after = {file: _header_in(header, wanted) for file, header in before.items()}
    for name, change in {CONFIG: _config_in, INDEX: _index_in}.items():
        if (folder / name).is_file():
            record: dict[str, Any] = read_json(inside(folder, name), dict[str, Any])
            if (changed := change(record, wanted, locations)) != record:
                before[name] = read_text(inside(folder, name))
                after[name] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    return before, after


def growth(locations: Mapping[str, TensorBytes], dtype: str) -> int:
    """Return how many bytes more the weights have in a wider dtype."""
    wanted: torch.dtype = getattr(torch, dtype)
    return sum(_grows(place, wanted) for place in _floating(locations.values()))


def rewrite(
    source: Path,
    target: Path,
    texts: Texts,
    locations: Mapping[str, TensorBytes],
    values: Mapping[str, Tensor],
) -> None:
    """Write the files of `texts` into a copy of a checkpoint: weights in the dtypes of their new
    headers.

    Args:
        values: weights that are not those of `source`.
    Raises:
        EngramFileError: a header that is not one of these weights.
    """
    for name, text in texts.items():
        path, raw = inside(target, name), text.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in (CONFIG, INDEX):
            path.write_bytes(raw)
            continue
        with path.open("xb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for data in _data(source, name, text, locations, values):
                file.write(data)
        header_of(target, name)  # raises where the header does not fit what was written


def _data(
    source: Path,
    file: str,
    header: str,
    locations: Mapping[str, TensorBytes],
    values: Mapping[str, Tensor],
) -> Iterable[bytes | bytearray]:
    places = {place.name: place for place in locations.values() if place.file == file}
    entries = entries_of(header, source / file)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    known = all(
        entry["dtype"] in (*DTYPES, places[name].dtype)
        for name, entry in entries.items()
        if name in places
    )
    if not known or shapes != {name: place.shape for name, place in places.items()}:
        raise EngramFileError(f"the header of {file} that was kept is not of {source / file}")
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        place, dtype = places[name], entries[name]["dtype"]
        if name not in values and dtype == place.dtype:
            yield place.read(source)
        else:
            value = values[name] if name in values else place.tensor(source)
            yield bytes_of(value.to(DTYPES[dtype]))


def _floating(places: Iterable[TensorBytes]) -> list[TensorBytes]:
    return [place for place in places if place.dtype in DTYPES]


def _grows(place: TensorBytes, dtype: torch.dtype) -> int:
    return prod(place.shape) * dtype.itemsize - (place.end - place.begin)


def _header_in(header: str, dtype: torch.dtype) -> str:
    """Return the header of the same tensors in another dtype."""
    record = json.loads(header)
    fresh = {"__metadata__": record.pop("__metadata__")} if "__metadata__" in record else {}
    name_of = {value: name for name, value in DTYPES.items()}
    sizes = {}
    for name, entry in record.items():
        begin, end = entry["data_offsets"]
        sizes[name] = end - begin
        if entry["dtype"] in DTYPES:
            entry["dtype"] = name_of[dtype]
            sizes[name] = prod(entry["shape"]) * dtype.itemsize

    def order(name: str) -> tuple[int, str]:
        # as safetensors orders them: wide numbers first, so that each is at a multiple of its size
        return -(sizes[name] // max(prod(record[name]["shape"]), 1)), name

    at = 0
    for name in sorted(record, key=order):
        fresh[name] = {**record[name], "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(fresh, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def _config_in(
    config: dict[str, Any], dtype: torch.dtype, locations: Mapping[str, TensorBytes]
) -> dict[str, Any]:
    field = "torch_dtype" if "torch_dtype" in config else "dtype"  # until transformers 4.56
    return {**config, field: dtype_name(dtype)}


def _index_in(
    index: dict[str, Any], dtype: torch.dtype, locations: Mapping[str, TensorBytes]
) -> dict[str, Any]:
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or "total_size" not in metadata:
        return index
    size = sum(place.end - place.begin for place in locations.values())
    size += growth(locations, dtype_name(dtype))
    return {**index, "metadata": {**metadata, "total_size": size}}
