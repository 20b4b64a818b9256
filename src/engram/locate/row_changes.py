"""States put into a forward pass of many rows: what goes where, and the hooks that do it."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from engram.locate.recorded_runs import module_name
from engram.locate.rows import Change
from engram.locate.settings import PARTS
from engram.model.language_model import LanguageModel

_Job = tuple[list[int], int, tuple[int, int] | None, Tensor]  # groups, token, part, values


class RowChanges:
    """Changes to one forward pass whose rows come in `groups` equal groups, one after the other."""

    def __init__(self, lm: LanguageModel, groups: int) -> None:
        self.lm, self.groups = lm, groups
        self._jobs: dict[tuple[str, str], list[_Job]] = {}

    def put(
        self,
        module: tuple[str, int],
        groups: list[int],
        token: int,
        values_rc: Tensor,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Replace states at position `token` in the rows of some groups.

        Args:
            module: (site, layer).
            values_rc: [rows of one group, c]; of them only the channels `part`, if given.
        """
        site, layer = module
        direction = "inputs" if site in PARTS else "outputs"
        key = (direction, module_name(self.lm, site, layer))
        self._jobs.setdefault(key, []).append((groups, token, part, values_rc))

    def hooks(self) -> dict[str, dict[nn.Module, Change]]:
        """Return the arguments of `hooks.substitute`."""
        hooks: dict[str, dict[nn.Module, Change]] = {"outputs": {}, "inputs": {}}
        for (direction, name), jobs in self._jobs.items():
            hooks[direction][self.lm.model.get_submodule(name)] = partial(self._change, jobs)
        return hooks

    def _change(self, jobs: list[_Job], tensor: Tensor) -> Tensor:
        # a copy: what enters a module may enter others too, which the patch does not concern
        changed = tensor.clone()
        rows = len(jobs[0][3])
        # rows and tokens share an axis in some families' modules
        view_grtc = changed.view(self.groups, rows, -1, changed.shape[-1])
        for groups, token, part, values_rc in jobs:
            cut = slice(None) if part is None else slice(*part)
            view_grtc[groups, :, token, cut] = values_rc[:, cut].to(changed.device)
        return changed
