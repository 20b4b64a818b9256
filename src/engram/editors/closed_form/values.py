"""Values: the change of one state at the subject that makes the model state the new object.

Knows facts, a layer, contexts, and the loss. Refuses to know how a value is written into weights
(see rome, mass) and how rows are computed (see shifted_rows).

Many facts are optimised at once, yet each as if it were alone: their losses do not depend on each
other, so that one backward pass of the sum gives each fact its own gradient; Adam works element by
element; and a fact that is done leaves the batch. So a batch gives what one fact after another
gives, up to rounding.

Sources: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 and Appendix E, arXiv:2210.07229, Sec. 4.3; Li
et al. 2024, arXiv:2308.08742 (PMET's two states); constants and order of operations as released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from engram.batching import batches
from engram.checks import Count, NonNegative, Positive, check_fields
from engram.editors.closed_form.shifted_rows import (
    ShiftedRows,
    Site,
    TokenRows,
    shifted_at,
    site_modules,
)
from engram.engine.attention import short_attention_in_eager
from engram.engine.precision import Matmul, matmul_in
from engram.engine.replayable import Engine
from engram.errors import FactError, NonFiniteError, SettingError
from engram.facts import Fact, token_span
from engram.model.language_model import LanguageModel
from engram.modules.frozen import frozen

KL_PROMPT = "{} is a"
# PMET: weight of the NLL once the object is the most probable answer, and the KL at which a fact is
# done then.
_ADAPTED_NLL, _ADAPTED_KL = 0.1, 0.01


@dataclass(frozen=True)
class ValueConfig:
    """Settings of the optimisation; defaults as released for GPT-2 XL.

    Args:
        steps: forward passes at most; no update follows the last one.
        weight_decay: times ||delta|| / ||v0||^2, the released form.
        kl_weight: times KL(edited || original) of the next token at the subject (nats).
        kl_position: where that KL is read: at the subject's last token (released), or at the end of
            "<subject> is a" (paper).
        clamp: largest ||delta|| as a multiple of ||v0||.
        stop: when a fact is done before the last step. "loss": its loss is below `stop_loss`.
            "argmax": also as soon as every token of the object is the most probable one in every
            context (Gupta et al. 2025), which keeps values short in long sequences of edits.
            "adaptive": PMET's rule, which then weighs the NLL a tenth and waits for the KL.
        matmul: "bfloat16" rounds the factors of matrix products of a float32 model while the value
            is optimised, which is faster on processors that have it; see `engine.precision`.
    """

    steps: Count = 20
    learning_rate: Positive = 0.5
    weight_decay: NonNegative = 0.5
    kl_weight: NonNegative = 0.0625
    kl_position: Literal["lookup", "last"] = "lookup"
    clamp: Positive = 4.0
    stop: Literal["loss", "argmax", "adaptive"] = "loss"
    stop_loss: NonNegative = 0.05
    matmul: Matmul = "float32"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Value:
    """The result of the optimisation for one fact, with what its first forward pass showed.

    Attributes:
        start_d: v0, the state at the subject's last token of the bare prompt; delta_d: the change;
            `star_d`, v*, is their sum.
        keys_cf: [contexts, f] input of the MLP output matrix at the subject's last token;
            outputs_cd: its output there. Without rows where the value comes from a store.
        losses: one (total, nll, kl, weight decay) per forward pass; delta_norms: ||delta|| used
            in it.
    """

    start_d: Tensor
    delta_d: Tensor
    keys_cf: Tensor
    outputs_cd: Tensor
    losses: list[tuple[float, float, float, float]]
    delta_norms: list[float]

    @property
    def star_d(self) -> Tensor:
        return self.start_d + self.delta_d


@dataclass(frozen=True)
class ValueSearch:
    """Where and by which settings values are optimised: all that a value depends on but its fact.

    Args:
        layer: block at which the state is changed, from 0.
        contexts: templates with one `{}` each, the bare "{}" first.
        config: settings of the optimisation.
        site: what is changed: the MLP's output (ROME), the block's (MEMIT), or the attention's and
            the MLP's, each by a change of its own (PMET; the value is then the MLP's).
        engine: how rows are computed; values are the same up to rounding.
    """

    layer: int
    contexts: Sequence[str]
    config: ValueConfig = field(default_factory=ValueConfig)
    site: Site = "mlp"
    engine: Engine = "auto"


OnStep = Callable[[int, int], None]  # (step, from 0; facts that were optimised in it)


def no_report(step: int, active: int) -> None:
    """Ignore a step: the default of every `on_step`."""


def optimise_value(
    lm: LanguageModel, fact: Fact, search: ValueSearch, on_step: OnStep = no_report
) -> Value:
    """Return one fact's value, see `optimise_values`."""
    ((_, value),) = optimise_values(lm, [fact], search, on_step=on_step)
    return value


def optimise_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    search: ValueSearch,
    facts_per_batch: int = 32,
    on_step: OnStep = no_report,
) -> Iterator[tuple[int, Value]]:
    """Find for each fact the change at its subject that makes `fact.target` likely in all contexts.

    Minimises over delta, for each fact:

        mean over contexts of -log p(target) / tokens of the target
        + kl_weight KL(edited || original)  at "<subject> is a"
        + weight_decay ||delta|| / ||v0||^2

    Args:
        facts_per_batch: facts in one batch, (contexts + 1) rows each, which bounds memory.
        on_step: called after each forward pass of a batch.
    Yields:
        (index of a fact, its value), one batch after another and shorter texts first; float32
        (float64 for a float64 model).
    Raises:
        FactError: contexts without a place for the prompt, or whose first is not "{}"; a text
            longer than the model takes.
        NonFiniteError: the loss is not finite.
    Example:
        >>> from engram.editors.closed_form.values import ValueSearch, optimise_values
        >>> ((number, value),) = optimise_values(lm, [fact], ValueSearch(1, ["{}"]))
        >>> value.losses[-1][0] < value.losses[0][0]
        True
    """
    contexts = search.contexts
    if not contexts or contexts[0] != "{}" or any(c.count("{}") != 1 for c in contexts):
        raise FactError(
            f"contexts={list(contexts)[:3]}...: expected '{{}}' first and exactly one '{{}}' "
            "in each"
        )
    # Once per call, not per batch: it runs the model, and depends on the layer alone.
    shifted = shifted_at(lm, search.layer, search.site, search.engine)
    for numbers in value_batches(lm, facts, search, facts_per_batch):
        batch = [facts[i] for i in numbers]
        # Put back afterwards; the released code leaves every parameter without a gradient.
        with frozen(lm.model):
            begun = _Batch(lm, batch, search, shifted)
            # The recorded run, of which keys and outputs come, is never rounded.
            with short_attention_in_eager(lm), matmul_in(search.config.matmul):
                values = begun.descend(on_step)
        yield from zip(numbers, values, strict=True)


def value_batches(
    lm: LanguageModel, facts: Sequence[Fact], search: ValueSearch, facts_per_batch: int
) -> list[list[int]]:
    """Return the numbers of the facts that `optimise_values` takes together.

    Each batch by itself gives the same values, so that batches can go to different workers.
    """
    if facts_per_batch < 1:
        raise SettingError(
            f"facts_per_batch={facts_per_batch}: at least one fact is optimised at a time"
        )
    lengths = [_FactTokens.of(lm, fact, search).length for fact in facts]
    return list(_batches(lengths, facts_per_batch))


def _batches(lengths: Sequence[tuple[int, int]], limit: int) -> Iterator[list[int]]:
    """Yield batches of facts of about one length, `limit` at most.

    A fact with a longer text begins a new batch once the present one is a quarter full: a mixed
    batch would be half padding, while a quarter-full one costs little more per fact.
    """

    def fits(batch: list[int], i: int) -> bool:
        longer = lengths[i][0] > lengths[batch[0]][0]
        return len(batch) < limit and not (longer and 4 * len(batch) >= limit)

    return batches(range(len(lengths)), fits, key=lengths.__getitem__)


@dataclass(frozen=True)
class _FactTokens:
    """The token rows of one fact: one row per context, the row of the KL penalty, and the targets.

    Fact("Rome", "{} is in", " the south") in the contexts "{}" and "He said. {}", of a model whose
    tokens are words:

        rows       [Rome, is, in, the]        [He, said, ., Rome, is, in, the]
        lookup     0                          3               the subject's last token
        reads      [2, 3]                     [5, 6]          positions that predict the target
        targets    [the, south]               [the, south]

    The target's last token is not part of the row: nothing reads what follows it. After a chat's
    header the target may have other tokens than in plain text, hence one target per row.
    """

    rows: list[list[int]]
    lookup: list[int]
    reads: list[list[int]]
    targets: list[list[int]]
    kl_row: list[int]
    kl_lookup: int

    @classmethod
    def of(cls, lm: LanguageModel, fact: Fact, search: ValueSearch) -> _FactTokens:
        rows = [_context_row(lm, fact, context) for context in search.contexts]
        kl_row, kl_lookup = subject_row(lm, fact.subject, KL_PROMPT)
        if search.config.kl_position == "lookup":
            # A causal model does not see " is a" from the subject's position.
            kl_row = kl_row[: kl_lookup + 1]
        ids, lookup, reads, targets = (list(column) for column in zip(*rows, strict=True))
        longest = max(map(len, ids))
        if longest > lm.max_tokens:
            raise FactError(
                f"{fact.prompt_text!r} and {fact.target!r} in the longest context are {longest} "
                f"tokens, the model takes at most {lm.max_tokens}; give shorter contexts"
            )
        return cls(ids, lookup, reads, targets, kl_row, kl_lookup)

    @property
    def n_reads(self) -> int:
        """Number of positions that are read, that of the KL penalty among them."""
        return sum(map(len, self.reads)) + 1

    @property
    def length(self) -> tuple[int, int]:
        """Positions from the subject's last token to the end, and in all, of the longest row."""
        suffixes = (len(row) - at for row, at in zip(self.rows, self.lookup, strict=True))
        return max(suffixes), max(map(len, self.rows))


def _context_row(
    lm: LanguageModel, fact: Fact, context: str
) -> tuple[list[int], int, list[int], list[int]]:
    """Return one row of `_FactTokens`: its tokens, lookup, reads, and target."""
    # Ids are joined, not texts: the released code appends the decoded target and encodes again, by
    # which SentencePiece models lose its space, and the loss does not move at all.
    ids, lookup = subject_row(lm, fact.subject, fact.prompt, context)
    if context.endswith("{}"):
        target = lm.target_ids(fact.prompt_text, fact.target)
    else:
        # Text follows the prompt, such as the header of a chat's answer: cloze knows which tokens
        # the target has there.
        target = lm.cloze(fact.prompt_text, fact.target, frame=context).answer
    return [*ids, *target[:-1]], lookup, [len(ids) - 1 + t for t in range(len(target))], target


def subject_row(
    lm: LanguageModel, subject: str, prompt: str, context: str = "{}"
) -> tuple[list[int], int]:
    """Return the tokens of `context` around `prompt` around `subject`, and the position of the
    subject's last token.
    """
    text = context.replace("{}", prompt.replace("{}", subject), 1)
    start = context.index("{}") + prompt.index("{}")
    encoding = lm.encode(text)
    return encoding.ids, token_span(encoding.offsets, start, start + len(subject))[1] - 1


class _LossTerms(NamedTuple):
    """The terms of the loss, [n] each, of the facts that are still optimised."""

    total: Tensor
    nll: Tensor
    kl: Tensor
    decay: Tensor
    says_target: Tensor  # every token of the object is the most probable one in every context


class _Adam:
    """Adam (Kingma & Ba 2015; betas 0.9 and 0.999, eps 1e-8) that can drop rows.

    torch.optim.Adam holds its moments per parameter: rows of one cannot leave, and a parameter per
    fact costs as many kernels as there are facts.
    """

    def __init__(self, parameters: Tensor, learning_rate: float) -> None:
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.learning_rate, self.steps = learning_rate, 0

    def keep(self, rows: list[int]) -> None:
        self.mean, self.square = self.mean[rows], self.square[rows]

    def step(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Return the parameters after one step."""
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        rate = self.learning_rate / (1 - 0.9**self.steps)
        size = (self.square / (1 - 0.999**self.steps)).sqrt() + 1e-8
        return parameters - rate * self.mean / size


class _Batch:
    """Facts that are optimised together; those that are done leave.

    Attributes:
        active: numbers of the facts that are still optimised. All rows of `delta_nsd`, `size_ns`,
            `original_nv` and `rows` are of these, in this order.
        start_nsd: states of all facts before any change, [facts, shifted modules, d].
    """

    def __init__(
        self, lm: LanguageModel, facts: Sequence[Fact], search: ValueSearch, shifted: Site
    ) -> None:
        self.facts, self.config = facts, search.config
        self.tokens = [_FactTokens.of(lm, fact, search) for fact in facts]
        # The penalty's row goes with the fact's contexts: alone, its few states would read every
        # weight of the blocks and of the head once more, a quarter of the time of one fact.
        rows = TokenRows(
            [row for fact in self.tokens for row in (*fact.rows, fact.kl_row)],
            [at for fact in self.tokens for at in (*fact.lookup, fact.kl_lookup)],
            [reads for fact in self.tokens for reads in (*fact.reads, [len(fact.kl_row) - 1])],
            [n for n, fact in enumerate(self.tokens) for _ in range(len(fact.rows) + 1)],
        )
        modules = site_modules(lm, search.site, search.layer)
        out = lm.parts.mlp_out_name(search.layer)
        # Keys and outputs come from the very run that is recorded for the replay: a value's delta
        # is relative to these states, and another run's rounding would be part of the residual.
        self.rows, seen = ShiftedRows.recorded(
            lm,
            rows,
            search.layer,
            shifted,
            search.engine,
            {"key": (out, "in"), "out": (out, "out"), **modules},
        )
        first, device = rows.first_of_each(), seen["out"].device
        # Also of a bfloat16 model: in its 8 bits of mantissa most steps of Adam would be lost.
        precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
        self.keys_bf, self.outputs_bd = seen["key"].to(precision), seen["out"].to(precision)
        self.start_nsd = torch.stack(
            [seen[name][first].to(device, precision) for name in modules], 1
        )
        self.active = list(range(len(facts)))
        self.size_ns = self.start_nsd.norm(dim=-1)
        self.original_nv: Tensor | None = None

    def descend(self, on_step: OnStep) -> list[Value]:
        """Optimise every fact's delta and return its value.

        One step, in the released code's order, which decides the last bits and where a fact ends:

        1. One forward pass of all context rows and penalty rows with delta added.
        2. The loss terms, noted with ||delta|| of this very pass.
        3. Facts that are done leave with the delta of this pass. At the last step all are done, so
           that no update follows the last forward pass.
        4. Gradient of the summed losses of the facts that stay, and one step of Adam.
        5. Clamp: delta is scaled back to clamp x ||v0||. Adam's moments are left as they are.

        With three facts, of which the second is done at step 1:

            step   active      delta_nsd     leaves with
            0      [0, 1, 2]   [3, s, d]     -
            1      [0, 1, 2]   [3, s, d]     1: its delta of step 1, updated once
            2      [0, 2]      [2, s, d]     ...
        """
        config = self.config
        delta_nsd = torch.zeros_like(self.start_nsd)
        adam = _Adam(delta_nsd, config.learning_rate)
        losses: list[list[tuple[float, float, float, float]]] = [[] for _ in self.facts]
        norms: list[list[float]] = [[] for _ in self.facts]
        deltas: dict[int, Tensor] = {}
        for step in range(config.steps):
            delta_nsd.requires_grad_()
            terms = self._loss_terms(delta_nsd)
            self._note(terms, delta_nsd, losses, norms)
            self._check_finite(terms.total, step)
            on_step(step, len(self.active))
            done = self._is_done(terms, step)  # by this pass's losses, before any update
            leaving = zip(self.active, delta_nsd.detach(), done, strict=True)
            deltas |= {n: delta_sd for n, delta_sd, leaves in leaving if leaves}
            stay = [row for row, leaves in enumerate(done) if not leaves]
            if not stay:
                break
            # autograd.grad and not backward(): no gradient is left on the model or on old deltas.
            (gradient_nsd,) = torch.autograd.grad(terms.total[stay].sum(), [delta_nsd])
            delta_nsd = delta_nsd.detach()
            if len(stay) < len(self.active):
                self._keep(stay)
                adam.keep(stay)
                delta_nsd, gradient_nsd = delta_nsd[stay], gradient_nsd[stay]
            delta_nsd = adam.step(delta_nsd, gradient_nsd)
            largest_ns = config.clamp * self.size_ns
            delta_nsd = delta_nsd * (largest_ns / delta_nsd.norm(dim=-1)).clamp(max=1)[..., None]
        of = len(self.tokens[0].rows) + 1  # and the penalty's, which gives no key
        return [
            Value(
                self.start_nsd[n, -1],
                deltas[n][-1],
                self.keys_bf[n * of : (n + 1) * of - 1],
                self.outputs_bd[n * of : (n + 1) * of - 1],
                losses[n],
                norms[n],
            )
            for n in range(len(self.facts))
        ]

    def _loss_terms(self, delta_nsd: Tensor) -> _LossTerms:
        """Run the rows with `delta_nsd` added and return the terms; gradients reach `delta_nsd`."""
        config = self.config
        facts = [self.tokens[n] for n in self.active]
        log_p_pv = self.rows.logits(delta_nsd).to(self.start_nsd).log_softmax(-1)
        nll_n, says_target_n = _nll(log_p_pv, facts)
        # A fact's last read is the penalty's.
        log_p_nv = log_p_pv[[end - 1 for end in accumulate(fact.n_reads for fact in facts)]]
        if (
            self.original_nv is None
        ):  # delta is zero in the first pass: no pass of its own is needed
            self.original_nv = log_p_nv.detach()
        # Against the first pass of these very rows: against a run of its own, even a delta of zero
        # would have a divergence, by rounding.
        kl_n = config.kl_weight * (log_p_nv.exp() * (log_p_nv - self.original_nv)).sum(-1)
        # ||delta|| / ||v0||^2 and not its square, as released: the pull does not fade near zero.
        # At zero torch's norm has the gradient 0; the root of a sum of squares would give NaN.
        decay_n = (config.weight_decay * delta_nsd.norm(dim=-1) / self.size_ns**2).sum(-1)
        if config.stop == "adaptive":
            nll_n = nll_n * torch.where(says_target_n, _ADAPTED_NLL, 1.0)
        return _LossTerms(nll_n + kl_n + decay_n, nll_n, kl_n, decay_n, says_target_n)

    def _is_done(self, terms: _LossTerms, step: int) -> list[bool]:
        """Return for each active fact whether it leaves after this forward pass."""
        if step == self.config.steps - 1:
            return [True] * len(self.active)
        done_n = terms.total < self.config.stop_loss
        if self.config.stop == "argmax":
            done_n |= terms.says_target
        if self.config.stop == "adaptive":
            done_n |= terms.says_target & (terms.kl <= _ADAPTED_KL)
        return [bool(done) for done in done_n.tolist()]

    def _keep(self, rows: list[int]) -> None:
        """Keep some of the active facts; the rows of the others are no longer computed."""
        assert self.original_nv is not None, "facts leave after a forward pass only"
        self.active = [self.active[row] for row in rows]
        self.rows = self.rows.only(rows)
        self.size_ns, self.original_nv = self.size_ns[rows], self.original_nv[rows]

    def _note(
        self,
        terms: _LossTerms,
        delta_nsd: Tensor,
        losses: list[list[tuple[float, float, float, float]]],
        norms: list[list[float]],
    ) -> None:
        """Append this pass's terms and norms to the lists of the active facts."""
        # One transfer from the device a step, not five numbers for each fact.
        numbers = [terms.total, terms.nll, terms.kl, terms.decay, delta_nsd[:, -1].norm(dim=-1)]
        table = torch.stack(numbers, 1).tolist()
        for n, (total, nll, kl, decay, norm) in zip(self.active, table, strict=True):
            losses[n].append((total, nll, kl, decay))
            norms[n].append(norm)

    def _check_finite(self, loss_n: Tensor, step: int) -> None:
        if not loss_n.isfinite().all():
            row = int((~loss_n.isfinite()).nonzero()[0, 0])
            raise NonFiniteError(
                f"the loss of the value of {self.facts[self.active[row]].subject!r} is "
                f"{loss_n[row].item()} at step {step}; nothing was changed. Try dtype=torch.float32"
            )


def _nll(log_p_pv: Tensor, facts: Sequence[_FactTokens]) -> tuple[Tensor, Tensor]:
    """Return each fact's mean over contexts of the target's negative log-probability per token, and
    whether every token of the target is the most probable one in every context.

    Rows of `log_p_pv` are the reads of all facts one after another: fact by fact, context by
    context, token by token, and then the fact's KL penalty, which is left out here. A read counts
    1 / (tokens of its target) / (contexts of its fact).
    """
    starts = accumulate((fact.n_reads for fact in facts), initial=0)
    reads = [
        start + i
        for start, fact in zip(starts, facts, strict=False)
        for i in range(fact.n_reads - 1)
    ]
    targets = [target for fact in facts for target in fact.targets]
    labels = [token for target in targets for token in target]
    shares = [
        1 / len(target) / len(fact.targets)
        for fact in facts
        for target in fact.targets
        for _ in target
    ]
    sizes = [fact.n_reads - 1 for fact in facts]
    device = log_p_pv.device
    reads_p, labels_p = torch.tensor(reads, device=device), torch.tensor(labels, device=device)
    shares_p = torch.tensor(shares, dtype=log_p_pv.dtype, device=device)
    nll_p = -log_p_pv[reads_p, labels_p] * shares_p
    says_p = log_p_pv.argmax(-1)[reads_p] == labels_p
    nll_n = torch.stack([part.sum() for part in nll_p.split(sizes)])
    return nll_n, torch.stack([part.all() for part in says_p.split(sizes)])
