"""From a model to its `Parts`: by the row of its family, or from its module tree.

Knows the table of layouts, and what to look for in the tree of a causal family without a row.
Refuses to guess: a part with no candidate or several is an error that shows the row to add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from engram.checks import did_you_mean
from engram.errors import UnsupportedModelError
from engram.modules.layouts import AUTO_CLASSES, LAYOUTS, Layout, ModelKind, log
from engram.modules.parts import Parts
from engram.modules.weights import linear_shape


def kind_of(config: Any, architectures: Sequence[str] | None = None) -> ModelKind:
    """Return what kind of model a config (and the names of its model classes) describes.

    Args:
        config: of the transformers library.
        architectures: class names, e.g. ["BertForMaskedLM"]; default: those that the config lists.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    # the class decides before the family does: BERT's config also serves BertLMHeadModel
    names = architectures or getattr(config, "architectures", None) or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return "masked"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    return "masked" if masked else "causal"  # a checkpoint of the bare model or of another head


def resolve(model: nn.Module) -> Parts:
    """Return the parts of a language model: by its row in `LAYOUTS`, or, if it is a causal one
    without a row, from its module tree.

    An encoder and a decoder that share one embedding module (as after `resize_token_embeddings`)
    get a module each, with the same weight, so that a hook on one is not a hook on the other.

    Raises:
        UnsupportedModelError: the family has no row and its parts are ambiguous, the message shows
            the row to add; or it was loaded as another kind of model than the row describes.
    """
    config: Any = model.config
    family, kind = str(config.model_type), kind_of(config, [type(model).__name__])
    layout = LAYOUTS.get(family) or _discover(model, family, kind)
    if layout.kind != kind:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a{'n' * (kind[0] in 'aeiou')} {kind} model, but "
            f"model_type={family!r} is offered as a {layout.kind} one; load it with transformers' "
            f"{AUTO_CLASSES[layout.kind]}, as engram.load does"
        )
    if family not in LAYOUTS:
        log.warning("no row for model_type=%r; found in its module tree: %s", family, layout)
    if kind == "encoder-decoder":
        _unshare(model, layout.embed)
    return Parts(model, layout)


def _unshare(model: nn.Module, name: str) -> None:
    """Let the module of that name be called from there only; its parameter stays shared with the
    others.
    """
    module = model.get_submodule(name)
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    if len(names) > 1:
        home, _, leaf = name.rpartition(".")
        # deepcopy's memo: the copy keeps these parameters instead of copying them
        shared = {id(parameter): parameter for parameter in module.parameters()}
        setattr(model.get_submodule(home), leaf, deepcopy(module, shared))


def _discover(model: nn.Module, family: str, kind: ModelKind) -> Layout:
    """Return the layout of a causal family without a row, if each part has exactly one
    candidate.
    """
    candidates: dict[str, list[str]] = {
        role: [] for role in ("blocks", "embed", "norm", "attention", "mlp", "mlp_out")
    }
    # Of the others, which of two stacks and before or after which norm cannot be guessed.
    if kind != "causal":
        raise UnsupportedModelError(_row_to_add(family, candidates, kind))
    layers = getattr(model.config, "num_hidden_layers", None)
    width = getattr(model.config, "hidden_size", None)
    # By their number alone: an nn.ModuleList as long as the config says is the stack of blocks.
    candidates["blocks"] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    candidates["embed"] = [name for name, module in model.named_modules() if module is embedding]
    if len(candidates["blocks"]) == 1:
        home = candidates["blocks"][0].rpartition(".")[0]
        body = model.get_submodule(home)
        candidates["norm"] = [
            f"{home}.{n}".lstrip(".") for n, m in body.named_children() if _is_norm(m)
        ]
        block = model.get_submodule(candidates["blocks"][0])[0]  # type: ignore[index]
        candidates["attention"] = [
            n for n, _ in block.named_children() if "attn" in n.lower() or n.lower() == "attention"
        ]
        candidates["mlp"] = [
            n for n, m in block.named_children() if n.lower() in ("mlp", "ffn", "feed_forward")
        ]
        if len(candidates["mlp"]) == 1:
            (mlp,) = candidates["mlp"]
            candidates["mlp_out"] = list(_matrices_to(block.get_submodule(mlp), mlp, width))
        # With output norms, hooks belong on the norm and not on the module; which norm is a guess.
        candidates["mlp"] = [] if _has_output_norms(block) else candidates["mlp"]
    if any(len(names) != 1 for names in candidates.values()):
        raise UnsupportedModelError(_row_to_add(family, candidates))
    roles: dict[str, Any] = {role: names[0] for role, names in candidates.items()}
    # Optional, unlike the others: without it, heads cannot be distinguished, and all else works.
    attention = roles["attention"]
    mixers = [n for n, _ in block.get_submodule(attention).named_children() if n in _HEADS_OUT]
    return Layout(**roles, heads_out=f"{attention}.{mixers[0]}" if len(mixers) == 1 else None)


# names of the matrix that mixes the heads: it is square, so its shape does not identify it
_HEADS_OUT = ("c_proj", "dense", "o_proj", "out_proj", "wo")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_output_norms(block: nn.Module) -> bool:
    """Return whether a block has more than one norm before each half: some of them come after a
    module, and which ones cannot be guessed.
    """
    return sum(_is_norm(child) for child in block.children()) > 2


def _matrices_to(module: nn.Module, prefix: str, width: int | None) -> Iterator[str]:
    """Yield the names of the matrices below `module` that map some other width to `width`."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            out_features, in_features = linear_shape(child)
            if out_features == width and in_features != width:
                yield f"{prefix}.{name}"


def _row_to_add(family: str, candidates: dict[str, list[str]], kind: ModelKind = "causal") -> str:
    near = did_you_mean(family, [n for n, layout in LAYOUTS.items() if layout.kind == kind])
    if kind != "causal":
        known = ", ".join(sorted(name for name, layout in LAYOUTS.items() if layout.kind == kind))
        return (
            f"no layout for model_type={family!r}{near}; {kind} families with one: {known}. The "
            "parts of these are not guessed: add one row to engram.modules.layouts.LAYOUTS"
        )
    row = ", ".join(
        f"{role}={names[0]!r}" if len(names) == 1 else f"{role}=..."
        for role, names in candidates.items()
    )
    unclear = "; ".join(
        f"{role}: {names or 'none found'}" for role, names in candidates.items() if len(names) != 1
    )
    return (
        f"no layout for model_type={family!r}{near}"
        f", and its module tree does not say where everything is ({unclear}). "
        f"Add one row to engram.modules.layouts.LAYOUTS: {family!r}: Layout({row})"
    )
