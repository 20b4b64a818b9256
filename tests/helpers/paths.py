"""Where the repository is, and the optional folder of published files beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "../shared"  # kept outside the project; tests that need it are skipped without it
