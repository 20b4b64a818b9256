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
from engram.locate.settings import SubjectCorruption
from engram.model.language_model import LanguageModel

_RULE = re.compile(r"(?P<kind>[sut])(?P<number>\d+\.?\d*|\.\d+)?|m")


@torch.no_grad()
def subject_embeddings(lm: LanguageModel, subjects: Sequence[str]) -> Tensor:
    """Return token embeddings of subjects, each encoded alone, as rows: [tokens, d], float64."""
    # without the space that a subject has inside a prompt, and repeated ones as often as they come:
    # "s3" is a number of the whole list, and another encoding would give another one
    ids = [i for subject in subjects for i in lm.encode(subject).ids]
    return lm.parts.embed(torch.tensor(ids, device=lm.device)).double().cpu()


class Corruptor:
    """The rule that corrupts subject embeddings, prepared once for any number of prompts.

    The rules of `noise`: "s3" three times the standard deviation of subject embeddings (the
    paper's); "s0.5" half of it; a number, that standard deviation itself; "u0.1" uniform on [-0.1,
    0.1); "m" normal with the mean and covariance of subject embeddings; "t10" Student's t with 10
    degrees of freedom and that covariance. Every call draws from the start of the
    stream: prompts with equally many subject tokens get the same noise, as in the released code.

    Attributes:
        samples: number of corrupted runs; one where nothing is drawn.
    Raises:
        FactError: a rule that is none of these.
    """

    def __init__(self, lm: LanguageModel, config: SubjectCorruption) -> None:
        self.config = config
        given = config.noise if config.corruption == "noise" else None
        self.samples = config.samples
        if given is None:
            self.samples = 1  # nothing is drawn: all runs would be the same
        elif isinstance(given, Tensor):
            self.samples = len(given)
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
                f"noise={rule!r} is not a rule; expected 's3', a number, 'u0.1', 'm', 't10' or a "
                "tensor"
            )
        self.kind, number = match["kind"] or "m", float(match["number"] or 1)
        if self.kind == "t" and number <= 2:
            raise FactError(
                f"noise={rule!r}: Student's t has a covariance only with more than 2 degrees of "
                "freedom"
            )
        if self.kind == "u":
            self.scale = number
            return
        embeddings = subject_embeddings(lm, self._subjects())
        if self.kind == "s":
            # one number over all entries, unbiased; dimensions are not scaled one by one
            self.scale = number * float(embeddings.std())
            return
        # of subjects, as "s3"; the released code measures these two on 1,000 texts of wikitext
        left, spread, _ = torch.linalg.svd(torch.cov(embeddings.T))
        self.mean, self.root, self.freedom = embeddings.mean(0), left * spread.sqrt(), number

    def _subjects(self) -> Sequence[str]:
        if self.config.noise_subjects is not None:
            return self.config.noise_subjects
        from engram import pocket

        return sorted({known.subject for known in pocket.facts()})

    def __call__(self, tokens: int) -> Tensor:
        """Return [samples, tokens, d] float64, to be added to the subject's embeddings or to
        replace them; the caller rounds the sum once, to the model's dtype.

        Raises:
            FactError: noise given as a tensor that has another shape.
        """
        given, shape = self.config.noise, (self.samples, tokens, self.width)
        if self.config.corruption != "noise":
            return self.mean.expand(shape)
        if isinstance(given, Tensor):
            return check_noise("noise", given, shape)
        # numpy's old generator, on the CPU: the only way to get the released code's numbers
        stream = np.random.RandomState(self.config.seed)
        if self.kind == "u":
            return torch.from_numpy(stream.uniform(-1, 1, size=shape)) * self.scale
        noise = torch.from_numpy(stream.randn(*shape))
        if self.root is None:
            return noise * self.scale
        noise = noise @ self.root.T
        if self.kind == "t":
            # Student's t is normal noise over the root of chi-squared / freedom, one draw for each
            # token; here scaled so that its covariance is that of the embeddings. The draws come
            # from a stream of their own, the one after `seed`: with the default seed, 1, that is
            # the released code's, which takes RandomState(2) whatever its seed is.
            factors = np.random.RandomState((self.config.seed + 1) % (1 << 32))
            chi = factors.chisquare(self.freedom, size=self.samples * tokens)
            factor = torch.from_numpy(np.sqrt((self.freedom - 2) / chi))
            noise = noise * factor.view(self.samples, tokens, 1)
        return noise + self.mean


def check_noise(name: str, noise_snd: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the noise if it fits the embeddings of [samples, corrupted tokens, d].

    Raises:
        FactError: another shape, or numbers that are not finite.
    """
    if tuple(noise_snd.shape) != shape:
        samples, tokens, width = shape
        raise FactError(
            f"{name} has shape {tuple(noise_snd.shape)}, expected [samples, corrupted tokens, d], "
            f"here [{samples}, {tokens}, {width}]"
        )
    if not noise_snd.isfinite().all():
        raise FactError(
            f"{name} holds NaN or infinity; give numbers that can be added to embeddings"
        )
    return noise_snd
