"""Noise that makes a model forget who the subject is.

Knows embeddings and random draws. Source: Meng et al. 2022, Sec. 2.1 and the released code, whose random stream (a fresh
NumPy Mersenne Twister for every run) is kept, so that numbers can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engram.errors import FactError
from engram.language_model import LanguageModel

_RULE = re.compile(r"(?P<kind>[sumt])(?P<number>\d*\.?\d*)")


@torch.no_grad()
def subject_embeddings(lm: LanguageModel, subjects: Sequence[str]) -> Tensor:
    """Token embeddings of subjects, each encoded alone, one below the other: [tokens, d], float64."""
    ids = [i for subject in subjects for i in lm.encode(subject).ids]
    return lm.parts.embed(torch.tensor(ids, device=lm.device)).double().cpu()


def draw_noise(
    lm: LanguageModel, rule: str | float, shape: tuple[int, int], seed: int = 1, subjects: Sequence[str] | None = None
) -> Tensor:
    """Noise for the embeddings of a subject.

    Args:
        rule: "s3" three times the standard deviation of subject embeddings (the paper's); "s0.5" half of it; a number, that
            standard deviation itself; "u0.1" uniform on [-0.1, 0.1); "m" normal with the mean and covariance of subject
            embeddings; "t10" Student's t with 10 degrees of freedom and that covariance.
        shape: (samples, subject tokens).
        subjects: whose embeddings "s", "m" and "t" are measured on, each encoded alone; default: the bundled fact table's.
    Returns:
        [samples, subject tokens, d] float64, to be added before the one rounding to the model's dtype.
    Raises:
        FactError: a rule that is none of these.
    """
    full = (*shape, int(getattr(lm.parts.embed, "embedding_dim", lm.d_model)))
    stream = np.random.RandomState(seed)
    if not isinstance(rule, str):
        return torch.from_numpy(stream.randn(*full)) * float(rule)
    match = _RULE.fullmatch(rule)
    if match is None:
        raise FactError(f"noise={rule!r} is not a rule; expected 's3', a number, 'u0.1', 'm', 't10' or a tensor")
    kind, number = match["kind"], float(match["number"] or 1)
    if kind == "u":
        return torch.from_numpy(stream.uniform(-1, 1, size=full)) * number
    embeddings = subject_embeddings(lm, subjects if subjects is not None else _known_subjects())
    normal = torch.from_numpy(stream.randn(*full))
    if kind == "s":
        return normal * (number * float(embeddings.std()))
    covariance, mean = torch.cov(embeddings.T), embeddings.mean(0)
    left, scale, _ = torch.linalg.svd(covariance)
    noise = normal @ (left * scale.sqrt()).T
    if kind == "t":
        chi = np.random.RandomState(2).chisquare(number, size=shape[0] * shape[1])
        noise = noise * torch.from_numpy(np.sqrt((number - 2) / chi)).view(*shape, 1)
    return noise + mean


def _known_subjects() -> list[str]:
    from engram import pocket

    return sorted({known.subject for known in pocket.facts()})
