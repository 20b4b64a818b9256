"""The precision of matrix products is set for a block, and put back however the block ends."""

from __future__ import annotations

import pytest
import torch

from engram.engine.precision import matmul_in


def test_products_are_rounded_inside_the_block_only() -> None:
    with matmul_in("bfloat16"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_error_puts_the_callers_setting_back() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="inside"), matmul_in("bfloat16"):
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == "high"
        with matmul_in("float32"):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
