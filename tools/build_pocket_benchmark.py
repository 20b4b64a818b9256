"""Find the facts that the bundled model does not say to the prompts of its benchmark, and name them
in pocket/benchmark.json.

    python tools/build_pocket_benchmark.py

Run it again when the model, its facts, its templates or the builder change: the file also holds
the digest of the records, and a test checks that they are still built the same.
"""

from __future__ import annotations

import json

import engram
from engram import pocket
from engram.benchmark.data.pocket_benchmark import SEED, pocket_benchmark
from engram.benchmark.data.records import digest_of
from engram.benchmark.known_records import known_records


def main() -> None:
    every = pocket_benchmark(all_facts=True)
    kept = known_records(engram.load("pocket"), every).records
    known = {record.id for record in kept}
    unknown = [record.id for record in every.records if record.id not in known]
    found = {"seed": SEED, "records": len(kept), "digest": digest_of(kept), "unknown": unknown}
    path = pocket.PATH.parent / "benchmark.json"
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
    print(
        f"{len(every.records)} records, {len(every.skipped)} facts left out by the builder, "
        f"{len(unknown)} unknown to the model"
    )
    for reason in every.skipped[:5]:
        print("  ", reason)


if __name__ == "__main__":
    main()
