"""Attention written out in place of transformers' own for the length of a `with` block: captured,
or quick where it is short.

Works for families that call transformers' attention interface. Refuses to know why queries and keys
are wanted: see attribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engram.errors import UnsupportedModelError
from engram.model.language_model import LanguageModel

_NAME = "engram"


@dataclass(frozen=True)
class Attention:
    """One block's attention: queries and keys as they meet, one key head for each query head.

    Attributes:
        query_bhtk, key_bhtk, value_bhtk: positions already encoded.
        output_bthk: weights times values, before the heads are mixed; in the graph where there is
            one.
        mask: added to the scores, or None.
        scaling: factor of query @ key.
        softcap: bound of the scores (Gemma 2), or None.
    """

    query_bhtk: Tensor
    key_bhtk: Tensor
    value_bhtk: Tensor
    output_bthk: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def rows(self, rows_n: Tensor) -> Attention:
        """Return the same of chosen rows."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows_n]
        q, k, v, out = (
            x.detach()[rows_n]
            for x in (self.query_bhtk, self.key_bhtk, self.value_bhtk, self.output_bthk)
        )
        return Attention(q, k, v, out, mask, self.scaling, self.softcap)

    def scores(self, query_bhtk: Tensor, key_bhtk: Tensor) -> Tensor:
        """Return the input of the softmax without the mask, [b, h, t, t]."""
        return _capped(query_bhtk @ key_bhtk.mT * self.scaling, self.softcap)

    def _masked(self, scores_bhts: Tensor) -> Tensor:
        return (
            scores_bhts
            if self.mask is None
            else scores_bhts + self.mask[..., : scores_bhts.shape[-1]]
        )

    def beyond_first_order(
        self, gradient_bthk: Tensor, query_bhtk: Tensor, key_bhtk: Tensor
    ) -> Tensor:
        """Return the change [b, t] of a metric when position i's query and key are replaced, minus
        its first-order estimate.

        Softmax saturates: where a query already gives a key all its weight, the gradient is near 0
        and the first-order estimate misses what another query would change. So the weights are
        computed again, exactly, and only their effect on the metric is taken as linear.

        Args:
            gradient_bthk: the metric's gradient with respect to `output_bthk`.
            query_bhtk, key_bhtk: the new queries and keys, one position at a time: a new query
                meets the old keys, a new key the old queries.
        Source: Kramár et al. 2024, Sec. 3.1.
        """
        old = self.scores(self.query_bhtk, self.key_bhtk)
        weights = self._masked(old).softmax(-1)
        # the metric's gradient with respect to the weights
        gain_bhts = gradient_bthk.transpose(1, 2) @ self.value_bhtk.mT
        mean_bht1 = (weights * gain_bhts).sum(-1, keepdim=True)
        slope = _slope(self.query_bhtk @ self.key_bhtk.mT * self.scaling, self.softcap)

        new = self.scores(query_bhtk, self.key_bhtk)
        exact = (self._masked(new).softmax(-1) * gain_bhts).sum(-1) - mean_bht1[..., 0]
        step = slope * ((query_bhtk - self.query_bhtk) @ self.key_bhtk.mT * self.scaling)
        queries_bht = exact - (weights * (gain_bhts - mean_bht1) * step).sum(-1)

        rise = self.scores(self.query_bhtk, key_bhtk) - old  # of score [j, i] with another key i
        step = slope * (self.query_bhtk @ (key_bhtk - self.key_bhtk).mT * self.scaling)
        growth = torch.expm1(rise.clamp(max=60))  # above it the key takes all the weight anyway
        keys_bhji = weights * (gain_bhts - mean_bht1) * (growth / (1 + weights * growth) - step)
        visible = weights > 0
        return (queries_bht + torch.where(visible, keys_bhji, 0).sum(2)).sum(1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _slope(raw: Tensor, softcap: float | None) -> Tensor | float:
    """Return the derivative of `_capped`."""
    return 1.0 if softcap is None else 1 - torch.tanh(raw / softcap) ** 2


@contextmanager
def capture_attention(lm: LanguageModel) -> Iterator[list[Attention]]:
    """Collect every block's attention, in the order of the calls, during one forward pass in the
    block.

    Raises:
        UnsupportedModelError: the family does not call transformers' attention interface.
    """
    config, seen = lm.model.config, list[Attention]()
    if lm.kind != "causal" or not lm.model._can_set_attn_implementation():
        raise UnsupportedModelError(
            "correction='query-key' has to see queries and keys, which model_type="
            f"{config.model_type!r} does not hand to transformers' attention interface; use "
            "correction='none'"
        )

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        if _is_special(settings):
            raise UnsupportedModelError(
                "correction='query-key' knows plain softmax attention, and model_type="
                f"{config.model_type!r} adds sinks or biases to it; use correction='none'"
            )
        key, value = _expand_heads(query, key, value)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        softcap = settings.get("softcap")
        output = _attend(query, key, value, mask, scaling, softcap)
        seen.append(Attention(query, key, value, output, mask, scaling, softcap))
        return output.clone(), None

    with _replaced_attention(lm, attend):
        yield seen


# Keys; up to this number products of small matrices take a third of the time of PyTorch's fused
# kernel on a CPU.
_SHORT = 64


@contextmanager
def short_attention_in_eager(lm: LanguageModel) -> Iterator[None]:
    """Write attention over few keys out on a CPU, for the length of the block.

    The same numbers to rounding. A fifth of an average trace's time went into the fused kernel,
    which is built for long texts.
    """
    if (
        lm.device.type != "cpu"
        or lm.model.config._attn_implementation != "sdpa"
        or not lm.model._can_set_attn_implementation()
    ):
        yield
        return

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        queries, keys = query.shape[2], key.shape[2]
        if keys > _SHORT or _is_special(settings) or settings.get("is_causal") is False:
            fused = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return fused(module, query, key, value, attention_mask, scaling=scaling, **settings)
        key, value = _expand_heads(query, key, value)
        if attention_mask is None and queries > 1:  # plain causal attention, left to the kernel
            later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            attention_mask = torch.zeros(queries, keys, dtype=query.dtype).masked_fill_(
                later, -torch.inf
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(query, key, value, attention_mask, scaling, settings.get("softcap")), None

    with _replaced_attention(lm, attend):
        yield


def _is_special(settings: dict[str, Any]) -> bool:
    """Return whether sinks or biases are added to the plain softmax."""
    return settings.get("s_aux") is not None or settings.get("position_bias") is not None


def _expand_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with one head for each of the query's."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Return weighted values [b, t, h, k]; a mask is added, or says (bool) what may be seen."""
    scores = _capped(query @ key.mT * scaling, softcap)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


@contextmanager
def _replaced_attention(lm: LanguageModel, attend: Callable[..., Any]) -> Iterator[None]:
    config = lm.model.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(_NAME, None)
