"""The modules of one model by role: blocks, attention, MLP, the matrix that gets edited, the head.

Knows modules and the names of their layout. Refuses to know where the names come from (layouts.py,
resolve.py), and what is done with the modules.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from engram.checks import did_you_mean
from engram.errors import UnsupportedModelError
from engram.modules.layouts import Layout, ModelKind
from engram.modules.weights import linear_shape


def takes(model: nn.Module, argument: str) -> bool:
    """Return whether a model's forward has an argument, such as "logits_to_keep" (it can compute
    logits at chosen positions only) or "past_key_values" (it can continue from a cache).

    Families differ in both, and a forward with `**kwargs` would swallow the argument silently.
    """
    return argument in signature(model.forward).parameters


class Parts:
    """The modules of one model by role, from `resolve`; every name is looked up before anything is
    hooked.

    Attributes:
        blocks: the blocks, first to last; an encoder-decoder model's are its encoder's.
        embed: token embedding; its output is where causal tracing adds noise. The encoder's own:
            the decoder never calls it.
        norm, project_out: what comes between the last block and the unembedding; None where a
            checkpoint does without.
        unembedding: the matrix that turns states into logits.
        layout: the name of each role.
        kind: "causal", "masked" or "encoder-decoder".
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        self.kind: ModelKind = layout.kind
        self.blocks = list(model.get_submodule(layout.blocks).children())
        self.embed = model.get_submodule(layout.embed)
        # site -> name below a block
        self._within = {"attention": layout.attention, "mlp": layout.mlp, **layout.sites}
        self._modules = {
            site: [block.get_submodule(name) for block in self.blocks]
            for site, name in self._within.items()
            if name
        }
        self.norm = _submodule(model, layout.norm)
        self.project_out = _submodule(model, layout.project_out)
        # from the model and not from a name: it may be tied to the embedding
        self.unembedding: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._head = [model.get_submodule(name) for name in layout.head]
        self._config: Any = model.config

    def block_name(self, layer: int) -> str:
        return f"{self.layout.blocks}.{layer}"

    def attention(self, layer: int) -> nn.Module:
        """Return the module whose (first) output is the attention's contribution to the residual
        stream, [b, t, d].
        """
        return self._site("attention")[layer]

    def mlp(self, layer: int) -> nn.Module:
        """Return the module whose output is the MLP's contribution to the residual stream,
        [b, t, d].
        """
        return self._site("mlp")[layer]

    def site_names(self) -> tuple[str, ...]:
        """Return the places of a block where a state can be read or restored; "residual" is the
        block's output, which all models have.
        """
        return (
            "residual",
            *(site for site in ("mlp", "attention") if site in self._modules),
            *self.layout.sites,
        )

    def site_module_name(self, site: str, layer: int) -> str:
        """Return the dotted name of the module whose (first) output is the state at `site`, one
        vector a token.

        Raises:
            UnsupportedModelError: this family has no such site; the message names those that it
                has.
        """
        if site == "residual":
            return self.block_name(layer)
        self._site(site)
        return f"{self.block_name(layer)}.{self._within[site]}"

    def _site(self, site: str) -> list[nn.Module]:
        if site not in self._modules:
            hint = did_you_mean(site, self.site_names())
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} has no site {site!r}{hint}; "
                f"it has {', '.join(self.site_names())}"
            )
        return self._modules[site]

    def mlp_out_name(self, layer: int) -> str:
        """Return the dotted name of the matrix that gets edited; its parameter is this + ".weight".

        Raises:
            UnsupportedModelError: editing is not offered for the family, or the layer does not
                exist.
        """
        if self.layout.mlp_out is None:
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} is {self._why_not_edited()}"
            )
        if not 0 <= layer < len(self.blocks):
            raise UnsupportedModelError(
                f"layer={layer} does not exist; this model has layers 0 to {len(self.blocks) - 1}"
            )
        return f"{self.block_name(layer)}.{self.layout.mlp_out}"

    def _why_not_edited(self) -> str:
        if self.kind != "causal":
            article = "a masked model" if self.kind == "masked" else "an encoder-decoder model"
            return (
                f"{article}: editing is offered for causal ones only, since the value that is "
                "written is optimised "
                "through a causal model. Tracing works; for editing choose a causal model."
            )
        if self.layout.mlp is None:
            return (
                "a state-space model: its blocks have no MLP, so there is no MLP output matrix to "
                "edit. Tracing works; for editing choose a transformer."
            )
        return (
            "a mixture of experts: a block has one MLP output matrix per expert, and which of them "
            "a fact passes through depends on the router, so there is no single matrix to edit. "
            "Tracing works; for editing choose a dense model."
        )

    def mlp_out(self, layer: int) -> nn.Module:
        """Return the matrix that gets edited, d_ff -> d_model: an `nn.Linear` or a `Conv1D`."""
        self.mlp_out_name(layer)
        return self.blocks[layer].get_submodule(self.layout.mlp_out or "")

    def heads_out_name(self, layer: int) -> str:
        """Return the dotted name of the matrix that mixes the heads: its input is [b, t, heads x
        head size], head after head.

        Raises:
            UnsupportedModelError: the family's row does not name one.
        """
        if self.layout.heads_out is None:
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} has no heads that can be "
                "distinguished: its row in engram.modules.layouts.LAYOUTS names no heads_out, the "
                "matrix whose input is all heads side by side"
            )
        return f"{self.block_name(layer)}.{self.layout.heads_out}"

    def head_width(self, layer: int) -> int:
        """Return the channels of one head in the input of `heads_out_name`."""
        self.heads_out_name(layer)
        mixer = self.blocks[layer].get_submodule(self.layout.heads_out or "")
        return linear_shape(mixer)[1] // self.n_heads

    def mlp_width(self, layer: int) -> int:
        """d_ff: neurons of a block's MLP, the input of `mlp_out`.

        Raises:
            UnsupportedModelError: the family's row does not name that matrix, or the layer does not
                exist.
        """
        if self.layout.mlp_out is None:
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} has no neurons that can be distinguished: "
                "its row in engram.modules.layouts.LAYOUTS names no mlp_out, the one matrix of a "
                "block whose input is all of its neurons"
            )
        return linear_shape(self.mlp_out(layer))[1]

    @property
    def n_heads(self) -> int:
        return int(self._config.num_attention_heads)

    def head(self, hidden: Tensor, *, norm: bool = True) -> Tensor:
        """Return the logits of block outputs, [..., d] -> [..., v]: last norm, unembedding, the
        family's scaling and soft cap.

        Args:
            norm: apply the last norm; without it, states go into the unembedding as they are. A
                masked model's head has a layer before the unembedding and no such norm: it is
                applied whole either way.
        Raises:
            UnsupportedModelError: of an encoder-decoder model, where the decoder makes the logits
                and not these blocks.
        """
        if self.kind == "encoder-decoder":
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} is an encoder-decoder model: the states "
                "of its encoder's blocks have no "
                "logits of their own; ask the whole model (LanguageModel.cloze_logits)"
            )
        modules = self._head or (self.norm if norm else None, self.project_out, self.unembedding)
        for module in modules:
            if module is not None:
                hidden = module(hidden)
        for name, scale in _LOGIT_SCALES.items():
            if (value := getattr(self._config, name, None)) is not None:
                hidden = scale(hidden, value)
        return hidden


_LOGIT_SCALES = {  # config attribute -> what the family does with it
    "logit_scale": lambda logits, value: (
        logits * value if isinstance(value, float | int) else logits
    ),
    "logits_scaling": lambda logits, value: logits / value,
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,
}


def _submodule(model: nn.Module, name: str | None) -> nn.Module | None:
    """Return the module of that name, or None where the checkpoint does without it (its class sets
    it to None).
    """
    module: object = model
    for part in name.split(".") if name else [""]:
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None
