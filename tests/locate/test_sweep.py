"""The sweep's worked example: which rows walk through the blocks, and that patches share them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from engram.locate import sweep
from engram.locate.settings import Patch
from engram.locate.sweep import Group, RowTable, TracedToken

R = [Patch("residual", layer, layer + 1) for layer in range(3)]
M0, M01, M12 = Patch("mlp", 0, 1), Patch("mlp", 0, 2), Patch("mlp", 1, 3)


def test_gathered_rows_repeat_reorder_and_drop():
    table = RowTable()
    table.append([M0, R[0]], torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    table.gather([R[0], M0, M0], [R[0], M0, M01])
    assert table.states == [R[0], M0, M01]
    assert table.hidden_nqd.flatten().tolist() == [3, 4, 1, 2, 1, 2]
    table.append([R[1]], torch.tensor([[5.0], [6.0]]))
    table.gather([R[1]], [R[1]])
    assert table.hidden_nqd.flatten().tolist() == [5, 6]


def test_three_layers_and_two_tokens_are_the_table_in_the_header(monkeypatch):
    through, opened = {}, {}

    class Walk:
        facts, read = torch.tensor([0, 1]), 1

        def __init__(self, runs, group):
            pass

        def through(self, layer, hidden_nqd, states):
            through[layer] = len(hidden_nqd), states
            return hidden_nqd

        def open(self, layer, states):
            opened[layer] = states
            number = [float(10 * layer + (s.site == "mlp")) for s in states for _ in range(2)]
            return torch.tensor(number)[:, None, None]

    monkeypatch.setattr(sweep, "_Walk", Walk)
    lm = SimpleNamespace(n_layers=3, parts=SimpleNamespace(head=lambda hidden: hidden))
    runs = SimpleNamespace(
        lm=lm, rows=SimpleNamespace(samples=1), scorer=lambda logits, facts: logits[:, 0, 0]
    )
    patches = (M0, M01, R[0], M12, R[1], R[2])
    group = Group((TracedToken(0, 1), TracedToken(1, 4)), patches)
    scores = sweep._sweep(runs, group)
    m1 = Patch("mlp", 1, 2)
    assert opened == {0: [M0, R[0]], 1: [m1, R[1]], 2: [R[2]]}, (
        "a window's later layers are to come"
    )
    assert through == {1: (6, [M0, M01, R[0]]), 2: (10, [M0, M01, R[0], M12, R[1]])}
    assert scores.tolist() == [[first] * 2 for first in (1, 1, 0, 11, 10, 20)]
