"""Effects averaged over facts, by role of the token, layer and site, with intervals.

Knows finished traces. Refuses to know how they were computed: see average_run.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2.2 and Appendix B; the six roles are those of the
    released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from engram.checks import checked_call, one_of
from engram.errors import EngramError, SettingError
from engram.locate.captions import Array, colours, replaced, severed_bars
from engram.locate.settings import PARTS
from engram.locate.trace import CausalTrace
from engram.locate.trace_store import TraceStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKEN_ROLES = ("first subject", "middle subject", "last subject", "first after", "further", "last")
Interval = Literal["bootstrap", "reference"]
_ROLE_LABELS = {  # in pictures, in the order of TOKEN_ROLES; which of matplotlib's ten colours
    "First subject token": 0,
    "Middle subject tokens": 1,
    "Last subject token": 2,
    "First subsequent token": 4,
    "Further tokens": 5,
    "Last token": 3,
}


def role_rows(trace: CausalTrace) -> dict[str, list[int]]:
    """Return the rows of a trace's tables by role, in the prompt's order; a role that the prompt
    does not have is empty.

    A subject of one token is both its first and its last; a single token after the subject is both
    the first after it and the last. Tokens before the subject have no role. Where the
    subject ends the prompt there is none after it.
    """
    first, end = trace.subject_range
    last = trace.last
    at = {
        "first subject": range(first, first + 1),
        "middle subject": range(first + 1, end - 1),
        "last subject": range(end - 1, end),
        # empty where the subject ends the prompt; the released code reads past the table there
        "first after": range(end, min(end, last) + 1),
        "further": range(end + 1, last),
        "last": range(last, last + 1),
    }
    row = {position: i for i, position in enumerate(trace.positions)}
    return {role: [row[i] for i in positions if i in row] for role, positions in at.items()}


@dataclass(frozen=True)
class Curves:
    """Mean effects by role, each [6, ...] as the table is after its token axis, NaN where no fact
    has the role.

    `counts` are the numbers of facts (bootstrap) or rows (reference) in each role's mean.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    counts: list[int]

    def of_role(self, number: int) -> tuple[Array, Array, Array]:
        """Return mean, low and high of one role, each [layers, ...]."""
        mean, low, high = (table[number].numpy() for table in (self.mean, self.low, self.high))
        return mean, low, high


@dataclass(frozen=True)
class AverageTrace:
    """Traces of many facts, and their means.

    Attributes:
        traces: one a fact, all with the same settings.
        skipped: facts that were left out, as (prompt, reason).
        seed: of the bootstrap.
    """

    traces: Sequence[CausalTrace]
    skipped: Sequence[tuple[str, str]] = ()
    seed: int = 0
    _cache: dict[Any, Curves] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.traces:
            reasons = (
                "; ".join(sorted({reason for _, reason in self.skipped})) or "no facts were given"
            )
            raise EngramError(f"there is no trace to average: {reasons}")
        first = _common(self.traces[0])
        for trace in self.traces:
            if different := [
                name for name, value in _common(trace).items() if value != first.get(name)
            ]:
                raise EngramError(
                    f"these traces differ in {', '.join(different)}; their mean would mean "
                    "nothing. Average those of one kind"
                )

    @property
    def sites(self) -> list[str]:
        return list(self.traces[0].scores)

    @property
    def layered(self) -> list[str]:
        """Tables of one value a layer: all but heads and neurons."""
        return [site for site in self.sites if site.partition(",")[0] not in PARTS]

    @property
    def severed(self) -> list[str]:
        """Tables with severed modules."""
        return [site for site in self.sites if site.endswith(" severed")]

    @checked_call
    def effects(
        self,
        site: str,
        interval: Interval = "bootstrap",
        level: float = 0.95,
        resamples: int = 2000,
    ) -> Curves:
        """Return average indirect effects (AIE), [roles, layers, ...], with an interval.

        Args:
            site: a table's name.
            interval: "bootstrap": each fact's mean effect in a role first, then the mean over
                facts; resampling facts. "reference": all rows of a role pooled, however many a
                fact has, and 1.96 standard deviations of their raw scores over
                the root of their number: the released code's formula, which used one number of
                    facts for all roles.
            level, resamples: of the bootstrap; percentiles.
        Raises:
            SettingError: no such table or interval, a level outside (0, 1).
        """
        if site not in self.sites or interval not in get_args(Interval) or not 0 < level < 1:
            raise SettingError(
                f"site={site!r}, interval={interval!r}, level={level}: these traces have "
                f"{', '.join(map(repr, self.sites))}; intervals are 'bootstrap' and 'reference', a "
                "level is between 0 and 1, such as 0.95"
            )
        key = (site, interval, level, resamples)
        if key not in self._cache:
            self._cache[key] = (
                self._reference(site)
                if interval == "reference"
                else self._bootstrap(site, level, resamples)
            )
        return self._cache[key]

    def _bootstrap(self, site: str, level: float, resamples: int) -> Curves:
        # one value a fact, however many tokens it has in the role: a long prompt counts no more
        by_fact = self._by_fact(site)  # [f, roles, ...], NaN where a fact lacks the role
        has_role = ~by_fact.isnan().flatten(2).any(-1)
        values = by_fact.nan_to_num().flatten(1)
        # a resample is a row of weights, so that one product of matrices averages all of them; a
        # fact without the role counts neither in the sum nor in the number
        weights = self._resampled(resamples)
        counts = (weights @ has_role.double()).unsqueeze(-1)
        sums = (weights @ values).unflatten(1, by_fact.shape[1:]).flatten(2)
        means = torch.where(counts > 0, sums / counts, torch.nan)
        low, high = (
            _quantile(means, q).view(by_fact.shape[1:]) for q in ((1 - level) / 2, (1 + level) / 2)
        )
        return Curves(by_fact.nanmean(0), low, high, has_role.sum(0).tolist())

    def _reference(self, site: str) -> Curves:
        pooled: dict[str, list[Tensor]] = {role: [] for role in TOKEN_ROLES}
        for trace in self.traces:
            for role, rows in role_rows(trace).items():
                pooled[role].extend(trace.scores[site][rows].double())
        # the released code's order: pool raw scores, then subtract the mean baseline of all facts,
        # also from roles that only some facts have
        baseline = torch.tensor([t.baseline for t in self.traces], dtype=torch.float64).mean()
        empty = torch.full_like(self.traces[0].scores[site][0], torch.nan, dtype=torch.float64)
        stacks = [torch.stack(rows) if rows else empty[None] for rows in pooled.values()]
        mean = torch.stack([stack.mean(0) for stack in stacks]) - baseline
        # of raw scores, not of effects, and without n - 1: the released code's band
        half = torch.stack(
            [1.96 * stack.std(0, correction=0) / len(stack) ** 0.5 for stack in stacks]
        )
        return Curves(mean, mean - half, mean + half, [len(rows) for rows in pooled.values()])

    def _by_fact(self, site: str) -> Tensor:
        rows = []
        for trace in self.traces:
            effects = trace.scores[site].double() - trace.baseline
            empty = torch.full_like(effects[0], torch.nan)
            by_role = role_rows(trace).values()
            rows.append(torch.stack([effects[at].mean(0) if at else empty for at in by_role]))
        return torch.stack(rows)

    def _resampled(self, resamples: int) -> Tensor:
        """Return [resamples, f], how often each fact was drawn."""
        generator = torch.Generator().manual_seed(self.seed)
        n = len(self.traces)
        # one stream for all tables: sites of one average are resampled alike and can be compared
        drawn = torch.randint(n, (resamples, n), generator=generator)
        return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=torch.float64)
        )

    @checked_call
    def total_effect(
        self, level: float = 0.95, resamples: int = 2000
    ) -> tuple[float, float, float]:
        """Return the average total effect (ATE), the mean over facts of clean minus corrupted, and
        its bootstrap interval.
        """
        totals = torch.tensor([t.total_effect for t in self.traces], dtype=torch.float64)
        # clean and corrupted of one fact stay together: the interval is that of paired differences
        means = self._resampled(resamples) @ totals / len(totals)
        low, high = (float(_quantile(means, q)) for q in ((1 - level) / 2, (1 + level) / 2))
        return float(totals.mean()), low, high

    @cached_property
    def clean(self) -> float:
        """Mean metric of the clean runs."""
        return sum(t.high_score for t in self.traces) / len(self.traces)

    @cached_property
    def corrupted(self) -> float:
        """Mean metric of the corrupted runs."""
        return sum(t.low_score for t in self.traces) / len(self.traces)

    def summary(self) -> dict[str, Any]:
        """Return what the paper reports beside its figures: total effect, peaks of the means, means
        of each fact's own maximum.

        Peaks are effects; "mean_of_maxima" is the mean over facts of the highest score, in the
        whole table or at a role. In the other direction, where the strongest effects are the most
        negative, it is the lowest.
        """
        ate, low, high = self.total_effect()
        about: dict[str, Any] = {
            "facts": len(self.traces),
            "skipped": len(self.skipped),
            "clean": self.clean,
            "corrupted": self.corrupted,
            "total_effect": {"mean": ate, "low": low, "high": high},
            "sites": {},
        }
        sign = self.traces[0].sign  # where effects are negative, the lowest are the strongest
        for site in self.sites:
            mean = self.effects(site).mean
            own = [sign * float((sign * t.scores[site]).max()) for t in self.traces]
            peaks: dict[str, Any] = {"mean_of_maxima": sum(own) / len(own)}
            for role in ("last subject", "last"):
                curve = mean[TOKEN_ROLES.index(role)]
                if not curve.isnan().all():
                    at = int((sign * curve).argmax())
                    rows = [t.scores[site][role_rows(t)[role]] for t in self.traces]
                    own = [sign * float((sign * row).max()) for row in rows if len(row)]
                    peaks[role] = {
                        "effect": float(curve.flatten()[at]),
                        "at": [int(i) for i in torch.unravel_index(torch.tensor(at), curve.shape)],
                        "mean_of_maxima": sum(own) / len(own),
                    }
            about["sites"][site] = peaks
        return about

    @property
    def caveat(self) -> str:
        """What to know before the means are read: that there is no effect; else empty."""
        return self.traces[0].captions.caveat(self.corrupted, self.clean, "these facts")

    def heading(self) -> tuple[str, str]:
        """Return two lines above a picture: how many facts and what is scored; then the model and
        the scores.
        """
        trace = self.traces[0]
        n, scored = len(self.traces), trace.captions.score_label("answer")
        first = f"{n} fact{'s' * (n != 1)}, such as {trace.heading()[0]}"
        return first, trace.captions.heading(f"average {scored}", self.corrupted, self.clean)

    def scale(self, sites: Sequence[str]) -> float:
        """Return how far the colours of these sites reach from no effect: to the strongest mean
        among them, and not less than effects that mean anything.
        """
        sign = self.traces[0].sign
        strongest = max(float((sign * self.effects(s).mean).nan_to_num().max()) for s in sites)
        return max(strongest, self.traces[0].captions.smallest_scale)

    def plot(self, *, shared_scale: bool = True) -> Figure:
        """Draw heat maps by role and layer, as in the paper's Figure 2: one colour scale, that of
        the first table; negative effects are white.

        In the other direction, where effects are negative, their size is shown.

        Args:
            shared_scale: False: the strongest mean of each panel is its darkest.
        """
        from engram.plots.heat_maps import HeatMap, in_lines, plot_heat_maps

        trace, sites = self.traces[0], self._drawable()
        tables = {site: (trace.sign * self.effects(site).mean).clamp(min=0) for site in sites}
        title = trace.captions.average_title()
        panels = [
            HeatMap(
                table.numpy(),
                colours(site),
                (0, self.scale([sites[0] if shared_scale else site])),
                in_lines(f"{title} of {replaced(site)}", f"over {len(self.traces)} prompts"),
                trace.captions.average_bar(),
                trace.captions.layer_label(site),
                rows=list(_ROLE_LABELS),
            )
            for site, table in tables.items()
        ]
        return plot_heat_maps(panels, self.heading(), self.caveat)

    @checked_call
    def plot_lines(self, interval: Interval = "bootstrap") -> Figure:
        """Draw a line and its 95 % band for each role, a panel for each site, as in the paper's
        Appendix B.
        """
        from engram.plots.curves import Curve, CurvePanel, plot_curves, tab10

        captions, panels = self.traces[0].captions, []
        title = captions.average_title()
        for site in self._drawable():
            means = self.effects(site, interval)
            layers = range(means.mean.shape[1])
            curves = [
                Curve(layers, *means.of_role(i), label, tab10(_ROLE_LABELS[label]))
                for i, label in enumerate(_ROLE_LABELS)
                if means.counts[i]
            ]
            panels.append(
                CurvePanel(
                    curves, len(layers), f"{title} of {replaced(site)}", captions.layer_label(site)
                )
            )
        return plot_curves(panels, title, self.heading(), self.caveat)

    @checked_call
    def plot_severed(self, role: str = "last subject") -> Figure:
        """Draw bars at each layer: the effect as it is, and with attention or MLP severed, as in
        the paper's Figure 3.

        Raises:
            SettingError: no such role, or no severed tables among the traces.
        """
        at, several = role_number(role), len(self.traces) > 1
        tables = {}
        for site in self.layered if self.severed else ():
            mean, low, high = self.effects(site).of_role(at)
            tables[site] = (mean, low, high) if several else (mean, None, None)
        return severed_bars(tables, self.traces[0].model, role, self.heading(), self.caveat)

    def _drawable(self) -> list[str]:
        """Return the tables of one value a layer; heads and neurons have no line over layers."""
        if not self.layered:
            raise SettingError(
                f"none of {self.sites} has one value a layer; see AverageTrace.effects for heads "
                "and neurons"
            )
        return self.layered

    @classmethod
    def load(cls, path: str | Path, seed: int = 0) -> AverageTrace:
        """Load the file of a run: everything in it that is finished.

        Raises:
            EngramFileError: not such a file.
        """
        with TraceStore.reading(path) as store:
            return cls(store.traces(), store.skipped(), seed)


def _common(trace: CausalTrace) -> dict[str, Any]:
    """Return what has to be the same for a mean to mean something: all but what belongs to one
    prompt.
    """
    settings = {
        name: value
        for name, value in trace.settings.items()
        if name not in ("foil", "other_subject")
    }
    shapes = {site: tuple(table.shape[1:]) for site, table in trace.scores.items()}
    return {
        "sites": shapes,
        "window": trace.window,
        "method": trace.method,
        "model": trace.model,
        **settings,
    }


def _quantile(samples: Tensor, q: float) -> Tensor:
    """Return quantiles along the first axis, without NaN; in pieces, since torch's takes no more
    than 2^24 numbers at once.
    """
    flat = samples.flatten(1) if samples.dim() > 1 else samples[:, None]
    quantiles = torch.cat(
        [piece.nanquantile(q, 0) for piece in flat.split(max(1, (1 << 24) // len(flat)), 1)]
    )
    return quantiles.view(samples.shape[1:])


def role_number(role: str) -> int:
    """Return the number of a token's role.

    Raises:
        SettingError: no such role.
    """
    one_of("role", role, TOKEN_ROLES)
    return TOKEN_ROLES.index(role)
