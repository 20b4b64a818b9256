"""Keys and states at the subjects of many facts, layer after layer while weights below change.

Rows end at their subject, since a causal model does not see what follows it. What enters the first
edited block is computed once. Of three edited layers 3, 4, 5:

            all rows (keys)                          bare prompts (states of 5)
    at(3)   block 3                                  blocks 3, 4, 5
    at(4)   blocks 3, 4: 3 is edited and final now   blocks 4, 5
    at(5)   blocks 4, 5: 4 is edited and final now   block 5

The released code runs every row through the whole model at every layer. Knows blocks. Refuses to
know what is solved with the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.editors.closed_form.shifted_rows import Site, site_modules
from engram.editors.closed_form.values import subject_row
from engram.engine.recording import base_model, record_run
from engram.engine.replayable import Engine, use_replay
from engram.engine.suffix import Suffix
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import RowContext, no_edits, record

_ROWS = 1024  # rows of one forward pass, which bounds memory


@dataclass
class _Chunk:
    """Rows of some facts; all contexts of a fact are adjacent, its bare prompt first."""

    facts: list[int]
    ids_bt: Tensor
    lookup: Tensor
    bare: Tensor  # numbers of the rows of bare prompts
    suffix: Suffix | None  # of whole rows; None where the model runs whole
    hidden_btd: Tensor | None
    layer: int  # that `hidden_btd` enters

    def row_facts(self, contexts: int) -> list[int]:
        """Return the fact of each row."""
        return [fact for fact in self.facts for _ in range(contexts)]


class SubjectStates:
    """Reader of the keys of `layers` and the states of the last one.

    Args:
        layers: the blocks that will be edited, ascending; `at` is called in this order.
        site: which state of the last layer, see `shifted_rows`.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        contexts: Sequence[str],
        layers: Sequence[int],
        site: Site,
        engine: Engine,
    ) -> None:
        self.lm, self.contexts, self.first, self.last = lm, contexts, layers[0], layers[-1]
        self.count = len(facts)
        self.state_name = list(site_modules(lm, site, self.last).values())[-1][0]
        self.chunks: list[_Chunk] = []
        replays = use_replay(lm, engine)
        rows = [
            [subject_row(lm, fact.subject, fact.prompt, context) for context in contexts]
            for fact in facts
        ]
        # By length, so that a chunk's rows end at about the same token: less padding is run.
        order = sorted(range(len(facts)), key=lambda i: max(at for _, at in rows[i]))
        size = max(1, _ROWS // len(contexts))
        for start in range(0, len(order), size):
            members = order[start : start + size]
            cut = [ids[: at + 1] for i in members for ids, at in rows[i]]
            ids_bt = pad_right(cut)
            suffix = hidden = None
            if replays:
                recording = record_run(lm, ids_bt, until=self.last).select(
                    torch.arange(len(cut)), self.first
                )
                suffix = Suffix(recording, 0, ids_bt.shape[1])
                hidden = recording.hidden[self.first]
            lookup = torch.tensor([len(row) - 1 for row in cut])
            bare = torch.arange(len(members)) * len(contexts)
            self.chunks.append(_Chunk(members, ids_bt, lookup, bare, suffix, hidden, self.first))

    @torch.no_grad()
    def at(self, layer: int, around: RowContext = no_edits) -> tuple[Tensor, Tensor]:
        """Return keys [n, contexts, f] of `layer`'s MLP output matrix, and states [n, d] of the
        bare prompts, with the weights as they are now.

        Float32 (float64 for a float64 model), in the order of the facts.

        Args:
            around: applies to each row what is in force for its fact, such as a change of its own.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        for chunk in self.chunks:
            keys_bf, states_nd = (self._replayed if chunk.suffix is not None else self._whole)(
                chunk, layer, around
            )
            wide = torch.promote_types(keys_bf.dtype, torch.float32)
            parts.append(
                (keys_bf.to(wide).unflatten(0, (len(chunk.facts), -1)), states_nd.to(wide))
            )
        # Chunks go by length: back to the order of the facts, in which targets and deltas are.
        place = torch.tensor([i for chunk in self.chunks for i in chunk.facts]).argsort()
        keys_ncf, states_nd = (torch.cat(part) for part in zip(*parts, strict=True))
        return keys_ncf[place.to(keys_ncf.device)], states_nd[place.to(states_nd.device)]

    def _replayed(self, chunk: _Chunk, layer: int, around: RowContext) -> tuple[Tensor, Tensor]:
        assert chunk.suffix is not None and chunk.hidden_btd is not None
        name = self.lm.parts.mlp_out_name(layer)
        with around(chunk.row_facts(len(self.contexts))):
            # Edited since the last call, and final now.
            for below in range(chunk.layer, layer):
                chunk.hidden_btd = chunk.suffix.block(below, chunk.hidden_btd)
            with record(self.lm.model, inputs=[name], stop=True) as seen:
                chunk.suffix.block(layer, chunk.hidden_btd)
        chunk.layer = layer
        keys_bf = self._at_subject(seen[name], chunk)
        hidden_ntd = chunk.hidden_btd[chunk.bare.to(chunk.hidden_btd.device)]
        with (
            around(chunk.facts),
            record(self.lm.model, outputs=[self.state_name], stop=True) as seen,
        ):
            for above in range(layer, self.last + 1):
                hidden_ntd = chunk.suffix.block(above, hidden_ntd, chunk.bare)
        return keys_bf, self._at_subject(seen[self.state_name], chunk, chunk.bare)

    def _whole(self, chunk: _Chunk, layer: int, around: RowContext) -> tuple[Tensor, Tensor]:
        name = self.lm.parts.mlp_out_name(layer)
        with (
            around(chunk.row_facts(len(self.contexts))),
            record(self.lm.model, inputs=[name], outputs=[self.state_name], stop=True) as seen,
        ):
            base_model(self.lm)(chunk.ids_bt.to(self.lm.device), use_cache=False)
        key = f"{name}:input" if name == self.state_name else name
        return self._at_subject(seen[key], chunk), self._at_subject(seen[self.state_name], chunk)[
            chunk.bare
        ]

    @staticmethod
    def _at_subject(seen: Tensor, chunk: _Chunk, rows: Tensor | None = None) -> Tensor:
        lookup = chunk.lookup if rows is None else chunk.lookup[rows]
        states = seen.view(len(lookup), -1, seen.shape[-1])
        return states[torch.arange(len(lookup)), lookup]
