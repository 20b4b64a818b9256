"""Attention written out, standing in for transformers' own for the length of a `with` block:
watched, or quick where it is short.

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
    """One block's attention: queries and keys as they meet, one key head a query head.

    Attributes:
        query_bhtk, key_bhtk, value_bhtk: positions already encoded.
        output_bthk: weights times values, before the heads are mixed; in the graph where there is
            one.
        mask: added to the scores, or None.
    """

    query_bhtk: Tensor
    key_bhtk: Tensor
    value_bhtk: Tensor
    output_bthk: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def rows(self, rows_n: Tensor) -> Attention:
        """The same of chosen rows."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows_n]
        q, k, v, out = (
            x.detach()[rows_n]
            for x in (self.query_bhtk, self.key_bhtk, self.value_bhtk, self.output_bthk)
        )
        return Attention(q, k, v, out, mask, self.scaling, self.softcap)

    def scores(self, query_bhtk: Tensor, key_bhtk: Tensor) -> Tensor:
        """[b, h, t, t] what the softmax gets, without the mask."""
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
        """[b, t] change of a metric when position i's query and key are replaced, minus its
        first-order estimate.

        Args:
            gradient_bthk: the metric's gradient with respect to `output_bthk`.
            query_bhtk, key_bhtk: the queries and keys put in, one position at a time; a query meets
                the keys that were there, a key the queries that were.
        Source: Kramár et al. 2024, Sec. 3.1: the weights are computed with the new query or key,
            their effect is linear.
        """
        there = self.scores(self.query_bhtk, self.key_bhtk)
        weights = self._masked(there).softmax(-1)
        gain_bhts = (
            gradient_bthk.transpose(1, 2) @ self.value_bhtk.mT
        )  # metric's gradient with respect to the weights
        mean_bht1 = (weights * gain_bhts).sum(-1, keepdim=True)
        slope = _slope(self.query_bhtk @ self.key_bhtk.mT * self.scaling, self.softcap)

        new = self.scores(query_bhtk, self.key_bhtk)
        exact = (self._masked(new).softmax(-1) * gain_bhts).sum(-1) - mean_bht1[..., 0]
        step = slope * ((query_bhtk - self.query_bhtk) @ self.key_bhtk.mT * self.scaling)
        queries_bht = exact - (weights * (gain_bhts - mean_bht1) * step).sum(-1)

        rise = (
            self.scores(self.query_bhtk, key_bhtk) - there
        )  # of score [j, i] when key i is replaced
        step = slope * (self.query_bhtk @ (key_bhtk - self.key_bhtk).mT * self.scaling)
        growth = torch.expm1(rise.clamp(max=60))  # beyond it the key takes all the weight anyway
        keys_bhji = weights * (gain_bhts - mean_bht1) * (growth / (1 + weights * growth) - step)
        visible = weights > 0
        return (queries_bht + torch.where(visible, keys_bhji, 0).sum(2)).sum(1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _slope(raw: Tensor, softcap: float | None) -> Tensor | float:
    """Derivative of `_capped`."""
    return 1.0 if softcap is None else 1 - torch.tanh(raw / softcap) ** 2


@contextmanager
def capture_attention(lm: LanguageModel) -> Iterator[list[Attention]]:
    """Collect every block's attention, in the order of the calls, during one forward pass of the
    block.

    Raises:
        UnsupportedModelError: the family does not call transformers' attention interface.
    """
    config, seen = lm.model.config, list[Attention]()
    if lm.kind != "causal" or not lm.model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"correction='query-key' has to see queries and keys, and model_type={config.model_type!r} keeps its attention to "
            "itself; use correction='none'"
        )

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if _is_special(options):
            raise UnsupportedModelError(
                f"correction='query-key' knows plain softmax attention, and model_type={config.model_type!r} adds sinks or "
                "biases to it; use correction='none'"
            )
        key, value = _a_head_each(query, key, value)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        output = _attend(query, key, value, mask, scaling, softcap)
        seen.append(Attention(query, key, value, output, mask, scaling, softcap))
        return output.clone(), None

    with _standing_in(lm, attend):
        yield seen


# keys; up to there products of small matrices take a third of the time of PyTorch's fused kernel on
# a CPU
_SHORT = 64


@contextmanager
def short_attention_in_eager(lm: LanguageModel) -> Iterator[None]:
    """Let attention over few keys be written out on a CPU, for the length of the block.

    The same numbers to rounding. A fifth of an average trace's time went into the fused kernel,
    which is made for long texts.
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
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        queries, keys = query.shape[2], key.shape[2]
        if keys > _SHORT or _is_special(options) or options.get("is_causal") is False:
            fused = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return fused(module, query, key, value, attention_mask, scaling=scaling, **options)
        key, value = _a_head_each(query, key, value)
        if attention_mask is None and queries > 1:  # plain causal attention, left to the kernel
            later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            attention_mask = torch.zeros(queries, keys, dtype=query.dtype).masked_fill_(
                later, -torch.inf
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(query, key, value, attention_mask, scaling, options.get("softcap")), None

    with _standing_in(lm, attend):
        yield


def _is_special(options: dict[str, Any]) -> bool:
    """Sinks or biases beside the plain softmax."""
    return options.get("s_aux") is not None or options.get("position_bias") is not None


def _a_head_each(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with one head for each of the query's."""
    groups = query.shape[1] // key.shape[1]
    return (
        (key, value)
        if groups == 1
        else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """[b, t, h, k] weighted values; a mask is added, or says (bool) what may be seen."""
    scores = _capped(query @ key.mT * scaling, softcap)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


@contextmanager
def _standing_in(lm: LanguageModel, attend: Callable[..., Any]) -> Iterator[None]:
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
