"""What a config may ask for, and a tokenizer give, before a model is built from them.

A config.json of others may name sizes that take hours to build, or no memory holds.
Knows configs and tokenizers of transformers. Refuses to know files.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from engram.checks import one_of
from engram.errors import EngramFileError
from engram.model.checkpoint_files import MOST_LAYERS

_COUNTS = ("vocab_size", "hidden_size", "num_attention_heads")
_MOST_TABLES = 1 << 30  # bytes, beside as many as the weights have
_ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation")
_LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def check_sizes(config: Any, tensors: int, where: str) -> None:
    """Raise where a config asks for a model that cannot be built, or not in any reasonable time.

    Args:
        tensors: number of weights in the files; 0: not known.
        where: the file that holds the config, for the message.
    Raises:
        EngramFileError: names the field.
    """
    config = config.get_text_config()
    most = min(tensors or MOST_LAYERS, MOST_LAYERS)
    for field in (*_COUNTS, *_LAYERS):
        value = getattr(config, field, None)
        limit = most if field in _LAYERS else None
        if isinstance(value, int) and not 1 <= value <= (limit or value):
            expected = "at least 1"
            if limit:
                expected += f" and at most {limit}"
            if limit == tensors:
                expected += ", the number of weights in the files"
            raise EngramFileError(
                f"{where} has {config.attribute_map.get(field, field)}={value}; "
                f"expected {expected}. Download the checkpoint again"
            )
    for field in _ACTIVATIONS:
        value = getattr(config, field, None)
        if isinstance(value, str):
            one_of(f"{where} has {field}", value, ACT2FN, error=EngramFileError)


def check_tables(model: PreTrainedModel, where: str) -> None:
    """Raise where a model, on the meta device, computes more when it is made than its weights hold.

    Raises:
        EngramFileError: such as a mask of all positions by all positions.
    """
    tables = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if tables > _MOST_TABLES + sum(weight.nbytes for weight in model.parameters()):
        raise EngramFileError(
            f"{where} asks for {tables / 1e9:.0f} GB of tables beside the weights, "
            "such as those of positions; expected less than the weights themselves. Download the "
            "checkpoint again"
        )


def check_tokenizer(tokenizer: Any, config: Any, name: str) -> None:
    """Raise where a tokenizer gives tokens that the model does not have.

    Raises:
        EngramFileError: says how many of both there are.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    # of its own tokens: added ones may be beyond, such as that for images of a model without them
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        raise EngramFileError(
            f"the tokenizer of {name} knows {tokenizer.vocab_size} tokens and config.json has "
            f"vocab_size={rows}; expected the tokenizer that was saved with the model"
        )
