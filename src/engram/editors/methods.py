"""The table of methods that rewrite facts: functions (LanguageModel, facts, settings) -> Edit.

A method reads the model and never changes it. It returns a value: an Edit, or a PromptEdit, which
has no weights. The table holds names, not functions, so that a command imports only the method that
it uses. Refuses to know what a method computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, cast

from engram.checks import one_of
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramError
from engram.settings import check_names


@dataclass(frozen=True)
class Method:
    """What `rewrite` calls by a name.

    Attributes:
        function: "module:name", imported when first used, or the function itself: (lm, facts, *,
            seed, progress, ...) -> Edit (or PromptEdit). A function that takes `past` gets the
            earlier edits; for any other they are in force on `lm` while it works.
        summary: what the method does, in a line.
        source: where it was published.
        batch_function: the same for many edits of one fact each, computed in one batch: (lm, facts,
            *, seed, ...) -> one Edit per fact, equal to what `function` returns for that fact
            alone. None: the edits are computed one by one.
        depends_on_batch: True if an edit of `batch_function` depends on which other facts are in
            the batch, so that it differs from what `function` returns.
        config: "module:name" of the dataclass of its settings, for methods whose layer a card can
            choose: a misspelt setting is then an error before anything is measured.
    """

    function: str | Callable[..., Edit | PromptEdit]
    summary: str
    source: str
    batch_function: str | Callable[..., list[Edit]] | None = None
    depends_on_batch: bool = False
    config: str | None = None

    def load(self) -> Callable[..., Edit | PromptEdit]:
        """Import and return `function`."""
        return cast("Callable[..., Edit | PromptEdit]", _imported(self.function))

    def load_batch(self) -> Callable[..., list[Edit]] | None:
        """Import and return `batch_function`, None where the method has none."""
        if self.batch_function is None:
            return None
        return cast("Callable[..., list[Edit]]", _imported(self.batch_function))

    def check_settings(self, names: Iterable[str], method: str) -> None:
        """Raise an error for a setting that neither the function nor its config has.

        Raises:
            SettingError: the message calls the method `method`.
        """
        if self.config is not None:
            # what a call names itself is not a setting; `depth` is how presets say a layer
            takes = {*signature(self.load()).parameters, "depth"}
            others = sorted(takes - {"lm", "facts", "method", "settings"})
            config = cast("type[Any]", _imported(self.config))
            check_names(config, set(names) - takes, method, ", ".join(others))


def _imported(function: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return cast("Callable[..., Any]", getattr(import_module(module), name))


_MASS = "engram.editors.closed_form.mass_settings:MassConfig"
METHODS: dict[str, Method] = {  # a new method is one file and one entry here
    "rome": Method(
        "engram.editors.closed_form.rome:rome",
        "one fact, one rank-one change of one MLP output matrix",
        "Meng et al. 2022, arXiv:2202.05262",
        batch_function="engram.editors.closed_form.rome:rome_each",
        config="engram.editors.closed_form.rome:RomeConfig",
    ),
    "memit": Method(
        "engram.editors.closed_form.mass:memit",
        "many facts at once, over a few layers",
        "Meng et al. 2023, arXiv:2210.07229",
        batch_function="engram.editors.closed_form.mass:memit_each",
        config=_MASS,
    ),
    "emmet": Method(
        "engram.editors.closed_form.mass:emmet",
        "many facts at once at one layer, each key met exactly up to a slack",
        "Gupta et al. 2024, arXiv:2403.14236",
        batch_function="engram.editors.closed_form.mass:emmet_each",
        config=_MASS,
    ),
    "memit-seq": Method(
        "engram.editors.closed_form.mass:memit_seq",
        "MEMIT that preserves the keys of earlier edits",
        "Fang et al. 2025, arXiv:2410.02355 (baseline)",
        batch_function="engram.editors.closed_form.mass:memit_seq_each",
        config=_MASS,
    ),
    "alphaedit": Method(
        "engram.editors.closed_form.mass:alphaedit",
        "changes in the null space of ordinary text's keys only; preserves earlier edits' keys",
        "Fang et al. 2025, arXiv:2410.02355",
        batch_function="engram.editors.closed_form.mass:alphaedit_each",
        config=_MASS,
    ),
    "pmet": Method(
        "engram.editors.closed_form.mass:pmet",
        "attention and MLP outputs optimised together, the MLP's part written",
        "Li et al. 2024, arXiv:2308.08742",
        batch_function="engram.editors.closed_form.mass:pmet_each",
        config=_MASS,
    ),
    "ft": Method(
        "engram.editors.training.fine_tuning:ft",
        "fine-tune one MLP output matrix on the facts",
        "Zhu et al. 2020, arXiv:2012.00363",
    ),
    "ft-l": Method(
        "engram.editors.training.fine_tuning:ft_l",
        "fine-tune one MLP output matrix, no entry further than norm_constraint",
        "Zhu et al. 2020, arXiv:2012.00363",
    ),
    "ft-w": Method(
        "engram.editors.training.fine_tuning:ft_w",
        "fine-tune one MLP output matrix with weight decay",
        "Meng et al. 2023, arXiv:2210.07229",
    ),
    "locft-bf": Method(
        "engram.editors.training.fine_tuning:locft_bf",
        "fine-tune one MLP output matrix in epochs of mini-batches over all facts",
        "Yang et al. 2025, arXiv:2509.22072",
    ),
    "lora": Method(
        "engram.editors.training.lora:lora",
        "train low-rank adapters of a few matrices on the facts",
        "Hu et al. 2021, arXiv:2106.09685",
    ),
    "ultraedit": Method(
        "engram.editors.training.ultraedit:ultraedit",
        "one gradient step on a few matrices through a ridge solve, without subjects or a corpus",
        "Gu et al. 2025, arXiv:2505.14679",
        batch_function="engram.editors.training.ultraedit:ultraedit_each",
        depends_on_batch=True,
    ),
    "in-context": Method(
        "engram.editors.in_context:in_context",
        "the facts stated in front of the prompts they are relevant to; no weights",
        "the plain baseline of Zheng et al. 2023, arXiv:2305.12740",
    ),
    "ike": Method(
        "engram.editors.in_context:ike",
        "the same after demonstrations of what follows from a new fact and what does not",
        "Zheng et al. 2023, arXiv:2305.12740",
    ),
}


def method_named(name: str) -> Callable[..., Edit | PromptEdit]:
    """Return the function of a method.

    Raises:
        EngramError: no method has that name.
    """
    one_of("method", name, METHODS, error=EngramError)
    return METHODS[name].load()
