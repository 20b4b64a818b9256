"""Tensors with what they are, in one safetensors file, and a checksum of both.

Knows the file's header: one entry of JSON, with a fingerprint of every tensor. Refuses to know what
the tensors mean: whoever reads them names a form for the entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor

from engram.errors import EngramFileError
from engram.files.atomic import atomic_file
from engram.files.checksums import stamped, verified
from engram.files.forms import parsed
from engram.files.names import check_regular
from engram.modules.fingerprints import fingerprint

Form = TypeVar("Form")
_FINGERPRINTS = "tensors"  # in the entry: name -> fingerprint


def tensors_to_bytes(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> bytes:
    """Return a safetensors file with `about` under `kind` in its header.

    Equal tensors and `about` give equal bytes.
    """
    # one entry: safetensors writes several in any order
    return save_tensors(dict(tensors), _metadata(tensors, kind, about))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]
) -> None:
    """Write `tensors_to_bytes` to a file, whole or not at all."""
    with atomic_file(path) as fresh:
        save_file(dict(tensors), fresh, _metadata(tensors, kind, about))


def tensors_from_bytes(
    data: bytes,
    kind: str,
    form: type[Form] | Any,
    where: str | Path,
    what: str,
    *,
    older: bool = False,
) -> tuple[dict[str, Tensor], Form]:
    """Return the tensors, and `about` as a value of `form`, that `tensors_to_bytes` was given.

    Args:
        where: the file, for errors; what: what it should be: "a saved causal trace".
        older: read data without an entry, as an older engram wrote it, as if it were {}.
    Raises:
        EngramFileError: not such data, or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _other(where, what, error) from error
    # safetensors.torch.load drops the header, which is a length and JSON
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = parsed(dict[str, Any], data[8 : 8 + size], where)  # texts, as loaded
    entries: dict[str, Any] = header.get("__metadata__") or {}
    if kind not in entries and not older:
        raise _other(where, what, f"no {kind!r} in its header")
    return tensors, _checked(tensors, entries.get(kind, "{}"), form, where)


def read_tensors(
    path: str | Path, kind: str, form: type[Form] | Any, what: str
) -> tuple[dict[str, Tensor], Form]:
    """Return what `write_tensors` was given; see `tensors_from_bytes`.

    Raises:
        EngramFileError: not such a file, or damaged.
    """
    try:
        check_regular(path)
        with safe_open(str(path), "pt") as file:
            entry = (file.metadata() or {}).get(kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, EngramFileError) as error:
        raise _other(path, what, error) from error
    if entry is None:
        raise _other(path, what, f"no {kind!r} in its header")
    return tensors, _checked(tensors, entry, form, path)


def _metadata(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> dict[str, str]:
    prints = {name: fingerprint(tensor) for name, tensor in sorted(tensors.items())}
    return {kind: json.dumps(stamped({**about, _FINGERPRINTS: prints}))}


def _checked(
    tensors: Mapping[str, Tensor], entry: str, form: type[Form] | Any, where: str | Path
) -> Form:
    about: Form = parsed(form, entry, where)
    record = verified(json.loads(entry), where)
    prints = record.get(_FINGERPRINTS)
    if prints is not None and prints != {name: fingerprint(t) for name, t in tensors.items()}:
        raise EngramFileError(
            f"{where} is damaged: its tensors are not those that were written (another checksum)"
        )
    return about


def _other(where: str | Path, what: str, problem: object) -> EngramFileError:
    return EngramFileError(f"{str(where)!r} is not {what} ({problem})")
