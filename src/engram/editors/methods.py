"""The table of methods that rewrite facts: functions (LanguageModel, facts, settings) -> Edit.

A method reads the model and never changes it. It returns a value: an Edit, or a PromptEdit, which
has no weights. The table holds names, not functions, so that a command imports only the method that
it uses. Refuses to know what a method computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, cast

from engram.checks import check_arguments, one_of
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramError
from engram.settings import read

_NO_SETTINGS = {"lm", "facts", "method", "settings"}  # what a call names itself


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
        config: "module:name" of the dataclass of its settings: wrong ones are then an error before
            anything is measured.
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

    def check_settings(self, settings: Mapping[str, Any], method: str, model: str) -> None:
        """Raise an error for settings that the method refuses, before anything is computed.

        Args:
            settings: as `rewrite` takes them, layer="auto" too.
            method: its name in the table.
            model: name of the model, whose preset gives the other settings.
        Raises:
            SettingError: a setting that it does not have, of another type or range, or a
                combination that means nothing.
        """
        from engram.editors.closed_form.mass_settings import settings_of  # imports torch

        takes: set[str] = set()
        for function in filter(None, (self.load(), self.load_batch())):
            takes |= set(signature(function).parameters) - _NO_SETTINGS
            given = {name: value for name, value in settings.items() if not _is_auto(name, value)}
            check_arguments(function, given)
        if self.config is not None:
            takes |= {"depth"}  # how presets say a layer
            own = {name: settings[name] for name in settings if name not in takes}
            usual = settings_of(method, model, own)
            config = cast("type[Any]", _imported(self.config))
            usual = {name: value for name, value in usual.items() if name not in takes}
            read(config, usual, method, ", ".join(sorted(takes)))


def _is_auto(name: str, value: Any) -> bool:
    return name in ("layer", "layers") and isinstance(value, str) and value == "auto"


def _imported(function: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return cast("Callable[..., Any]", getattr(import_module(module), name))


_MASS = "engram.editors.closed_form.mass_settings:MassConfig"
_TUNED = "engram.editors.training.fine_tuning:FineTuningConfig"
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
        config=_TUNED,
    ),
    "ft-l": Method(
        "engram.editors.training.fine_tuning:ft_l",
        "fine-tune one MLP output matrix, no entry further than norm_constraint",
        "Zhu et al. 2020, arXiv:2012.00363",
        config=_TUNED,
    ),
    "ft-w": Method(
        "engram.editors.training.fine_tuning:ft_w",
        "fine-tune one MLP output matrix with weight decay",
        "Meng et al. 2023, arXiv:2210.07229",
        config=_TUNED,
    ),
    "locft-bf": Method(
        "engram.editors.training.fine_tuning:locft_bf",
        "fine-tune one MLP output matrix in epochs of mini-batches over all facts",
        "Yang et al. 2025, arXiv:2509.22072",
        config=_TUNED,
    ),
    "lora": Method(
        "engram.editors.training.lora:lora",
        "train low-rank adapters of a few matrices on the facts",
        "Hu et al. 2021, arXiv:2106.09685",
        config="engram.editors.training.lora:LoraEditConfig",
    ),
    "ultraedit": Method(
        "engram.editors.training.ultraedit:ultraedit",
        "one gradient step on a few matrices through a ridge solve, without subjects or a corpus",
        "Gu et al. 2025, arXiv:2505.14679",
        batch_function="engram.editors.training.ultraedit:ultraedit_each",
        depends_on_batch=True,
        config="engram.editors.training.ultraedit:UltraEditConfig",
    ),
    "in-context": Method(
        "engram.editors.in_context:in_context",
        "the facts stated in front of the prompts they are relevant to; no weights",
        "the plain baseline of Zheng et al. 2023, arXiv:2305.12740",
        config="engram.editors.in_context:InContextConfig",
    ),
    "ike": Method(
        "engram.editors.in_context:ike",
        "the same after demonstrations of what follows from a new fact and what does not",
        "Zheng et al. 2023, arXiv:2305.12740",
        config="engram.editors.in_context:IkeConfig",
    ),
}


def check_method(name: str, settings: Mapping[str, Any], model: str) -> None:
    """Raise an error for a method that does not exist, or settings that it refuses.

    Args:
        settings, model: see `Method.check_settings`.
    Raises:
        EngramError: no method has that name; SettingError: see `Method.check_settings`.
    """
    method_named(name)
    METHODS[name].check_settings(settings, name, model)


def method_named(name: str) -> Callable[..., Edit | PromptEdit]:
    """Return the function of a method.

    Raises:
        EngramError: no method has that name.
    """
    one_of("method", name, METHODS, error=EngramError)
    return METHODS[name].load()
