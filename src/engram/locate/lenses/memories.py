"""MLP memories: which neurons fire on a text, and which tokens each of them promotes.

An MLP's output is a sum over its neurons, sum_n c_n v_n, and a bias where it has one: the
coefficient c_n, input of the MLP's last matrix, says how strongly neuron n fires; its value vector
v_n, a column of that matrix, is what it then writes into the residual stream. Read through the
unembedding, v_n promotes some tokens and suppresses others. Knows one layer and one position at a
time.

Sources: Geva et al. 2021, arXiv:2012.14913 (key-value memories); Geva et al. 2022, arXiv:2203.14680
    (promoted concepts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.checks import checked_call, position_in
from engram.engine.recording import base_model
from engram.errors import SettingError
from engram.locate.lenses.vocabulary import require_causal, require_finite
from engram.model.language_model import LanguageModel
from engram.modules.hooks import record
from engram.modules.weights import as_linear, linear_shape
from engram.plots.words import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scored = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ValueVector:
    """What one MLP neuron promotes, whatever the text.

    Attributes:
        length: Euclidean norm of the value vector.
        norm: whether scores are seen through the model's last norm, see `promotes`.
        promotes, suppresses: (token, score), the furthest first.
    """

    layer: int
    neuron: int
    length: float
    norm: bool
    promotes: Scored
    suppresses: Scored

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, neuron {self.neuron}\n  promotes    {words(self.promotes)}\n"
            f"  suppresses  {words(self.suppresses)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Memory:
    """A neuron that fires.

    Attributes:
        coefficient: input of the MLP's last matrix at this position; its sign decides whether the
            value vector is added or subtracted.
        strength: |coefficient| x length of the value vector: how far it moves the residual stream
            (before an output norm).
        share: strength as a part of the sum over all neurons of the layer.
        value: the tokens that it promotes and suppresses.
    """

    coefficient: float
    strength: float
    share: float
    value: ValueVector

    @property
    def pushes(self) -> Scored:
        """The tokens made more probable here: those promoted, or, where the coefficient is
        negative, those suppressed.
        """
        if self.coefficient >= 0:
            return self.value.promotes
        return tuple((token, -score) for token, score in self.value.suppresses)


@dataclass(frozen=True)
class Memories:
    """The neurons that fire at one layer and position of a text, strongest first.

    Attributes:
        position: of the token, counted from the text's start.
        output_norm: the family normalises the MLP's output before it joins the residual stream
            (Gemma 2, OLMo 2); value vectors, strengths and promoted tokens are those before that
            norm.
    """

    text: str
    model: str
    layer: int
    position: int
    token: str
    output_norm: bool
    neurons: tuple[Memory, ...]

    def __str__(self) -> str:
        lines = [
            f"layer {self.layer} at token {self.token!r} (position {self.position})" + self.note()
        ]
        lines.append(
            f"{'neuron':>7} {'coefficient':>11} {'strength':>8} {'share':>6}  pushes towards"
        )
        for neuron in self.neurons:
            lines.append(
                f"{neuron.value.neuron:>7} {neuron.coefficient:>11.3f} {neuron.strength:>8.2f} "
                f"{neuron.share:>6.1%}  {words(neuron.pushes)}"
            )
        return "\n".join(lines)

    def note(self) -> str:
        """Return what a reader has to know about the numbers; "" if nothing."""
        return ", before the norm of the MLP's output" if self.output_norm else ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return asdict(self)

    def plot(self) -> Figure:
        """Draw a bar for each neuron, its strength with the coefficient's sign, and next to it the
        seven tokens that it makes more probable.
        """
        from engram.plots.lenses import plot_memories

        return plot_memories(
            {m.value.neuron: math.copysign(m.strength, m.coefficient) for m in self.neurons},
            [[token for token, _ in m.pushes[:7]] for m in self.neurons],
            title=f"at token {self.token!r}{self.note()}",
            y_label=f"neuron of layer {self.layer}",
            heading=(
                shorten(self.text, 300),
                f"{PurePath(self.model).name}: neurons that fire, and what they promote",
            ),
        )


@checked_call
@torch.no_grad()
def memories(
    lm: LanguageModel,
    text: str,
    layer: int,
    position: int = -1,
    *,
    neurons: int = 10,
    k: int = 10,
    norm: bool = True,
) -> Memories:
    """Return the neurons that fire most strongly at one layer and position, and the tokens they
    promote.

    Args:
        layer: block, from 0.
        position: token of the text, from 0; negative ones count from the end.
        neurons: number to return, ranked by |coefficient| x length of the value vector, as in
            Geva et al. 2022.
        k, norm: see `promotes`.
    Raises:
        SettingError: a position that the text does not have, neurons or k out of range.
        UnsupportedModelError: a mixture of experts, a layer that does not exist, a model that is
            not causal.
        NonFiniteError: the model's states are not finite.

    Example:
        >>> firing = engram.memories(lm, fact.prompt_text, layer=1, neurons=3)
        >>> [neuron.strength > 0 for neuron in firing.neurons]
        [True, True, True]
    """
    require_causal(lm, "engram.memories")
    name, weight_df = lm.parts.mlp_out_name(layer), as_linear(lm.parts.mlp_out(layer))
    ids = lm.encode(text).ids
    at = position_in(position, len(ids))
    if not 1 <= neurons <= weight_df.shape[1]:
        raise SettingError(
            f"neurons={neurons}: the number to show, from 1 to the layer's {weight_df.shape[1]}"
        )
    # stops there: the blocks above are not run
    with record(lm.model, inputs=[name], stop=True) as seen:
        base_model(lm)(torch.tensor([ids], device=lm.device), use_cache=False)
    coefficient_f = seen[name].reshape(len(ids), -1)[at]
    require_finite(lm, text, coefficient_f)
    # in float64: in half precision the sum over all neurons, for shares, would overflow or round
    strength_f = coefficient_f.double().abs() * weight_df.double().norm(dim=0).to(
        coefficient_f.device
    )
    # by coefficient times length: a neuron that fires strongly may write a tiny vector
    best = strength_f.topk(neurons)
    firing = [
        Memory(
            float(coefficient_f[value.neuron]),
            strength,
            strength / float(strength_f.sum().clamp(min=1e-30)),
            value,
        )
        for strength, value in zip(
            best.values.tolist(), _values(lm, layer, best.indices.tolist(), k, norm), strict=True
        )
    ]
    # a family that norms the MLP's output has that norm as its "mlp" module, without the matrix
    inside = any(module is lm.parts.mlp_out(layer) for module in lm.parts.mlp(layer).modules())
    return Memories(
        text, lm.name, layer, at, lm.token_strings(ids[at : at + 1])[0], not inside, tuple(firing)
    )


@checked_call
@torch.no_grad()
def promotes(
    lm: LanguageModel, layer: int, neuron: int, k: int = 10, *, norm: bool = True
) -> ValueVector:
    """Return the tokens that one neuron's value vector promotes and suppresses; no text is needed.

    With U the unembedding and v the value vector, scores are
        norm=False: U v, as in Geva et al. 2022;
        norm=True:  U (N(v) - N(0)), N the model's last norm.
    A norm centres (if it does), divides by a size and multiplies by its scale g, so the second is
    U (g * centred v) up to a positive factor: the order in which a small step along v moves the
    logits of the last state, whatever that state is. Scores are those of v alone, scaled to the
    norm's size.
    Neither adds the unembedding's bias, a family's scaling or soft cap of logits. Where a family
    normalises the MLP's output (Gemma 2, OLMo 2), v is read as it is before that norm.

    Args:
        layer, neuron: block and column of its MLP output matrix, both from 0.
        k: number of tokens at each end.
    Raises:
        SettingError: k or the neuron out of range.
        UnsupportedModelError: a mixture of experts, a layer that does not exist, a model that is
            not causal.

    Example:
        >>> value = engram.promotes(lm, layer=1, neuron=0, k=5)
        >>> len(value.promotes), len(value.suppresses)
        (5, 5)
    """
    require_causal(lm, "engram.promotes")
    width = linear_shape(lm.parts.mlp_out(layer))[1]
    if not 0 <= neuron < width:
        raise SettingError(
            f"neuron={neuron} does not exist; layer {layer} has neurons 0 to {width - 1}"
        )
    return _values(lm, layer, [neuron], k, norm)[0]


def vocabulary_scores(lm: LanguageModel, vectors_nd: Tensor, *, norm: bool = True) -> Tensor:
    """Return scores of the vocabulary for vectors of the residual stream, [n, v], float32 or
    better, by the formulas of `promotes`.
    """
    if norm and lm.parts.norm is not None:
        # N(0) is the norm's bias alone: it would promote the same tokens for every neuron
        vectors_nd = lm.parts.norm(vectors_nd) - lm.parts.norm(torch.zeros_like(vectors_nd[:1]))
    # between the stream and a narrower embedding, as in OPT 350M
    if lm.parts.project_out is not None:
        vectors_nd = lm.parts.project_out(vectors_nd)
    weight_vd = lm.parts.unembedding.weight
    scores = vectors_nd.to(weight_vd.device) @ weight_vd.T  # type: ignore[arg-type, operator]
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _values(
    lm: LanguageModel, layer: int, neurons: Sequence[int], k: int, norm: bool
) -> list[ValueVector]:
    # columns of (out, in), however the checkpoint stores it: GPT-2 has the transpose
    vectors_nd = as_linear(lm.parts.mlp_out(layer))[:, list(neurons)].T
    scores_nv = vocabulary_scores(lm, vectors_nd, norm=norm)
    if not 1 <= k <= scores_nv.shape[1]:
        raise SettingError(
            f"k={k}: the number of tokens to show, from 1 to the vocabulary's {scores_nv.shape[1]}"
        )
    lengths = vectors_nd.double().norm(dim=1).tolist()
    high, low = (scores_nv.topk(k, -1, largest=largest) for largest in (True, False))

    def named(best: torch.return_types.topk, row: int) -> Scored:
        return tuple(
            zip(
                lm.token_strings(best.indices[row].tolist()), best.values[row].tolist(), strict=True
            )
        )

    return [
        ValueVector(layer, neuron, lengths[row], norm, named(high, row), named(low, row))
        for row, neuron in enumerate(neurons)
    ]


def words(scored: Scored) -> str:
    """Return the first eight tokens of a list as one line."""
    # repr shows a line break as \n, which would break the table; its quotes are cut off
    return " ".join(repr(token.strip() or token)[1:-1] for token, _ in scored[:8])
