"""Batches are as full as their limits allow, and lose no item."""

from __future__ import annotations

from itertools import pairwise

import torch

from engram.batching import batches

LENGTHS = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def test_padded_batches_keep_to_their_tokens_and_are_as_full_as_they_may_be():
    parts = list(batches(LENGTHS, key=int, length=int, tokens=64))
    assert [n for part in parts for n in part] == sorted(LENGTHS)
    assert all(len(part) * max(part) <= 64 for part in parts)
    for part, after in pairwise(parts):
        assert (len(part) + 1) * max(*part, after[0]) > 64


def test_sizes_sum_to_the_total_at_most_and_items_keep_their_order():
    parts = list(batches(LENGTHS, size=int, total=50))
    assert [n for part in parts for n in part] == LENGTHS
    assert all(sum(part) <= 50 for part in parts)
    for part, after in pairwise(parts):
        assert sum(part) + after[0] > 50


def test_an_item_above_a_limit_is_a_batch_of_its_own():
    assert list(batches([3, 99, 4], size=int, total=10)) == [[3], [99], [4]]
    assert list(batches([3, 99, 4], length=int, tokens=10)) == [[3], [99], [4]]
    assert list(batches([], size=int, total=10)) == []


def test_a_condition_sees_the_batch_that_an_item_would_join():
    parts = list(batches("aabbba", lambda batch, letter: letter == batch[0]))
    assert parts == [["a", "a"], ["b", "b", "b"], ["a"]]
