"""Where a model family keeps the parts that we read and write: one row a family.

Knows dotted module names, keyed by `config.model_type`, and how to find them where a causal family is not in the table.
Refuses to know what is done with the parts: hooks, replay and editors ask for them by role.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from engram.errors import UnsupportedModelError
from engram.weights import as_linear as as_linear  # found here too, beside the parts that it is asked of
from engram.weights import is_transposed as is_transposed
from engram.weights import linear_shape

log = logging.getLogger(__name__)

Kind = Literal["causal", "masked", "encoder-decoder"]
AUTO_CLASSES: dict[Kind, str] = {  # the class of transformers that loads a model of a kind
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Layout:
    """Dotted names of the parts; those below a block are relative to it.

    Where a family normalises a module's output before it joins the residual stream (Gemma 2, OLMo 2), `attention` and `mlp`
    name that norm: its output is the contribution that causal tracing restores. Where it normalises the stream itself after
    each half (BERT, BART), they name what is added just before. Of an encoder-decoder model, all names are the encoder's.
    """

    blocks: str  # list of blocks
    embed: str  # token embedding, before positions are added
    norm: str  # last norm before the unembedding; absent in some checkpoints
    attention: str | None  # module whose (first) output is the attention's contribution to the residual stream
    mlp: str | None  # module whose output is the MLP's contribution
    mlp_out: str | None  # matrix that gets edited: d_ff -> d_model; None where editing is not offered
    heads_out: str | None = None  # matrix that mixes the heads' outputs: its input is all heads side by side
    project_out: str | None = None  # map from the last norm to a smaller unembedding
    sites: Mapping[str, str] = field(default_factory=dict)  # more places to trace: name -> module with output [b, t, any]
    kind: Kind = "causal"
    head: tuple[str, ...] = ()  # a masked model's modules from the last block to the logits, in order


_LLAMA = Layout("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp", "mlp.down_proj", "self_attn.o_proj")
_GPT2 = Layout("transformer.h", "transformer.wte", "transformer.ln_f", "attn", "mlp", "mlp.c_proj", "attn.c_proj")
_BLOOM = Layout(  # attention and MLP modules add the residual themselves, their last matrices do not
    "transformer.h", "transformer.word_embeddings", "transformer.ln_f",
    "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "self_attention.dense",
)  # fmt: skip
_SANDWICH = replace(_LLAMA, attention="post_attention_layernorm", mlp="post_feedforward_layernorm")
_MOE = replace(_LLAMA, mlp_out=None)
_MAMBA = Layout(
    "backbone.layers", "backbone.embeddings", "backbone.norm_f", attention=None, mlp=None, mlp_out=None,
    sites={"mixer": "mixer", "in_proj": "mixer.in_proj", "x_proj": "mixer.x_proj"},
)  # fmt: skip
_T5 = Layout(
    "encoder.block", "encoder.embed_tokens", "encoder.final_layer_norm",
    "layer.0.SelfAttention", "layer.1.DenseReluDense", None, "layer.0.SelfAttention.o", kind="encoder-decoder",
)  # fmt: skip
_BERT = Layout(
    "bert.encoder.layer", "bert.embeddings.word_embeddings", "", "attention.output.dense", "output.dense", None,
    "attention.output.dense", kind="masked", head=("cls",),
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {  # key: model.config.model_type, never a checkpoint's name
    "bart": Layout(
        "model.encoder.layers", "model.encoder.embed_tokens", "",
        "self_attn", "fc2", None, "self_attn.out_proj", kind="encoder-decoder",
    ),
    "bert": _BERT,
    "bloom": _BLOOM,
    "codegen": replace(_GPT2, mlp_out="mlp.fc_out", heads_out="attn.out_proj"),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "distilbert": Layout(
        "distilbert.transformer.layer", "distilbert.embeddings.word_embeddings", "",
        "attention.out_lin", "ffn.lin2", None, "attention.out_lin", kind="masked",
        head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ),
    "falcon": replace(_BLOOM, attention="self_attention", mlp="mlp"),
    "falcon_mamba": _MAMBA,
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
    "granitemoe": replace(_MOE, mlp="block_sparse_moe"),
    "llama": _LLAMA,
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, sites={"mixer": "mixer", "in_proj": "mixer.in_proj", "gated_norm": "mixer.norm"}),
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "mpt": Layout(
        "transformer.blocks", "transformer.wte", "transformer.norm_f",
        "attn", "ffn.down_proj", "ffn.down_proj", "attn.out_proj",
    ),
    "mt5": _T5,
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
    "phimoe": _MOE,
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "roberta": replace(
        _BERT, blocks="roberta.encoder.layer", embed="roberta.embeddings.word_embeddings", head=("lm_head",)
    ),
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, mlp_out="mlp.c_proj"),
    "t5": _T5,
    "umt5": _T5,
}  # fmt: skip


class Parts:
    """The modules of one model, by role. Made by `resolve`; every name is looked up before anything is hooked.

    Attributes:
        blocks: the blocks, first to last; an encoder-decoder model's are its encoder's.
        embed: token embedding; its output is where causal tracing adds noise. The encoder's own: the decoder never calls it.
        norm, project_out: what stands between the last block and the unembedding; None where a checkpoint does without.
        unembedding: the matrix that turns states into logits.
        layout: the names behind the roles.
        kind: "causal", "masked" or "encoder-decoder".
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        self.kind: Kind = layout.kind
        self.blocks = list(model.get_submodule(layout.blocks).children())
        self.embed = model.get_submodule(layout.embed)
        self._within = {"attention": layout.attention, "mlp": layout.mlp, **layout.sites}  # site -> name below a block
        self._modules = {
            site: [block.get_submodule(name) for block in self.blocks] for site, name in self._within.items() if name
        }
        self.norm = _submodule(model, layout.norm)
        self.project_out = _submodule(model, layout.project_out)
        self.unembedding: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._head = [model.get_submodule(name) for name in layout.head]
        self._config: Any = model.config

    def block_name(self, layer: int) -> str:
        return f"{self.layout.blocks}.{layer}"

    def attention(self, layer: int) -> nn.Module:
        """Module whose (first) output is the attention's contribution to the residual stream, [b, t, d]."""
        return self._site("attention")[layer]

    def mlp(self, layer: int) -> nn.Module:
        """Module whose output is the MLP's contribution to the residual stream, [b, t, d]."""
        return self._site("mlp")[layer]

    def site_names(self) -> tuple[str, ...]:
        """The places of a block where a state can be read or put back; "residual" is the block's output, all models have it."""
        return ("residual", *(site for site in ("mlp", "attention") if site in self._modules), *self.layout.sites)

    def site_module_name(self, site: str, layer: int) -> str:
        """Dotted name of the module whose (first) output is the state at `site`, one vector a token.

        Raises:
            UnsupportedModelError: this family has no such site; the message names those that it has.
        """
        if site == "residual":
            return self.block_name(layer)
        self._site(site)
        return f"{self.block_name(layer)}.{self._within[site]}"

    def _site(self, site: str) -> list[nn.Module]:
        if site not in self._modules:
            near = get_close_matches(site, self.site_names(), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} has no site {site!r}{hint}; it has {', '.join(self.site_names())}"
            )
        return self._modules[site]

    def mlp_out_name(self, layer: int) -> str:
        """Dotted name of the matrix that gets edited; its parameter is this + ".weight".

        Raises:
            UnsupportedModelError: editing is not offered for the family, or the layer does not exist.
        """
        if self.layout.mlp_out is None:
            raise UnsupportedModelError(f"model_type={self._config.model_type!r} is {self._why_not_edited()}")
        if not 0 <= layer < len(self.blocks):
            raise UnsupportedModelError(f"layer={layer} does not exist; this model has layers 0 to {len(self.blocks) - 1}")
        return f"{self.block_name(layer)}.{self.layout.mlp_out}"

    def _why_not_edited(self) -> str:
        if self.kind != "causal":
            article = "a masked model" if self.kind == "masked" else "an encoder-decoder model"
            return (
                f"{article}: editing is offered for causal ones only, since the value that is written is optimised "
                "through a causal model. Tracing works; for editing choose a causal model."
            )
        if self.layout.mlp is None:
            return (
                "a state-space model: its blocks have no MLP, so there is no MLP output matrix to edit. Tracing works; for "
                "editing choose a transformer."
            )
        return (
            "a mixture of experts: a block has one MLP output matrix per "
            "expert, and which of them a fact passes through depends on the router, so there is no single matrix to "
            "edit. Tracing works; for editing choose a dense model."
        )

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

    def head_width(self, layer: int) -> int:
        """Channels of one head in the input of `heads_out_name`."""
        self.heads_out_name(layer)
        return linear_shape(self.blocks[layer].get_submodule(self.layout.heads_out or ""))[1] // self.n_heads

    def mlp_width(self, layer: int) -> int:
        """d_ff: neurons of a block's MLP, the input of `mlp_out`.

        Raises:
            UnsupportedModelError: the family's row does not name that matrix, or the layer does not exist.
        """
        if self.layout.mlp_out is None:
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} has no neurons that can be told apart: its row in "
                "engram.architectures.LAYOUTS names no mlp_out, the one matrix of a block whose input is all of its neurons"
            )
        return linear_shape(self.mlp_out(layer))[1]

    @property
    def n_heads(self) -> int:
        return int(self._config.num_attention_heads)

    def head(self, hidden: Tensor, *, norm: bool = True) -> Tensor:
        """Logits of block outputs [..., d] -> [..., v]: last norm, unembedding, the family's scaling and soft cap.

        Args:
            norm: apply the last norm; without it, states go into the unembedding as they are. A masked model's head has a
                layer before the unembedding and no such norm: it is applied whole either way.
        Raises:
            UnsupportedModelError: of an encoder-decoder model, where the decoder makes the logits and not these blocks.
        """
        if self.kind == "encoder-decoder":
            raise UnsupportedModelError(
                f"model_type={self._config.model_type!r} is an encoder-decoder model: the states of its encoder's blocks have no "
                "logits of their own; ask the whole model (LanguageModel.cloze_logits)"
            )
        for module in self._head or (self.norm if norm else None, self.project_out, self.unembedding):
            if module is not None:
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


def kind_of(config: Any, architectures: Sequence[str] | None = None) -> Kind:
    """What kind of model a config (and the names of its model classes) describes.

    Args:
        config: of the transformers library.
        architectures: class names, e.g. ["BertForMaskedLM"]; default: those that the config lists.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    names = architectures or getattr(config, "architectures", None) or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return "masked"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "masked" if masked else "causal"  # a checkpoint of the bare model or of another head


def resolve(model: nn.Module) -> Parts:
    """The parts of a language model: by its row in `LAYOUTS`, else, where it is a causal one, from its module tree.

    An encoder and a decoder that call one embedding module between them (`resize_token_embeddings` leaves them so) get a
    module each, with the same weight, so that a hook on the one is not a hook on the other.

    Raises:
        UnsupportedModelError: the family has no row and its parts are ambiguous, the message shows the row to add; or it was
            loaded as another kind of model than the row describes.
    """
    config: Any = model.config
    family, kind = str(config.model_type), kind_of(config, [type(model).__name__])
    layout = LAYOUTS.get(family) or _discover(model, kind)
    if layout.kind != kind:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a{'n' * (kind[0] in 'aeiou')} {kind} model, but model_type={family!r} is offered as a "
            f"{layout.kind} one; load it with transformers' {AUTO_CLASSES[layout.kind]}, as engram.load does"
        )
    if family not in LAYOUTS:
        log.warning("no row for model_type=%r; found in its module tree: %s", family, layout)
    if kind == "encoder-decoder":
        _unshare(model, layout.embed)
    return Parts(model, layout)


def _unshare(model: nn.Module, name: str) -> None:
    """Let the module of that name be called from there only; its parameter stays the one of all who held it."""
    module = model.get_submodule(name)
    if sum(each is module for _, each in model.named_modules(remove_duplicate=False)) > 1:
        home, _, leaf = name.rpartition(".")
        shared = {id(parameter): parameter for parameter in module.parameters()}
        setattr(model.get_submodule(home), leaf, deepcopy(module, shared))


def _submodule(model: nn.Module, name: str | None) -> nn.Module | None:
    """The module of that name, or None where the checkpoint does without it (set to None in its class)."""
    module: object = model
    for part in name.split(".") if name else [""]:
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


def _discover(model: nn.Module, kind: Kind) -> Layout:
    """The layout of a causal family that has no row, where each part has exactly one candidate."""
    found: dict[str, list[str]] = {role: [] for role in ("blocks", "embed", "norm", "attention", "mlp", "mlp_out")}
    if kind != "causal":  # which of its stacks, and before or after which norm, is not ours to guess
        raise UnsupportedModelError(_row_to_add(str(model.config.model_type), found, kind))  # type: ignore[union-attr]
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
    roles: dict[str, Any] = {role: names[0] for role, names in found.items()}
    mixers = [n for n, _ in block.get_submodule(found["attention"][0]).named_children() if n in _HEADS_OUT]
    return Layout(**roles, heads_out=f"{found['attention'][0]}.{mixers[0]}" if len(mixers) == 1 else None)


_HEADS_OUT = ("c_proj", "dense", "o_proj", "out_proj", "wo")  # what families call it; a square matrix, so no shape tells it


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_output_norms(block: nn.Module) -> bool:
    """More than one norm before each half of a block: some of them come after a module, and which is not ours to guess."""
    return sum(_is_norm(child) for child in block.children()) > 2


def _matrices_to(module: nn.Module, prefix: str, width: int | None) -> Iterator[str]:
    """Names of the matrices below `module` that map some other width to `width`."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            out_features, in_features = linear_shape(child)
            if out_features == width and in_features != width:
                yield f"{prefix}.{name}"


def _row_to_add(family: str, found: dict[str, list[str]], kind: Kind = "causal") -> str:
    near = get_close_matches(family, [name for name, layout in LAYOUTS.items() if layout.kind == kind], n=1)
    if kind != "causal":
        known = ", ".join(sorted(name for name, layout in LAYOUTS.items() if layout.kind == kind))
        return (
            f"no layout for model_type={family!r}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + f"; {kind} families with one: {known}. The parts of these are not guessed: add one row to "
            "engram.architectures.LAYOUTS"
        )
    row = ", ".join(f"{role}={names[0]!r}" if len(names) == 1 else f"{role}=..." for role, names in found.items())
    unclear = "; ".join(f"{role}: {names or 'none found'}" for role, names in found.items() if len(names) != 1)
    return (
        f"no layout for model_type={family!r}"
        + (f" (did you mean {near[0]!r}?)" if near else "")
        + f", and its module tree does not say where everything is ({unclear}). "
        f"Add one row to engram.architectures.LAYOUTS: {family!r}: Layout({row})"
    )
