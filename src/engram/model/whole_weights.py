"""Whether the weights of a model are all there, fit its config, and are finite.

transformers gives random numbers to weights that a checkpoint lacks and drops those that a config
has no place for, with a report and no error. Here each of them is an error, unless its name says
that no number of the language model depends on it (`_UNUSED`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engram.errors import EngramFileError, NonFiniteError
from engram.modules.weights import numbers

_AGAIN = "Download the checkpoint again"
# Names in a checkpoint that never matter, beside those that transformers' model classes list
# themselves (`_keys_to_ignore_on_load_unexpected`, and tied weights, which it knows).
_UNUSED = re.compile(
    # tables that older versions stored and that are now computed: causal masks and what stands in
    # masked places, angles of rotary and sinusoidal positions, numbers of positions
    r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask|scale_attn|embed_positions)$"
    r"|(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    r"|(^|\.)(position_ids|token_type_ids)$"
    r"|(^|\.)(encoder|decoder)\.version$"
    # other heads beside or instead of the language model's: of sentences, classes, values (of
    # reinforcement learning), spans of answers, several tokens ahead
    r"|^(\w+\.)?pooler\.|^cls\.seq_relationship\.|^(\w+\.)?mtp\."
    r"|^(score|classifier|classification_head|qa_outputs|v_head|multiple_choice_head)\."
)


def check_names(info: dict[str, Any], name: str) -> None:
    """Raise unless a checkpoint has the weights that its config describes, and no others.

    Args:
        info: transformers' `output_loading_info`.
        name: of the model, for the message.
    Raises:
        EngramFileError: lists the names.
    """
    unexpected = {key for key in info["unexpected_keys"] if not _UNUSED.search(key)}
    mismatched = {
        f"{key} ({_shape(stored)} in the file, {_shape(wanted)} in the config)"
        for key, stored, wanted in info["mismatched_keys"]
    }
    problems = [
        f"{words} {_listed(names)}"
        for words, names in (
            ("the config has weights that the files lack:", info["missing_keys"]),
            ("the files have weights that the config has no place for:", unexpected),
            ("weights have other shapes:", mismatched),
            ("weights could not be loaded:", info["error_msgs"]),
        )
        if names
    ]
    if problems:
        raise EngramFileError(
            f"config.json of {name} does not describe its weights; {'; '.join(problems)}. Expected "
            "the config.json that was saved with these weights; download the checkpoint again"
        )


def check_stored(model: PreTrainedModel, dtypes: Mapping[str, str], name: str) -> None:
    """Raise where the files store a weight twice, or whole numbers for it.

    transformers takes the last of two names, and converts whole numbers: either is another model.

    Args:
        model: may be on the meta device.
        dtypes: of the tensors in the files, as safetensors calls them.
        name: of the model, for the message.
    Raises:
        EngramFileError: names the tensors.
    """
    weights, prefix = model.state_dict(), f"{model.base_model_prefix}."
    homes: dict[str, str] = {}
    for stored, dtype in dtypes.items():
        # checkpoints may lack the base model's prefix, such as "transformer.", or have one more
        names = (stored, prefix + stored, stored.removeprefix(prefix))
        weight = next((one for one in names if one in weights), None)
        if weight is None:
            continue
        if (other := homes.setdefault(weight, stored)) != stored:
            raise EngramFileError(f"{other} and {stored} of {name} are one weight. {_AGAIN}")
        if weights[weight].is_floating_point() and not dtype.startswith(("F", "BF")):
            raise EngramFileError(
                f"{stored} of {name} is stored as {dtype}; expected floating point. {_AGAIN}"
            )


def check_finite(model: nn.Module, name: str) -> None:
    """Raise unless every weight is a finite number.

    Args:
        name: of the model, for the message.
    Raises:
        NonFiniteError: names the weight.
    """
    for label, tensor in _stored(model):
        check_numbers(tensor, f"{label} of {name}")


def check_numbers(tensor: Tensor, name: str) -> None:
    """Raise unless every number of a tensor is finite; see `check_finite`."""
    # The sum first: 40 ms for 135 million numbers on 2 cores, where isfinite takes 330. One that is
    # not finite may be an overflow, so it is confirmed.
    total = tensor.sum(dtype=torch.float32 if tensor.itemsize < 4 else None)
    if torch.isfinite(total) or (finite := torch.isfinite(tensor)).all():
        return
    raise NonFiniteError(
        f"{name} holds {int((~finite).sum())} numbers that are NaN or infinite in "
        f"{str(tensor.dtype).removeprefix('torch.')}. Download the checkpoint again, or load "
        "it in a dtype of a wider range (dtype='float32')"
    )


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Tied weights are one tensor. By weak references: an offloaded weight is gone after its module,
    # and the next one may get its id.
    seen: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
    for prefix, module in model.named_modules():
        for label, tensor in numbers(module):
            if id(tensor) not in seen and tensor.is_floating_point():
                seen[id(tensor)] = tensor
                yield f"{prefix}.{label}".lstrip("."), tensor.detach()


def _listed(names: Collection[str], most: int = 3) -> str:
    ordered = sorted(names, key=_natural)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(" ".join(name.split()) for name in ordered[:most]) + more


def _natural(name: str) -> list[Any]:
    """Return a key that sorts layer 9 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _shape(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
