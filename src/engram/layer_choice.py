"""Which layer to edit: ask the model. Trace, try the few best layers, keep the one whose receipt is best.

Stands above locate, editors and evaluate, which do not know each other. That a trace's strongest layer need not be the best
one to edit (Hase et al. 2023, arXiv:2301.04213) is why the trace only names candidates and receipts decide.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import torch

from engram import pocket
from engram.editors import rewrite
from engram.editors.corpora import Corpus
from engram.editors.second_moment import second_moments
from engram.errors import EngramError
from engram.evaluate.knows import knows
from engram.evaluate.receipt import Receipt, verify
from engram.fact_files import read_facts
from engram.facts import Fact
from engram.language_model import LanguageModel
from engram.locate.causal_trace import causal_trace, usual_window

log = logging.getLogger(__name__)

_KNOWN = 4  # facts traced beside the given one


@dataclass(frozen=True)
class LayerTrial:
    """One layer that was tried: what the trace promised, what the receipt says."""

    layer: int
    effect: float
    score: float
    receipt: Receipt


def choose_layer(lm: LanguageModel, fact: Fact, **settings: Any) -> int:
    """The layer whose edit of `fact` has the best receipt, see `try_layers`."""
    trials = try_layers(lm, fact, **settings)
    return max(trials, key=lambda trial: (trial.score, trial.effect)).layer


def try_layers(
    lm: LanguageModel,
    fact: Fact,
    *,
    method: str = "rome",
    candidates: int = 3,
    known: Sequence[Fact] | None = None,
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> list[LayerTrial]:
    """Edit one fact at the most promising layers and take the receipt of each.

    Args:
        candidates: how many layers are tried, those with the largest mean effect of MLP windows at the subject's last token.
        known: facts to trace beside the given one; default: a few of the bundled table's that this model knows.
        corpus, tokens, seed: of the second moments, see `second_moments`.
        settings: the method's other settings.
    Returns:
        One trial a layer, in the order of their effect.
    """
    known = known_facts(lm, _KNOWN) if known is None else known
    traced = [fact, *known]
    window = usual_window(lm.n_layers)
    effects_l = torch.zeros(lm.n_layers)
    for i, each in enumerate(traced):
        if progress is not None:
            progress("tracing", i, len(traced))
        target = each.target_true if each is fact else each.target
        trace = causal_trace(
            lm,
            each.prompt_text,
            subject=each.subject,
            target=target,
            sites=["mlp"],
            window=window,
            positions="subject_last",
        )
        effects_l += trace.effects("mlp")[0] / len(traced)
    best = effects_l[:-1].topk(min(candidates, lm.n_layers - 1)).indices.tolist()
    moments = second_moments(lm, best, corpus, tokens, seed=seed)  # of all candidates in one pass
    fact = pocket.evidence_for(fact)
    trials = []
    for i, layer in enumerate(best):
        if progress is not None:
            progress("trying layers", i, len(best))
        receipt = verify(lm, rewrite(lm, [fact], method, layer=layer, second_moments=moments, seed=seed, **settings))
        trials.append(LayerTrial(layer, float(effects_l[layer]), receipt_score(receipt), receipt))
        log.info("layer %d: effect %.3f, receipt %.3f", layer, effects_l[layer], trials[-1].score)
    return trials


def receipt_score(receipt: Receipt) -> float:
    """One number for a receipt: harmonic mean of efficacy, paraphrase and neighbourhood margins, as far as they were measured.

    A margin is the mean difference between the probabilities of the wanted and the unwanted answer, moved to [0, 1]; successes
    alone would tie on a single fact.
    """
    margins = [(1 + margin) / 2 for margin in receipt.margins() if margin is not None]
    if not margins:
        raise EngramError("the receipt measured nothing, so layers cannot be compared")
    return harmonic_mean(margins)


def known_facts(lm: LanguageModel, count: int, asked: int = 64) -> list[Fact]:
    """Facts of the bundled table whose object is this model's own next token: at most `count` of `asked` that are tried."""
    return knows(lm, random.Random(0).sample(read_facts("pocket"), asked), paraphrases=False).known()[:count]
