"""Whether a model can be replayed: tried out on a few tokens, then remembered.

Knows what replay has to give: the model's own numbers. Refuses to know families by name: a family
that surprises us is detected here and runs through whole forward passes.
"""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from engram.engine.recording import NotReplayableError, record_run
from engram.engine.suffix import Suffix, log
from engram.errors import UnsupportedModelError
from engram.model.language_model import LanguageModel
from engram.modules.hooks import StopForward

Engine = Literal["auto", "replay", "whole"]


_REPLAYABLE: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def use_replay(lm: LanguageModel, engine: Engine) -> bool:
    """Return whether to replay: as `engine` says, or for "auto" wherever it gives the model's own
    numbers (see `replayable`).

    Raises:
        UnsupportedModelError: engine="replay", and the model cannot be replayed.
    """
    if engine == "replay" and not replayable(lm):
        raise UnsupportedModelError(
            f"engine='replay': {lm.name} (model_type={lm.model.config.model_type!r}) cannot be "
            "replayed; leave out engine, and it runs through whole forward passes"
        )
    return engine != "whole" and replayable(lm)


def replayable(lm: LanguageModel) -> bool:
    """Return whether replay gives this model's own numbers: tried once per model, then remembered.

    The try covers rows with different starts, the short last block and the head. It is repeated
    where the attention implementation or the dtype was changed since.
    """
    # On a weak key: an edit keeps the model's blocks, so the answer outlives edits but not models.
    known = _REPLAYABLE.setdefault(lm.model, {})
    key = (getattr(lm.model.config, "_attn_implementation", None), lm.dtype)
    if key not in known:
        try:
            known[key] = _try(lm)
        # Whatever a family's own code raises when its blocks are called in an unusual way.
        except (
            NotReplayableError,
            StopForward,
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
        ) as error:
            log.debug("%s cannot be replayed: %s", lm.name, error)
            known[key] = False
        if not known[key]:
            log.debug("%s runs through whole forward passes", lm.name)
    return known[key]


@torch.no_grad()
def _try(lm: LanguageModel) -> bool:
    vocabulary = int(lm.model.config.vocab_size)
    # Distinct tokens; rows differ, so that mixing up rows cannot go unnoticed.
    ids_bt = (torch.arange(14).view(2, 7) * 31 + 5) % vocabulary
    recording = record_run(lm, ids_bt)
    tolerance = 1e-3 if torch.finfo(lm.dtype).eps < 1e-5 else 0.1

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).float().norm() <= tolerance * b.float().norm().clamp(min=1e-6))

    # One start for all rows takes other branches (views, one mask) than two starts.
    for starts in (3, [2, 4]):
        suffix = Suffix(recording, starts, 3)
        for layer in range(lm.n_layers):
            entering, leaving = suffix.states(layer), suffix.states(layer + 1)
            if not close(suffix.block(layer, entering), leaving):
                return False
            if not close(suffix.last_positions(layer, entering), leaving[:, -1:]):
                return False
            columns_br, rows_b1 = torch.tensor([[0, 1], [2, 0]]), torch.arange(2)[:, None]
            if not close(
                suffix.at_columns(layer, entering, columns_br), leaving[rows_b1, columns_br]
            ):
                return False
    return close(
        lm.parts.head(recording.hidden[-1]), lm.model(ids_bt.to(lm.device), use_cache=False).logits
    )
