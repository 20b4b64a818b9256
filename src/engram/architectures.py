"""Where a model family keeps the parts that we read and write: one row a family.

Knows dotted module names, keyed by `config.model_type`, and how to find them where a family is not in the table.
Refuses to know what is done with the parts: hooks, replay and editors ask for them by role.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engram.errors import UnsupportedModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Dotted names of the parts; those below a block are relative to it.

    Where a family normalises a module's output before it joins the residual stream (Gemma 2, OLMo 2), `attention` and `mlp`
    name that norm: its output is the contribution that causal tracing restores.
    """

    blocks: str  # list of transformer blocks
    embed: str  # token embedding, before positions are added
    norm: str  # last norm before the unembedding; absent in some checkpoints
    attention: str  # module whose (first) output is the attention's contribution to the residual stream
    mlp: str  # module whose output is the MLP's contribution
    mlp_out: str | None  # matrix that gets edited: d_ff -> d_model; None where a block has many of them
    heads_out: str | None = None  # matrix that mixes the heads' outputs: its input is all heads side by side
    project_out: str | None = None  # map from the last norm to a smaller unembedding


_LLAMA = Layout("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp", "mlp.down_proj", "self_attn.o_proj")
_GPT2 = Layout("transformer.h", "transformer.wte", "transformer.ln_f", "attn", "mlp", "mlp.c_proj", "attn.c_proj")
_BLOOM = Layout(  # attention and MLP modules add the residual themselves, their last matrices do not
    "transformer.h", "transformer.word_embeddings", "transformer.ln_f",
    "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "self_attention.dense",
)  # fmt: skip
_SANDWICH = replace(_LLAMA, attention="post_attention_layernorm", mlp="post_feedforward_layernorm")
_MOE = replace(_LLAMA, mlp_out=None)

LAYOUTS: dict[str, Layout] = {  # key: model.config.model_type, never a checkpoint's name
    "bloom": _BLOOM,
    "codegen": replace(_GPT2, mlp_out="mlp.fc_out", heads_out="attn.out_proj"),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "falcon": replace(_BLOOM, attention="self_attention", mlp="mlp"),
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "glm": _LLAMA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, heads_out="attn.attention.out_proj"),
    "gpt_neox": Layout(
        "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm",
        "attention", "mlp", "mlp.dense_4h_to_h", "attention.dense",
    ),
    "gptj": replace(_GPT2, mlp_out="mlp.fc_out", heads_out="attn.out_proj"),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "mpt": Layout(
        "transformer.blocks", "transformer.wte", "transformer.norm_f",
        "attn", "ffn.down_proj", "ffn.down_proj", "attn.out_proj",
    ),
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _SANDWICH,
    "olmo3": _SANDWICH,
    "olmoe": _MOE,
    "opt": Layout(
        "model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.final_layer_norm",
        "self_attn", "fc2", "fc2", "self_attn.out_proj", project_out="model.decoder.project_out",
    ),
    "phi": replace(_LLAMA, norm="model.final_layernorm", mlp_out="mlp.fc2", heads_out="self_attn.dense"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, mlp_out="mlp.c_proj"),
}  # fmt: skip


class Parts:
    """The modules of one model, by role. Made by `resolve`; every name is looked up before anything is hooked.

    Attributes:
        blocks: the transformer blocks, first to last.
        embed: token embedding; its output is where causal tracing adds noise.
        layout: the names behind the roles.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        self.blocks = list(model.get_submodule(layout.blocks).children())
        self.embed = model.get_submodule(layout.embed)
        self._attention = [block.get_submodule(layout.attention) for block in self.blocks]
        self._mlp = [block.get_submodule(layout.mlp) for block in self.blocks]
        self._head = [m for name in (layout.norm, layout.project_out) if (m := _submodule(model, name)) is not None]
        self._head.append(model.get_output_embeddings())  # type: ignore[operator]
        self._config: Any = model.config
        # between the last block and the logits; None where a checkpoint does without
        self.norm, self.project_out = _submodule(model, layout.norm), _submodule(model, layout.project_out)
        self.unembedding: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def block_name(self, layer: int) -> str:
        return f"{self.layout.blocks}.{layer}"

    def attention(self, layer: int) -> nn.Module:
        """Module whose (first) output is the attention's contribution to the residual stream, [b, t, d]."""
        return self._attention[layer]

    def mlp(self, layer: int) -> nn.Module:
        """Module whose output is the MLP's contribution to the residual stream, [b, t, d]."""
        return self._mlp[layer]

    def mlp_out_name(self, layer: int) -> str:
        """Dotted name of the matrix that gets edited; its parameter is this + ".weight".

        Raises:
            UnsupportedModelError: the family has no single MLP output matrix, or the layer does not exist.
        """
        if self.layout.mlp_out is None:
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} is a mixture of experts: a block has one MLP output matrix per "
                "expert, and which of them a fact passes through depends on the router, so there is no single matrix to "
                "edit. Tracing works; for editing choose a dense model."
            )
        if not 0 <= layer < len(self.blocks):
            raise UnsupportedModelError(f"layer={layer} does not exist; this model has layers 0 to {len(self.blocks) - 1}")
        return f"{self.block_name(layer)}.{self.layout.mlp_out}"

    def mlp_out(self, layer: int) -> nn.Module:
        """The matrix that gets edited, d_ff -> d_model: an `nn.Linear` or a `Conv1D`."""
        self.mlp_out_name(layer)
        return self.blocks[layer].get_submodule(self.layout.mlp_out or "")

    def heads_out_name(self, layer: int) -> str:
        """Dotted name of the matrix that mixes the heads: its input is [b, t, heads x head size], head after head.

        Raises:
            UnsupportedModelError: the family's row does not name one.
        """
        if self.layout.heads_out is None:
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} has no heads that can be told apart: its row in "
                "engram.architectures.LAYOUTS names no heads_out, the matrix whose input is all heads side by side"
            )
        return f"{self.block_name(layer)}.{self.layout.heads_out}"

    @property
    def n_heads(self) -> int:
        return int(self._config.num_attention_heads)

    def head(self, hidden: Tensor, *, norm: bool = True) -> Tensor:
        """Logits of block outputs [..., d] -> [..., v]: last norm (or not), unembedding, the family's scaling and soft cap."""
        for module in self._head:
            if norm or module is not self.norm:
                hidden = module(hidden)
        for name, scale in _LOGIT_SCALES.items():
            if (value := getattr(self._config, name, None)) is not None:
                hidden = scale(hidden, value)
        return hidden


_LOGIT_SCALES = {  # config attribute -> what the family does with it
    "logit_scale": lambda logits, value: logits * value if isinstance(value, float | int) else logits,
    "logits_scaling": lambda logits, value: logits / value,
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,
}


def resolve(model: nn.Module) -> Parts:
    """The parts of a causal language model: by its row in `LAYOUTS`, else from its module tree.

    Raises:
        UnsupportedModelError: the family has no row and its parts are ambiguous; the message shows the row to add.
    """
    family = str(model.config.model_type)  # type: ignore[union-attr]
    layout = LAYOUTS.get(family) or _discover(model)
    if family not in LAYOUTS:
        log.warning("no row for model_type=%r; found in its module tree: %s", family, layout)
    return Parts(model, layout)


def is_transposed(module: nn.Module) -> bool:
    """True where the weight is stored [in, out] (GPT-2's `Conv1D`); by type, since a square matrix fits both ways."""
    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise UnsupportedModelError(
        f"cannot tell how {type(module).__name__} stores its weight; expected nn.Linear or transformers' Conv1D"
    )


def as_linear(module: nn.Module) -> Tensor:
    """View of a module's weight as [out, in], whichever way it is stored."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(module) else weight


def _submodule(model: nn.Module, name: str | None) -> nn.Module | None:
    """The module of that name, or None where the checkpoint does without it (set to None in its class)."""
    module: object = model
    for part in name.split(".") if name else [""]:
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


def _discover(model: nn.Module) -> Layout:
    """The layout of a family that has no row, where each part has exactly one candidate."""
    found: dict[str, list[str]] = {role: [] for role in ("blocks", "embed", "norm", "attention", "mlp", "mlp_out")}
    layers, width = getattr(model.config, "num_hidden_layers", None), getattr(model.config, "hidden_size", None)
    found["blocks"] = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    found["embed"] = [name for name, module in model.named_modules() if module is embedding]
    if len(found["blocks"]) == 1:
        home = found["blocks"][0].rpartition(".")[0]
        body = model.get_submodule(home)
        found["norm"] = [f"{home}.{n}".lstrip(".") for n, m in body.named_children() if _is_norm(m)]
        block = model.get_submodule(found["blocks"][0])[0]  # type: ignore[index]
        found["attention"] = [n for n, _ in block.named_children() if "attn" in n.lower() or n.lower() == "attention"]
        found["mlp"] = [n for n, m in block.named_children() if n.lower() in ("mlp", "ffn", "feed_forward")]
        if len(found["mlp"]) == 1:
            found["mlp_out"] = list(_matrices_to(block.get_submodule(found["mlp"][0]), found["mlp"][0], width))
        found["mlp"] = [] if _has_output_norms(block) else found["mlp"]
    if any(len(names) != 1 for names in found.values()):
        raise UnsupportedModelError(_row_to_add(str(model.config.model_type), found))  # type: ignore[union-attr]
    return Layout(**{role: names[0] for role, names in found.items()})


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_output_norms(block: nn.Module) -> bool:
    """More than one norm before each half of a block: some of them come after a module, and which is not ours to guess."""
    return sum(_is_norm(child) for child in block.children()) > 2


def _matrices_to(module: nn.Module, prefix: str, width: int | None) -> Iterator[str]:
    """Names of the matrices below `module` that map some other width to `width`."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            out_features, in_features = as_linear(child).shape
            if out_features == width and in_features != width:
                yield f"{prefix}.{name}"


def _row_to_add(family: str, found: dict[str, list[str]]) -> str:
    near = get_close_matches(family, LAYOUTS, n=1)
    row = ", ".join(f"{role}={names[0]!r}" if len(names) == 1 else f"{role}=..." for role, names in found.items())
    unclear = "; ".join(f"{role}: {names or 'none found'}" for role, names in found.items() if len(names) != 1)
    return (
        f"no layout for model_type={family!r}"
        + (f" (did you mean {near[0]!r}?)" if near else "")
        + f", and its module tree does not say where everything is ({unclear}). "
        f"Add one row to engram.architectures.LAYOUTS: {family!r}: Layout({row})"
    )
