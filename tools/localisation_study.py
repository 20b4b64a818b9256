"""Does causal tracing say where to edit? Per fact of a model and per layer: indirect effects, and
how well an edit at that layer works.

    python tools/localisation_study.py --count 150 --out docs/data/localisation.jsonl
    python tools/localisation_study.py --model smollm2 --layers 0 3 6 9 12 --window 6 \\
        --facts ../shared/data/counterfact.jsonl.gz --out docs/data/smollm2/localisation.jsonl

Facts that the model knows, in random order. Of each: the indirect effect of restoring the subject's
last token at every layer (residual stream, MLP of one layer, window of MLPs), then one ROME edit to
a counterfactual object at every layer, scored at its own prompt, at held-out paraphrases
and at neighbours. One line of JSON a fact, written when all its layers are done: kill it, start it
again, nothing is measured twice. Refuses to know what the numbers mean: see localisation_report.

Source of the question: Hase et al. 2023, arXiv:2301.04213.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import engram
from engram.model.language_model import LanguageModel
from known_facts import add_options, source
from measure_model import WINDOW, shared_settings, usual_corpus

log = logging.getLogger("localisation_study")

NOISE = "s3"


def traces(window: int) -> dict[str, tuple[str, int]]:
    """Return the effects that are measured: name -> (site, layers restored together)."""
    return {
        "residual": ("residual", 1),
        "mlp": ("mlp", 1),
        f"mlp, {window} layers": ("mlp", window),
    }


def effects(
    lm: LanguageModel, fact: engram.Fact, window: int, samples: int
) -> dict[str, list[float]]:
    """Indirect effects by layer at the subject's last token, of the true object's probability."""
    curves: dict[str, list[float]] = {}
    for size in sorted({1, window}):
        wanted = {name: site for name, (site, w) in traces(window).items() if w == size}
        trace = engram.trace(
            lm,
            fact.prompt_text,
            subject=fact.subject,
            target=fact.target_true,
            sites=list(dict.fromkeys(wanted.values())),
            window=size,
            samples=samples,
            noise=NOISE,
            positions="subject_last",
        )
        curves |= {name: trace.effects(site)[0].tolist() for name, site in wanted.items()}
        curves |= {"clean": [trace.high_score], "corrupted": [trace.low_score]}
    return curves


def answered(lm: LanguageModel, fact: engram.Fact) -> dict[str, list[tuple[float, float]]]:
    """(probability of the new object, of the true one) after the edit's prompt, its paraphrases,
    and texts about neighbours.
    """
    texts = {
        "efficacy": [fact.prompt_text],
        "paraphrase": list(fact.paraphrases),
        "neighbourhood": [text for text, _ in fact.neighbours],
    }
    pairs = [
        (text, answer)
        for group in texts.values()
        for text in group
        for answer in (fact.target, str(fact.target_true))
    ]
    probabilities = iter(lm.probabilities(pairs))
    return {
        name: [(next(probabilities), next(probabilities)) for _ in group]
        for name, group in texts.items()
    }


def margins(answers: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, float]:
    """Mean probability of the wanted object less that of the unwanted one, in [-1, 1], for each
    kind of text.

    Wanted is the new object, and for neighbours the true one.
    """
    means = {name: fmean(new - true for new, true in pairs) for name, pairs in answers.items()}
    return means | {"neighbourhood": -means["neighbourhood"]}


def study(
    lm: LanguageModel, fact: engram.Fact, given: argparse.Namespace, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of one fact: effects by layer, margins before, and margins after the edit
    at each layer.
    """
    traced = effects(lm, fact, given.window, given.samples)
    edited = []
    for layer in given.layers:
        edit = engram.rewrite(lm, fact, method="rome", layer=layer, **shared)
        with edit.applied(lm):
            edited.append(margins(answered(lm, fact)))
    return {
        "subject": fact.subject,
        "prompt": fact.prompt,
        "object": fact.target_true,
        "target": fact.target,
        "clean": rounded(traced.pop("clean"))[0],
        "corrupted": rounded(traced.pop("corrupted"))[0],
        "effects": {
            name: rounded([values[layer] for layer in given.layers])
            for name, values in traced.items()
        },
        "before": {
            name: rounded([value])[0] for name, value in margins(answered(lm, fact)).items()
        },
        "after": {name: rounded([each[name] for each in edited]) for name in edited[0]},
    }


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


def resumed(path: Path, settings: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(subject, prompt) of the facts that `path` holds, made under the same settings; a line that a
    kill tore is cut off.

    Raises:
        SystemExit: the file was made under other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": dict(settings)}) + "\n", encoding="utf8")
        return set()
    whole = [
        line
        for line in path.read_text(encoding="utf8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    path.write_text("".join(whole), encoding="utf8")
    head, *records = (json.loads(line) for line in whole)
    if head["settings"] != dict(settings):
        raise SystemExit(
            f"{path} was measured with {head['settings']}, now {dict(settings)}; give another --out"
        )
    return {(record["subject"], record["prompt"]) for record in records}


def settings_of(lm: LanguageModel, given: argparse.Namespace) -> dict[str, Any]:
    """Return everything that a file of the study was made under."""
    settings = {
        "model": given.model,
        "seed": given.seed,
        "noise": NOISE,
        "samples": given.samples,
        "traces": {name: list(trace) for name, trace in traces(given.window).items()},
        "method": "rome",
        "corpus": usual_corpus(lm),
        "torch": torch.__version__,
    }
    if given.dtype != "float32":
        settings["dtype"] = given.dtype
    if len(given.layers) < lm.n_layers:
        settings["layers"] = given.layers
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--layers", type=int, nargs="+", help="that are edited; default: all")
    parser.add_argument("--window", type=int, default=WINDOW, help="layers restored together")
    parser.add_argument("--samples", type=int, default=10, help="draws of noise a fact")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    lm = engram.load(given.model, dtype=given.dtype)
    given.layers = given.layers or list(range(lm.n_layers))
    done = resumed(given.out, settings_of(lm, given))
    shared = shared_settings(lm, given.layers, usual_corpus(lm))
    for i, fact in enumerate(islice(source(given).facts(lm), given.count)):
        if (fact.subject, fact.prompt) in done:
            continue
        began = time.monotonic()
        record = study(lm, fact, given, shared)
        with given.out.open("a", encoding="utf8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        log.info(
            "%d of %d: %s, %.1f s", i + 1, given.count, fact.prompt_text, time.monotonic() - began
        )


if __name__ == "__main__":
    main()
