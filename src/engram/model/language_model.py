"""A language model (causal, masked or encoder-decoder) and its tokenizer: score and generate.

Knows text and probabilities. Refuses to know what happens inside the model (see hooks, engine and
edit) and how text becomes tokens (see tokens and cloze).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engram.batching import batches
from engram.checks import Count, checked, checked_call
from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.model.cloze import (
    Cloze,
    Templates,
    answered,
    check_decoder_template,
    check_prompt_template,
    check_target,
    continued,
    default_templates,
    filled,
)
from engram.model.frames import Frame, around, check_frame, framed, name_of
from engram.model.tokens import Encoding, Tokens, pad_right, spaced
from engram.modules.hooks import substitute
from engram.modules.layouts import ModelKind
from engram.modules.parts import Parts, takes
from engram.modules.resolve import resolve

_Temperature = Annotated[float, Ge(1e-4)]  # logits divided by less overflow
_TOKENS_PER_BATCH = 4096  # tokens in one scoring forward
_LOGITS_PER_BATCH = 1 << 27  # float32 logits held at once: half a gigabyte


class LanguageModel:
    """A language model of the transformers library with its tokenizer.

    Args:
        model: from `AutoModelForCausalLM`, `AutoModelForMaskedLM` or `AutoModelForSeq2SeqLM`; put
            into eval mode, its weights are never changed here.
        tokenizer: a fast one (offset mappings are how subjects are located).
        name: what messages and files call it.
        loaded: the arguments of `load` that give this model again, for workers; None: there are
            none.
    Attributes:
        kind: "causal", "masked" or "encoder-decoder"; read off the model's class and config.
        tokens: the tokenizer's half: texts into ids and back.
        parts: where the model's blocks, matrices and head are.
    Raises:
        UnsupportedModelError: a family whose parts cannot be found, a tokenizer without offsets, or
            one without a mask token for a masked model.
    Example:
        >>> lm
        LanguageModel('pocket', gpt2, 8 x 256, torch.float32)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        *,
        loaded: dict[str, Any] | None = None,
    ) -> None:
        self.tokens = Tokens(tokenizer, longest_sequence(model))
        self.model, self.tokenizer, self.loaded = model.eval(), tokenizer, loaded
        self.name = name or model.config.name_or_path or type(model).__name__
        self.parts: Parts = resolve(model)
        self.kind: ModelKind = self.parts.kind
        self._templates: Templates = default_templates(self.kind, tokenizer)

    def __repr__(self) -> str:
        size = f"{self.n_layers} x {self.d_model}"
        return f"LanguageModel({self.name!r}, {self.model.config.model_type}, {size}, {self.dtype})"

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

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the model takes, in tokens; see `longest_sequence`."""
        return self.tokens.max_tokens

    # -- how it is asked ---------------------------------------------------------------------------

    @property
    def cloze_template(self) -> str:
        """The text that puts a prompt, at {}, to the model: "{}" for a causal one, "{} [MASK]." for
        BERT, "{} <extra_id_0>." for T5.

        Can be set: for a causal model to any text around the prompt (see `asked_through`); for a T5
        that was fine-tuned to answer (flan) to "{}", and `cloze_decoder` then to "".

        Raises:
            SettingError: when set to one that a model of this kind cannot be asked with; when read
                while the model is asked through a function, which is no template.
        """
        if not isinstance(self._templates.prompt, str):
            raise SettingError(
                f"{self.name} is asked through the function {name_of(self._templates.prompt)} at "
                "the moment, which has no template; leave the block of asked_through, or of an "
                "in-context edit, first"
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
        """Wrap every prompt in `frame` inside the block; the previous frame is restored on exit.

        It applies to `cloze`, `log_probs`, `probabilities`, `next_tokens` and `generate`, and to
        everything that uses them (`knows`, `trace`, `verify`). `encode`, `perplexity` and what
        editors compute do not use it. Blocks nest: the outer frame is put around the inner one.

        Args:
            frame: a text with one {} for the prompt, or a function that puts text around the
                prompt it is given. Special tokens written out in it count as such, and a text's
                start token is not doubled.
        Yields:
            The model.
        Raises:
            SettingError: a text without one {}; UnsupportedModelError: a model that is not causal.
        Example:
            >>> with lm.asked_through("The Space Needle is in Paris. {}"):
            ...     lm.cloze("To see the Space Needle, go to").tokens
            19
        """
        self.check_framed()
        # The whole value is put back, so that a template that was set inside the block goes, too.
        before = self._templates
        self._templates = Templates(around(before.prompt, check_frame(frame)), before.decoder)
        try:
            yield self
        finally:
            self._templates = before

    def check_framed(self) -> None:
        """Raise where the model cannot be asked through a frame.

        Raises:
            UnsupportedModelError: it is not causal.
        """
        if self.kind != "causal":
            raise UnsupportedModelError(
                f"{self.name} is of kind {self.kind!r} and asked with a blank; only causal models "
                "are asked through a frame"
            )

    @property
    def cloze_decoder(self) -> str:
        """The text that an encoder-decoder model's decoder begins with, {} being the prompt; the
        answer comes next.

        "<extra_id_0>" for T5, whose decoder names the blank it fills; "{}" for BART, whose decoder
        was trained to write the whole text again; "" for models fine-tuned to answer, and for other
        kinds, where nothing else can be set.

        Raises:
            SettingError: when set for a model of another kind.
        """
        return self._templates.decoder

    @cloze_decoder.setter
    def cloze_decoder(self, template: str) -> None:
        decoder = check_decoder_template(template, self.kind)
        self._templates = Templates(self._templates.prompt, decoder)

    def cloze(self, prompt: str, target: str | None = None, *, frame: Frame | None = None) -> Cloze:
        """Return the prompt made ready for this model to fill in what comes next, worded as
        `cloze_template` says.

        A causal model continues the prompt in its frame. A masked one gets a mask for each token of
        the target, so that each of them is predicted without knowing the others. An encoder-decoder
        model's decoder writes the target.

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
        if target is not None:
            check_target(target)
        if self.kind == "causal":
            frame = self.frame if frame is None else check_frame(frame)
            return continued(self.tokens, frame, prompt, target)
        if frame is not None:
            self.check_framed()  # raises
        if self.kind == "masked":
            return filled(self.tokens, self.cloze_template, prompt, target)
        return answered(self.tokens, self._templates, self.model, prompt, target)

    # -- text -> tokens ----------------------------------------------------------------------------

    def encode(self, text: str) -> Encoding:
        """Return the tokens of `text`; see `Tokens.encode`.

        Example:
            >>> lm.encode("The tower is in").ids
            [413, 275, 1921, 356, 318]
        """
        return self.tokens.encode(text)

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """Return the tokens by which `target` continues the bare `prompt`; one leading space is
        added where the target has none. See `Tokens.continuation_ids`.

        Raises:
            FactError: the target gives no token.
        """
        check_target(target)
        return self.tokens.continuation_ids(prompt, spaced(target))

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Return each token decoded alone, for display."""
        return self.tokens.strings(ids)

    # -- tokens -> probabilities -------------------------------------------------------------------

    @torch.no_grad()
    def logits_at(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        decoder_rows: Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """Return the logits of each row of token ids at the wanted positions.

        Rows of a causal model are padded on the right: no real position can see a pad, so none is
        masked. Rows of the other kinds are computed together where they are of one length. Logits
        are computed only at positions that some row of the batch reads.

        Args:
            rows, positions: the clozes' `ids` and `read`.
            decoder_rows: the clozes' `decoder_ids`, for an encoder-decoder model; there, positions
                are places in them.
        Returns:
            Per row, in the caller's order, one tensor [len(positions[i]), v], float32 (float64 for
            a float64 model), on the model's device.
        """
        out: list[Tensor | None] = [None] * len(rows)
        for batch in self._batches(rows, positions):
            wanted = sorted({p for i in batch for p in positions[i]})
            ids_bt, decoder_bt = pad_right([rows[i] for i in batch]).to(self.device), None
            # The decoder is causal, so its rows may be padded; the encoder's are of one length.
            if decoder_rows is not None:
                decoder_bt = pad_right([decoder_rows[i] for i in batch]).to(self.device)
            logits = self.cloze_logits(ids_bt, wanted, decoder_bt)
            # Back to each row's own positions, in float32: bfloat16 keeps 2 digits of a logit.
            wide = torch.promote_types(logits.dtype, torch.float32)
            column = {p: at for at, p in enumerate(wanted)}
            for row, i in enumerate(batch):
                out[i] = logits[row, [column[p] for p in positions[i]]].to(wide)
        return cast("list[Tensor]", out)

    def cloze_logits(
        self, ids_bt: Tensor, read: Sequence[int], decoder_bt: Tensor | None = None
    ) -> Tensor:
        """Return the logits [b, len(read), v] of one forward pass through the model's own head,
        computed at those positions only where it can.

        Args:
            ids_bt: [b, t] token ids, e.g. copies of `Cloze.ids`; every token counts, so rows of a
                masked or an encoder-decoder model have to be of one length.
            read: positions, the same of every row: of `ids_bt`, or of `decoder_bt` where it is
                given.
            decoder_bt: [b, t'] `Cloze.decoder_ids`, for an encoder-decoder model only; its shorter
                rows may be padded on the right.
        """
        positions = list(read)
        if self.kind == "causal" and self.keeps_logits:
            keep = torch.tensor(positions, device=ids_bt.device)
            return self.model(ids_bt, use_cache=False, logits_to_keep=keep).logits
        if self.kind == "causal":
            return self.model(ids_bt, use_cache=False).logits[:, positions]
        if self.kind == "encoder-decoder":
            out = self.model(ids_bt, decoder_input_ids=decoder_bt, use_cache=False)
            return out.logits[:, positions]
        # The head is a fifth of BERT's work, and its forward cannot be limited to positions.
        read_only = {self.model.base_model: lambda hidden_btd: hidden_btd[:, positions]}
        with substitute(read_only):
            return self.model(ids_bt).logits

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the model's forward computes logits at chosen positions only."""
        return takes(self.model, "logits_to_keep")

    def _batches(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> Iterator[list[int]]:
        """Split row numbers into batches of similar length (for kinds that see to the right, of one
        length), bounded in tokens and in logits.
        """
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        wanted: set[int] = set()

        # Every row of a batch gets logits at all positions that any of them reads.
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
        """Return the log-probability (nats) of every token of each target, after its prompt and the
        target's earlier tokens.

        A masked model gets all masks of a target at once: each token is predicted with all of them
        masked.

        Args:
            pairs: (prompt, target) texts; see `cloze` for how they are put to the model.
        Returns:
            Per pair one float32 tensor [target tokens]; its sum is the log-probability of the whole
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
        """Return the logits [len(read), v] of each; equal clozes are computed once (a masked
        model's prompt with two objects).
        """
        # The answer's last token is in no row, so answers that differ in it alone share a forward.
        rows = [(tuple(c.ids), tuple(c.read), tuple(c.decoder_ids or ())) for c in clozes]
        number = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        ids, read, decoder_ids = zip(*number, strict=True) if number else ((), (), ())
        decoder_rows = decoder_ids if self.kind == "encoder-decoder" else None
        logits = self.logits_at(ids, read, decoder_rows)
        return [logits[number[row]] for row in rows]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the probability of each whole target after its prompt; see `log_probs`.

        Example:
            >>> cities = ("Rome", "Paris")
            >>> rome, paris = lm.probabilities([("The Colosseum is in", city) for city in cities])
            >>> rome > paris
            True
        """
        return [float(log_probs.sum().exp()) for log_probs in self.log_probs(pairs)]

    @checked_call
    def next_tokens(self, prompt: str, k: Count = 5) -> list[tuple[str, float]]:
        """Return the k most probable next tokens after `prompt`, or in its blank: pairs of the
        decoded token and its probability.

        Example:
            >>> lm.next_tokens("The Eiffel Tower is in the city of", k=1)  # doctest: +ELLIPSIS
            [(' Paris', 0...)]
        """
        (logits,) = self._ask([self.cloze(prompt)])
        top = logits[0].softmax(-1).topk(k)
        return list(zip(self.token_strings(top.indices.tolist()), top.values.tolist(), strict=True))

    @checked_call
    def perplexity(self, text: str, *, after: str = "", tokens: Count | None = None) -> float:
        """Return exp of the mean negative log-probability per token of `text`, its first token not
        counted.

        A text longer than the model takes is cut into pieces that are scored one by one. No frame
        is put around it.

        Args:
            after: a text in front of each piece, read and not scored.
            tokens: of a piece at most; default: as many as the model takes. The same number scores
                the same tokens, with or without a text in front.
        Raises:
            FactError: a text of fewer than two tokens, or no room for it after `after`.
            UnsupportedModelError: a model that is not causal.
        Example:
            >>> text = "Paris is the capital of France."
            >>> lm.perplexity(text) < lm.perplexity("Capital Paris of the is France.")
            True
        """
        if self.kind != "causal":
            raise UnsupportedModelError(
                f"{self.name} is a{'n' * (self.kind[0] in 'aeiou')} {self.kind} model, and "
                "perplexity is that of reading a text from left to right: only causal models have "
                "one. Use log_probs, which asks with a blank"
            )
        front = self.encode(after).ids if after else []
        room = self.max_tokens - len(front)
        # At least two: the first token of a piece is read and not scored.
        size = room if tokens is None else tokens
        if not 2 <= size <= room:
            raise FactError(
                f"pieces of {size} tokens after a text of {len(front)}: the model takes "
                f"{self.max_tokens}, and a piece needs 2"
            )
        pieces = self.tokens.pieces(text, size)
        if not pieces:
            raise FactError(
                f"text {text!r} has fewer than two tokens; perplexity needs a token to predict"
            )
        # Piece by piece: the logits of a long text would not fit.
        total, count = 0.0, 0
        for piece in pieces:
            # a start token that the text in front has already
            doubled = int(piece[:1] == front[:1] and piece[0] in self.tokenizer.all_special_ids)
            read = range(len(front) - doubled, len(front) - doubled + len(piece) - 1)
            (logits,) = self.logits_at([front + piece[doubled:-1]], [list(read)])
            targets = torch.tensor(piece[1:], device=logits.device)
            # Pieces are summed in Python's float64: float32 loses digits over a long text.
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(piece) - 1
        return float(torch.tensor(total / count, dtype=torch.float64).exp())

    @checked_call
    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: Count = 20, **settings: Any) -> str:
        """Return `prompt` and its continuation, greedy unless `settings` say otherwise; of an
        encoder-decoder model, its answer alone.

        A frame's text is read and not returned (see `asked_through`); an answer in a turn of its
        own is set off by a space.

        Args:
            settings: passed on to transformers' `generate`, e.g. `do_sample=True, top_p=0.9`.
        Raises:
            UnsupportedModelError: a masked model.
        Example:
            >>> lm.generate("The Eiffel Tower is in the city of", max_new_tokens=1)
            'The Eiffel Tower is in the city of Paris'
        """
        if self.kind == "masked":
            raise UnsupportedModelError(
                f"{self.name} is a masked model: it fills blanks and does not write on. Use "
                "next_tokens, which asks it for one"
            )
        ids = self.prompt_ids(prompt)
        ids_bt = torch.tensor([ids], device=self.device)
        settings.setdefault("do_sample", False)
        if settings.get("temperature") is not None:
            checked("temperature", settings["temperature"], _Temperature)
        # Named, since transformers warns at every call of a model without a pad token.
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        settings.setdefault("pad_token_id", pad)
        out = cast("Any", self.model).generate(
            ids_bt,
            attention_mask=torch.ones_like(ids_bt),
            max_new_tokens=max_new_tokens,
            **settings,
        )
        # An encoder-decoder model returns its answer alone, others the prompt's tokens too.
        new = out[0][len(ids) :] if self.kind == "causal" else out[0]
        return self.with_answer(prompt, new.tolist())

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens that `generate` continues: those of the prompt in its frame."""
        if self.kind == "causal":
            return self.encode(framed(self.frame, prompt).text).ids
        return list(self.tokenizer(prompt)["input_ids"])

    def with_answer(self, prompt: str, new: Sequence[int]) -> str:
        """Return `prompt` and the text of the tokens `new` that were written after it; of an
        encoder-decoder model, that text alone. See `generate`.
        """
        if self.kind != "causal":
            return self._plain(list(new))
        whole, ids = framed(self.frame, prompt).text, self.prompt_ids(prompt)
        text = self._plain([*ids, *new])
        if whole == prompt:
            return text
        # Decoded alone, a first word would lose its space under some tokenizers.
        read = self._plain(ids)
        answer = text[len(read) :] if text.startswith(read) else self._plain(list(new))
        # In a turn of its own the answer has no space; after the prompt it would run into it.
        apart = not (whole.endswith(prompt) or prompt[-1:].isspace() or answer[:1].isspace())
        return prompt + " " * apart + answer

    def _plain(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def longest_sequence(model: PreTrainedModel) -> int:
    """Return how many tokens a model takes; 2048 where it has no positions to run out of (Mamba,
    T5).
    """
    config = model.config.get_text_config()
    # MPT has its own name for it
    positions = getattr(config, "max_position_embeddings", None) or getattr(
        config, "max_seq_len", None
    )
    limit = int(positions or 2048)
    for name, table in model.named_modules():
        # RoBERTa's first positions are those of padding
        if (
            name.endswith("position_embeddings")
            and isinstance(table, nn.Embedding)
            and table.padding_idx is not None
        ):
            return min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit
