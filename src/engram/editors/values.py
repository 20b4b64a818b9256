"""The value of an edit: the change of one MLP output that makes the model say the new object.

Knows one fact, one layer and a batch of contexts. Refuses to know how the value is written into weights (see rome).
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 and Appendix E; constants and order of operations as in the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engram.errors import FactError, NonFiniteError, SettingError
from engram.facts import Fact, token_span
from engram.hooks import substitute
from engram.language_model import LanguageModel, pad_right
from engram.replay import Engine, Suffix, body, record_run, use_replay

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class ValueConfig:
    """Knobs of the optimisation; defaults as released for GPT-2 XL."""

    steps: int = 20  # forward passes at most; the last one is not followed by an update
    learning_rate: float = 0.5
    weight_decay: float = 0.5  # times ||delta|| / ||v0||^2, the released form
    kl_weight: float = 0.0625  # times KL(edited || original) of the next token at the subject (nats)
    # where the KL is read: the subject's last token (released), or the end of "<subject> is a" (paper)
    kl_position: Literal["lookup", "last"] = "lookup"
    clamp: float = 4.0  # largest ||delta|| as a multiple of ||v0||
    stop_loss: float = 0.05  # done when the loss is below

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingError(f"steps={self.steps}: at least one forward pass is needed")
        if self.clamp <= 0 or self.learning_rate <= 0:
            raise SettingError(f"clamp={self.clamp}, learning_rate={self.learning_rate}: both have to be above 0")


@dataclass(frozen=True)
class Value:
    """What the optimisation found, and what was read from the same forward pass on the way.

    Attributes:
        start_d: v0, the MLP output at the subject's last token of the bare prompt; delta_d: the change; v* is their sum.
        keys_cf: [contexts, f] input of the MLP output matrix at the subject's last token; outputs_cd: its output there.
        losses: one (total, nll, kl, weight decay) a forward pass; delta_norms: ||delta|| used in it.
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
class _Batch:
    """Rows of one optimisation: one a context, the KL row last; padded on the right."""

    ids_bt: Tensor
    lookup: list[int]  # subject's last token in each row
    last: list[int]  # last position of the prompt, which predicts the target's first token
    target: list[int]
    suffix: int  # positions from the subject's last token to the end of the longest row

    @classmethod
    def of(cls, lm: LanguageModel, fact: Fact, contexts: Sequence[str], kl_position: str) -> _Batch:
        target = lm.target_ids(fact.prompt_text, fact.target)
        rows, lookup, last = [], [], []
        for template, prompt in [*((c, fact.prompt) for c in contexts), ("{}", KL_PROMPT)]:
            before = template.index("{}")
            text = template.replace("{}", prompt.replace("{}", fact.subject), 1)
            start = before + prompt.index("{}")
            encoding = lm.encode(text)
            rows.append(encoding.ids)
            lookup.append(token_span(encoding.offsets, start, start + len(fact.subject))[1] - 1)
            last.append(len(encoding.ids) - 1)
        rows[:-1] = [row + target[:-1] for row in rows[:-1]]
        if kl_position == "lookup":  # what follows the subject there is seen by nothing
            rows[-1] = rows[-1][: lookup[-1] + 1]
            last[-1] = lookup[-1]
        suffix = max(len(row) - at for row, at in zip(rows, lookup, strict=True))
        return cls(pad_right(rows, max(lookup) + suffix), lookup, last, target, suffix)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, positions, labels) of the logits the loss needs; the KL row's one comes last and has label 0."""
        contexts, n = len(self.lookup) - 1, len(self.target)
        rows = [j for j in range(contexts) for _ in range(n)] + [contexts]
        positions = [self.last[j] + t for j in range(contexts) for t in range(n)]
        positions.append(self.last[-1])
        return torch.tensor(rows), torch.tensor(positions), torch.tensor(self.target * contexts + [0])


def optimise_value(
    lm: LanguageModel, fact: Fact, layer: int, contexts: Sequence[str], config: ValueConfig, engine: Engine = "auto"
) -> Value:
    """Find the change of the MLP's output at the subject that makes `fact.target` likely in every context.

    Minimises over delta: mean over contexts of -log p(target) / its tokens + kl_weight KL + weight_decay ||delta|| / ||v0||^2.

    Args:
        layer: block whose MLP output is changed, from 0.
        contexts: templates with one `{}` each, the bare "{}" first.
    Returns:
        The value, with keys and outputs of the edited matrix in all contexts, float32 (float64 for a float64 model).
    Raises:
        FactError: contexts without a place for the prompt, or not led by "{}".
        NonFiniteError: the loss is not finite.
    """
    if not contexts or contexts[0] != "{}" or any(c.count("{}") != 1 for c in contexts):
        raise FactError(f"contexts={list(contexts)[:3]}...: expected '{{}}' first and exactly one '{{}}' in each")
    batch = _Batch.of(lm, fact, contexts, config.kl_position)
    name = lm.parts.mlp_out_name(layer)
    recording = record_run(lm, batch.ids_bt, inputs=[name], outputs=[name])
    precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
    rows = torch.arange(len(batch.lookup))

    def at_subject(seen: Tensor) -> Tensor:
        return seen.view(*batch.ids_bt.shape, -1)[rows, batch.lookup].to(precision)

    keys_bf, outputs_bd = at_subject(recording.seen[f"{name}:input"]), at_subject(recording.seen[name])
    start_d = outputs_bd[0]
    run = _replayed if use_replay(lm, engine) else _whole
    forward = run(lm, batch, layer, recording)
    with _frozen(lm.model):
        delta_d, losses, norms = _descend(forward, batch, start_d, config)
    return Value(start_d, delta_d, keys_bf[:-1], outputs_bd[:-1], losses, norms)


Forward = Callable[[Tensor], Tensor]  # delta [d] -> logits [reads, v] at `_Batch.read`


def _descend(
    forward: Forward, batch: _Batch, start_d: Tensor, config: ValueConfig
) -> tuple[Tensor, list[tuple[float, float, float, float]], list[float]]:
    """Adam on delta, as released: stop before the update, clamp after it and leave Adam's moments alone."""
    contexts, n = len(batch.lookup) - 1, len(batch.target)
    labels = batch.read()[2].to(start_d.device)
    delta_d = torch.zeros_like(start_d, requires_grad=True)
    optimiser = torch.optim.Adam([delta_d], lr=config.learning_rate)
    limit, original_v = config.clamp * start_d.norm(), None
    losses: list[tuple[float, float, float, float]] = []
    norms: list[float] = []
    for step in range(config.steps):
        log_p = forward(delta_d).to(start_d).log_softmax(-1)  # logits may be made on another device than the layer's
        original_v = log_p[-1].detach() if original_v is None else original_v
        nll = -log_p[:-1].gather(1, labels[:-1, None]).view(contexts, n).mean(1).mean()
        kl = config.kl_weight * (log_p[-1].exp() * (log_p[-1] - original_v)).sum()
        decay = config.weight_decay * delta_d.norm() / start_d.norm() ** 2
        loss = nll + kl + decay
        losses.append((loss.item(), nll.item(), kl.item(), decay.item()))
        norms.append(delta_d.norm().item())
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the value's loss is {loss.item()} at step {step}; nothing was changed. Try dtype=torch.float32"
            )
        if loss.item() < config.stop_loss or step == config.steps - 1:
            break
        (delta_d.grad,) = torch.autograd.grad(loss, [delta_d])
        optimiser.step()
        with torch.no_grad():
            if (norm := delta_d.norm()) > limit:
                delta_d.mul_(limit / norm)
    return delta_d.detach(), losses, norms


def _replayed(lm: LanguageModel, batch: _Batch, layer: int, recording: Any) -> Forward:
    """Blocks from `layer` on, from the subject's last token on; at `layer` itself that one token is all that changes.

    Where all contexts end together, the last block computes what is read and nothing else: the target's positions of the
    contexts, and the KL row's one.
    """
    alone = Suffix(lm, recording, batch.lookup, 1)
    suffix = Suffix(lm, recording, batch.lookup, batch.suffix)
    read_rows, positions, _ = batch.read()
    columns = positions - torch.tensor(batch.lookup)[read_rows]
    entering, after = alone.states(layer), suffix.states(layer + 1)[:, 1:]
    contexts, n, top = len(batch.lookup) - 1, len(batch.target), lm.n_layers - 1
    aligned = (
        layer < top
        and batch.last[-1] == batch.lookup[-1]
        and len({c - a for c, a in zip(batch.last[:-1], batch.lookup, strict=False)}) == 1
    )
    context_rows, kl_row = torch.arange(contexts), torch.tensor([contexts])

    def forward(delta_d: Tensor) -> Tensor:
        with substitute({lm.parts.mlp_out(layer): lambda out: out + delta_d.to(out)}):
            token_b1d = alone.block(layer, entering)
        hidden_bqd = torch.cat([token_b1d, after], 1)
        for above in range(layer + 1, lm.n_layers - aligned):
            hidden_bqd = suffix.block(above, hidden_bqd)
        if not aligned:
            return lm.parts.head(hidden_bqd[read_rows, columns])
        ends_cnd = suffix.last_positions(top, hidden_bqd[:-1], context_rows, n)
        kl_11d = alone.block(top, hidden_bqd[-1:, :1], kl_row)
        return lm.parts.head(torch.cat([ends_cnd.flatten(0, 1), kl_11d[0]]))

    return forward


def _whole(lm: LanguageModel, batch: _Batch, layer: int, recording: Any) -> Forward:
    """The same through whole forward passes, for models that cannot be replayed."""
    rows, (read_rows, positions, _) = torch.arange(len(batch.lookup)), batch.read()
    seen: dict[str, Tensor] = {}

    def forward(delta_d: Tensor) -> Tensor:
        def add(out: Tensor) -> Tensor:
            shift = torch.zeros(*batch.ids_bt.shape, len(delta_d), dtype=out.dtype, device=out.device)
            shift[rows, batch.lookup] = delta_d.to(out)
            return out + shift.view(out.shape)

        def keep(out: Tensor) -> Tensor:
            seen["last"] = out
            return out

        with substitute({lm.parts.mlp_out(layer): add}), substitute({lm.parts.blocks[-1]: keep}):
            body(lm)(batch.ids_bt.to(lm.device), use_cache=False)
        return lm.parts.head(seen.pop("last")[read_rows, positions])

    return forward


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
