"""ledger.json: the base model and the canary's limits that a ledger was created with.

Knows one file, which is written once. Refuses to know edits and events.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram.errors import EngramFileError
from engram.evaluate.canary import Canary
from engram.ledger.history import now

FORMAT_VERSION = 1
NAME = "ledger.json"


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
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read_header(folder: Path) -> tuple[dict[str, Any], Canary]:
    """Return the base and the canary that `write_header` wrote.

    Raises:
        EngramFileError: no ledger, a damaged one, or one of a newer engram.
    """
    path = folder / NAME
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r}, this engram reads {FORMAT_VERSION}; "
                "pip install --upgrade engram"
            )
        # looked up here, so that a header without them is reported as damaged
        return record["base"], Canary(**record["canary"])
    except FileNotFoundError as error:
        raise EngramFileError(
            f"{folder} is no ledger: it has no {NAME}. Ledger.create(folder, lm) makes one"
        ) from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise EngramFileError(
            f"{path} cannot be read: {error}. Take the ledger from a backup"
        ) from error
