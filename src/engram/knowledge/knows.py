"""What does the model know? Cloze probing: where a fact's object ranks among the words, or the
objects, that could follow.

Knows prompts, objects and log-probabilities. Refuses to know what the result is used for, and how a
family fills a gap: see cloze.

Sources: Petroni et al. 2019 (LAMA), arXiv:1909.01066; Jiang et al. 2020 (LPAQA), arXiv:1911.12543;
Elazar et al. 2021 (ParaRel), arXiv:2102.01017.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from engram.batching import batches
from engram.checks import Count, checked_call, one_of
from engram.engine.shared_prompts import Ids
from engram.errors import FactError, SettingError
from engram.facts import Fact
from engram.knowledge.cloze_rows import ClozeRow, ClozeRows, check_not_nan
from engram.knowledge.knowledge import Aggregate, Among, Knowledge, KnownRecord, Length, Reply
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.progress import Progress, Work, announce, no_progress

_LOGITS = 1 << 24  # log-probabilities held at once: 64 MB in float32
_IN_CACHE = 1 << 19  # of them compared at once: 2 MB
_SCORES = 1 << 18  # scores of candidates held at once


@checked_call
def knows(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    *,
    candidates: Literal["vocabulary", "relation"] | Sequence[str] = "vocabulary",
    aggregate: Aggregate = "first",
    length: Length = "sum",
    paraphrases: bool = True,
    k: Count = 10,
    table: Sequence[Fact] | None = None,
    progress: Progress = no_progress,
) -> Knowledge:
    """Ask a model of any kind for the object of each fact, by its prompt and by its paraphrases.

    One forward per prompt, see `LanguageModel.cloze`. Candidates of several tokens share one where
    they begin alike (masked models: where they have as many tokens), and their prompt's keys and
    values.

    Args:
        facts: `target` is the object.
        candidates: what the object is ranked among.
            "vocabulary": every token. An object of several tokens has the worst rank of its tokens,
            each read after the ones before, so that rank 1 means: greedy decoding gives all of it.
            Masked models: each at its own mask, all masks at once; rank 1 means that each token is
            its mask's best.
            "relation": the objects that `table` has in the fact's relation; or a list of texts,
            each fact's object among them. Candidates are compared by the log-probability of the
            whole text, and are not renormalised.
        aggregate: which number of several prompts counts.
            "first": that of the fact's own prompt.
            "best": the best prompt's, chosen for each fact by its answer: an oracle, an upper
            bound.
            "mean": log-probabilities are averaged over the prompts, then ranked.
        length: log-probability of an object of several tokens: the "sum" over its tokens, or the
            "mean", which does not prefer short objects.
        paraphrases: whether prompts other than the first are used. Without them consistency is not
            measured.
        k: of P@k.
        table: facts that say what else is right and which objects a relation has; default:
            `facts`. Give all of them where `facts` is a sample. Other objects of the same subject
            and relation are right too, and are taken out of the ranking, as in LAMA (in the
            vocabulary: those of one token).
        progress: called with ("prompts", prompts done, prompts in all).
    Raises:
        FactError: no facts; a fact without a relation, or without its object among the candidates;
            a text without tokens or too long for the model.
        SettingError: an argument that is none of the above.
        NonFiniteError: the model gave NaN.
    Example:
        >>> tower = engram.Fact("Eiffel Tower", "The {} is in the city of", "Paris")
        >>> record, = engram.knows(lm, tower).records
        >>> record.rank, record.answer
        (1, 'Paris')
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    among = cast(
        "Among",
        candidates
        if isinstance(candidates, str)
        else tuple(dict.fromkeys(text.strip() for text in candidates)),
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
    records: dict[int, KnownRecord] = {}
    work = Work("prompts", f"testing {len(facts):,} facts by {total:,} prompts")
    tokens = [question.tokens() for question in questions]
    # a third: rows run in large batches, which is that much faster for a token
    work.expect("tokens", sum(tokens), seconds_per_token(lm, progress) / 3)
    announce(progress, work)
    # Blocks bound what is held at once; within one, rows of all its questions share batches.
    for block in _blocks(questions, size if among == "vocabulary" else None):
        judged = judge(cloze, [questions[i] for i in block], length, aggregate == "mean")
        for i, (judgements, averaged) in zip(block, judged, strict=True):
            records[i] = _record(questions[i], judgements, averaged, aggregate)
            done += len(judgements)
        work.did("tokens", sum(tokens[i] for i in block))
        progress("prompts", done, total)
    # Blocks come by length of prompt; the caller's order is put back.
    in_order = tuple(records[i] for i in range(len(facts)))
    return Knowledge(in_order, among, aggregate, length, k, lm.name)


class Judgement(NamedTuple):
    """What one prompt shows: the top answer, the rank of the object, its log-probability."""

    answer: str
    rank: int
    log_prob: float


def _record(
    question: _Question,
    judgements: Sequence[Judgement],
    averaged: Judgement | None,
    aggregate: Aggregate,
) -> KnownRecord:
    """Return the record of one fact, with the judgement that counts."""
    replies = [Reply(p, *j) for p, j in zip(question.prompts, judgements, strict=True)]
    counted = averaged or judgements[0]
    if aggregate == "best":
        # Ranks tie often, 1 above all, and then a prompt's place in the list should not decide.
        counted = min(judgements, key=lambda judgement: (judgement.rank, -judgement.log_prob))
    return KnownRecord(question.fact, tuple(replies), *counted)


# -- questions -------------------------------------------------------------------------------------


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

    def tokens(self) -> float:
        """Return about how many tokens are run: of each prompt, and of each candidate after it."""
        answers = max(1, len(self.candidates))
        return sum(4 + len(prompt) / 4 + 3 * answers for prompt in self.prompts)


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
            return ()  # 50,000 texts would be made and compared for nothing: columns are tokens
        if self.among == "relation":
            if fact.relation is None:
                raise FactError(
                    f"fact {i} ({fact.prompt_text!r}) has no relation; candidates='relation' needs "
                    "Fact(..., relation=...)"
                )
            names = self._objects.get(fact.relation, ())
            where = f"the table's objects of relation {fact.relation!r}"
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
    # Without a relation the prompt stands in for it: equal prompts ask for the same thing.
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
    if aggregate != "first" and not paraphrases:
        raise SettingError(
            f"aggregate={aggregate!r} is over a fact's paraphrases, and paraphrases=False "
            "leaves them out"
        )


def _blocks(questions: Sequence[_Question], vocabulary: int | None) -> Iterator[list[int]]:
    """Split the numbers of questions, short ones first, into blocks that memory holds."""

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


# -- judgements ------------------------------------------------------------------------------------


class _Slots(list[int]):
    """A flat list of integers, filled piece by piece; each piece is remembered as a slice."""

    def add(self, values: Iterable[int]) -> slice:
        """Append the values and return where they are."""
        start = len(self)
        self.extend(values)
        return slice(start, len(self))


class _AtPosition(NamedTuple):
    """The best token of a position (or the best candidate of a row), and the object's own rank and
    score there.
    """

    best: int
    rank: int
    score: float


def _in_vocabulary(
    cloze: ClozeRows, questions: Sequence[_Question], length: Length, average: bool
) -> Iterator[tuple[list[Judgement], Judgement | None]]:
    """Yield the judgement of each prompt of a question, and of the average over its prompts where
    that is wanted.

    Example: two prompts of one fact; the object has 2 tokens, 70 and 71.

        row  positions  tokens judged there  slice
        0    0, 1       70, 71               0:2     first prompt
        1    2, 3       70, 71               2:4     second prompt

    Ranks of 1 and 3 at positions 0 and 1 give the first prompt rank 3.
    """
    rows: list[ClozeRow] = []
    tokens = _Slots()  # at each position that is read, the answer's
    barred: list[tuple[int, int]] = []  # (position, token that is right too)
    answers: list[list[tuple[Ids, slice]]] = []  # per question and prompt
    for question in questions:
        others = [cloze.tokens(question.prompts[0], text) for text in question.also_right]
        answers.append([])
        for prompt in question.prompts:
            ids = cloze.tokens(prompt, question.target)
            barred += [
                (len(tokens), other[0])
                for other in others
                if len(other) == 1 and other[0] != ids[0]
            ]
            answers[-1].append((ids, tokens.add(ids)))
            rows += cloze.rows(prompt, [ids])[0]
    log_probs_pv = cloze.logits(rows).log_softmax(-1)
    # After the softmax: other right objects leave the ranking, but keep their share of probability.
    for position, token in barred:
        log_probs_pv[position, token] = -torch.inf
    judged = _judged(log_probs_pv, tokens)
    for question, by_prompt in zip(questions, answers, strict=True):
        judgements = [
            _whole(cloze, question, ids, judged[piece], length) for ids, piece in by_prompt
        ]
        if not average:
            yield judgements, None
            continue
        ids = by_prompt[0][0]
        if any(others != ids for others, _ in by_prompt):
            raise FactError(
                f"{question.target!r} is cut into other tokens after one prompt than after another "
                f"({question.prompts}), so their log-probabilities cannot be averaged; choose "
                "another aggregate, or candidates"
            )
        means_pv = torch.stack([log_probs_pv[piece] for _, piece in by_prompt]).mean(0)
        yield judgements, _whole(cloze, question, ids, _judged(means_pv, ids), length)


def _whole(
    cloze: ClozeRows,
    question: _Question,
    ids: Ids,
    positions: Sequence[_AtPosition],
    length: Length,
) -> Judgement:
    """Return the judgement of an answer's tokens together: the worst rank decides."""
    best, ranks, log_probs = zip(*positions, strict=True)
    answer = question.target if max(ranks) == 1 else cloze.top_answer(ids, best)
    return Judgement(answer, max(ranks), sum(log_probs) / (len(ids) if length == "mean" else 1))


def _judged(scores_pv: Tensor, own: Sequence[int]) -> list[_AtPosition]:
    """Judge each position: `own` is the column of the object's token, or of the object.

    Of equal scores the first column is the better one, as for arg-max, so that rank 1 and being the
    best are the same: scores [3, 5, 5] have best 1, and ranks 3, 1, 2.
    """
    judged: list[_AtPosition] = []
    own_p1 = torch.tensor(own, device=scores_pv.device)[:, None]
    # Comparing all at once took six times as long: memory was the limit.
    rows = max(1, _IN_CACHE // scores_pv.shape[1])
    for piece_pv, own_q1 in zip(scores_pv.split(rows), own_p1.split(rows), strict=True):
        score_q1 = piece_pv.gather(1, own_q1)
        check_not_nan(score_q1)
        rank_q = 1 + (piece_pv > score_q1).sum(1)
        tied_pv = piece_pv == score_q1
        if int(tied_pv.sum()) > len(piece_pv):  # ties are rare, and counting them is slow
            columns_v = torch.arange(piece_pv.shape[1], device=own_q1.device)
            rank_q += (tied_pv & (columns_v < own_q1)).sum(1)
        columns = piece_pv.argmax(1).tolist(), rank_q.tolist(), score_q1[:, 0].tolist()
        judged += map(_AtPosition, *columns)
    return judged


def _among_candidates(
    cloze: ClozeRows, questions: Sequence[_Question], length: Length, average: bool
) -> Iterator[tuple[list[Judgement], Judgement | None]]:
    """Yield the same among whole candidates.

    Every pair of prompt and candidate is a slot that adds up the log-probabilities of the
    candidate's tokens, whichever rows they are read in.
    """
    reads: dict[ClozeRow, list[tuple[int, int, int]]] = {}  # (which read, token, slot)
    lengths = _Slots()  # of the candidate in each slot
    pieces: list[list[slice]] = []  # per question and prompt
    for question in questions:
        pieces.append([])
        for prompt in question.prompts:
            answers = [cloze.tokens(prompt, text) for text in question.candidates]
            rows, row_of = cloze.rows(prompt, answers)
            piece = lengths.add(map(len, answers))
            pieces[-1].append(piece)
            for slot, (ids, row) in enumerate(zip(answers, row_of, strict=True), piece.start):
                reads.setdefault(rows[row], []).extend(
                    (read, token, slot) for read, token in enumerate(ids)
                )
    scores = cloze.log_probs(list(reads), list(reads.values()), len(lengths))
    if length == "mean":
        scores /= torch.tensor(lengths)
    for question, by_prompt in zip(questions, pieces, strict=True):
        scores_qc = torch.stack([scores[piece] for piece in by_prompt])
        also_right = [
            c for c, text in enumerate(question.candidates) if text in question.also_right
        ]
        # The object itself is never among them, so its own score stays.
        scores_qc[:, also_right] = -torch.inf
        judgements = _named(question, scores_qc)
        if average:
            yield judgements, _named(question, scores_qc.mean(0, keepdim=True))[0]
        else:
            yield judgements, None


def _named(question: _Question, scores_qc: Tensor) -> list[Judgement]:
    """Return the judgements of scores of a question's candidates, row by row."""
    own = question.candidates.index(question.target)
    judged = _judged(scores_qc, [own] * len(scores_qc))
    return [Judgement(question.candidates[at.best], at.rank, at.score) for at in judged]
