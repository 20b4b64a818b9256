"""What a causal trace asks: which states are replaced, by what, in which run, and what is read at
the end.

Knows the settings and which of them go together. Refuses to know models but for their number of
layers and heads: `tables` turns the settings into the list of patches that the engines compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from engram.checks import did_you_mean, one_of
from engram.engine.replayable import Engine
from engram.errors import SettingError
from engram.facts import Occurrence

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel

Corruption = Literal["noise", "zeros", "mean", "subject"]
Direction = Literal["denoise", "noise"]
Effect = Literal["indirect", "direct"]
Metric = Literal["probability", "log_probability", "logit_difference"]
Method = Literal["exact", "attribution"]
Correction = Literal["none", "query-key"]
Align = Literal["code", "paper"]

SITES = ("residual", "mlp", "attention")  # of the paper's figures
WINDOWED = ("mlp", "attention")  # restored in several layers together
PARTS = ("head", "neuron")  # channels of a matrix's input rather than a module's output


@dataclass(frozen=True)
class TraceConfig:
    """The settings of `engram.trace` and `engram.average_trace`.

    Args:
        sites: what is replaced at a token. "residual": a block's output. "mlp", "attention": what
            they add to the residual stream, in a window of layers. "head": one attention head's
            output before the heads are mixed. "neuron": one entry of the MLP output matrix's input,
            see `neurons`. Some families have more, such as Mamba's "mixer".
            Default: residual, MLP and attention, as far as the family has them.
        neurons: the (layer, index) pairs of "neuron".
        window: layers replaced together at "mlp" and "attention"; default: 10, or a third of a
            smaller model.
        window_align: see `window_layers`.
        corruption: what happens to the subject. "noise" on its embeddings; "zeros" or the "mean"
            embedding of known subjects in their place; another "subject" of as many tokens in the
            prompt (the symmetric intervention).
        noise: a rule (see `corruption.Corruptor`), or a tensor [samples, corrupted tokens, d] that
            is added as it is.
        noise_subjects: whose embeddings the rules and the mean are measured on; default: the
            bundled fact table's.
        replace: put the noise in the embeddings' place instead of adding it.
        samples, seed: noise draws, averaged over; the same seed gives the same bytes.
        extra_tokens: tokens behind the subject that are corrupted too.
        occurrence: which place of the subject is corrupted, where it occurs several times.
        direction: "denoise" puts clean states into the corrupted run (is this state sufficient?),
            "noise" puts corrupted states into the clean run (is it necessary?).
        effect: "indirect": what changes when the state alone is replaced. "direct": what changes
            when everything but the state is, the input being the other run's and the state held
            where it was. With total effect TE, in either direction, TE = direct effect - the
            opposite direction's indirect effect.
        metric: what is read: the answer's "probability", its "log_probability" (nats), or the
            "logit_difference" between the first tokens of the answer and of `foil`; each averaged
            over samples.
        positions: tokens at which states are replaced: "all", the subject's last, the prompt's
            "last", or their numbers.
        severed: modules whose outputs at that token are frozen, in all layers, to those of the run
            that is patched: "mlp", "attention" or both, one more table for each.
        frozen_noise: noise [samples, tokens, d] of the run that the frozen outputs are taken from;
            default: the same noise. The released code froze outputs of another draw.
        method: "exact", or "attribution": a first-order estimate of every effect from one backward
            pass.
        correction: "query-key": recompute the next block's attention weights in the estimate of
            residual states, where the softmax is far from linear.
        screen: estimate everything, then compute so many of the most promising cells exactly.
        rows_per_batch: rows computed at once, which bounds memory; default: what fits in about half
            a gigabyte.
        engine: "replay", "whole" forward passes, or by itself whichever gives the model's own
            numbers fastest.
    Raises:
        SettingError: a value that does not exist, or a combination that means nothing; the message
            says why.
    Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2 and Appendix B; direct and indirect effects
        of Pearl 2001, as in Vig et al. 2020, arXiv:2004.12265, and Finlayson et al. 2021,
        arXiv:2106.06087; paired prompts and noising in Zhang & Nanda 2024, arXiv:2309.16042;
        attribution in Nanda 2023 and Kramár et al. 2024, arXiv:2403.00745.
    """

    sites: str | Sequence[str] | None = None
    neurons: Sequence[tuple[int, int]] = ()
    window: int | None = None
    window_align: Align = "code"
    corruption: Corruption = "noise"
    noise: str | float | Tensor = "s3"
    noise_subjects: Sequence[str] | None = None
    replace: bool = False
    samples: int = 10
    seed: int = 1
    extra_tokens: int = 0
    occurrence: Occurrence = "first"
    direction: Direction = "denoise"
    effect: Effect = "indirect"
    metric: Metric = "probability"
    positions: str | Sequence[int] = "all"
    severed: str | Sequence[str] = ()
    frozen_noise: Tensor | None = None
    method: Method = "exact"
    correction: Correction = "none"
    screen: int | None = None
    rows_per_batch: int | None = None
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", (self.sites,))
        object.__setattr__(
            self,
            "severed",
            (self.severed,) if isinstance(self.severed, str) else tuple(self.severed),
        )
        object.__setattr__(
            self, "neurons", tuple((int(layer), int(index)) for layer, index in self.neurons)
        )
        for name, kind in _CHOICES.items():
            one_of(name, getattr(self, name), get_args(kind))
        if (
            (self.window is not None and self.window < 1)
            or self.samples < 1
            or self.extra_tokens < 0
        ):
            raise SettingError(
                f"window={self.window}, samples={self.samples}, extra_tokens={self.extra_tokens}: window and samples have to "
                "be at least 1, extra_tokens at least 0"
            )
        if self.rows_per_batch is not None and self.rows_per_batch < 1:
            raise SettingError(
                f"rows_per_batch={self.rows_per_batch}: at least one row is computed at a time"
            )
        named = (
            self.positions in ("all", "subject_last", "last")
            if isinstance(self.positions, str)
            else False
        )
        if not named and (
            isinstance(self.positions, str) or not isinstance(self.positions, Sequence)
        ):
            raise SettingError(
                f"positions={self.positions!r} does not exist; expected 'all', 'subject_last', 'last' or token numbers"
            )
        for problem, reason in self._invalid_combinations():
            if problem:
                raise SettingError(reason)

    def _invalid_combinations(self) -> list[tuple[bool, str]]:
        sites, severed = SITES if self.sites is None else tuple(self.sites), self.severed
        unknown = [name for name in severed if name not in WINDOWED]
        own = [
            name for name in severed if name in sites or (name == "attention" and "head" in sites)
        ]
        own += ["mlp"] if "mlp" in severed and "neuron" in sites else []
        return [
            (not sites, "sites is empty: name at least one, such as 'residual'"),
            (
                bool(unknown),
                f"severed={unknown} cannot be severed; expected 'mlp', 'attention' or both",
            ),
            (
                bool(severed) and self.sites is not None and bool(own),
                f"severed={list(severed)} freezes what sites={list(sites)} replaces: the same output cannot be both. Sever "
                "the other module, or trace sites=['residual']",
            ),
            (
                bool(severed) and self.sites is None,
                "severed needs sites without the severed module; say sites=['residual'], as in the paper",
            ),
            (
                bool(severed) and self.effect == "direct",
                "severed with effect='direct': a direct effect already blocks the path through the state; freezing modules "
                "behind it blocks part of what is measured. Use effect='indirect'",
            ),
            (
                bool(severed) and self.estimates,
                "severed paths have no first-order estimate here; use method='exact' without screen",
            ),
            (
                self.frozen_noise is not None
                and (not severed or self.corruption != "noise" or self.direction != "denoise"),
                "frozen_noise is the noise of the run that severed modules are frozen to: it needs severed=..., "
                "corruption='noise' and direction='denoise'",
            ),
            (
                self.replace and self.corruption != "noise",
                f"replace=True speaks of noise, but corruption={self.corruption!r} replaces the embeddings anyway",
            ),
            (
                self.extra_tokens > 0 and self.corruption == "subject",
                "extra_tokens with corruption='subject': the other prompt differs in the subject alone",
            ),
            (
                ("neuron" in sites) != bool(self.neurons),
                "sites=['neuron'] and neurons=[(layer, index), ...] go together: a model has too many to trace them all",
            ),
            (
                self.screen is not None and (self.method == "attribution" or self.screen < 1),
                f"screen={self.screen} computes so many cells exactly (at least 1), method='attribution' none: choose one",
            ),
            (
                self.correction != "none" and not self.estimates,
                "correction belongs to estimates; use it with method='attribution' or screen=...",
            ),
            (
                self.correction != "none" and "residual" not in sites,
                "correction='query-key' corrects estimates of residual states; trace sites=['residual'] among others",
            ),
        ]

    @classmethod
    def of(cls, **settings: Any) -> TraceConfig:
        """From keyword settings.

        Raises:
            SettingError: a setting that does not exist, with the nearest one that does.
        """
        cls.check_names(settings)
        return cls(**settings)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse settings that do not exist.

        Raises:
            SettingError: see `of`.
        """
        known = [field.name for field in fields(cls)]
        for name in names:
            if name not in known:
                raise SettingError(
                    f"causal tracing has no setting {name!r}{did_you_mean(name, known)}; "
                    f"settings: {', '.join(known)}"
                )

    @property
    def estimates(self) -> bool:
        """Whether cells are estimated by attribution, all of them or before a screen."""
        return self.method == "attribution" or self.screen is not None

    @property
    def replaces(self) -> bool:
        """Whether subject embeddings are replaced, rather than added to."""
        return self.replace or self.corruption in ("zeros", "mean")

    @property
    def inserts_corrupted(self) -> bool:
        """Whether corrupted states go into the clean run, rather than clean ones into the corrupted
        run.
        """
        return (self.direction == "noise") != (self.effect == "direct")


_CHOICES: dict[str, Any] = {
    "window_align": Align,
    "corruption": Corruption,
    "occurrence": Occurrence,
    "direction": Direction,
    "effect": Effect,
    "metric": Metric,
    "method": Method,
    "correction": Correction,
    "engine": Engine,
}


@dataclass(frozen=True)
class Patch:
    """The states that one cell replaces at its token: `site` in layers [first, end), all channels
    or those of `part`.
    """

    site: str
    first: int
    end: int
    part: tuple[int, int] | None = None
    severed: str | None = None


@dataclass(frozen=True)
class EffectTable:
    """One table of scores: its name, its shape behind the token axis, and its patches in row-major
    order.
    """

    name: str
    shape: tuple[int, ...]
    patches: tuple[Patch, ...]


def default_window(n_layers: int) -> int:
    """10 layers as in the paper, a third of the model where that is fewer: a window over all layers
    shows nothing.
    """
    return min(10, max(1, round(n_layers / 3)))


def window_layers(
    centre: int, window: int, n_layers: int, align: Align = "code"
) -> tuple[int, int]:
    """Layers [first, last + 1) of the window shown at `centre`, clipped at the ends of the model.

    "code" is what the authors released: 10 layers from centre - 5 to centre + 4; "paper" prints the
    interval one higher.
    """
    shift = 0 if align == "code" else 1
    first, end = centre - window // 2 + shift, centre + math.ceil(window / 2) + shift
    return min(max(0, first), n_layers - 1), max(1, min(n_layers, end))


def tables(lm: LanguageModel, config: TraceConfig) -> list[EffectTable]:
    """Every table that the settings ask for; a severed one is named after both, such as "residual,
    mlp severed".

    Raises:
        UnsupportedModelError: a site that the family does not have, a layer that the model does not
            have.
        SettingError: a neuron that the layer does not have.
    """
    sites = config.sites or [site for site in lm.parts.site_names() if site not in PARTS]
    found = []
    for site in sites:
        for severed in (None, *config.severed):
            patches, shape = _patches(lm, config, site)
            if severed:
                patches = [Patch(p.site, p.first, p.end, p.part, severed) for p in patches]
            found.append(
                EffectTable(
                    f"{site}, {severed} severed" if severed else site, shape, tuple(patches)
                )
            )
    return found


def _patches(
    lm: LanguageModel, config: TraceConfig, site: str
) -> tuple[list[Patch], tuple[int, ...]]:
    n_layers = lm.n_layers
    if site == "head":
        width = lm.parts.head_width(0)
        heads = range(lm.parts.n_heads)
        return [
            Patch(site, layer, layer + 1, (h * width, (h + 1) * width))
            for layer in range(n_layers)
            for h in heads
        ], (n_layers, len(heads))
    if site == "neuron":
        for layer, index in config.neurons:
            d_ff = lm.parts.mlp_width(layer)
            if not 0 <= index < d_ff:
                raise SettingError(
                    f"neuron {index} of layer {layer} does not exist; there are {d_ff}, from 0"
                )
        return [Patch(site, layer, layer + 1, (i, i + 1)) for layer, i in config.neurons], (
            len(config.neurons),
        )
    if site not in WINDOWED:
        return [Patch(site, layer, layer + 1) for layer in range(n_layers)], (n_layers,)
    window = config.window or default_window(n_layers)
    return [
        Patch(site, *window_layers(c, window, n_layers, config.window_align))
        for c in range(n_layers)
    ], (n_layers,)
