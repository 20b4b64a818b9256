"""Causal tracing: which states of a model, put back into a run that forgot the subject, bring the
answer back.

The result for one prompt, its files and its pictures. Refuses to know models: tracing computes it,
average averages many.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 2; indices from 0 as in the released code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Len, MinLen
from torch import Tensor
from typing_extensions import TypedDict

from engram.checks import checked_call
from engram.errors import EngramFileError, SettingError
from engram.files.atomic import atomic_file
from engram.files.forms import parsed
from engram.files.names import read_bytes
from engram.locate.captions import LETTERS, Captions, colours, marked, severed_bars
from engram.modules.tensor_files import tensors_from_bytes, tensors_to_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram.plots.heat_maps import HeatMap

_KIND = "engram.trace"
_EXACT = "exact: "  # before the names of `exact` in a file
# A number of a token; no prompt is as long, and ranges of roles are walked through.
_Token = Annotated[int, Ge(0), Le(1 << 20)]


class _AboutForm(TypedDict):
    """What a file says of a trace beside its tables."""

    prompt: str
    subject: str
    answer: str
    tokens: Annotated[list[str], MinLen(1)]
    positions: list[_Token]
    subject_range: tuple[_Token, _Token]
    corrupted: list[_Token]
    low_score: float
    high_score: float
    window: Annotated[int, Ge(1)]
    samples: Annotated[int, Ge(1)]
    model: str
    last: Annotated[int, Ge(-1), Le(1 << 20)]
    settings: dict[str, Any]
    method: Literal["exact", "attribution", "screened"]
    tables: Annotated[list[str], MinLen(1)]


class _SettingsForm(TypedDict, total=False):
    """The settings that pictures and averages read; see `trace_tables.described`."""

    corruption: str
    direction: Literal["denoise", "noise"]
    effect: Literal["indirect", "direct"]
    metric: Literal["probability", "log_probability", "logit_difference"]
    neurons: list[Annotated[list[Annotated[int, Ge(0)]], Len(2, 2)]]
    foil: str | None
    other_subject: str | None


@dataclass(frozen=True)
class CausalTrace:
    """The causal trace of one prompt: tables of scores, and what they are scores of.

    Attributes:
        scores: site -> float32 table of the metric with that state replaced, mean over samples:
            [tokens, layers]; for "head" [tokens, layers, heads], for "neuron" [tokens, neurons].
            For "mlp" and "attention" a column is the centre of a window of layers. A table with
            severed modules is named "residual, mlp severed".
        low_score, high_score: the metric in the corrupted and in the clean run.
        answer: the scored text, with its leading space.
        tokens: the prompt's tokens, one a row of `scores`.
        positions: index in the prompt of each row.
        subject_range: [first, last + 1) token of the subject's first (or chosen) mention.
        corrupted: all tokens that were corrupted.
        last: the token whose output is read first.
        settings: those of the trace, as JSON holds them; see `TraceConfig`.
        method: "exact"; "attribution": every number is a first-order estimate; "screened": those in
            `exact` are not.
        exact: for "screened", site -> bool table of the cells that were computed.
    """

    prompt: str
    subject: str
    answer: str
    tokens: list[str]
    positions: list[int]
    subject_range: tuple[int, int]
    corrupted: list[int]
    scores: dict[str, Tensor]
    low_score: float
    high_score: float
    window: int
    samples: int
    model: str
    last: int = -1
    settings: dict[str, Any] = field(default_factory=dict)
    method: str = "exact"
    exact: dict[str, Tensor] = field(default_factory=dict)

    @property
    def baseline(self) -> float:
        """The score that effects are differences to: that of the run whose states are replaced, see
        `Patching.direction`.
        """
        return self.high_score if self.captions.inserts else self.low_score

    @property
    def sign(self) -> int:
        """1, or -1 where corrupted states are inserted, so that strong effects are negative."""
        return -1 if self.captions.inserts else 1

    @property
    def total_effect(self) -> float:
        """Metric of the clean run minus that of the corrupted run."""
        return self.high_score - self.low_score

    @checked_call
    def effects(self, site: str) -> Tensor:
        """Return effects, shaped as `scores[site]`: the score minus the baseline. They are indirect
        unless the settings say effect="direct".
        """
        return self.scores[site] - self.baseline

    @checked_call
    def best(self, site: str) -> tuple[int, ...]:
        """Return the indices, such as (row, layer), of the largest effect; in the other direction,
        of the most negative.

        Of a screened table only the exact cells are compared, where there are any.
        """
        effects = self.sign * self.effects(site)
        # an estimate where a softmax saturates can be larger than any effect that was computed
        if site in self.exact and self.exact[site].any():
            effects = effects.masked_fill(~self.exact[site], -torch.inf)
        largest = effects.argmax()
        return tuple(int(i) for i in torch.unravel_index(largest, effects.shape))

    def labels(self) -> list[str]:
        """Return the tokens with a star after those that got noise."""
        return [
            t + "*" * (at in self.corrupted)
            for at, t in zip(self.positions, self.tokens, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it; `scores` are lists of rows."""
        tables = {
            name: {k: v.tolist() for k, v in getattr(self, name).items()}
            for name in ("scores", "exact")
        }
        return {**vars(self), **tables}

    @property
    def captions(self) -> Captions:
        """The words around its pictures."""
        return Captions(self.settings, self.method, self.window, self.model)

    @property
    def caveat(self) -> str:
        """What to know before the tables are read: that there is no effect; else empty."""
        return self.captions.caveat(self.low_score, self.high_score)

    def heading(self, letters: int = 2 * LETTERS) -> tuple[str, str]:
        """Return two lines above a picture: prompt, subject in brackets and answer; then the model
        and the scores. The first has at most that many letters.
        """
        captions = self.captions
        last = self.settings.get("occurrence") == "last"
        scored = captions.score_label(self.answer.strip())
        return (
            marked(self.prompt, self.subject, self.answer, letters, last=last),
            captions.heading(scored, self.low_score, self.high_score),
        )

    def scale(self, sites: Sequence[str]) -> float:
        """Return how far the colours of these sites reach from the baseline: to the strongest
        effect among them, and not less than effects that mean anything.
        """
        strongest = max(
            float((self.sign * self.effects(site)).nan_to_num().max()) for site in sites
        )
        return max(strongest, self.captions.smallest_scale)

    @checked_call
    def plot(self, site: str | None = None, *, shared_scale: bool = True) -> Figure:
        """Draw the paper's heat maps (Fig. 1), tokens down and layers across: all sites side by
        side, or one of them.

        Heads are shown at the token where one of them has the largest effect, layers down and
        heads across. Where there is no effect, a warning says so, and the colours stay pale.

        Args:
            shared_scale: use the same colours for the same effect in all panels; False: the
                strongest effect of each panel is its darkest.
        """
        from engram.plots.heat_maps import plot_heat_maps

        sites = list(self.scores) if site is None else [site]
        shared = self.scale(sites) if shared_scale else None
        panels = [self._panel(name, shared or self.scale([name])) for name in sites]
        return plot_heat_maps(panels, self.heading(LETTERS * len(panels)), self.caveat)

    def _panel(self, site: str, scale: float) -> HeatMap:
        from engram.plots.heat_maps import HeatMap, in_lines

        values, captions = self.scores[site], self.captions
        rows: list[str] | None = self.labels()
        columns, at, x_label, y_label = None, "", captions.layer_label(site), ""
        if values.dim() == 3:
            row = self.best(site)[0]
            at = f", at {self.labels()[row].strip()}"
            values, rows = values[row], None
            x_label, y_label = f"head of {captions.model_name}", "layer"
        elif site == "neuron":
            columns = [f"{layer}.{index}" for layer, index in self.settings["neurons"]]
            x_label = f"layer.neuron of {captions.model_name}"
        shades, low, high = colours(site), self.baseline, self.baseline
        if captions.inserts:  # what is inserted lowers the score: the lowest is the darkest
            shades, low = f"{shades}_r", self.baseline - scale
        else:
            high = self.baseline + scale
        return HeatMap(
            values.numpy(),
            shades,
            (low, high),
            in_lines(*captions.title(site, at)),
            captions.score_label(self.answer.strip()),
            x_label,
            y_label,
            rows,
            columns,
            bar_beside=site == "neuron",
        )

    def plot_severed(self) -> Figure:
        """Draw bars at each layer: the effect at the subject's last token as it is, and with
        attention or MLP severed.

        Raises:
            SettingError: no severed tables, or the subject's last token was not traced.
        """
        last = self.subject_range[1] - 1
        if last not in self.positions:
            raise SettingError(
                f"positions={self.positions} leave out the subject's last token, {last}; "
                "trace it with positions='all' or 'subject_last'"
            )
        row = self.positions.index(last)
        # in double precision: an effect is a small difference of two probabilities
        effects = {s: (t.double() - self.baseline)[row].numpy() for s, t in self.scores.items()}
        tables = {site: (mean, None, None) for site, mean in effects.items()}
        heading = self.heading(2 * LETTERS)
        return severed_bars(tables, self.model, "last subject", heading, self.caveat)

    def to_bytes(self) -> bytes:
        """Return a safetensors file: tables are tensors, everything else is in its header."""
        about = {k: v for k, v in vars(self).items() if k not in ("scores", "exact")} | {
            "tables": list(self.scores)
        }
        tables = {k: v.contiguous() for k, v in self.scores.items()}
        tables |= {_EXACT + k: v.contiguous() for k, v in self.exact.items()}
        return tensors_to_bytes(tables, _KIND, about)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        with atomic_file(path) as fresh:
            fresh.write_bytes(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "these bytes") -> CausalTrace:
        """Load what `to_bytes` returned.

        Raises:
            EngramFileError: not such data; the message calls it `name`.
        """
        what = "a saved causal trace; make one with CausalTrace.save"
        about: _AboutForm
        tensors, about = tensors_from_bytes(data, _KIND, _AboutForm, name, what)
        parsed(_SettingsForm, json.dumps(about["settings"]), f"{name}, settings,")
        own: dict[str, Any] = dict(about)
        tables = own.pop("tables")
        exact = {k.removeprefix(_EXACT): v for k, v in tensors.items() if k.startswith(_EXACT)}
        if set(tensors) != {*tables, *(_EXACT + site for site in exact)}:
            raise EngramFileError(f"{name} is damaged: its tables are {', '.join(tensors)}")
        scores = {site: tensors[site] for site in tables}
        if fault := _fault(about, scores, exact):
            raise EngramFileError(f"{name} is damaged: {fault}")
        return cls(**own, scores=scores, exact=exact)

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """Load what `save` wrote.

        Raises:
            EngramFileError: not such a file.
        """
        try:
            data = read_bytes(path)
        except (OSError, EngramFileError) as error:
            raise EngramFileError(f"{str(path)!r} is not a saved causal trace ({error})") from error
        return cls.from_bytes(data, str(path))


def _fault(about: _AboutForm, scores: dict[str, Tensor], exact: dict[str, Tensor]) -> str | None:
    """Return what of a file's trace does not fit the rest of it; None if all does."""
    rows, (first, end) = len(about["tokens"]), about["subject_range"]
    if len(about["positions"]) != rows:
        return f"{len(about['positions'])} positions of {rows} tokens"
    if first >= end:
        return f"subject_range={[first, end]}, expected a first token and the one after the last"
    for site, table in scores.items():
        if table.dtype != torch.float32 or table.dim() not in (2, 3) or len(table) != rows:
            kind = f"{list(table.shape)} {table.dtype}"
            return f"table {site!r} is {kind}, expected a row of float32 for each of {rows} tokens"
        if not table.numel() or not table.isfinite().all():
            return f"table {site!r} is empty, or holds NaN or infinity"
    neurons = about["settings"].get("neurons", ())
    if "neuron" in scores and scores["neuron"].shape[1:] != (len(neurons),):
        return f"table 'neuron' has {list(scores['neuron'].shape)} of {len(neurons)} neurons"
    for site, table in exact.items():
        if site not in scores or table.shape != scores[site].shape or table.dtype != torch.bool:
            return f"table 'exact: {site}' is not of the cells of a table {site!r}"
    return None
