"""Causal tracing: which states of a model, put back into a run that forgot the subject, bring the answer back.

All cells (token x layer x site x noise sample) of one prompt are computed in one sweep over the blocks: see sweep.
Knows one prompt at a time. Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2; indices from 0 as in the released code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engram.errors import EditFileError, FactError, NonFiniteError
from engram.facts import Occurrence, subject_starts, token_span
from engram.language_model import LanguageModel
from engram.locate.corruption import draw_noise
from engram.locate.sweep import Cell, Runs, Site, chunks, sweep, whole
from engram.replay import Engine, use_replay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES: tuple[Site, ...] = ("residual", "mlp", "attention")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CausalTrace:
    """What one prompt's causal trace found.

    Attributes:
        scores: site -> [tokens, layers] float32, probability of `answer` with that state restored, mean over noise samples.
            For "mlp" and "attention" a column is the centre of a window of layers.
        low_score, high_score: the same probability in the corrupted and in the clean run.
        answer: the scored text, with its leading space.
        tokens: the prompt's tokens, one a row of `scores`.
        positions: where in the prompt each row stands.
        subject_range: [first, last + 1) token of the subject's first (or chosen) place in the prompt.
        corrupted: all tokens that got noise.
    """

    prompt: str
    subject: str
    answer: str
    tokens: list[str]
    positions: list[int]
    subject_range: tuple[int, int]
    corrupted: list[int]
    scores: dict[Site, Tensor]
    low_score: float
    high_score: float
    window: int
    samples: int
    model: str

    def effects(self, site: Site) -> Tensor:
        """Indirect effects [tokens, layers]: restored minus corrupted probability."""
        return self.scores[site] - self.low_score

    def best(self, site: Site) -> tuple[int, int]:
        """(token, layer) of the largest effect."""
        at = int(self.scores[site].argmax())
        return divmod(at, self.scores[site].shape[1])

    def labels(self) -> list[str]:
        """The tokens as shown: a star behind those that got noise."""
        return [t + "*" * (at in self.corrupted) for at, t in zip(self.positions, self.tokens, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it; `scores` are lists of rows."""
        return {**vars(self), "scores": {site: table.tolist() for site, table in self.scores.items()}}

    def plot(self, site: Site | None = None) -> Figure:
        """The paper's heat maps: all sites side by side, or one of them."""
        from engram.plots import plot_trace

        return plot_trace(self, site)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file; scores are tensors, everything else is in its header."""
        about = {k: v for k, v in vars(self).items() if k != "scores"}
        save_file({k: v.contiguous() for k, v in self.scores.items()}, path, {"engram.trace": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """Read what `save` wrote.

        Raises:
            EditFileError: not such a file.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {})["engram.trace"])
                scores = {site: file.get_tensor(site) for site in SITES if site in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise EditFileError(
                f"{str(path)!r} is not a saved causal trace ({error}); make one with CausalTrace.save"
            ) from error
        return cls(**{**about, "subject_range": tuple(about["subject_range"])}, scores=scores)


def usual_window(n_layers: int) -> int:
    """10 layers as in the paper, a third of the model where that is fewer: a window over all layers shows nothing."""
    return min(10, max(1, round(n_layers / 3)))


def window_layers(centre: int, window: int, n_layers: int, align: Literal["code", "paper"] = "code") -> tuple[int, int]:
    """Layers [first, last + 1) of the window shown at `centre`, clipped at the ends of the model.

    "code" is what the authors released: 10 layers from centre - 5 to centre + 4; "paper" prints the interval one higher.
    """
    shift = 0 if align == "code" else 1
    first, end = centre - window // 2 + shift, centre + math.ceil(window / 2) + shift
    return min(max(0, first), n_layers - 1), max(1, min(n_layers, end))


def causal_trace(
    lm: LanguageModel,
    prompt: str,
    *,
    subject: str,
    target: str | None = None,
    sites: Sequence[Site] = SITES,
    window: int = 10,
    window_align: Literal["code", "paper"] = "code",
    samples: int = 10,
    seed: int = 1,
    noise: str | float | Tensor = "s3",
    noise_subjects: Sequence[str] | None = None,
    replace: bool = False,
    occurrence: Occurrence = "first",
    positions: Literal["all", "subject_last"] = "all",
    rows_per_chunk: int | None = None,
    engine: Engine = "auto",
    progress: Progress | None = None,
) -> CausalTrace:
    """Find which states carry a fact: corrupt the subject, restore one state at a time, watch the answer.

    Args:
        prompt: text up to the object, e.g. "The Space Needle is located in the city of".
        subject: words of the prompt whose embeddings get the noise.
        target: the scored text; default: the model's own most probable next token. Several tokens are scored as a whole.
        sites: "residual" single states, "mlp" and "attention" windows of layers.
        window: layers restored together at "mlp" and "attention"; `window_align` see `window_layers`.
        samples, seed: noise draws, averaged over; the same seed gives the same bytes.
        noise: a rule (see `corruption.draw_noise`) or a tensor [samples, subject tokens, d] that is added as it is.
        noise_subjects: whose embeddings the rules are measured on.
        replace: put the noise in the embeddings' place instead of adding it.
        occurrence: which place of the subject is corrupted, where it occurs several times.
        positions: restore at all tokens, or at the subject's last token only (one row).
        rows_per_chunk: rows computed at once, which bounds memory; default: what fits in about half a gigabyte.
        engine: "replay", "whole" forward passes, or by itself whichever gives the model's own numbers fastest.
        progress: called with (cells done, cells in all).
    Raises:
        FactError: subject not in the prompt or lost by the tokenizer, empty target, noise of a wrong shape.
        NonFiniteError: the model's probabilities are not finite.
    Source: Meng et al. 2022, Sec. 2.2 and Appendix B; noise as in the released code.
    """
    if window < 1 or samples < 1:
        raise FactError(f"window={window}, samples={samples}: both have to be at least 1")
    encoding = lm.encode(prompt)
    starts = subject_starts(prompt, subject, occurrence)
    spans = [token_span(encoding.offsets, at, at + len(subject)) for at in starts]
    corrupted = [i for b, e in spans for i in range(b, e)]
    if not isinstance(noise, Tensor):
        noise = draw_noise(lm, noise, (samples, len(corrupted)), seed, noise_subjects)
    if noise.dim() != 3 or noise.shape[1] != len(corrupted):
        raise FactError(
            f"noise has shape {tuple(noise.shape)}, expected [samples, {len(corrupted)} subject tokens, d_model] for {subject!r}"
        )
    tail = lm.target_ids(prompt, target) if target is not None else []
    run = Runs(lm, encoding.ids, tail, corrupted, noise, replace)

    tokens = [spans[0][1] - 1] if positions == "subject_last" else list(range(len(encoding.ids)))
    cells = [
        Cell(site, token, column, *_layers(site, column, window, lm.n_layers, window_align))
        for token in tokens
        for site in sites
        for column in range(lm.n_layers)
    ]
    scores = {site: torch.full((len(tokens), lm.n_layers), run.low_score) for site in sites}
    alive = [cell for cell in cells if run.can_matter(cell)]
    score = sweep if use_replay(lm, engine) else whole
    done = 0
    for chunk in chunks(lm, alive, run, rows_per_chunk):
        for cell, probability in zip(chunk, score(run, chunk), strict=True):
            scores[cell.site][tokens.index(cell.token), cell.column] = probability
        done += len(chunk)
        if progress is not None:
            progress(done, len(alive))
    if not all(torch.isfinite(table).all() for table in scores.values()):
        raise NonFiniteError(f"{lm.name} gives probabilities that are not finite on {prompt!r}; try dtype=torch.float32")
    shown = lm.token_strings(encoding.ids)
    return CausalTrace(
        prompt, subject, str(lm.tokenizer.decode(run.answer)), [shown[i] for i in tokens], tokens, spans[0], corrupted,
        scores, run.low_score, run.high_score, window, run.samples, lm.name,
    )  # fmt: skip


def _layers(site: Site, column: int, window: int, n_layers: int, align: Literal["code", "paper"]) -> tuple[int, int]:
    return (column, column + 1) if site == "residual" else window_layers(column, window, n_layers, align)
