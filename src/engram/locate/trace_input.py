"""One prompt in tokens, ready to be traced: where its subject is, what is corrupted, what is read.

Knows text and token positions. Refuses to run the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engram.errors import FactError, SettingError
from engram.facts import subject_starts, token_span
from engram.locate.corruption import Corruptor, check_noise
from engram.locate.settings import TraceConfig
from engram.model.cloze import Cloze
from engram.model.language_model import LanguageModel


@dataclass(frozen=True)
class TracePrompt:
    """What is traced.

    Attributes:
        text, subject: a prompt and the words of it that are corrupted.
        target, foil: the scored answer (default: the model's own next token), and the one that it
            is compared with.
        other_subject: takes the subject's place in the corrupted run of corruption="subject".
        start: character at which the subject begins, where that is known; occurrence="first" would
            search for it.
    """

    text: str
    subject: str
    target: str | None = None
    foil: str | None = None
    other_subject: str | None = None
    start: int | None = None


@dataclass(frozen=True)
class TraceInput:
    """A prompt in tokens.

    Attributes:
        ids, decoder_ids: what the model reads; the answer's tokens but the last are at the end.
        read: positions whose next-token distributions are scored.
        answer: ids of the target, empty where the model's own answer is wanted; foil: first id of
            the foil.
        rows: positions at which states are replaced.
        span: [first, last + 1) token of the subject's first (or chosen) mention; corrupted: all
            tokens that are changed.
        noise: [samples, corrupted, d] float64 for their embeddings; None where `other_ids` are read
            instead.
        decoder_corrupted, decoder_noise, other_decoder_ids: the same where a decoder is made to
            begin with the prompt (BART): it would read the answer off the subject there.
    """

    prompt: TracePrompt
    ids: list[int]
    decoder_ids: list[int] | None
    read: list[int]
    answer: list[int]
    foil: int | None
    rows: list[int]
    span: tuple[int, int]
    corrupted: list[int]
    noise: Tensor | None
    other_ids: list[int] | None
    decoder_corrupted: list[int] = field(default_factory=list)
    decoder_noise: Tensor | None = None
    other_decoder_ids: list[int] | None = None


def prepare(
    lm: LanguageModel, prompt: TracePrompt, config: TraceConfig, corruptor: Corruptor
) -> TraceInput:
    """Return `prompt` in tokens.

    Raises:
        FactError: subject not in the prompt or lost by the tokenizer, empty target or foil, noise
            of a wrong shape, another subject of another length.
        SettingError: foil or other subject missing where the settings need one, or given where they
            do not.
    """
    _check_foil(prompt, config)
    cloze = lm.cloze(prompt.text, prompt.target)
    # by character offsets of the whole prompt. The released code decodes token by token and looks
    # for the subject in the pieces: it fails where decoding drops a space or splits a character
    starts = subject_starts(prompt.text, prompt.subject, config.subject.occurrence)
    if prompt.start is not None and config.subject.occurrence == "first":
        # a search would find the same letters inside an earlier, longer word
        starts = [prompt.start]
    spans = [token_span(cloze.offsets, at, at + len(prompt.subject)) for at in starts]
    _check_extra(config.subject.extra_tokens, spans, cloze, prompt)
    corrupted = _widened(
        spans, config.subject.extra_tokens, cloze.offsets[: cloze.tokens], len(prompt.text)
    )
    other = None
    if prompt.other_subject is not None:
        other = _other(lm, prompt, starts, cloze, spans)
        # where the subjects agree in a token, nothing is exchanged
        corrupted = [i for i, (a, b) in enumerate(zip(cloze.ids, other.ids, strict=True)) if a != b]
    foil = None if prompt.foil is None else lm.cloze(prompt.text, prompt.foil).answer[0]
    in_decoder = _in_decoder(lm, prompt, starts, cloze, config.subject.extra_tokens)
    # the stream begins again at each call: a decoder's copy of the subject gets the same noise
    noise = corruptor(len(corrupted)) if other is None else None
    frozen = config.patching.frozen_noise
    if frozen is not None and noise is not None:
        samples, tokens, width = noise.shape
        check_noise("frozen_noise", frozen, (samples, tokens, width))
    read = cloze.read if lm.kind != "encoder-decoder" else [cloze.tokens - 1]
    return TraceInput(
        prompt,
        cloze.ids,
        cloze.decoder_ids,
        cloze.read,
        cloze.answer,
        foil,
        rows=_rows(config, cloze.tokens, spans[0], read),
        span=spans[0],
        corrupted=corrupted,
        noise=noise,
        other_ids=None if other is None else other.ids,
        decoder_corrupted=in_decoder,
        decoder_noise=corruptor(len(in_decoder)) if in_decoder and other is None else None,
        other_decoder_ids=None if other is None else other.decoder_ids,
    )


def _check_foil(prompt: TracePrompt, config: TraceConfig) -> None:
    if (prompt.foil is not None) != (config.metric == "logit_difference"):
        raise SettingError(
            f"metric={config.metric!r} with foil={prompt.foil!r}: 'logit_difference' is between "
            "the answer and a foil, and no other metric has one"
        )
    if (prompt.other_subject is not None) != (config.subject.corruption == "subject"):
        raise SettingError(
            f"corruption={config.subject.corruption!r} with "
            f"other_subject={prompt.other_subject!r}: 'subject' puts another "
            "subject into the prompt, and no other corruption does"
        )


def _rows(config: TraceConfig, tokens: int, span: tuple[int, int], read: list[int]) -> list[int]:
    if config.patching.positions == "all":
        return list(range(tokens))
    if config.patching.positions == "subject_last":
        return [span[1] - 1]
    if config.patching.positions == "last":
        return read[:1]  # a later read position belongs to the answer, not to the prompt
    rows = list(dict.fromkeys(int(at) for at in config.patching.positions))
    if not rows or any(not 0 <= at < tokens for at in rows):
        raise SettingError(f"positions={rows}: the prompt has tokens 0 to {tokens - 1}")
    return rows


def _check_extra(
    extra: int, spans: list[tuple[int, int]], cloze: Cloze, prompt: TracePrompt
) -> None:
    """Raise unless the prompt has that many tokens after its last mention of the subject."""
    end = max(end for _, end in spans)
    after = [a for a, b in cloze.offsets[end : cloze.tokens] if b > a and a < len(prompt.text)]
    if extra > len(after):
        raise FactError(
            f"extra_tokens={extra}: expected at most {len(after)}, as many tokens of the prompt "
            f"follow the subject {prompt.subject!r}"
        )


def _widened(
    spans: list[tuple[int, int]], extra: int, offsets: Sequence[tuple[int, int]], end: int
) -> list[int]:
    """Return the tokens of the spans and `extra` ones after each, within the prompt's own `end`
    characters.

    Example: spans [(1, 3)] with extra=2 of a prompt of 4 tokens give [1, 2, 3].
    """
    # answer tokens follow the prompt in the same row: they are never corrupted
    last = max(i for i, (a, b) in enumerate(offsets) if b > a and a < end)
    return sorted({i for b, e in spans for i in range(b, max(e, min(e + extra, last + 1)))})


def _in_decoder(
    lm: LanguageModel, prompt: TracePrompt, starts: list[int], cloze: Cloze, extra: int
) -> list[int]:
    """Return the subject's positions in the text that the decoder is made to begin with; none where
    that is not the prompt.
    """
    if lm.kind != "encoder-decoder" or "{}" not in lm.cloze_decoder:
        return []
    begun, front = lm.cloze_decoder.replace("{}", prompt.text), lm.cloze_decoder.index("{}")
    offsets = lm.tokenizer(begun, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    lead = cloze.read[0] + 1 - len(offsets)  # start tokens
    spans = [token_span(offsets, front + at, front + at + len(prompt.subject)) for at in starts]
    return [lead + i for i in _widened(spans, extra, offsets, front + len(prompt.text))]


def _other(
    lm: LanguageModel,
    prompt: TracePrompt,
    starts: list[int],
    cloze: Cloze,
    spans: list[tuple[int, int]],
) -> Cloze:
    """Return the same prompt about another subject, which has to have the same length in tokens."""
    assert prompt.other_subject is not None
    text, end = prompt.text, len(prompt.subject)
    # from the end, so that earlier starts stay right when the subjects differ in length
    for at in reversed(starts):
        text = text[:at] + prompt.other_subject + text[at + end :]
    other = lm.cloze(text, prompt.target)
    # a space in front may belong to either token
    inside = {i for b, e in spans for i in range(b - 1, e)}
    outside = [i for i in range(len(cloze.ids)) if i not in inside]
    if len(other.ids) != len(cloze.ids) or any(cloze.ids[i] != other.ids[i] for i in outside):
        raise FactError(
            f"other_subject={prompt.other_subject!r} does not take the place of {prompt.subject!r} "
            f"token by token ({len(other.ids)} tokens in all instead of {len(cloze.ids)}); states "
            "are exchanged between equal positions, so choose a subject of as many tokens"
        )
    if other.ids == cloze.ids:
        raise FactError(
            f"other_subject={prompt.other_subject!r} is the subject: nothing would be corrupted"
        )
    return other
