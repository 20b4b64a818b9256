"""ledger.json: the base model and the canary's limits that a ledger was created with.

Knows one file, which is written once. Refuses to know edits and events.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any  # typing's has no types at run time before 3.12

from engram.edit.forms import BaseForm
from engram.errors import EngramFileError
from engram.evaluate.canary import Canary
from engram.files.checksums import stamped
from engram.files.forms import read_record
from engram.files.names import inside
from engram.ledger.history import now

FORMAT_VERSION = 1
NAME = "ledger.json"


@dataclass(frozen=True)
class _Header:
    created: str
    base: BaseForm
    canary: Canary


def write_header(folder: Path, base: dict[str, Any], canary: Canary) -> None:
    """Write the header of a new ledger.

    Args:
        base: what `edit.base.describe_base` says about every weight that can be edited.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "created": now(),
        "base": base,
        "canary": asdict(canary),
    }
    text = json.dumps(stamped(record), indent=1, ensure_ascii=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read_header(folder: Path) -> tuple[dict[str, Any], Canary]:
    """Return the base and the canary that `write_header` wrote.

    Raises:
        EngramFileError: no ledger, a damaged one, or one of a newer engram.
    """
    if not (folder / NAME).exists():
        raise EngramFileError(
            f"{folder} is no ledger: it has no {NAME}. Ledger.create(folder, lm) makes one"
        )
    header: _Header = read_record(
        inside(folder, NAME),
        _Header,
        "ledger",
        version=FORMAT_VERSION,
        advice="Take it from a backup",
    )
    return dict(header.base), header.canary
