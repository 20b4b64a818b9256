"""What the mass editors are made of: their settings, and the table of methods.

Knows which settings make a method, and which exclude each other. Refuses to know how they are used
(see mass).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from engram.checks import NonNegative, Positive, check_fields
from engram.editors.closed_form.shifted_rows import Site
from engram.editors.closed_form.values import ValueConfig
from engram.editors.presets import overridden, preset
from engram.errors import SettingError


@dataclass(frozen=True)
class MassConfig:
    """Settings of the closed-form mass editors, with those of the value optimisation.

    Args:
        preservation: lambda, the weight of C (`mom2_update_weight`). None: `relative_preservation`
            x d_ff, which means the same for every model, as one key's k^T C^-1 k is d_ff on
            average.
        slack: EMMET's epsilon, which multiplies the weight. 0: every key is met exactly, and C only
            breaks ties.
        ridge: weight of ||Delta||^2, absolute (AlphaEdit's L2).
        relative_ridge: in its place, the same as a multiple of the mean squared length of a key,
            C's trace, which means the same for every model.
        null_energy, null_threshold: confine the change to C's null space, see
            `SecondMoment.null_space`. The published threshold is 2e-2; an energy means the same for
            every model.
        share: how much of the residual a layer takes that has `left` layers from itself on: "even"
            1 / left, "root" 1 / sqrt(left), "all" 1.
        site: which state is optimised and compared, see `shifted_rows.Site`.
        keys: "halves": half the bare prompt's key, half the contexts' mean (published). "mean": of
            all alike. "both" (ours): both are sent to the value, for models that treat a text's
            first token specially; one column a fact all the same, and later edits preserve the mean
            of the two.
        norm_anchor: scale each value to the mean norm that those of the first edit of `past` had
            (2026), against growth in long sequences.
        reference: the released code's order of operations: one LU per layer, no cached factors.
    """

    preservation: NonNegative | None = None
    relative_preservation: NonNegative = 1.0
    slack: NonNegative = 1.0
    ridge: NonNegative = 0.0
    relative_ridge: NonNegative = 0.0
    null_energy: Annotated[float, Gt(0), Lt(1)] | None = None
    null_threshold: Positive | None = None
    share: Literal["even", "root", "all"] = "even"
    site: Site = "block"
    keys: Literal["halves", "mean", "both"] = "halves"
    norm_anchor: bool = False
    reference: bool = False
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.null_energy is not None and self.null_threshold is not None:
            raise SettingError(
                f"null_energy={self.null_energy}, null_threshold={self.null_threshold}: give one "
                "of them, either says what the null space is"
            )
        if self.ridge and self.relative_ridge:
            raise SettingError(
                f"ridge={self.ridge}, relative_ridge={self.relative_ridge}: give one of them, "
                "either says how strongly a change is held"
            )
        held = self.ridge or self.relative_ridge
        if self.projects and not (held or self.weight(1)):
            raise SettingError(
                "ridge=0: nothing would hold a change in the null space; set ridge above 0 "
                "(published: 10)"
            )
        if self.exact and held:
            raise SettingError(
                f"ridge={held} without slack or preservation: every key is met exactly, "
                "which leaves nothing to weigh the change against; set both above 0, or ridge=0"
            )
        if self.reference and (held or self.projects or self.slack != 1 or self.keys == "both"):
            raise SettingError(
                "reference=True is MEMIT as released: without ridge, null space, slack and "
                "keys='both'"
            )

    @property
    def projects(self) -> bool:
        return self.null_energy is not None or self.null_threshold is not None

    @property
    def exact(self) -> bool:
        """True if every key is met exactly."""
        return not self.projects and not self.weight(1)

    def weight(self, d_ff: int) -> float:
        """Return the weight of C in the least-squares problem."""
        return self.slack * (
            self.relative_preservation * d_ff if self.preservation is None else self.preservation
        )


# The last layer, with one left, takes all of what is missing whatever the rule.
RESIDUAL_SHARES: dict[str, Callable[[int], float]] = {
    "even": lambda left: 1 / left,
    "root": lambda left: left**-0.5,
    "all": lambda left: 1.0,
}


KEEPS_PAST_KEYS = ("memit-seq", "alphaedit")  # keys of earlier edits are preserved


# What makes a method; numbers are in presets. EMMET with a slack is MEMIT with the weight slack x
# lambda (equal to 1e-13), so that one solver serves all rows. AlphaEdit's C is its null space only.
MASS_METHODS: dict[str, dict[str, Any]] = {
    "memit": {},
    "emmet": {"share": "all"},
    "memit-seq": {},
    "alphaedit": {"preservation": 0.0},
    "pmet": {"share": "root", "site": "attention+mlp", "stop": "adaptive"},
}


def settings_of(method: str, model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's row, overridden by the model's preset, overridden by what is given.

    Of a method without a row, the preset overridden by what is given.
    """
    usual = overridden(MASS_METHODS.get(method, {}), preset(method, model))
    if given.get("reference"):
        for name in (
            "keys",
            "variant",
            "contexts",
        ):  # the preset's own choice gives way to the released one
            usual.pop(name, None)
    return overridden(usual, given)
