"""What pictures of traces say: names of sites, titles, and what an axis or a colour bar measures.

Knows the settings of a trace. Refuses to know how anything is computed or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engram.errors import SettingError
from engram.plots.words import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = 60  # of a heading above one panel
Array = NDArray[Any]
_SITES = {  # site -> colour map, what is replaced
    "residual": ("Purples", "state"),
    "mlp": ("Greens", "MLP"),
    "attention": ("Reds", "attention"),
    "head": ("Oranges", "head"),
    "neuron": ("Blues", "neuron"),
}
_ESTIMATES = {"attribution": " (estimate)", "screened": " (partly estimated)"}  # by method
_SEVERED = {  # what a table's name ends in -> colour and label of its bars
    "": ("#7261ab", "as it is"),
    ", attention severed": ("#f3201b", "attention severed"),
    ", mlp severed": ("#20b020", "MLP severed"),
}


# A total effect below this is none: the table is noise, whatever its colours. Of other metrics than
# probability it is in nats (a tenth of a nat is a tenth of the probability).
_NO_EFFECT = {"probability": 0.01}
_NO_EFFECT_NATS = 0.1
_SCALES = 5  # a colour scale is at least this many times as long, so that noise stays pale


@dataclass(frozen=True)
class Captions:
    """The words around a trace's pictures; the fields are those of `CausalTrace`."""

    settings: Mapping[str, Any]
    method: str
    window: int
    model: str

    @property
    def model_name(self) -> str:
        return PurePath(self.model).name

    @property
    def inserts(self) -> bool:
        """Whether corrupted states go into the clean run: strong effects are then negative."""
        return bool(self.settings.get("direction") == "noise")

    @property
    def effect(self) -> str:
        return str(self.settings.get("effect", "indirect"))

    def layer_label(self, site: str) -> str:
        """Return what a layer of a site's table is."""
        verb = "replaced" if self.inserts else "restored"
        if self.effect == "direct":
            verb = "kept"
        if site.partition(",")[0] in ("mlp", "attention"):
            return f"centre of {self.window} {verb} {replaced(site)} layers"
        return f"single {verb} layer of {self.model_name}"

    def title(self, site: str, at: str = "") -> tuple[str, str]:
        """Return the two halves of a table's title; `at` is appended."""
        # a direct effect holds one state where it was and changes the input: the words turn round
        direct = self.effect == "direct"
        run, other = ("corrupted", "clean")
        if direct != self.inserts:
            run, other = other, run
        name, end = replaced(site), _ESTIMATES.get(self.method, "") + at
        if direct:
            return f"{run.capitalize()} input,", f"{name} kept {other}{end}"
        return f"{'Corrupting' if self.inserts else 'Restoring'} {name}", f"after {run} input{end}"

    def score_label(self, answer: str) -> str:
        """Return what is measured, such as "p(Seattle)"."""
        metric = self.settings.get("metric", "probability")
        if metric == "logit_difference":
            return f"logits, {answer} - {str(self.settings.get('foil')).strip()}"
        return f"p({answer})" if metric == "probability" else f"log p({answer})"

    @property
    def smallest_scale(self) -> float:
        """Length of a colour scale at least: smaller effects stay pale."""
        return _SCALES * self._threshold

    @property
    def _threshold(self) -> float:
        return _NO_EFFECT.get(str(self.settings.get("metric", "probability")), _NO_EFFECT_NATS)

    def caveat(self, low: float, high: float, facts: str = "this fact") -> str:
        """Return what to say where the effect is nothing, else an empty text.

        Args:
            low, high: the metric in the corrupted and in the clean run.
        """
        probability = self.settings.get("metric", "probability") == "probability"
        if probability and high < self._threshold:
            return f"no effect: the model does not know {facts} (p {high:.3f})"
        if high - low < self._threshold:
            name = "p" if probability else "the score"
            # 80 columns of a terminal
            return f"no effect: {name} is {high:.3f}, and {low:.3f} with the subject corrupted"
        return ""

    def heading(self, scored: str, low: float, high: float) -> str:
        """Return the model and what the effects are differences of."""
        return f"{self.model_name}: {scored} {high:.3f}, with the subject corrupted {low:.3f}"

    def average_title(self) -> str:
        """Return what averages over such traces are, such as "Average indirect effect"."""
        return f"Average {self.effect} effect{_ESTIMATES.get(self.method, '')}"

    def average_bar(self) -> str:
        """Return the abbreviation: "AIE" or "ADE", negated in the other direction."""
        return f"{'-' * self.inserts}A{self.effect[0].upper()}E"


def marked(prompt: str, subject: str, answer: str, letters: int, *, last: bool = False) -> str:
    """Return "The [Space Needle] is in the city of → Seattle": the subject in brackets, the answer.

    A longer text is shortened on both sides of the subject, which stays.

    Args:
        letters: the most that the text has.
        last: mark the last mention of the subject, not the first.
    """
    answer, subject = shorten(answer.strip(), letters // 4), shorten(subject, letters // 3)
    start = prompt.rfind(subject) if last else prompt.find(subject)
    if start < 0:  # it was shortened, or is not there
        return f"{shorten(prompt, letters - len(answer) - 3)} → {answer}"
    before, after = prompt[:start], prompt[start + len(subject) :]
    room = max(8, letters - len(subject) - len(answer) - 5)
    short_side = min(len(before), len(after), room // 2)
    longest = room - short_side
    if len(before) > longest:
        before = "…" + before[len(before) - longest + 1 :]
    return f"{before}[{subject}]{shorten(after, room - len(before))} → {answer}"


def colours(table: str) -> str:
    """Return the colour map of a table; a site of a family's own is grey."""
    return _SITES.get(table.partition(", ")[0], ("Greys", ""))[0]


def replaced(table: str) -> str:
    """Return what a table replaces, in words; a site of a family's own goes by its own name."""
    site, _, severed = table.partition(", ")
    name = _SITES.get(site, ("", site))[1]
    return f"{name} ({_SITES[severed.removesuffix(' severed')][1]} severed)" if severed else name


def severed_bars(
    tables: Mapping[str, tuple[Array, Array | None, Array | None]],
    model: str,
    role: str,
    heading: Sequence[str] = (),
    warning: str = "",
) -> Figure:
    """Draw bars at each layer: the effect as it is, and with attention or MLP severed.

    Args:
        tables: name -> mean, low and high at each layer for tokens of this role; low and high are
            None for a single trace.
        heading, warning: lines above and below the bars.
    Raises:
        SettingError: no severed tables.
    """
    from engram.plots.curves import Curve, plot_bars

    severed = [name for name in tables if name.endswith(" severed")]
    if not severed:
        raise SettingError(
            "these traces have no severed tables; trace with sites=['residual'], "
            "severed=['mlp', 'attention']"
        )
    site, curves, average = severed[0].partition(",")[0], [], ""
    for end, (colour, label) in _SEVERED.items():
        if f"{site}{end}" in tables:
            mean, low, high = (x if x is None else 100 * x for x in tables[f"{site}{end}"])
            assert mean is not None
            average = "" if low is None else "average "
            curves.append(Curve(range(len(mean)), mean, low, high, label, colour))
    layer = f"layer of {PurePath(model).name} at which the state is restored, {role} token"
    return plot_bars(curves, layer, f"{average}indirect effect, %", heading, warning)
