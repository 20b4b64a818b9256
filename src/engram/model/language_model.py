"""A language model (causal, masked or encoder-decoder) and its tokenizer: load, tokenise, score,
generate.

Knows text and probabilities. Refuses to know what anybody does to the model's inside: see hooks,
replay and edit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engram.batching import batches
from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.model.cloze import (
    Cloze,
    Templates,
    check_decoder_template,
    check_prompt_template,
    default_templates,
    make_cloze,
)
from engram.model.frames import Frame, around, check_frame, framed, name_of
from engram.model.tokens import Encoding, continuation_ids, pad_right, spaced
from engram.modules.hooks import substitute
from engram.modules.layouts import ModelKind
from engram.modules.parts import Parts
from engram.modules.resolve import resolve

log = logging.getLogger(__name__)


_TOKENS_PER_BATCH = 4096  # tokens in one scoring forward


_LOGITS_PER_BATCH = 1 << 27  # float32 logits held at once: half a gigabyte


class LanguageModel:
    """A language model of the transformers library with its tokenizer.

    Args:
        model: from `AutoModelForCausalLM`, `AutoModelForMaskedLM` or `AutoModelForSeq2SeqLM`; put
            into eval mode, its weights are never changed here.
        tokenizer: a fast one (offset mappings are how subjects are found).
        name: what messages and files call it.
    Attributes:
        kind: "causal", "masked" or "encoder-decoder"; read off the model's class and config.
    Raises:
        UnsupportedModelError: a family whose parts cannot be found, a tokenizer without offsets, or
            one without a mask token for a masked model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer and reports no character offsets, by which subjects are "
                "found; load the fast one (use_fast=True, or convert it with tokenizers)"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.parts: Parts = resolve(model)
        self.kind: ModelKind = self.parts.kind
        self.loaded: dict[str, Any] | None = (
            None  # arguments of `load`, where it made this: workers get the same model by them
        )
        self._templates: Templates = default_templates(self.kind, tokenizer)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.model.config.model_type}, {self.n_layers} x {self.d_model}, {self.dtype})"

    @property
    def n_layers(self) -> int:
        """Blocks of the stack that reads the prompt: of an encoder-decoder model, the encoder's."""
        return len(self.parts.blocks)

    @property
    def d_model(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids have to be; with a `device_map`, the device of the embedding."""
        return cast("nn.Embedding", self.parts.embed).weight.device

    @cached_property
    def max_tokens(self) -> int:
        """Longest sequence that the model takes; 2048 where it has no positions to run out of
        (Mamba, T5).
        """
        config = self.model.config.get_text_config()
        mpt = getattr(config, "max_seq_len", None)  # its own name for it
        limit = int(getattr(config, "max_position_embeddings", None) or mpt or 2048)
        for (
            name,
            table,
        ) in self.model.named_modules():  # RoBERTa's first positions stand for padding
            if (
                name.endswith("position_embeddings")
                and isinstance(table, nn.Embedding)
                and table.padding_idx is not None
            ):
                return min(limit, table.num_embeddings - table.padding_idx - 1)
        return limit

    @property
    def cloze_template(self) -> str:
        """How a prompt, at {}, is put to the model: "{}" to a causal one, "{} [MASK]." to BERT, "{}
        <extra_id_0>." to T5.

        Can be set: for a causal model to any text around the prompt (see `asked_through`); for a T5
            that was fine-tuned to answer
        (flan) to "{}", and `cloze_decoder` then to "".

        Raises:
            SettingError: when set to one that a model of this kind cannot be asked with; when read
                while the model is asked through a function, which is no template.
        """
        if not isinstance(self._templates.prompt, str):
            raise SettingError(
                f"{self.name} is asked through the function {name_of(self._templates.prompt)} at the moment, which has no "
                "template; leave the block of asked_through, or of an in-context edit, first"
            )
        return self._templates.prompt

    @cloze_template.setter
    def cloze_template(self, template: str) -> None:
        prompt = check_prompt_template(template, self.kind, self.tokenizer)
        self._templates = Templates(prompt, self._templates.decoder)

    @property
    def frame(self) -> Frame:
        """What a causal model is asked through at the moment: `cloze_template`, or a function."""
        return self._templates.prompt

    @contextmanager
    def asked_through(self, frame: Frame) -> Iterator[LanguageModel]:
        """Within the block prompts are put to a causal model in a frame; however it ends, they are
        put as before.

        `cloze`, `log_probs`, `probabilities`, `next_tokens` and `generate` ask through the frame,
        and so does everything that stands on them (`knows`, `trace`, `verify`). `encode`,
        `perplexity` and what editors compute do not.
        Blocks nest: the frame of an outer block stands around that of an inner one.

        Args:
            frame: a text with one {} where the prompt stands, or a function that puts text around
                the prompt it is given. Special tokens written out in it count as such, and a text's
                start token is not doubled.
        Yields:
            The model.
        Raises:
            SettingError: a text without one {}; UnsupportedModelError: a model that is not causal.
        Example:
            >>> with lm.asked_through("The Space Needle is in Paris. {}"):
            ...     lm.generate("To see the Space Needle, go to")
        """
        self.check_framed()
        before = self._templates
        self._templates = Templates(around(before.prompt, check_frame(frame)), before.decoder)
        try:
            yield self
        finally:
            self._templates = before

    def check_framed(self) -> None:
        """Refuse a model that cannot be asked through a frame.

        Raises:
            UnsupportedModelError: it is not causal.
        """
        if self.kind != "causal":
            raise UnsupportedModelError(
                f"{self.name} is of kind {self.kind!r} and asked with a blank; only causal models are asked through a frame"
            )

    @property
    def cloze_decoder(self) -> str:
        """What an encoder-decoder model's decoder is made to begin with, {} being the prompt; the
        answer comes next.

        "<extra_id_0>" for T5, whose decoder says which blank it fills; "{}" for BART, whose decoder
        was trained to write the whole text anew; "" for models fine-tuned to answer, and for other
        kinds, where nothing else can be set.

        Raises:
            SettingError: when set for a model of another kind.
        """
        return self._templates.decoder

    @cloze_decoder.setter
    def cloze_decoder(self, template: str) -> None:
        self._templates = Templates(
            self._templates.prompt, check_decoder_template(template, self.kind)
        )

    # -- text -> tokens ----------------------------------------------------------------------------

    def encode(self, text: str) -> Encoding:
        """Tokens of `text` as the tokenizer makes them by default, specials in front included, none
        behind.

        A start token that the text brings along, as a chat template's does, is not put in front
        once more.

        Raises:
            FactError: no token is left, or more than the model takes.
        """
        batch = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, offsets = (
            list(batch["input_ids"]),
            [(int(a), int(b)) for a, b in batch["offset_mapping"]],
        )
        special = list(batch["special_tokens_mask"])
        while (
            special and special[-1] and offsets[-1][0] == offsets[-1][1]
        ):  # an end-of-text that some tokenizers append
            ids.pop(), offsets.pop(), special.pop()
        if (
            len(ids) > 1
            and ids[0] == ids[1]
            and special[0]
            and offsets[0][0] == offsets[0][1] < offsets[1][1]
        ):
            ids, offsets = ids[1:], offsets[1:]
        if not ids:
            raise FactError(f"text {text!r} gives no tokens")
        if len(ids) > self.max_tokens:
            raise FactError(
                f"text of {len(ids)} tokens, the model takes at most {self.max_tokens}: {text[:60]!r}..."
            )
        return Encoding(text, ids, offsets)

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """Tokens by which `target` continues the bare `prompt`; one leading space is added where
        the target has none.

        They are read off the joint tokenisation, so that a tokenizer which treats a word
        differently at the start of a text is no trap; where prompt and target would merge into one
        token, the target is tokenised alone.

        Raises:
            FactError: the target gives no token.
        """
        if not target.strip():
            raise FactError(
                f"target={target!r} is empty; give the words that shall follow the prompt"
            )
        return continuation_ids(self, prompt, spaced(target))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Special tokens as they are written in a text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(
            dict.fromkeys(
                [*self.tokenizer.all_special_tokens, *(str(each) for each in added if each.special)]
            )
        )

    def cloze(self, prompt: str, target: str | None = None, *, frame: Frame | None = None) -> Cloze:
        """The prompt made ready for this model to fill in what comes next, worded as
        `cloze_template` says.

        A causal model continues the prompt in its frame. A masked one gets a mask for each token of
        the target, so that each of them is predicted without knowing the others. An encoder-decoder
        model's decoder says the target.

        Args:
            prompt: text up to, not including, the object.
            target: the object; one leading space is added where it has none and words come before
                it. None: ask for one token, whichever.
            frame: of a causal model, instead of what it is asked through at the moment; see
                `asked_through`.
        Raises:
            FactError: the target gives no token, or the text more than the model takes.
            UnsupportedModelError: an encoder-decoder model that does not say how its decoder
                starts; a frame for a model that is not causal.
        """
        return make_cloze(self, prompt, target, frame)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Each token decoded alone, for display."""
        return [str(self.tokenizer.decode([i])) for i in ids]

    # -- tokens -> probabilities -------------------------------------------------------------------

    @torch.no_grad()
    def logits_at(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """Logits of each row of token ids at the positions asked for.

        Rows of a causal model are padded on the right: no real position can see a pad, so none is
            masked. Rows of the
        other kinds are computed together where they are of one length. Logits are made only at
        positions that some row of the batch reads.

        Args:
            rows, positions: the clozes' `ids` and `read`.
            decoder_rows: the clozes' `decoder_ids`, for an encoder-decoder model; there, positions
                are places in them.
        Returns:
            One tensor [len(positions[i]), v] a row in the caller's order, float32 (float64 for a
            float64 model), on the model's device.
        """
        out: list[Tensor | None] = [None] * len(rows)
        for batch in self._batches(rows, positions):
            wanted = sorted({p for i in batch for p in positions[i]})
            decoder_bt = (
                None
                if decoder_rows is None
                else pad_right([decoder_rows[i] for i in batch]).to(self.device)
            )
            logits = self.cloze_logits(
                pad_right([rows[i] for i in batch]).to(self.device), wanted, decoder_bt
            )
            column = {p: at for at, p in enumerate(wanted)}
            for row, i in enumerate(batch):
                out[i] = logits[row, [column[p] for p in positions[i]]].to(
                    torch.promote_types(logits.dtype, torch.float32)
                )
        return cast("list[Tensor]", out)

    def cloze_logits(
        self, ids_bt: Tensor, read: Sequence[int], decoder_bt: Tensor | None = None
    ) -> Tensor:
        """Logits [b, len(read), v] of one forward pass through the model's own head, made at those
        positions only where it can.

        Args:
            ids_bt: [b, t] token ids, e.g. copies of `Cloze.ids`; every token counts, so rows of a
                masked or an encoder-decoder model have to be of one length.
            read: positions, the same of every row: of `ids_bt`, or of `decoder_bt` where it is
                given.
            decoder_bt: [b, t'] `Cloze.decoder_ids`, for an encoder-decoder model only; its shorter
                rows may be padded on the right.
        """
        positions = list(read)
        if self.kind == "causal" and self._keeps_logits:
            keep = torch.tensor(positions, device=ids_bt.device)
            return self.model(ids_bt, use_cache=False, logits_to_keep=keep).logits
        if self.kind == "causal":
            return self.model(ids_bt, use_cache=False).logits[:, positions]
        if self.kind == "encoder-decoder":
            return self.model(ids_bt, decoder_input_ids=decoder_bt, use_cache=False).logits[
                :, positions
            ]
        with substitute(
            {self.model.base_model: lambda hidden_btd: hidden_btd[:, positions]}
        ):  # the head is a fifth of BERT's work
            return self.model(ids_bt).logits

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in signature(self.model.forward).parameters

    def _batches(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> Iterator[list[int]]:
        """Row numbers in batches of similar length (for kinds that see to the right, the same),
        bounded in tokens and in logits.
        """
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        wanted: set[int] = set()

        def fits(batch: list[int], i: int) -> bool:
            if len(batch) == 1:
                wanted.clear()
                wanted.update(positions[batch[0]])
            wanted.update(positions[i])
            one_length = self.kind == "causal" or len(rows[i]) == len(rows[batch[0]])
            return one_length and (len(batch) + 1) * len(wanted) * vocabulary <= _LOGITS_PER_BATCH

        def length(i: int) -> int:
            return len(rows[i])

        return batches(range(len(rows)), fits, key=length, length=length, tokens=_TOKENS_PER_BATCH)

    def log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """Log-probability (nats) of every token of each target, after its prompt and the target's
        earlier tokens.

        A masked model is asked for all tokens of a target at once: each is predicted with all of
            them masked.

        Args:
            pairs: (prompt, target) texts; see `cloze` for how they are put to the model.
        Returns:
            One float32 tensor [target tokens] a pair; the sum is the log-probability of the whole
            target.
        """
        clozes = [self.cloze(prompt, target) for prompt, target in pairs]
        return [
            logits.log_softmax(-1).gather(
                -1, torch.tensor(cloze.answer, device=logits.device)[:, None]
            )[:, 0]
            for logits, cloze in zip(self._ask(clozes), clozes, strict=True)
        ]

    def _ask(self, clozes: Sequence[Cloze]) -> list[Tensor]:
        """Logits [len(read), v] of each; what is asked twice is computed once (a masked model's
        prompt with two objects).
        """
        asked = [
            (tuple(each.ids), tuple(each.read), tuple(each.decoder_ids or ())) for each in clozes
        ]
        once = {question: number for number, question in enumerate(dict.fromkeys(asked))}
        rows, read, decoder_rows = zip(*once, strict=True) if once else ((), (), ())
        logits = self.logits_at(
            rows, read, decoder_rows if self.kind == "encoder-decoder" else None
        )
        return [logits[once[question]] for question in asked]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Probability of each whole target after its prompt; see `log_probs`."""
        return [float(each.sum().exp()) for each in self.log_probs(pairs)]

    def next_tokens(self, prompt: str, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable next tokens after `prompt`, or in its blank, as (decoded token,
        probability).
        """
        (logits,) = self._ask([self.cloze(prompt)])
        top = logits[0].softmax(-1).topk(k)
        return list(zip(self.token_strings(top.indices.tolist()), top.values.tolist(), strict=True))

    def perplexity(self, text: str, *, behind: str = "", tokens: int | None = None) -> float:
        """exp of the mean negative log-probability per token of `text`, its first token not
        counted.

        A text longer than the model takes is cut into pieces that are scored one by one. No frame
        is put around it: `behind` is what each piece stands behind.

        Args:
            behind: a text before each piece, read and not scored.
            tokens: of a piece at most; default: as many as the model takes. The same number scores
                the same tokens, with or without a text before them.
        Raises:
            FactError: a text of fewer than two tokens, or no room for it behind `behind`.
            UnsupportedModelError: a model that is not causal.
        """
        if self.kind != "causal":
            raise UnsupportedModelError(
                f"{self.name} is a{'n' * (self.kind[0] in 'aeiou')} {self.kind} model, and perplexity is that of reading a text "
                "from left to right: only causal models have one. Use log_probs, which asks with a blank"
            )
        front = self.encode(behind).ids if behind else []
        room = self.max_tokens - len(front)
        size = room if tokens is None else tokens
        if not 2 <= size <= room:
            raise FactError(
                f"pieces of {size} tokens behind a text of {len(front)}: the model takes {self.max_tokens}, and a piece needs 2"
            )
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        if not pieces:
            raise FactError(
                f"text {text!r} has fewer than two tokens; perplexity needs a token to predict"
            )
        total, count = 0.0, 0
        for piece in pieces:
            doubled = int(
                piece[:1] == front[:1] and piece[0] in self.tokenizer.all_special_ids
            )  # a start token
            read = range(len(front) - doubled, len(front) - doubled + len(piece) - 1)
            (logits,) = self.logits_at([front + piece[doubled:-1]], [list(read)])
            nll = nn.functional.cross_entropy(
                logits, torch.tensor(piece[1:], device=logits.device), reduction="sum"
            )
            total, count = total + float(nll), count + len(piece) - 1
        return float(torch.tensor(total / count, dtype=torch.float64).exp())

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 20, **options: Any) -> str:
        """`prompt` and its continuation, greedy unless `options` say otherwise; of an
        encoder-decoder model, its answer alone.

        A frame's text is read and not returned (see `asked_through`); an answer in a turn of its
        own is set off by a space.

        Args:
            options: passed on to transformers' `generate`, e.g. `do_sample=True, top_p=0.9`.
        Raises:
            UnsupportedModelError: a masked model.
        """
        if self.kind == "masked":
            raise UnsupportedModelError(
                f"{self.name} is a masked model: it fills blanks and does not write on. Use next_tokens, which asks it for one"
            )
        whole = framed(self.frame, prompt).text if self.kind == "causal" else prompt
        ids = (
            self.encode(whole).ids
            if self.kind == "causal"
            else list(self.tokenizer(prompt)["input_ids"])
        )
        ids_bt = torch.tensor([ids], device=self.device)
        options.setdefault("do_sample", False)
        options.setdefault(
            "pad_token_id", self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        )
        out = cast("Any", self.model).generate(
            ids_bt, attention_mask=torch.ones_like(ids_bt), max_new_tokens=max_new_tokens, **options
        )
        text = str(self.tokenizer.decode(out[0], skip_special_tokens=True))
        if whole == prompt:
            return text
        read = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        # not decoded alone, where a first word would lose its space under some tokenizers
        written = (
            text[len(read) :]
            if text.startswith(read)
            else str(self.tokenizer.decode(out[0][len(ids) :], skip_special_tokens=True))
        )
        apart = not (whole.endswith(prompt) or prompt[-1:].isspace() or written[:1].isspace())
        return prompt + " " * apart + written
