"""What does the model know? Cloze probing: where a fact's object ranks among the words, or the
objects, that could follow.

Knows prompts, objects and log-probabilities. Refuses to know what the result is used for, and how a
family fills a gap: see language_model. Sources: Petroni et al. 2019 (LAMA), arXiv:1909.01066; Jiang
    et al. 2020 (LPAQA), arXiv:1911.12543; Elazar et
al. 2021 (ParaRel), arXiv:2102.01017.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from engram.batching import batches
from engram.checks import one_of
from engram.engine.shared_prompts import Ids
from engram.errors import FactError, SettingError
from engram.facts import Fact
from engram.knowledge.cloze_rows import ClozeRow, ClozeRows, check_not_nan
from engram.knowledge.knowledge import Aggregate, Knowledge, KnownRecord, Length, Reply
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress

_LOGITS = 1 << 24  # log-probabilities held at once: 64 MB in float32
_IN_CACHE = 1 << 19  # of them compared at once: 2 MB
_SCORES = 1 << 18  # scores of candidates held at once

Judged = tuple[str, int, float]  # top answer, rank of the object, its log-probability


def knows(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    *,
    candidates: Literal["vocabulary", "relation"] | Sequence[str] = "vocabulary",
    aggregate: Aggregate = "first",
    length: Length = "sum",
    paraphrases: bool = True,
    k: int = 10,
    table: Sequence[Fact] | None = None,
    progress: Progress = no_progress,
) -> Knowledge:
    """Ask a model of any kind for the object of each fact, by its prompt and by its paraphrases;
    see `LanguageModel.cloze`.

    One forward a prompt. Candidates of several tokens share one where they begin alike (masked
    models: where they are of as many tokens), and their prompt's keys and values.

    Args:
        facts: `target` is the object that is asked for.
        candidates: what the object is ranked among.
            "vocabulary": every token. An object of several tokens has the worst rank of its tokens,
            each read behind the
            ones before, so that rank 1 means: greedy decoding says all of it. Masked models: each
                at its own mask, all masks
            at once; rank 1 means that each token is its mask's best.
            "relation": the objects that `table` has in the fact's relation; or these texts, each
            fact's object among them. Candidates are compared by the log-probability of the whole
            text, and are not renormalised.
        aggregate: which number of several prompts counts.
            "first": that of the fact's own prompt.
            "best": the best prompt's, chosen for each fact by its answer: an oracle, an upper
            bound. "mean": log-probabilities are averaged over the prompts, then ranked.
        length: log-probability of an object of several tokens: the "sum" over its tokens, or the
            "mean", which does not prefer short objects.
        paraphrases: whether prompts other than the first are asked. Without them consistency is not
            measured.
        k: of P@k.
        table: facts that tell what else is right and which objects a relation has; default:
            `facts`. Give all of them where `facts` is a sample. Other objects of the same subject
            and relation are right too, and are taken out of the ranking, as in LAMA (in the
            vocabulary: those of one token).
        progress: called with (what is done, done, total).
    Raises:
        FactError: no facts; a fact without a relation, or without its object among the candidates;
            a text without tokens or too long for the model.
        SettingError: an argument that is none of the above.
        NonFiniteError: the model gave NaN.
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    among: str | tuple[str, ...] = (
        candidates
        if isinstance(candidates, str)
        else tuple(dict.fromkeys(each.strip() for each in candidates))
    )
    _check(facts, among, aggregate, length, paraphrases, k)
    world = _World([*facts] if table is None else [*table], among)
    questions = [
        _Question(
            fact,
            tuple(dict.fromkeys([fact.prompt_text, *(fact.paraphrases if paraphrases else ())])),
            world.candidates(i, fact),
            world.also_right(fact),
        )
        for i, fact in enumerate(facts)
    ]
    judge = _among_candidates if among != "vocabulary" else _in_vocabulary
    size = lm.model.config.get_text_config().vocab_size
    cloze, done, total = ClozeRows(lm), 0, sum(len(question.prompts) for question in questions)
    found: dict[int, KnownRecord] = {}
    for block in _blocks(questions, size if among == "vocabulary" else None):
        asked = [questions[i] for i in block]
        for i, question, (each, overall) in zip(
            block, asked, judge(cloze, asked, length, aggregate == "mean"), strict=True
        ):
            replies = tuple(
                Reply(prompt, *judged)
                for prompt, judged in zip(question.prompts, each, strict=True)
            )
            best = (
                min(replies, key=lambda reply: (reply.rank, -reply.log_prob))
                if aggregate == "best"
                else replies[0]
            )
            counted = overall or (best.answer, best.rank, best.log_prob)
            found[i] = KnownRecord(question.fact, replies, *counted)
            done += len(replies)
        progress("prompts", done, total)
    return Knowledge(
        tuple(found[i] for i in range(len(facts))), among, aggregate, length, k, lm.name
    )


# -- what is asked ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """A fact, all its prompts, the candidates (none: the vocabulary), and other objects that are
    right as well.
    """

    fact: Fact
    prompts: tuple[str, ...]
    candidates: tuple[str, ...]
    also_right: frozenset[str]

    @property
    def target(self) -> str:
        return self.fact.target.strip()


class _World:
    """What a table of facts says about candidates and about other right objects."""

    def __init__(self, table: Sequence[Fact], among: str | tuple[str, ...]) -> None:
        self.among = among
        objects: dict[str | None, set[str]] = defaultdict(set)
        self._right: dict[tuple[str, str], set[str]] = defaultdict(set)
        for fact in table:
            objects[fact.relation].add(fact.target.strip())
            self._right[_key(fact)].add(fact.target.strip())
        self._objects = {relation: tuple(sorted(names)) for relation, names in objects.items()}

    def candidates(self, i: int, fact: Fact) -> tuple[str, ...]:
        if self.among == "vocabulary":
            return ()
        if self.among == "relation":
            if fact.relation is None:
                raise FactError(
                    f"fact {i} ({fact.prompt_text!r}) has no relation; candidates='relation' needs Fact(..., relation=...)"
                )
            names, where = (
                self._objects.get(fact.relation, ()),
                f"the table's objects of relation {fact.relation!r}",
            )
        else:
            names, where = tuple(self.among), "the candidates"
        if fact.target.strip() not in names:
            raise FactError(
                f"fact {i} ({fact.prompt_text!r}): its object {fact.target!r} is not among {where}"
            )
        return names

    def also_right(self, fact: Fact) -> frozenset[str]:
        return frozenset(self._right.get(_key(fact), ())) - {fact.target.strip()}


def _key(fact: Fact) -> tuple[str, str]:
    return (fact.prompt if fact.relation is None else f"relation {fact.relation}"), fact.subject


def _check(
    facts: Sequence[Fact],
    among: str | tuple[str, ...],
    aggregate: str,
    length: str,
    paraphrases: bool,
    k: int,
) -> None:
    if not facts:
        raise FactError("no facts to ask for; give at least one Fact")
    for name, value, allowed in (
        ("candidates", among, ("vocabulary", "relation")),
        ("aggregate", aggregate, get_args(Aggregate)),
        ("length", length, get_args(Length)),
    ):
        if isinstance(value, str):
            more = ", or a list of texts" if name == "candidates" else ""
            one_of(name, value, allowed, more=more)
    if k < 1:
        raise SettingError(f"k={k}: P@k needs k of at least 1")
    if aggregate != "first" and not paraphrases:
        raise SettingError(
            f"aggregate={aggregate!r} is over a fact's paraphrases, and paraphrases=False leaves them out"
        )


def _blocks(questions: Sequence[_Question], vocabulary: int | None) -> Iterator[list[int]]:
    """Numbers of questions, short ones first, as many together as memory holds."""

    def size(i: int) -> int:
        # An object's tokens are not counted yet; three a prompt is more than most have.
        question = questions[i]
        return len(question.prompts) * (3 * vocabulary if vocabulary else len(question.candidates))

    return batches(
        range(len(questions)),
        key=lambda i: max(map(len, questions[i].prompts)),
        size=size,
        total=_LOGITS if vocabulary else _SCORES,
    )


# -- how it is judged ------------------------------------------------------------------------------


def _in_vocabulary(
    cloze: ClozeRows, asked: Sequence[_Question], length: Length, averaged: bool
) -> Iterator[tuple[list[Judged], Judged | None]]:
    """For each question what is judged of each prompt, and of the average over its prompts if that
    is wanted.
    """
    rows: list[ClozeRow] = []
    tokens: list[int] = []  # at each position that is read, the answer's
    barred: list[tuple[int, int]] = []  # (position, token that is right as well)
    answers: list[
        list[tuple[Ids, int]]
    ] = []  # of each question and prompt: the answer, and the first position that is its own
    for question in asked:
        others = [cloze.tokens(question.prompts[0], text) for text in question.also_right]
        answers.append([])
        for prompt in question.prompts:
            ids = cloze.tokens(prompt, question.target)
            barred += [
                (len(tokens), other[0])
                for other in others
                if len(other) == 1 and other[0] != ids[0]
            ]
            answers[-1].append((ids, len(tokens)))
            rows += cloze.rows(prompt, [ids])[0]
            tokens += ids
    log_probs_pv = cloze.logits(rows).log_softmax(-1)
    for position, token in barred:
        log_probs_pv[position, token] = -torch.inf
    judged = _judged(log_probs_pv, tokens)
    for question, mine in zip(asked, answers, strict=True):
        replies = [
            _whole(cloze, question, ids, judged[at : at + len(ids)], length) for ids, at in mine
        ]
        if not averaged:
            yield replies, None
            continue
        ids = mine[0][0]
        if any(others != ids for others, _ in mine):
            raise FactError(
                f"{question.target!r} is cut into other tokens after one prompt than after another ({question.prompts}), so "
                "their log-probabilities cannot be averaged; choose another aggregate, or candidates"
            )
        means_pv = torch.stack([log_probs_pv[at : at + len(ids)] for _, at in mine]).mean(0)
        yield replies, _whole(cloze, question, ids, _judged(means_pv, ids), length)


def _whole(
    cloze: ClozeRows,
    question: _Question,
    ids: Ids,
    positions: Sequence[tuple[int, int, float]],
    length: Length,
) -> Judged:
    """What was judged of an answer's tokens, taken together: the worst rank decides."""
    best, ranks, log_probs = zip(*positions, strict=True)
    answer = question.target if max(ranks) == 1 else cloze.spoken(ids, best)
    return answer, max(ranks), sum(log_probs) / (len(ids) if length == "mean" else 1)


def _judged(scores_pv: Tensor, token: Sequence[int]) -> list[tuple[int, int, float]]:
    """At each position: the best token, the rank of the token that is asked for, and its score.

    Of equal ones the first in the vocabulary is the better one, as for arg-max: rank 1 and being
    the best token are the same.
    """
    judged: list[tuple[int, int, float]] = []
    token_p = torch.tensor(token, device=scores_pv.device)[:, None]
    rows = max(
        1, _IN_CACHE // scores_pv.shape[1]
    )  # comparing all at once took six times as long: memory was the limit
    for piece_pv, own_p in zip(scores_pv.split(rows), token_p.split(rows), strict=True):
        score_p = piece_pv.gather(1, own_p)
        check_not_nan(score_p)
        rank_p = 1 + (piece_pv > score_p).sum(1)
        tied_pv = piece_pv == score_p
        if int(tied_pv.sum()) > len(piece_pv):
            rank_p += (
                tied_pv & (torch.arange(piece_pv.shape[1], device=own_p.device) < own_p)
            ).sum(1)
        judged += zip(
            piece_pv.argmax(1).tolist(), rank_p.tolist(), score_p[:, 0].tolist(), strict=True
        )
    return judged


def _among_candidates(
    cloze: ClozeRows, asked: Sequence[_Question], length: Length, averaged: bool
) -> Iterator[tuple[list[Judged], Judged | None]]:
    """The same among whole candidates."""
    rows: dict[
        ClozeRow, list[tuple[int, int, int]]
    ] = {}  # what is read in each: (which read, token, slot of the candidate)
    lengths: list[int] = []
    for question in asked:
        for prompt in question.prompts:
            answers = [cloze.tokens(prompt, text) for text in question.candidates]
            mine, where = cloze.rows(prompt, answers)
            for ids, row in zip(answers, where, strict=True):
                rows.setdefault(mine[row], []).extend(
                    (j, token, len(lengths)) for j, token in enumerate(ids)
                )
                lengths.append(len(ids))
    scores = cloze.log_probs(list(rows), list(rows.values()), len(lengths))
    if length == "mean":
        scores /= torch.tensor(lengths)
    at = 0
    for question in asked:
        scores_qc = scores[at : at + len(question.prompts) * len(question.candidates)].view(
            len(question.prompts), -1
        )
        at += scores_qc.numel()
        others = [c for c, text in enumerate(question.candidates) if text in question.also_right]
        scores_qc[:, others] = -torch.inf
        own = question.candidates.index(question.target)

        def named(
            scores_qc: Tensor, own: int = own, names: Sequence[str] = question.candidates
        ) -> list[Judged]:
            return [
                (names[best], rank, score)
                for best, rank, score in _judged(scores_qc, [own] * len(scores_qc))
            ]

        yield named(scores_qc), named(scores_qc.mean(0, keepdim=True))[0] if averaged else None
