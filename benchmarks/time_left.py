"""Whether the time left that long work shows is right: predicted over actual seconds, by verb.

    python benchmarks/time_left.py                          pocket
    python benchmarks/time_left.py --model FOLDER --verbs stats average

Each verb runs once, with an empty cache. Seconds are those of the processor, since nobody can say
how long work takes on a machine that does other things too. (Give torch one thread:
OMP_NUM_THREADS=1.)

"counts" is what a caller gets who extrapolates the (done, total) of the stage that reported last;
"shown" is the sum over all announced work, as the command line shows it. Both are read five times a
second from the first fifth of the run on, and compared with what the run then still took: "at_20"
is the ratio at the first fifth, "worst" the one that is furthest from 1 while more than two seconds
were left, "none" the share of the readings without any prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engram
import engram.progress

clock = time.process_time


class Recorder:
    """A progress callback that notes, while work runs, when it predicts its end."""

    def __init__(self) -> None:
        self.began = clock()
        self.works: list[Any] = []
        self.stage: tuple[str, float, int, int] | None = None  # name, begun, at, in all
        self.last = (0.0, 0)
        self.readings: list[tuple[float, float | None, float | None]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = clock()
        if self.stage is None or self.stage[0] != what:
            self.stage = (what, now, done, total)
        self.last = (now, done)

    def announce(self, work: Any) -> None:
        self.works.append(work)
        print(f"  {work.about}; {work.kept}: about {work.left():.1f} s", flush=True)

    def _read(self) -> None:
        while not self.ended.wait(0.2):
            now = clock()
            shown = sum(work.left() for work in self.works) if self.works else None
            self.readings.append((now - self.began, self._counted(now), shown))

    def _counted(self, now: float) -> float | None:
        if self.stage is None:
            return None
        _, begun, first, total = self.stage
        at, done = self.last
        if done <= first:
            return None
        return max(0.0, (at - begun) * (total - first) / (done - first) - (now - begun))

    def compared(self) -> dict[str, Any]:
        seconds = clock() - self.began
        late = [r for r in self.readings if r[0] >= 0.2 * seconds]
        about: dict[str, Any] = {"seconds": round(seconds, 1)}
        for name, column in (("counts", 1), ("shown", 2)):
            pairs = [(r[column], seconds - r[0]) for r in late if r[column] is not None]
            far = [(p, a) for p, a in pairs if a > 2] or pairs[:1]
            worst = max(far, key=lambda pair: abs(math.log(_ratio(*pair))), default=None)
            about[name] = {
                "at_20": round(_ratio(*pairs[0]), 2) if pairs else None,
                "worst": round(_ratio(*worst), 2) if worst else None,
                "none": round(1 - len(pairs) / max(1, len(late)), 2),
            }
        return about


def _ratio(predicted: float, actual: float) -> float:
    return max(predicted, 0.01) / max(actual, 0.01)


def verbs(model: str, folder: Path) -> dict[str, Callable[[Any], Any]]:
    from engram.editors.second_moments.measure import second_moments
    from engram.facts import sample_facts

    lm = engram.load(model)
    facts = engram.read_facts("pocket")
    fact = facts[0]
    some = sample_facts(facts, 40, 0)
    edits = [r.facts[0] for r in engram.read_dataset("pocket", limit=40).records]
    few: dict[str, Any] = {"tokens": 4000, "store": False}
    return {
        "stats": lambda p: second_moments(lm, range(lm.n_layers), progress=p),
        "stats4000": lambda p: second_moments(
            lm, range(lm.n_layers), tokens=4000, cache_dir=folder / "few", progress=p
        ),
        "trace": lambda p: engram.trace(lm, fact.prompt_text, subject=fact.subject, progress=p),
        "average": lambda p: engram.average_trace(
            lm, some, out=folder / "average", keep="all", progress=p
        ),
        "known": lambda p: engram.average_trace(
            lm, sample_facts(facts, 300, 0), out=folder / "known", samples=2, progress=p
        ),
        "knows": lambda p: engram.knows(lm, sample_facts(facts, 300, 0), progress=p),
        "layers": lambda p: engram.layer_card(
            lm, edits=3, traces=6, estimates=12, layer_step=5, tokens=4000, progress=p
        ),
        "bench": lambda p: engram.bench(
            lm,
            engram.read_dataset("pocket"),
            {"memit": {"tokens": 4000}},
            folder / "bench",
            limit=60,
            records_per_batch=8,
            progress=p,
        ),
        "memit": lambda p: engram.rewrite(lm, edits, "memit", facts_per_batch=8, progress=p, **few),
        "rome": lambda p: engram.rewrite(lm, edits[0], "rome", tokens=4000, progress=p),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--verbs", nargs="*")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    given = parser.parse_args()
    # where there is `Work`: a version of engram without it has counts only
    if (work := getattr(engram.progress, "Work", None)) is not None:
        from engram.model import pace

        work.__init__.__kwdefaults__["clock"] = clock
        pace.time = SimpleNamespace(monotonic=clock)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ENGRAM_CACHE"] = folder
        table = verbs(given.model, Path(folder))
        for verb in given.verbs or table:
            os.environ["ENGRAM_CACHE"] = f"{folder}/{verb}"
            recorder = Recorder()
            recorder.thread.start()
            try:
                table[verb](recorder)
                results[verb] = recorder.compared()
                print(verb, json.dumps(results[verb]), flush=True)
            except Exception as error:
                print(verb, "failed:", error, file=sys.stderr, flush=True)
            recorder.ended.set()
    if given.out:
        given.out.write_text(json.dumps({"model": given.model, "verbs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
