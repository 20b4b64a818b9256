"""A canary: two numbers that rise when edits begin to damage a model, with limits at which to stop.

Knows held-out text and norms. Refuses to know facts: whether an edit works is what a receipt says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from engram.checks import check_fields
from engram.edit.edit import Edit
from engram.errors import SettingError
from engram.evaluate.held_out import held_out_text
from engram.evaluate.receipt import Check, Thresholds
from engram.evaluate.verify import norm_ratio
from engram.model.language_model import LanguageModel

Limit = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Canary:
    """Limits that a model with all its edits has to keep; None: neither measured nor judged.

    It is coarse on purpose: it takes a minute and needs no facts. Neighbours of a fact suffer long
    before perplexity does (docs/ledger.md); receipts measure them.

    Args:
        max_perplexity_ratio: perplexity of held-out text, with the edits over without; the default
            is a receipt's.
        max_norm_ratio: ||change|| / ||weight||, Frobenius, of the weight that is changed most. The
            changes of n unrelated facts are about sqrt(n) times as long as one fact's, so the
            default is above a receipt's: 40 sound edits of pocket have 6.4; with one of them made
            10 times too large they have 6 to 14.
        text: the held-out text; default: half a page of plain prose.
    Raises:
        SettingError: a limit that is not above 0, or a text without words.
    """

    max_perplexity_ratio: Limit | None = Thresholds.max_perplexity_ratio
    max_norm_ratio: Limit | None = 10.0
    text: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.text is not None and not self.text.strip():
            raise SettingError(
                f"text={self.text!r} is empty; give prose that the model reads well, or None for "
                "the bundled page"
            )

    def perplexity(self, lm: LanguageModel) -> float | None:
        """Return the perplexity of the held-out text, as the model is now; None without a limit."""
        return (
            None
            if self.max_perplexity_ratio is None
            else lm.perplexity(self.text or held_out_text())
        )

    def checks(
        self, lm: LanguageModel, edit: Edit, before: float | None, after: float | None
    ) -> list[Check]:
        """Return both numbers with their limits.

        Args:
            lm: the unedited model.
            edit: all edits that are applied to it, as one.
            before, after: `perplexity` without the edit and with it.
        """
        # A ratio, since the perplexity itself says more about the text than about the edits.
        ratio = None if before is None or after is None else after / before
        change = None if self.max_norm_ratio is None else norm_ratio(lm, edit)
        return [
            Check("perplexity_ratio", ratio, self.max_perplexity_ratio, at_least=False),
            Check("norm_ratio", change, self.max_norm_ratio, at_least=False),
        ]
