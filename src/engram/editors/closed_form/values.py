"""Values: the change of one state at the subject that makes the model say the new object, optimised
for many facts at once.

Knows facts, a layer, contexts, and the loss. Refuses to know how a value is written into weights
(see rome, mass) and how rows are computed (see value_rows). Facts are independent: one backward
pass of the summed losses gives each its own gradient, Adam works element by element, and a fact
that is done leaves the batch. So a batch gives what one by one gives, up to rounding.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 and Appendix E, arXiv:2210.07229, Sec. 4.3; Li
    et al. 2024,
arXiv:2308.08742 (PMET's two states); constants and order of operations as in the released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from engram.batching import batches
from engram.checks import one_of
from engram.editors.closed_form.shifted_rows import (
    ShiftedRows,
    Site,
    TokenRows,
    shifted_at,
    site_modules,
)
from engram.engine.attention import short_attention_in_eager
from engram.engine.replayable import Engine
from engram.errors import FactError, NonFiniteError, SettingError
from engram.facts import Fact, token_span
from engram.model.language_model import LanguageModel

KL_PROMPT = "{} is a"
_ADAPTED_NLL, _ADAPTED_KL = (
    0.1,
    0.01,
)  # PMET: weight of the NLL once the object is said, and the KL at which it is done


@dataclass(frozen=True)
class ValueConfig:
    """Knobs of the optimisation; defaults as released for GPT-2 XL.

    Args:
        steps: forward passes at most; the last one is not followed by an update.
        weight_decay: times ||delta|| / ||v0||^2, the released form.
        kl_weight: times KL(edited || original) of the next token at the subject (nats).
        kl_position: where that KL is read: at the subject's last token (released), or at the end of
            "<subject> is a" (paper).
        clamp: largest ||delta|| as a multiple of ||v0||.
        stop: when a fact is done before the last step. "loss": its loss is below `stop_loss`.
            "argmax": also as soon as every token of the object is the most probable one in every
            context (Gupta et al. 2025), which keeps values short in long sequences of edits.
            "adaptive": PMET's rule, which then weighs the NLL a tenth and waits for the KL.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    kl_position: Literal["lookup", "last"] = "lookup"
    clamp: float = 4.0
    stop: Literal["loss", "argmax", "adaptive"] = "loss"
    stop_loss: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingError(f"steps={self.steps}: at least one forward pass is needed")
        if self.clamp <= 0 or self.learning_rate <= 0:
            raise SettingError(
                f"clamp={self.clamp}, learning_rate={self.learning_rate}: both have to be above 0"
            )
        one_of("stop", self.stop, ("loss", "argmax", "adaptive"))
        one_of("kl_position", self.kl_position, ("lookup", "last"))


@dataclass(frozen=True)
class Value:
    """What the optimisation found for one fact, and what was read from the same forward pass on the
    way.

    Attributes:
        start_d: v0, the state at the subject's last token of the bare prompt; delta_d: the change;
            v* is their sum.
        keys_cf: [contexts, f] input of the MLP output matrix at the subject's last token;
            outputs_cd: its output there. Without rows where the value comes from a store.
        losses: one (total, nll, kl, weight decay) a forward pass; delta_norms: ||delta|| used in
            it.
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


def optimise_value(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
    config: ValueConfig,
    engine: Engine = "auto",
) -> Value:
    """One fact's value at the MLP's output, see `optimise_values`."""
    ((_, value),) = optimise_values(lm, [fact], layer, contexts, config, engine=engine)
    return value


def optimise_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    config: ValueConfig,
    *,
    site: Site = "mlp",
    engine: Engine = "auto",
    facts_per_batch: int = 32,
) -> Iterator[tuple[int, Value]]:
    """Find for each fact the change at its subject that makes `fact.target` likely in every
    context.

    Minimises over delta: mean over contexts of -log p(target) / its tokens + kl_weight KL +
        weight_decay ||delta|| / ||v0||^2.

    Args:
        layer: block at which the state is changed, from 0.
        contexts: templates with one `{}` each, the bare "{}" first.
        site: what is changed: the MLP's output (ROME), the block's (MEMIT), or the attention's and
            the MLP's, each by a change of its own (PMET; the value is then the MLP's).
        facts_per_batch: facts in one batch, (contexts + 1) rows each, which bounds memory.
    Yields:
        (index of a fact, its value), a batch after the other and shorter texts first; float32
        (float64 for a float64 model).
    Raises:
        FactError: contexts without a place for the prompt, or not led by "{}"; a text longer than
            the model takes.
        NonFiniteError: the loss is not finite.
    """
    if not contexts or contexts[0] != "{}" or any(c.count("{}") != 1 for c in contexts):
        raise FactError(
            f"contexts={list(contexts)[:3]}...: expected '{{}}' first and exactly one '{{}}' in each"
        )
    shifted = shifted_at(lm, layer, site, engine)
    for batch in value_batches(lm, facts, contexts, config, facts_per_batch):
        asked = {i: _Asked.of(lm, facts[i], contexts, config.kl_position) for i in batch}
        with _frozen(lm.model):
            begun = _Batch(
                lm,
                [asked[i] for i in batch],
                [facts[i] for i in batch],
                layer,
                site,
                shifted,
                engine,
            )
            with short_attention_in_eager(lm):
                values = begun.descend(config)
        yield from zip(batch, values, strict=True)


def value_batches(
    lm: LanguageModel,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    config: ValueConfig,
    facts_per_batch: int,
) -> list[list[int]]:
    """Numbers of the facts that `optimise_values` takes together; each batch by itself gives the
    same.
    """
    if facts_per_batch < 1:
        raise SettingError(
            f"facts_per_batch={facts_per_batch}: at least one fact is optimised at a time"
        )
    lengths = [_Asked.of(lm, fact, contexts, config.kl_position).length for fact in facts]
    return list(_batches(lengths, facts_per_batch))


def _batches(lengths: Sequence[tuple[int, int]], limit: int) -> Iterator[list[int]]:
    """Facts of about one length together, `limit` at most: half of a mixed batch would be padding,
    a quarter-full one loses little.
    """

    def fits(batch: list[int], i: int) -> bool:
        longer = lengths[i][0] > lengths[batch[0]][0]
        return len(batch) < limit and not (longer and 4 * len(batch) >= limit)

    return batches(range(len(lengths)), fits, key=lengths.__getitem__)


@dataclass(frozen=True)
class _Asked:
    """What one fact asks of the model: a row a context, the penalty's row, and the tokens wanted."""

    rows: list[list[int]]
    lookup: list[int]  # subject's last token in each row
    reads: list[list[int]]  # positions that predict the target's tokens
    targets: list[
        list[int]
    ]  # these tokens; behind a chat's header they may differ from those in plain text
    kl_row: list[int]
    kl_lookup: int

    @classmethod
    def of(cls, lm: LanguageModel, fact: Fact, contexts: Sequence[str], kl_position: str) -> _Asked:
        rows = [_context_row(lm, fact, context) for context in contexts]
        kl_row, kl_lookup = subject_row(lm, fact.subject, KL_PROMPT)
        if kl_position == "lookup":  # what follows the subject there is seen by nothing
            kl_row = kl_row[: kl_lookup + 1]
        ids, lookup, reads, targets = (list(each) for each in zip(*rows, strict=True))
        if max(map(len, ids)) > lm.max_tokens:
            raise FactError(
                f"{fact.prompt_text!r} and {fact.target!r} in the longest context are {max(map(len, ids))} tokens, the model takes at "
                f"most {lm.max_tokens}; give shorter contexts"
            )
        return cls(ids, lookup, reads, targets, kl_row, kl_lookup)

    @property
    def length(self) -> tuple[int, int]:
        """Positions from the subject's last token on, and in all."""
        return max(len(row) - at for row, at in zip(self.rows, self.lookup, strict=True)), max(
            map(len, self.rows)
        )


def _context_row(
    lm: LanguageModel, fact: Fact, context: str
) -> tuple[list[int], int, list[int], list[int]]:
    """One context's tokens with all of the target's but the last, the subject's last token, where
    the target is read, its tokens.
    """
    ids, lookup = subject_row(lm, fact.subject, fact.prompt, context)
    if context.endswith("{}"):
        target = lm.target_ids(fact.prompt_text, fact.target)
    # something follows the prompt, such as the header of a chat's answer: how the target is spelt
    # there, cloze knows
    else:
        target = lm.cloze(fact.prompt_text, fact.target, frame=context).answer
    return [*ids, *target[:-1]], lookup, [len(ids) - 1 + t for t in range(len(target))], target


def subject_row(
    lm: LanguageModel, subject: str, prompt: str, context: str = "{}"
) -> tuple[list[int], int]:
    """Tokens of `context` around `prompt` around `subject`, and the place of the subject's last
    token.
    """
    text = context.replace("{}", prompt.replace("{}", subject), 1)
    start = context.index("{}") + prompt.index("{}")
    encoding = lm.encode(text)
    return encoding.ids, token_span(encoding.offsets, start, start + len(subject))[1] - 1


class _Batch:
    """Facts that are optimised together."""

    def __init__(
        self,
        lm: LanguageModel,
        asked: Sequence[_Asked],
        facts: Sequence[Fact],
        layer: int,
        site: Site,
        shifted: Site,
        engine: Engine,
    ) -> None:
        self.asked, self.facts = asked, facts
        contexts = TokenRows(
            [row for each in asked for row in each.rows],
            [at for each in asked for at in each.lookup],
            [reads for each in asked for reads in each.reads],
            [n for n, each in enumerate(asked) for _ in each.rows],
        )
        penalty = TokenRows(
            [each.kl_row for each in asked],
            [each.kl_lookup for each in asked],
            [[len(each.kl_row) - 1] for each in asked],
            list(range(len(asked))),
        )
        modules = site_modules(lm, site, layer)
        out = lm.parts.mlp_out_name(layer)
        precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
        self.contexts, seen = ShiftedRows.recorded(
            lm,
            contexts,
            layer,
            shifted,
            engine,
            {"key": (out, "in"), "out": (out, "out"), **modules},
        )
        self.penalty, _ = ShiftedRows.recorded(lm, penalty, layer, shifted, engine, {})
        first, device = self.contexts.rows.first_of_each(), seen["out"].device
        self.keys_bf, self.outputs_bd = seen["key"].to(precision), seen["out"].to(precision)
        self.start_nsd = torch.stack(
            [seen[name][first].to(device, precision) for name in modules], 1
        )

    @torch.enable_grad()  # also for a caller who is only going to generate
    def descend(self, config: ValueConfig) -> list[Value]:
        """Adam on every fact's delta, as released: stop before the update, clamp after it and leave
        Adam's moments alone.
        """
        state, penalty, asked = self.contexts, self.penalty, list(self.asked)
        start_nsd, active = self.start_nsd, list(range(len(asked)))
        size_ns = start_nsd.norm(dim=-1)
        delta_nsd = torch.zeros_like(start_nsd)
        moments = torch.zeros_like(start_nsd), torch.zeros_like(start_nsd)
        original_nv: Tensor | None = None
        losses: list[list[tuple[float, float, float, float]]] = [[] for _ in asked]
        norms: list[list[float]] = [[] for _ in asked]
        found: dict[int, Tensor] = {}
        for step in range(config.steps):
            delta_nsd.requires_grad_()
            logits_pv = state.logits(delta_nsd).to(start_nsd)
            nll_n, said_n = _nll(logits_pv.log_softmax(-1), asked)
            log_p_nv = penalty.logits(delta_nsd).to(start_nsd).log_softmax(-1)
            original_nv = log_p_nv.detach() if original_nv is None else original_nv
            kl_n = config.kl_weight * (log_p_nv.exp() * (log_p_nv - original_nv)).sum(-1)
            decay_n = (config.weight_decay * delta_nsd.norm(dim=-1) / size_ns**2).sum(-1)
            if config.stop == "adaptive":
                nll_n = nll_n * torch.where(said_n, _ADAPTED_NLL, 1.0)
            loss_n = nll_n + kl_n + decay_n
            table = torch.stack(
                [loss_n, nll_n, kl_n, decay_n, delta_nsd[:, -1].norm(dim=-1)], 1
            ).tolist()
            for n, (*terms, norm) in zip(active, table, strict=True):
                losses[n].append(tuple(terms))
                norms[n].append(norm)
            self._check_finite(loss_n, active, step)
            done_n = loss_n < config.stop_loss
            if config.stop != "loss":
                done_n |= said_n & ((kl_n <= _ADAPTED_KL) if config.stop == "adaptive" else True)
            if step == config.steps - 1:
                done_n = torch.ones_like(done_n)
            done = done_n.tolist()
            found |= {
                n: delta
                for n, delta, over in zip(active, delta_nsd.detach(), done, strict=True)
                if over
            }
            keep = [i for i, over in enumerate(done) if not over]
            if not keep:
                break
            (grad_nsd,) = torch.autograd.grad(loss_n[keep].sum(), [delta_nsd])
            delta_nsd = delta_nsd.detach()
            if len(keep) < len(active):
                active, asked = [active[i] for i in keep], [asked[i] for i in keep]
                state, penalty = state.only(keep), penalty.only(keep)
                delta_nsd, grad_nsd, size_ns, original_nv = (
                    x[keep] for x in (delta_nsd, grad_nsd, size_ns, original_nv)
                )
                moments = moments[0][keep], moments[1][keep]
            delta_nsd = _adam(delta_nsd, grad_nsd, moments, step + 1, config.learning_rate)
            over_ns1 = (config.clamp * size_ns / delta_nsd.norm(dim=-1)).clamp(max=1)[..., None]
            delta_nsd = delta_nsd * over_ns1
        of = len(self.asked[0].rows)
        return [
            Value(
                self.start_nsd[n, -1],
                found[n][-1],
                self.keys_bf[n * of : (n + 1) * of],
                self.outputs_bd[n * of : (n + 1) * of],
                losses[n],
                norms[n],
            )
            for n in range(len(self.asked))
        ]

    def _check_finite(self, loss_n: Tensor, active: Sequence[int], step: int) -> None:
        if not loss_n.isfinite().all():
            at = int((~loss_n.isfinite()).nonzero()[0, 0])
            raise NonFiniteError(
                f"the loss of the value of {self.facts[active[at]].subject!r} is {loss_n[at].item()} at step {step}; nothing was "
                "changed. Try dtype=torch.float32"
            )


def _nll(log_p_pv: Tensor, asked: Sequence[_Asked]) -> tuple[Tensor, Tensor]:
    """Each fact's mean over contexts of the target's negative log-probability a token; whether it
    is the arg-max throughout.
    """
    labels = [token for each in asked for target in each.targets for token in target]
    shares = [
        1 / len(target) / len(each.targets)
        for each in asked
        for target in each.targets
        for _ in target
    ]
    sizes = [sum(map(len, each.targets)) for each in asked]
    labels_p1 = torch.tensor(labels, device=log_p_pv.device)[:, None]
    nll = (
        -log_p_pv.gather(1, labels_p1)[:, 0]
        * torch.tensor(shares, dtype=log_p_pv.dtype, device=log_p_pv.device)
    ).split(sizes)
    said = (log_p_pv.argmax(-1, keepdim=True) == labels_p1)[:, 0].split(sizes)
    return torch.stack([each.sum() for each in nll]), torch.stack([each.all() for each in said])


def _adam(
    delta: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: int, rate: float
) -> Tensor:
    """One step of Adam (Kingma & Ba 2015, betas 0.9 and 0.999, eps 1e-8); written out since facts
    leave with their moments.
    """
    mean, square = moments
    mean.lerp_(grad, 0.1)
    square.mul_(0.999).addcmul_(grad, grad, value=0.001)
    return delta - rate / (1 - 0.9**step) * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights inside the block; every flag is put back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
