"""lm-evaluation-harness on an edited model: its tasks and its numbers.

Knows how the harness is called. Refuses to know tasks.
Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from engram.checks import Count, checked_call
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import MissingExtraError, SettingError
from engram.model.language_model import LanguageModel

Mode = Literal["beside", "weights"]


@checked_call
def harness(
    lm: LanguageModel,
    tasks: Annotated[Sequence[str], MinLen(1)],
    *,
    edit: Edit | PromptEdit | None = None,
    mode: Mode = "beside",
    include_path: str | Path | None = None,
    rows_per_batch: Count = 8,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness on a model, edited or not.

    Args:
        tasks: names, as the harness knows them.
        edit: applied to the model for the length of the evaluation.
        mode: how the edit is applied, see `Edit.applied`. "beside": the change is added to the
            output of the modules, so that weights may be quantised; "weights": it is written into
            the weights.
        include_path: folder with tasks of your own.
        rows_per_batch: rows of a forward pass.
        settings: of `lm_eval.simple_evaluate`, such as num_fewshot=5 or limit=100.
    Returns:
        Task -> metric -> value, as the harness reports them.
    Raises:
        MissingExtraError: the harness is not installed.
        SettingError: a task that does not exist, another mode, or an edit of words, which the
            harness' prompts do not pass through.
    Example:
        >>> engram.harness(lm, ["piqa"], edit=edit, limit=100)  # doctest: +SKIP
        {'piqa': {'acc,none': 0.55, ...}}
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "harness") from error
    if edit is not None and not edit.changes_weights:
        raise SettingError(
            f"{edit!r} is a text in front of prompts, and the harness puts its own prompts to the "
            "model; give an edit of weights"
        )
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if missing := [task for task in tasks if not manager.match_tasks([task])]:
        raise SettingError(
            f"tasks {', '.join(missing)} do not exist; 'lm_eval ls tasks' shows the harness' own, "
            "include_path is for others"
        )
    # The loaded model itself: by name the harness would load it again, without the edit.
    model = HFLM(
        lm.model,
        backend="causal",
        tokenizer=lm.tokenizer,
        batch_size=rows_per_batch,
        max_length=lm.max_tokens,
    )
    # "beside" by default, for quantised weights; the numbers of both ways differ by rounding only.
    with nullcontext() if edit is None else edit.applied(lm, how=mode):
        results = lm_eval.simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, **settings
        )
    assert results is not None, "the harness gives None on processes other than the first only"
    return dict(results["results"])
