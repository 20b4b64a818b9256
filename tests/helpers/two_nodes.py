"""What both machines of tests/runs/test_two_nodes.py must be able to import."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

HEAD, OTHER = "10.77.0.1", "10.77.0.2"
METHODS: dict[str, dict[str, Any]] = {
    "memit": {"steps": 2, "store": False, "contexts": ["{}"]},
    "ultraedit": {},
}


@dataclass(frozen=True)
class Where:
    """Tells on which machine each unit is done, slowly."""

    def start(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def do(self, state: str, unit: int) -> tuple[int, str]:
        time.sleep(0.5)
        return unit**2, state
