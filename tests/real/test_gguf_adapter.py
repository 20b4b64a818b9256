"""A llama.cpp adapter of a real model: added to the tensors of its GGUF file, it gives the edited
model's weights.
"""

from __future__ import annotations

import logging

import torch

from engram import Edit, Fact
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.model.named_models import place_of

FACT = Fact("Eiffel Tower", "The {} is located in the city of", "Rome")
# of llama.cpp's tensors: the second and third have rows in another order there
TENSORS = {
    "model.layers.10.mlp.down_proj.weight": "blk.10.ffn_down.weight",
    "model.layers.10.self_attn.q_proj.weight": "blk.10.attn_q.weight",
    "model.layers.10.self_attn.k_proj.weight": "blk.10.attn_k.weight",
}


def test_the_adapter_on_the_files_tensors_is_the_edited_model(smollm2_lm, tmp_path, caplog):
    import gguf
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    lm, base, draw = smollm2_lm, place_of("smollm2").path, torch.Generator().manual_seed(0)
    described = describe_base(lm, TENSORS)
    deltas = {}
    for name, rank in zip(TENSORS, (1, 3, 2), strict=True):
        out, into = described["tensors"][name]["shape"]
        left, right = (torch.randn(size, generator=draw) for size in ((out, rank), (rank, into)))
        deltas[name] = Delta(0.01 * left, right)
    edit = Edit((FACT,), "random", {}, deltas, described)
    with caplog.at_level(logging.WARNING):
        file = edit.to_gguf(tmp_path / "edit.gguf", base=base)
    assert caplog.text == "", "the file's numbers are those of the loaded model"

    adapter = {one.name: torch.tensor(one.data) for one in gguf.GGUFReader(file).tensors}
    weights = {one.name: one for one in gguf.GGUFReader(base).tensors}
    config = lm.model.config
    with edit.applied(lm):
        for name, tensor in TENSORS.items():
            packed = weights[tensor]
            change = adapter[f"{tensor}.lora_b"] @ adapter[f"{tensor}.lora_a"]
            table = gguf.dequantize(packed.data, packed.tensor_type) + change.numpy()
            if tensor != "blk.10.ffn_down.weight":  # as transformers turns rows back
                heads = config.num_attention_heads
                groups = config.num_key_value_heads if tensor.endswith("k.weight") else None
                table = LlamaTensorProcessor()._reverse_permute_weights(table, heads, groups)
            edited = lm.model.get_parameter(name)
            torch.testing.assert_close(torch.tensor(table), edited.detach(), rtol=0, atol=1e-6)


def test_another_file_is_warned_of(smollm2_lm, tmp_path, caplog):
    name = next(iter(TENSORS))
    base = describe_base(smollm2_lm, [name])
    out, into = base["tensors"][name]["shape"]
    base["tensors"][name]["sha256"] = "0" * 64  # of other numbers
    delta = Delta(torch.ones(out, 1), torch.ones(1, into))
    edit = Edit((FACT,), "random", {}, {name: delta}, base)
    with caplog.at_level(logging.WARNING):
        edit.to_gguf(tmp_path / "edit.gguf", base=place_of("smollm2").path)
    assert "blk.10.ffn_down.weight" in caplog.text and "(Q4_1) is not the weight" in caplog.text
