"""A causal language model and its tokenizer: load, tokenise, score, generate.

Knows text and probabilities. Refuses to know what anybody does to the model's inside: see hooks, replay and edit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from engram.architectures import Parts, resolve
from engram.errors import EngramError, FactError, UnsupportedModelError

log = logging.getLogger(__name__)

_TOKENS_PER_BATCH = 4096  # tokens in one scoring forward
_LOGITS_PER_BATCH = 1 << 27  # float32 logits held at once: half a gigabyte


@dataclass(frozen=True)
class Encoding:
    """A tokenised text: `offsets[i]` are the characters (start, end) of `text` that token `ids[i]` stands for."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class LanguageModel:
    """A causal language model of the transformers library with its tokenizer.

    Args:
        model: e.g. from `AutoModelForCausalLM`; put into eval mode, its weights are never changed here.
        tokenizer: a fast one (offset mappings are how subjects are found).
        name: what messages and files call it.
    Raises:
        UnsupportedModelError: a family whose parts cannot be found, or a tokenizer without offsets.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer and reports no character offsets, by which subjects are "
                "found; load the fast one (use_fast=True, or convert it with tokenizers)"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.parts: Parts = resolve(model)

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {self.model.config.model_type}, {self.n_layers} x {self.d_model}, {self.dtype})"
        )

    kind = "causal"

    def cloze(self, prompt, target=None):  # temporary
        from types import SimpleNamespace

        e = self.encode(prompt)
        t = self.target_ids(prompt, target) if target is not None else []
        ids = e.ids + t[:-1]
        return SimpleNamespace(
            ids=ids,
            offsets=e.offsets,
            text=prompt,
            read=list(range(len(e.ids) - 1, len(ids))),
            answer=t,
            decoder_ids=None,
            tokens=len(e.ids),
        )

    def cloze_logits(self, ids_bt, read, decoder_bt=None):
        return self._forward(ids_bt, read)

    @property
    def n_layers(self) -> int:
        return len(self.parts.blocks)

    @property
    def d_model(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids have to be; with a `device_map`, the device of the embedding."""
        return cast("nn.Embedding", self.parts.embed).weight.device

    @cached_property
    def max_tokens(self) -> int:
        """Longest sequence that the model takes."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2048)

    # -- text -> tokens ------------------------------------------------------------------------------------------

    def encode(self, text: str) -> Encoding:
        """Tokens of `text` as the tokenizer makes them by default, specials in front included, none behind.

        Raises:
            FactError: no token is left, or more than the model takes.
        """
        batch = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, offsets = list(batch["input_ids"]), [(int(a), int(b)) for a, b in batch["offset_mapping"]]
        special = list(batch["special_tokens_mask"])
        while special and special[-1] and offsets[-1][0] == offsets[-1][1]:  # an end-of-text that some tokenizers append
            ids.pop(), offsets.pop(), special.pop()
        if not ids:
            raise FactError(f"text {text!r} gives no tokens")
        if len(ids) > self.max_tokens:
            raise FactError(f"text of {len(ids)} tokens, the model takes at most {self.max_tokens}: {text[:60]!r}...")
        return Encoding(text, ids, offsets)

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """Tokens by which `target` continues `prompt`; one leading space is added where the target has none.

        They are read off the joint tokenisation, so that a tokenizer which treats a word differently at the start of
        a text is no trap; where prompt and target would merge into one token, the target is tokenised alone.

        Raises:
            FactError: the target gives no token.
        """
        if not target.strip():
            raise FactError(f"target={target!r} is empty; give the words that shall follow the prompt")
        target = target if target[:1].isspace() else " " + target
        head, joint = self.encode(prompt).ids, self.encode(prompt + target).ids
        if joint[: len(head)] == head and len(joint) > len(head):
            return joint[len(head) :]
        alone = list(self.tokenizer(target, add_special_tokens=False)["input_ids"])
        if not alone:
            raise FactError(f"target={target!r} gives no tokens")
        return alone

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Each token decoded alone, for display."""
        return [str(self.tokenizer.decode([i])) for i in ids]

    # -- tokens -> probabilities -----------------------------------------------------------------------------------

    @torch.no_grad()
    def logits_at(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits of each row of token ids at the positions asked for.

        Rows are padded on the right: no real position can see a pad, so none is masked. Logits are made only at
        positions that some row of the batch reads.

        Returns:
            One tensor [len(positions[i]), v] a row in the caller's order, float32 (float64 for a float64 model), on the model's device.
        """
        out: list[Tensor | None] = [None] * len(rows)
        for batch in self._batches(rows, positions):
            wanted = sorted({p for i in batch for p in positions[i]})
            logits = self._forward(pad_right([rows[i] for i in batch]).to(self.device), wanted)
            column = {p: at for at, p in enumerate(wanted)}
            for row, i in enumerate(batch):
                out[i] = logits[row, [column[p] for p in positions[i]]].to(torch.promote_types(logits.dtype, torch.float32))
        return cast("list[Tensor]", out)

    def _forward(self, ids_bt: Tensor, positions: list[int]) -> Tensor:
        """Logits [b, len(positions), v] through the model's own head."""
        if self._keeps_logits:
            keep = torch.tensor(positions, device=ids_bt.device)
            return self.model(ids_bt, use_cache=False, logits_to_keep=keep).logits
        return self.model(ids_bt, use_cache=False).logits[:, positions]

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in signature(self.model.forward).parameters

    def _batches(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Row numbers in batches of similar length, each bounded in tokens and in logits."""
        vocabulary = int(self.model.config.vocab_size)
        batch: list[int] = []
        wanted: set[int] = set()
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            count, both = len(batch) + 1, wanted | set(positions[i])
            if batch and (count * len(rows[i]) > _TOKENS_PER_BATCH or count * len(both) * vocabulary > _LOGITS_PER_BATCH):
                yield batch
                batch, both = [], set(positions[i])
            batch, wanted = [*batch, i], both
        if batch:
            yield batch

    def log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """Log-probability (nats) of every token of each target, after its prompt and the target's earlier tokens.

        Args:
            pairs: (prompt, target) texts.
        Returns:
            One float32 tensor [target tokens] a pair; the sum is the log-probability of the whole target.
        """
        rows, positions, targets = [], [], []
        for prompt, target in pairs:
            head, tail = self.encode(prompt).ids, self.target_ids(prompt, target)
            rows.append(head + tail[:-1])
            positions.append(list(range(len(head) - 1, len(head) + len(tail) - 1)))
            targets.append(tail)
        return [
            logits.log_softmax(-1).gather(-1, torch.tensor(tail, device=logits.device)[:, None])[:, 0]
            for logits, tail in zip(self.logits_at(rows, positions), targets, strict=True)
        ]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Probability of each whole target after its prompt; see `log_probs`."""
        return [float(each.sum().exp()) for each in self.log_probs(pairs)]

    def next_tokens(self, prompt: str, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable next tokens after `prompt`, as (decoded token, probability)."""
        ids = self.encode(prompt).ids
        (logits,) = self.logits_at([ids], [[len(ids) - 1]])
        top = logits[0].softmax(-1).topk(k)
        return list(zip(self.token_strings(top.indices.tolist()), top.values.tolist(), strict=True))

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-probability per token of `text`, its first token not counted.

        A text longer than the model takes is cut into pieces that are scored one by one.
        """
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        pieces = [ids[at : at + self.max_tokens] for at in range(0, len(ids), self.max_tokens)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        if not pieces:
            raise FactError(f"text {text!r} has fewer than two tokens; perplexity needs a token to predict")
        total, count = 0.0, 0
        for piece in pieces:
            (logits,) = self.logits_at([piece[:-1]], [list(range(len(piece) - 1))])
            nll = nn.functional.cross_entropy(logits, torch.tensor(piece[1:], device=logits.device), reduction="sum")
            total, count = total + float(nll), count + len(piece) - 1
        return float(torch.tensor(total / count, dtype=torch.float64).exp())

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 20, **options: Any) -> str:
        """`prompt` and its continuation, greedy unless `options` say otherwise.

        Args:
            options: passed on to transformers' `generate`, e.g. `do_sample=True, top_p=0.9`.
        """
        ids_bt = torch.tensor([self.encode(prompt).ids], device=self.device)
        options.setdefault("do_sample", False)
        options.setdefault("pad_token_id", self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)
        out = cast("Any", self.model).generate(
            ids_bt, attention_mask=torch.ones_like(ids_bt), max_new_tokens=max_new_tokens, **options
        )
        return str(self.tokenizer.decode(out[0], skip_special_tokens=True))


def pad_right(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Rows of token ids as one [b, t] tensor, shorter ones filled with their last token, which no real position can see."""
    length = max(len(row) for row in rows) if length is None else length
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> LanguageModel:
    """A language model by name.

    Args:
        name: "pocket" (the bundled model), a local folder, or a causal model of the Hugging Face hub.
        dtype: e.g. torch.bfloat16 or "bfloat16"; default: as the checkpoint stores it (pocket: float32).
        device_map: passed on to transformers, e.g. "auto" or "cuda:0"; default: the CPU.
        trust_remote_code: whether the checkpoint may bring Python code that is then executed.
        options: passed on to `AutoModelForCausalLM.from_pretrained`.
    Raises:
        EngramError: nothing was found under that name, or it is not a causal language model.
    """
    where, shown = str(name), str(name)
    if shown == "pocket":
        from engram import pocket

        where, dtype = str(pocket.PATH), dtype or torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype or "auto", device_map=device_map, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngramError(
            f"no causal language model found as {shown!r}: {reason}\n"
            "Expected 'pocket', a folder with config.json and safetensors weights, or a name on the Hugging Face hub "
            "such as 'openai-community/gpt2-xl' (the hub needs a network connection the first time)."
        ) from error
    _fuse_activations(model)
    if model.dtype in (torch.float16, torch.bfloat16) and model.device.type == "cpu":
        log.warning("%s is in %s, which many CPUs compute 100 times slower than float32; dtype='float32' takes twice the memory",
                    shown, str(model.dtype).removeprefix("torch."))  # fmt: skip
    return LanguageModel(model, tokenizer, name=shown)


def _fuse_activations(model: nn.Module) -> None:
    """Let PyTorch's fused tanh-GELU stand in for the eight elementwise steps it is written out in for GPT-2 and others.

    The same function to rounding (1e-7); on a CPU a tenth of a traced prompt's time was spent in those steps.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            home, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(home), leaf, nn.GELU(approximate="tanh"))
