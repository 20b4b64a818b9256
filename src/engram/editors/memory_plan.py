"""What an edit will take in memory and on disk, computed from shapes before anything big starts.

Knows shapes only: works on a model on the meta device, which has no weights. It counts what the
editors hold at once. That is an estimate; the tests compare it with measured peaks, and it has to
be within a factor of two. Refuses to know how an edit is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from engram.checks import Count, Layers, checked_call, one_of
from engram.editors.closed_form.mass_settings import MASS_METHODS
from engram.editors.presets import preset, preset_layers
from engram.editors.second_moments.measure import TOKENS_PER_KEY
from engram.model.language_model import LanguageModel
from engram.modules.weights import linear_shape

Phase = Literal["throughout", "second moments", "values", "solve", "on disk"]
PLANNED = ("rome", *MASS_METHODS)
_BATCH_TOKENS = 4096  # of one forward pass over text, see second_moments
_SAMPLED = 64, 100  # texts that a model samples at once, tokens of each, see corpora
_WIDE = 8  # bytes of a float64


@dataclass(frozen=True)
class Part:
    """A part of what is held in memory, or written to disk, during a phase."""

    what: str
    phase: Phase
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What an edit will take; `str(plan)` is a table.

    Attributes:
        parts: everything that is counted.
        about: the edit that was planned, in a line.
    """

    parts: tuple[Part, ...]
    about: str

    def of(self, phase: Phase) -> int:
        """Return the bytes of a phase, without what stays throughout."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    @property
    def beside(self) -> int:
        """Largest number of bytes held in addition to the model."""
        return max(self.of("second moments"), self.of("values"), self.of("solve"))

    @property
    def peak(self) -> int:
        """The same with the model. Python and its libraries take about half a gigabyte more."""
        return self.of("throughout") + self.beside

    @property
    def on_disk(self) -> int:
        return self.of("on disk")

    def __str__(self) -> str:
        width = max(len(part.what) for part in self.parts)
        rows = [self.about, f"{'what':<{width}}  {'when':<14} {'MB':>10}"]
        rows += [
            f"{part.what:<{width}}  {part.phase:<14} {part.bytes / 1e6:>10,.1f}"
            for part in self.parts
        ]
        rows.append(f"{'peak beside the model':<{width}}  {'':<14} {self.beside / 1e6:>10,.1f}")
        rows.append(f"{'peak':<{width}}  {'':<14} {self.peak / 1e6:>10,.1f}")
        return "\n".join(rows)


@dataclass(frozen=True)
class _Shapes:
    """Sizes of a model and of an edit of it."""

    layers: int
    first: int  # lowest layer whose blocks are run again
    d: int
    f: int
    kv: int  # width of one token's keys, or values, of one layer
    v: int
    item: int  # bytes of a number in the model's dtype
    edited: int  # layers edited
    facts: int
    rows_a_fact: int  # contexts
    rows: int  # rows of one value optimisation
    row_tokens: int
    target_tokens: int


@checked_call
def memory_plan(
    lm: LanguageModel,
    n_facts: Count = 1,
    method: str = "rome",
    *,
    layers: Layers | None = None,
    contexts: Count | None = None,
    row_tokens: Count = 24,
    target_tokens: Count = 2,
    facts_per_batch: Count = 32,
) -> MemoryPlan:
    """Estimate from shapes what rewriting `n_facts` facts will take; no weight is read.

    Args:
        lm: may be on the meta device (`language_model.load_shapes`).
        layers: those that are edited; default: the preset's.
        contexts: texts that a value is optimised in; default: as published, 21 for ROME and 6 for
            the others.
        row_tokens: tokens of a context, the prompt and the target together.
        target_tokens: of them, those of the target.
        facts_per_batch: facts whose values are optimised in one batch (ROME: always one).
    Raises:
        SettingError: a method that is not planned here, or a number below 1.
        UnsupportedModelError: a model without a single MLP output matrix per block.
    Example:
        >>> plan = engram.memory_plan(lm, n_facts=10, method="memit")
        >>> plan.on_disk < plan.beside < plan.peak
        True
    """
    one_of("method", method, PLANNED)
    mass = method in MASS_METHODS
    chosen = (
        preset_layers(preset(method, lm.name), lm.n_layers, "layers" if mass else "layer")
        if layers is None
        else sorted(set(layers))
    )
    contexts = (6 if mass else 21) if contexts is None else contexts
    d, f = linear_shape(lm.parts.mlp_out(chosen[-1]))
    config: Any = lm.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or d // heads)
    shapes = _Shapes(
        layers=lm.n_layers,
        first=chosen[-1],
        d=d,
        f=f,
        kv=head_size * int(getattr(config, "num_key_value_heads", None) or heads),
        v=int(config.vocab_size),
        item=lm.dtype.itemsize,
        edited=len(chosen),
        facts=n_facts,
        rows_a_fact=contexts,
        rows=(min(n_facts, facts_per_batch) if mass else 1) * (contexts + 1),
        row_tokens=row_tokens,
        target_tokens=target_tokens,
    )
    stored = sum(_stored(tensor) for tensor in (*lm.model.parameters(), *lm.model.buffers()))
    facts, blocks = (f"{n_facts} fact{'s' * (n_facts > 1)}", f"layer{'s' * (len(chosen) > 1)}")
    about = (
        f"{lm.name}: {facts} by {method} at {blocks} {', '.join(map(str, chosen))}; {_name(lm)}, "
        f"d_model {d}, d_ff {f}"
    )
    samples = preset(method, lm.name).get("corpus") == "sampled"
    return MemoryPlan((Part("model", "throughout", stored), *_parts(shapes, mass, samples)), about)


def _parts(s: _Shapes, mass: bool, samples: bool) -> Iterator[Part]:
    moments = s.edited * s.f**2 * _WIDE
    texts, tokens = _SAMPLED
    drawn = texts * (
        2 * s.layers * s.kv * tokens * s.item + 3 * s.v * 4
    )  # keys, values; logits and what is drawn from
    forward = _BATCH_TOKENS * (4 * s.d + 2 * s.f) * s.item
    yield Part(f"sums of k k^T over {TOKENS_PER_KEY * s.f:,} tokens", "second moments", moments)
    what = "a forward pass over text" + ", or the sampling of that text" * samples
    yield Part(what, "second moments", max(forward, drawn * samples))

    run = s.rows * s.row_tokens * s.item  # one number for every recorded token
    recorded = run * ((s.layers + 1) * s.d + 2 * s.layers * s.kv + s.f)
    suffix = (
        s.rows * min(s.row_tokens, s.row_tokens // 2 + s.target_tokens) * s.item
    )  # from the subject's last token on
    graph = (
        suffix * (s.layers - s.first) * (8 * s.d + 2 * s.f) + run * (s.layers - s.first) * 4 * s.kv
    )
    logits = s.rows * s.target_tokens * s.v * (s.item + 3 * 4)
    yield Part("second moments", "values", moments)
    yield Part(f"a recorded run of {s.rows} rows of {s.row_tokens} tokens", "values", recorded)
    yield Part("what the gradient needs of the layers above", "values", graph)
    yield Part("logits", "values", logits)

    keys = s.facts * s.edited * (s.f + s.d) * 4
    yield Part("second moments", "solve", moments)
    yield Part("C shifted, its factor, and room to compute it", "solve", 4 * s.f**2 * _WIDE)
    yield Part("keys and values of all facts", "solve", keys)
    if mass:
        every = s.facts * s.rows_a_fact * (s.row_tokens * s.d * s.item + s.f * 4)
        yield Part("states and keys of all facts in all contexts", "solve", every)
        yield Part(
            "the change of a layer, and the system of all facts",
            "solve",
            (3 * s.d * s.f + s.facts * (s.f + s.d)) * _WIDE,
        )
    yield Part("the edit", "on disk", s.edited * 4 * min(s.facts * (s.d + s.f), s.d * s.f))


def _stored(tensor: Tensor) -> int:
    """Return the bytes of a tensor as it is held: of a packed one, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        inside = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum(_stored(part) for part in inside if part is not None)
    return tensor.numel() * tensor.element_size()


def _name(lm: LanguageModel) -> str:
    return str(lm.dtype).removeprefix("torch.")
