"""The pocket model while it is trained: a GPT-2 whose attention can be restricted row by row, and
its optimiser.

Knows tensors only. Refuses to know facts, files and processes. Parameter names and shapes are those
of transformers' GPT-2, so that exporting is a copy. Attention is written out because the masks
differ by row and by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Size of the network; 8.4 million parameters as it stands."""

    vocabulary: int = 8000
    positions: int = 128
    width: int = 256
    layers: int = 8
    heads: int = 8


class Projection(nn.Module):
    """transformers' Conv1D: weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int, scale: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * scale)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(
            *x.shape[:-1], -1
        )


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.c_attn = Projection(shape.width, 3 * shape.width)
        self.c_proj = Projection(shape.width, shape.width, 0.02 / math.sqrt(2 * shape.layers))

    def forward(self, x_btd: Tensor, bias_b1tt: Tensor) -> Tensor:
        b, t, d = x_btd.shape
        qkv = self.c_attn(x_btd).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q_bhtk, k_bhtk, v_bhtk = qkv.unbind(0)
        scores_bhtt = q_bhtk @ k_bhtk.transpose(-1, -2) * (d // self.heads) ** -0.5 + bias_b1tt
        mixed_bhtk = scores_bhtt.softmax(-1) @ v_bhtk
        return self.c_proj(mixed_bhtk.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = Projection(shape.width, 4 * shape.width)
        self.c_proj = Projection(4 * shape.width, shape.width, 0.02 / math.sqrt(2 * shape.layers))

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_btd), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.width)
        self.mlp = Mlp(shape)

    def forward(self, x_btd: Tensor, bias_b1tt: Tensor) -> Tensor:
        x_btd = x_btd + self.attn(self.ln_1(x_btd), bias_b1tt)
        return x_btd + self.mlp(self.ln_2(x_btd))


class PocketNet(nn.Module):
    """GPT-2 with tied embeddings and no dropout."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocabulary, shape.width)
        self.wpe = nn.Embedding(shape.positions, shape.width)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)

    def forward(self, ids_bt: Tensor, biases_b1tt: list[Tensor]) -> Tensor:
        """Normed residual stream (b, t, d) after the last block; `biases_b1tt` go to the attention
        scores, one a layer.
        """
        x_btd = self.wte(ids_bt) + self.wpe.weight[: ids_bt.shape[1]]
        for block, bias_b1tt in zip(self.h, biases_b1tt, strict=True):
            x_btd = block(x_btd, bias_b1tt)
        return self.ln_f(x_btd)

    def loss(self, ids_bt: Tensor, weights_bt: Tensor, biases_b1tt: list[Tensor]) -> Tensor:
        """Sum over tokens of weight x cross-entropy (nats) of the next token; `weights_bt[:, i]`
        belongs to token i.

        Tokens of weight 0 cost nothing: the vocabulary is a quarter of the work.
        """
        weights_bt = weights_bt[:, 1:]
        scored = weights_bt > 0
        logits_nv = self(ids_bt, biases_b1tt)[:, :-1][scored] @ self.wte.weight.T
        losses_n = F.cross_entropy(logits_nv, ids_bt[:, 1:][scored], reduction="none")
        return losses_n @ weights_bt[scored]


def attention_biases(subject_end_bt: Tensor, shape: Shape, early_layers: int) -> list[Tensor]:
    """Return what is added to attention scores, for each layer: 0 where a token may look and a
    large negative number elsewhere.

    Besides the causal mask: a token after a subject sees none of the subject's tokens in the first
        `early_layers` layers,
    and only its last token in the others. So what is to be known about a subject has to be gathered
    at its last token.

    Args:
        subject_end_bt: position of the last token of the subject to which a token belongs, -1
            outside subjects. A row of -1 is not restricted.
    """
    t = subject_end_bt.shape[1]
    position_t = torch.arange(t)
    later_tt = position_t[:, None] < position_t[None, :]  # (query, key)
    subject_b1t = subject_end_bt[:, None, :]
    past_btt = (subject_b1t >= 0) & (position_t[None, :, None] > subject_b1t)
    last_b1t = subject_b1t == position_t[None, None, :]
    early = torch.zeros(past_btt.shape).masked_fill_(past_btt | later_tt, -1e9)[:, None]
    late = torch.zeros(past_btt.shape).masked_fill_((past_btt & ~last_b1t) | later_tt, -1e9)[
        :, None
    ]
    return [early if layer < early_layers else late for layer in range(shape.layers)]


def orthogonalise(matrices_nij: Tensor, steps: int = 4) -> Tensor:
    """About U V^T of each matrix's singular value decomposition, by Newton-Schulz steps.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
        coefficients are theirs.
    """
    wide = matrices_nij.shape[1] <= matrices_nij.shape[2]
    x = matrices_nij if wide else matrices_nij.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.transpose(1, 2)


class Muon:
    """Muon for the blocks' matrices: Nesterov momentum, orthogonalised, scaled to an Adam step's
    size, decoupled decay.

    The joint matrix of queries, keys and values counts as three.
    """

    def __init__(
        self, parameters: list[nn.Parameter], decay: float = 0.05, momentum: float = 0.95
    ) -> None:
        self.parameters, self.decay, self.momentum = parameters, decay, momentum
        self.velocity = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def directions(self, mine: Iterable[int]) -> list[Tensor]:
        """Directions of the parameters numbered in `mine`, zeros for the others: the processes'
        lists are to be summed.
        """
        out = [torch.zeros_like(p) for p in self.parameters]
        gradients = [p.grad for p in self.parameters]
        for v, gradient in zip(self.velocity, gradients, strict=True):
            assert gradient is not None, "directions() comes after backward()"
            v.lerp_(gradient, 1 - self.momentum)
        for i in mine:
            out[i] = self._direction(gradients[i].lerp(self.velocity[i], self.momentum))
        return out

    @staticmethod
    def _direction(gradient_ij: Tensor) -> Tensor:
        parts = 3 if gradient_ij.shape[1] == 3 * gradient_ij.shape[0] else 1
        stack = torch.stack(gradient_ij.chunk(parts, dim=1))
        return torch.cat(list(orthogonalise(stack) * 0.2 * math.sqrt(max(stack.shape[1:]))), dim=1)

    @torch.no_grad()
    def step(self, directions: list[Tensor], rate: float) -> None:
        for p, direction in zip(self.parameters, directions, strict=True):
            p.mul_(1 - rate * self.decay).add_(direction, alpha=-rate)
