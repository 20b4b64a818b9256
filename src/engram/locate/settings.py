"""The settings of a causal trace: which states are replaced, by what, in which run, and what is
read at the end.

Knows the settings and which of them go together. Refuses to know models but for their number of
layers and heads: `tables` turns the settings into the list of patches that the engines compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Lt
from torch import Tensor

from engram.checks import Count, Natural, NonNegative, Texts, briefly, check_fields
from engram.engine.precision import Matmul
from engram.engine.replayable import Engine
from engram.errors import SettingError
from engram.facts import Occurrence
from engram.settings import check_names, read

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel

Corruption = Literal["noise", "zeros", "mean", "subject"]
Direction = Literal["denoise", "noise"]
Effect = Literal["indirect", "direct"]
Metric = Literal["probability", "log_probability", "logit_difference"]
TraceMethod = Literal["exact", "attribution"]
Correction = Literal["none", "query-key"]

SITES = ("residual", "mlp", "attention")  # of the paper's figures
# restored in several layers together: in the paper's models one of them changes next to nothing
WINDOWED = ("mlp", "attention")
PARTS = ("head", "neuron")  # channels of a matrix's input rather than a module's output


@dataclass(frozen=True)
class SubjectCorruption:
    """What happens to the subject in the corrupted run.

    Args:
        corruption: "noise" on the subject's embeddings; "zeros" or the "mean" embedding of known
            subjects in their place; another "subject" of as many tokens in the prompt (the
            symmetric intervention).
        noise: a rule (see `corruption.Corruptor`), or a tensor [samples, corrupted tokens, d] that
            is added as it is.
        noise_subjects: whose embeddings the rules and the mean are measured on; default: the
            bundled fact table's.
        replace: put the noise in the embeddings' place instead of adding it, as an option of the
            released code does.
        samples, seed: noise draws, averaged over; the same seed gives the same bytes.
        extra_tokens: number of tokens after the subject that are corrupted too.
        occurrence: which mention of the subject is corrupted, where it occurs several times.
    Raises:
        SettingError: a value that does not exist, or a combination that means nothing.
    Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2.1 and Appendix B.4; paired prompts in
        Zhang & Nanda 2024, arXiv:2309.16042.
    """

    corruption: Corruption = "noise"
    # as published; one standard deviation leaves too small a total effect to see anything
    noise: str | NonNegative | Tensor = "s3"
    noise_subjects: Texts | None = None
    replace: bool = False
    samples: Count = 10  # as published
    # the released code's; the noise is of numpy's older generator, whose seeds are shorter
    seed: Annotated[int, Ge(0), Lt(2**32)] = 1
    extra_tokens: Natural = 0
    occurrence: Occurrence = "first"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.replace and self.corruption != "noise":
            raise SettingError(
                f"replace=True is about noise, but corruption={self.corruption!r} replaces the "
                "embeddings anyway"
            )
        if self.extra_tokens and self.corruption == "subject":
            raise SettingError(
                "extra_tokens with corruption='subject': the other prompt differs in the subject "
                "alone"
            )

    @property
    def replaces(self) -> bool:
        """Whether subject embeddings are replaced, rather than added to."""
        return self.replace or self.corruption in ("zeros", "mean")


@dataclass(frozen=True)
class Patching:
    """Which states are replaced, and in which run.

    Args:
        sites: what is replaced at a token. "residual": a block's output. "mlp", "attention": what
            they add to the residual stream, in a window of layers. "head": one attention head's
            output before the heads are mixed. "neuron": one entry of the MLP output matrix's input,
            see `neurons`. Some families have more, such as Mamba's "mixer".
            Default: residual, MLP and attention, where the family has them.
        neurons: the (layer, index) pairs of "neuron".
        window: layers replaced together at "mlp" and "attention", see `window_layers`; default:
            10, or a third of a smaller model.
        positions: tokens at which states are replaced: "all", the subject's last, the prompt's
            "last", or their numbers.
        direction: "denoise" puts clean states into the corrupted run (is this state sufficient?),
            "noise" puts corrupted states into the clean run (is it necessary?).
        effect: "indirect": what changes when the state alone is replaced. "direct": what changes
            when everything but the state is, the input being the other run's and the state held
            where it was. With total effect TE, in either direction, TE = direct effect - the
            opposite direction's indirect effect.
        severed: modules whose outputs at that token are frozen, in all layers, to those of the run
            that is patched: "mlp", "attention" or both, one more table for each.
        frozen_noise: noise [samples, tokens, d] of the run that the frozen outputs are taken from;
            default: the same noise. The released code froze outputs of another draw.
    Raises:
        SettingError: a value that does not exist, or a combination that means nothing.
    Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2.2 and Appendix B; direct and indirect effects
        of Pearl 2001, as in Vig et al. 2020, arXiv:2004.12265, and Finlayson et al. 2021,
        arXiv:2106.06087.
    """

    sites: str | Texts | None = None
    neurons: tuple[tuple[Natural, Natural], ...] = ()
    window: Count | None = None
    positions: Literal["all", "subject_last", "last"] | tuple[int, ...] = "all"
    direction: Direction = "denoise"
    effect: Effect = "indirect"
    severed: str | tuple[str, ...] = ()
    frozen_noise: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        sites = (self.sites,) if isinstance(self.sites, str) else self.sites
        severed = (self.severed,) if isinstance(self.severed, str) else self.severed
        # as tuples: configs of equal settings compare equal, whether a name or a list was given
        for name, value in (("sites", sites), ("severed", severed)):
            object.__setattr__(self, name, value)
        self._check_sites(SITES if sites is None else sites)
        if severed:
            self._check_severed(sites, severed)

    def _check_sites(self, sites: tuple[str, ...]) -> None:
        if ("neuron" in sites) != bool(self.neurons):
            raise SettingError(
                "sites=['neuron'] and neurons=[(layer, index), ...] go together: a model has too "
                "many to trace them all"
            )
        if self.frozen_noise is not None and (not self.severed or self.direction != "denoise"):
            raise SettingError(_FROZEN_NOISE)

    def _check_severed(self, sites: tuple[str, ...] | None, severed: tuple[str, ...]) -> None:
        if unknown := [name for name in severed if name not in WINDOWED]:
            raise SettingError(
                f"severed={briefly(unknown)} cannot be severed; expected 'mlp', 'attention' or both"
            )
        if sites is None:
            raise SettingError(
                "severed needs sites without the severed module; say sites=['residual'], as in the "
                "paper"
            )
        inside = {"attention": {"attention", "head"}, "mlp": {"mlp", "neuron"}}
        if any(inside[name].intersection(sites) for name in severed):
            raise SettingError(
                f"severed={list(severed)} freezes what sites={list(sites)} replaces: the same "
                "output cannot be both. Sever the other module, or trace sites=['residual']"
            )
        if self.effect == "direct":
            raise SettingError(
                "severed with effect='direct': a direct effect already blocks the path through the "
                "state; freezing modules after it blocks part of what is measured. Use "
                "effect='indirect'"
            )

    @property
    def inserts_corrupted(self) -> bool:
        """Whether corrupted states go into the clean run, rather than clean ones into the corrupted
        run.
        """
        return (self.direction == "noise") != (self.effect == "direct")


@dataclass(frozen=True)
class Estimation:
    """Which cells are estimated rather than computed.

    Args:
        method: "exact", or "attribution": a first-order estimate of every effect from one backward
            pass.
        correction: "query-key": recompute the next block's attention weights in the estimate of
            residual states, where the softmax is far from linear.
        screen: estimate everything, then compute the N most promising cells exactly.
    Raises:
        SettingError: a value that does not exist, or a combination that means nothing.
    Source: Nanda 2023; Kramár et al. 2024, arXiv:2403.00745.
    """

    method: TraceMethod = "exact"
    correction: Correction = "none"
    screen: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.screen is not None and self.method == "attribution":
            raise SettingError(
                f"screen={self.screen} computes that many cells exactly, method='attribution' "
                "none: choose one"
            )
        if self.correction != "none" and not self.needed:
            raise SettingError(
                "correction belongs to estimates; use it with method='attribution' or screen=..."
            )

    @property
    def needed(self) -> bool:
        """Whether cells are estimated by attribution, all of them or before a screen."""
        return self.method == "attribution" or self.screen is not None


@dataclass(frozen=True)
class TraceConfig:
    """The settings of `engram.trace` and `engram.average_trace`, in groups.

    Callers write them flat, `engram.trace(lm, ..., samples=3, window=5)`; `TraceConfig.of` puts
    each where it belongs. Here are the settings that concern no group, and the combinations of
    groups that mean nothing.

    Args:
        metric: what is read: the answer's "probability", its "log_probability" (nats), or the
            "logit_difference" between the first tokens of the answer and of `foil`; each averaged
            over samples.
        rows_per_batch: rows computed at once, which bounds memory; default: what fits in about half
            a gigabyte.
        engine: "replay", "whole" forward passes, or "auto": whichever gives the model's own
            numbers fastest.
        matmul: "bfloat16" rounds the factors of matrix products of a float32 model, which is
            faster on processors that have it; see `engine.precision`.
    Raises:
        SettingError: a value that does not exist, or a combination that means nothing; the message
            says why.

    Example:
        >>> from engram.locate.settings import TraceConfig
        >>> config = TraceConfig.of(samples=3, window=5)
        >>> config.subject.samples, config.patching.window
        (3, 5)
    """

    subject: SubjectCorruption = field(default_factory=SubjectCorruption)
    patching: Patching = field(default_factory=Patching)
    estimation: Estimation = field(default_factory=Estimation)
    metric: Metric = "probability"
    rows_per_batch: Count | None = None
    engine: Engine = "auto"
    matmul: Matmul = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        # the groups cannot see each other, so that what two of them exclude is checked here
        sites = SITES if self.patching.sites is None else self.patching.sites
        if self.patching.severed and self.estimation.needed:
            raise SettingError(
                "severed paths have no first-order estimate here; use method='exact' without screen"
            )
        if self.patching.frozen_noise is not None and self.subject.corruption != "noise":
            raise SettingError(_FROZEN_NOISE)
        if self.estimation.correction != "none" and "residual" not in sites:
            raise SettingError(
                "correction='query-key' corrects estimates of residual states; trace "
                "sites=['residual'] among others"
            )

    @classmethod
    def of(cls, **settings: Any) -> TraceConfig:
        """Return the config of flat settings.

        Raises:
            SettingError: a setting that does not exist, with the nearest one that does.
        """
        return read(cls, settings, _NAME, _ALSO)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise an error for settings that do not exist.

        Raises:
            SettingError: see `of`.
        """
        check_names(cls, names, _NAME, _ALSO)


_NAME, _ALSO = "causal tracing", "target, foil, other_subject, progress"
_FROZEN_NOISE = (
    "frozen_noise is the noise of the run that severed modules are frozen to: it needs "
    "severed=..., corruption='noise' and direction='denoise'"
)


@dataclass(frozen=True)
class Patch:
    """The states that one cell replaces at its token: `site` in layers [first, end), all channels
    or those of `part`; `severed` modules are frozen.
    """

    site: str
    first: int
    end: int
    part: tuple[int, int] | None = None
    severed: str | None = None


@dataclass(frozen=True)
class EffectTable:
    """One table of scores: its name, its shape after the token axis, and its patches in row-major
    order.
    """

    name: str
    shape: tuple[int, ...]
    patches: tuple[Patch, ...]


def default_window(n_layers: int) -> int:
    """Return 10 layers as in the paper, or a third of the model where that is fewer: a window over
    all layers shows nothing.
    """
    return min(10, max(1, round(n_layers / 3)))


def window_layers(centre: int, window: int, n_layers: int) -> tuple[int, int]:
    """Return the layers [first, last + 1) of the window shown at `centre`, clipped at the ends of
    the model.

    An even window reaches further down than up, as in the released code: 10 layers are centre - 5
    to centre + 4. (The paper's text prints an interval
    one higher.)

    Example:
        >>> from engram.locate.settings import window_layers
        >>> window_layers(20, 10, 48), window_layers(1, 10, 48)
        ((15, 25), (0, 6))
    """
    first, end = centre - window // 2, centre + math.ceil(window / 2)
    # at the ends a window gets shorter (6 layers at centre 1): it is neither moved nor rescaled
    return max(0, first), min(n_layers, end)


def tables(lm: LanguageModel, config: TraceConfig) -> list[EffectTable]:
    """Return every table of these settings; a severed one is named after both, such as "residual,
    mlp severed".

    Raises:
        UnsupportedModelError: a site that the family does not have, a layer that the model does not
            have.
        SettingError: a neuron that the layer does not have.
    """
    sites = config.patching.sites or [site for site in lm.parts.site_names() if site not in PARTS]
    result = []
    for site in sites:
        # first the table as it is, which the severed ones are compared with
        for severed in (None, *config.patching.severed):
            patches, shape = _patches(lm, config, site)
            if severed:
                patches = [Patch(p.site, p.first, p.end, p.part, severed) for p in patches]
            result.append(
                EffectTable(
                    f"{site}, {severed} severed" if severed else site, shape, tuple(patches)
                )
            )
    return result


def _patches(
    lm: LanguageModel, config: TraceConfig, site: str
) -> tuple[list[Patch], tuple[int, ...]]:
    n_layers = lm.n_layers
    if site == "head":
        # a head is a slice of the mixing matrix's input, the last place where heads are apart
        width = lm.parts.head_width(0)
        heads = range(lm.parts.n_heads)
        return [
            Patch(site, layer, layer + 1, (h * width, (h + 1) * width))
            for layer in range(n_layers)
            for h in heads
        ], (n_layers, len(heads))
    if site == "neuron":
        for layer, index in config.patching.neurons:
            d_ff = lm.parts.mlp_width(layer)
            if not 0 <= index < d_ff:
                raise SettingError(
                    f"neuron {index} of layer {layer} does not exist; there are {d_ff}, from 0"
                )
        return [
            Patch(site, layer, layer + 1, (i, i + 1)) for layer, i in config.patching.neurons
        ], (len(config.patching.neurons),)
    if site not in WINDOWED:
        return [Patch(site, layer, layer + 1) for layer in range(n_layers)], (n_layers,)
    window = config.patching.window or default_window(n_layers)
    return [Patch(site, *window_layers(c, window, n_layers)) for c in range(n_layers)], (n_layers,)
