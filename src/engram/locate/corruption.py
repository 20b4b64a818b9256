"""Corrupting a subject: what its token embeddings become, drawn by the published rules.

Knows embeddings and random streams. Refuses to know the run they go into.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2.1 and Appendix B.4, and the released code, whose
    random stream is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engram.errors import FactError
from engram.locate.settings import TraceConfig
from engram.model.language_model import LanguageModel

_RULE = re.compile(r"(?P<kind>[sut])(?P<number>\d+\.?\d*|\.\d+)?|m")


@torch.no_grad()
def subject_embeddings(lm: LanguageModel, subjects: Sequence[str]) -> Tensor:
    """Token embeddings of subjects, each encoded alone, one below the other: [tokens, d], float64."""
    ids = [i for subject in subjects for i in lm.encode(subject).ids]
    return lm.parts.embed(torch.tensor(ids, device=lm.device)).double().cpu()


class Corruptor:
    """What corrupted subject embeddings are, prepared once for any number of prompts.

    The rules of `noise`: "s3" three times the standard deviation of subject embeddings (the
    paper's); "s0.5" half of it; a number, that standard deviation itself; "u0.1" uniform on [-0.1,
    0.1); "m" normal with the mean and covariance of subject embeddings; "t10" Student's t with 10
    degrees of freedom and that covariance. Every call draws from the start of the
    stream: prompts with equally many subject tokens get the same noise, as in the released code.

    Attributes:
        samples: how many corrupted runs there are: one where nothing is drawn.
    Raises:
        FactError: a rule that is none of these.
    """

    def __init__(self, lm: LanguageModel, config: TraceConfig) -> None:
        self.config, self.seed = config, config.seed
        given = config.noise if config.corruption == "noise" else None
        self.samples = (
            1 if given is None else len(given) if isinstance(given, Tensor) else config.samples
        )
        self.width = int(getattr(lm.parts.embed, "embedding_dim", lm.d_model))
        self.mean, self.root, self.scale = torch.zeros(self.width, dtype=torch.float64), None, 1.0
        self.kind, self.freedom = "s", 0.0
        if isinstance(given, str):
            self._read(lm, given)
        elif given is not None and not isinstance(given, Tensor):
            self.scale = float(given)
        elif config.corruption == "mean":
            self.mean = subject_embeddings(lm, self._subjects()).mean(0)

    def _read(self, lm: LanguageModel, rule: str) -> None:
        match = _RULE.fullmatch(rule)
        if match is None or (match["kind"] in ("u", "t") and match["number"] is None):
            raise FactError(
                f"noise={rule!r} is not a rule; expected 's3', a number, 'u0.1', 'm', 't10' or a tensor"
            )
        self.kind, number = match["kind"] or "m", float(match["number"] or 1)
        if self.kind == "t" and number <= 2:
            raise FactError(
                f"noise={rule!r}: Student's t has a covariance from more than 2 degrees of freedom on"
            )
        if self.kind == "u":
            self.scale = number
            return
        embeddings = subject_embeddings(lm, self._subjects())
        if self.kind == "s":
            self.scale = number * float(embeddings.std())
            return
        left, spread, _ = torch.linalg.svd(torch.cov(embeddings.T))
        self.mean, self.root, self.freedom = embeddings.mean(0), left * spread.sqrt(), number

    def _subjects(self) -> Sequence[str]:
        if self.config.noise_subjects is not None:
            return self.config.noise_subjects
        from engram import pocket

        return sorted({known.subject for known in pocket.facts()})

    def __call__(self, tokens: int) -> Tensor:
        """[samples, tokens, d] float64: to be added before the one rounding to the model's dtype,
        or to replace.

        Raises:
            FactError: noise given as a tensor that has another shape.
        """
        given, shape = self.config.noise, (self.samples, tokens, self.width)
        if self.config.corruption != "noise":
            return self.mean.expand(shape)
        if isinstance(given, Tensor):
            return check_noise("noise", given, shape)
        stream = np.random.RandomState(self.seed)
        if self.kind == "u":
            return torch.from_numpy(stream.uniform(-1, 1, size=shape)) * self.scale
        noise = torch.from_numpy(stream.randn(*shape))
        if self.root is None:
            return noise * self.scale
        noise = noise @ self.root.T
        if self.kind == "t":
            chi = np.random.RandomState(2).chisquare(self.freedom, size=self.samples * tokens)
            noise = noise * torch.from_numpy(np.sqrt((self.freedom - 2) / chi)).view(
                self.samples, tokens, 1
            )
        return noise + self.mean


def check_noise(name: str, noise_snd: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The tensor, if it can be added to the embeddings of [samples, corrupted tokens, d]."""
    if tuple(noise_snd.shape) != shape:
        samples, tokens, width = shape
        raise FactError(
            f"{name} has shape {tuple(noise_snd.shape)}, expected [samples, corrupted tokens, d], here [{samples}, {tokens}, {width}]"
        )
    if not noise_snd.isfinite().all():
        raise FactError(
            f"{name} holds NaN or infinity; give numbers that can be added to embeddings"
        )
    return noise_snd


def draw_noise(
    lm: LanguageModel,
    rule: str | float,
    shape: tuple[int, int],
    seed: int = 1,
    subjects: Sequence[str] | None = None,
) -> Tensor:
    """[samples, subject tokens, d] noise by a rule, see `Corruptor`; `shape` is (samples, subject
    tokens).
    """
    config = TraceConfig(noise=rule, samples=shape[0], seed=seed, noise_subjects=subjects)
    return Corruptor(lm, config)(shape[1])
