"""Texts of similar meaning: vectors for sentences, and the nearest ones by cosine.

Knows texts and vectors. Refuses to know facts and what the nearest texts are for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engram.batching import batches
from engram.checks import one_of
from engram.errors import MissingExtraError
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import record

Encoder = Callable[[list[str]], Tensor]  # texts -> [texts, width]
PUBLISHED = "sentence-transformers/all-MiniLM-L6-v2"
_ROWS_PER_BATCH = 32


def encoder_of(lm: LanguageModel, encoder: str | Encoder) -> Encoder:
    """Return a sentence encoder by name, or the function itself.

    Args:
        encoder: "hidden": the model's own states after its middle block, each scaled to length 1
            (a first token's state would drown the others), averaged over tokens; "embeddings": the
            same of its input embeddings, a bag of words. Neither was trained to compare sentences,
            so published results need the encoder below. A name "sentence-transformers/...": that
            package's model, such as "sentence-transformers/all-MiniLM-L6-v2", with which IKE was
            published.
    Raises:
        SettingError: another name; MissingExtraError: sentence-transformers is not installed.
    """
    if not isinstance(encoder, str):
        return encoder
    if encoder.startswith("sentence-transformers/"):
        return _sentence_transformer(encoder)
    one_of(
        "encoder",
        encoder,
        ("hidden", "embeddings"),
        more=f", a name such as {PUBLISHED!r}, or a function from a list of texts to a tensor with "
        "one row per text (files do not keep a function: pass it again)",
    )
    return lambda texts: _own_vectors(lm, texts, embeddings=encoder == "embeddings")


def nearest(query_d: Tensor, texts_nd: Tensor, k: int | None = None) -> list[int]:
    """Return the rows of `texts_nd` by cosine with `query_d`, nearest first, equally near ones in
    their order; at most `k`.
    """
    cosines_n = nn.functional.cosine_similarity(texts_nd.float(), query_d.float()[None], dim=-1)
    return cosines_n.argsort(descending=True, stable=True)[:k].tolist()


@torch.no_grad()
def _own_vectors(lm: LanguageModel, texts: list[str], *, embeddings: bool) -> Tensor:
    """Return [texts, d] in float32: means over tokens of unit-length states."""
    # Cut at what the model takes; an empty text gets a token, so that there is a state to average.
    rows = [
        list(lm.tokenizer(text, verbose=False)["input_ids"])[: lm.max_tokens] or [0]
        for text in texts
    ]
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches(
        range(len(rows)), lambda batch, i: len(batch) < _ROWS_PER_BATCH, key=lambda i: len(rows[i])
    ):
        ids_bt = pad_right([rows[i] for i in batch]).to(lm.device)
        states_btd = (lm.parts.embed(ids_bt) if embeddings else _middle(lm, ids_bt)).float()
        for row, i in enumerate(batch):
            states_td = states_btd[row, : len(rows[i])]
            vectors[i] = nn.functional.normalize(states_td, dim=-1).mean(0).cpu()
    return torch.stack(vectors)


def _middle(lm: LanguageModel, ids_bt: Tensor) -> Tensor:
    name = lm.parts.block_name((lm.n_layers - 1) // 2)
    # Stopped there: the upper half and the head are not needed.
    with record(lm.model, outputs=[name], stop=True) as seen:
        lm.model(ids_bt, use_cache=False)
    return seen[name].view(*ids_bt.shape, -1)


def _sentence_transformer(name: str) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "ike") from error
    model = SentenceTransformer(name)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).cpu()
