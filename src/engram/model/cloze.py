"""One way to ask a model for a missing object, whatever its kind.

    causal            The tower is in                    -> Paris                           the next
    tokens (see framing) masked            [CLS] The tower is in [MASK]. [SEP] -> Paris
                one mask a token of the answer encoder-decoder   The tower is in <extra_id_0>. </s>
                -> <pad> <extra_id_0> Paris       what the decoder says (T5)

Knows tokenizers and templates. Refuses to know modules and logits: LanguageModel.cloze_logits reads
what is asked here.
Sources: fill-in-the-blank probing, Petroni et al. 2019 (LAMA), arXiv:1909.01066; the sentinels of
    T5, Raffel et al. 2020,
arXiv:1910.10683, Sec. 3.1.4; BART rewrites the whole text, Lewis et al. 2020, arXiv:1910.13461.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.model.chat_template import answers_spaced
from engram.model.frames import BARE, Frame, check_frame, framed
from engram.modules.layouts import ModelKind

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel
from engram.model.tokens import _encode, _tokens, continuation_ids, spaced

SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class Cloze:
    """A prompt made ready for a model of any kind to fill in its object.

    Attributes:
        ids: what the stack that reads the prompt gets (the encoder, or the only stack there is),
            specials included.
        offsets: characters (start, end) of `text` for each of `ids`; (0, 0) for specials and for a
            frame's text in front.
        text: what was tokenised, from the prompt on, so that places in the prompt are places in it.
        read: positions whose logits predict the answer's tokens, one each: of `ids`, or of
            `decoder_ids` where there are any.
        answer: tokens of the target; [] where none was given (`read` then has one position).
        decoder_ids: what an encoder-decoder model's decoder is fed: start token, the text it is
            made to begin with, and the answer but for its last token. None for the other kinds.
        tokens: how many of `ids`, from the first on, are the prompt's and its frame's: all but the
            answer's. For a masked or an encoder-decoder model all of them.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    text: str
    read: list[int]
    answer: list[int]
    decoder_ids: list[int] | None
    tokens: int


@dataclass(frozen=True)
class Templates:
    """How a prompt is put to a model: `prompt` for the stack that reads it, `decoder` what the
    decoder is made to begin with.
    """

    prompt: Frame
    decoder: str = ""


def default_templates(kind: ModelKind, tokenizer: PreTrainedTokenizerBase) -> Templates:
    """The wording in which models of a kind were trained to fill a blank.

    Raises:
        UnsupportedModelError: a masked model whose tokenizer has no mask token.
    """
    if kind == "causal":
        return Templates(BARE)
    if kind == "masked" and not tokenizer.mask_token:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no mask token, which a masked model is asked with; set tokenizer.mask_token"
        )
    if kind == "encoder-decoder" and _has_sentinel(tokenizer):
        return Templates(f"{{}} {SENTINEL}.", SENTINEL)
    if tokenizer.mask_token:
        return Templates(f"{{}} {tokenizer.mask_token}.", "{}" if kind == "encoder-decoder" else "")
    return Templates("{}")


def _has_sentinel(tokenizer: PreTrainedTokenizerBase) -> bool:
    found = tokenizer.convert_tokens_to_ids(SENTINEL)
    return found is not None and found != tokenizer.unk_token_id


def check_prompt_template(
    template: str, kind: ModelKind, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The template, if a model of that kind can be asked with it.

    Raises:
        SettingError: it has not one place {} for the prompt; for kinds other than causal, text in
            front of it, or not the one blank that the kind needs.
    """
    if kind == "causal":
        return str(check_frame(template))
    if not template.startswith("{}") or template.count("{}") != 1:
        raise SettingError(
            f"cloze_template={template!r}: expected {{}} once, in front, where the prompt stands; "
            "words that shall come before it belong into the prompt"
        )
    mask = tokenizer.mask_token
    if kind == "masked" and template.count(str(mask)) != 1:
        raise SettingError(
            f"cloze_template={template!r}: expected the mask token {mask!r} once; a longer answer repeats it"
        )
    return template


def check_decoder_template(template: str, kind: ModelKind) -> str:
    """The same for what the decoder is made to begin with: any text, in which {} is the prompt.

    Raises:
        SettingError: the model has no decoder of its own, or {} stands there twice.
    """
    if template and kind != "encoder-decoder":
        raise SettingError(
            f"cloze_decoder={template!r}: only an encoder-decoder model has a decoder to begin for; this is a {kind} one"
        )
    if template.count("{}") > 1:
        raise SettingError(f"cloze_decoder={template!r}: expected {{}}, the prompt, at most once")
    return template


def make_cloze(
    lm: LanguageModel, prompt: str, target: str | None, frame: Frame | None = None
) -> Cloze:
    """See `LanguageModel.cloze`."""
    if target is not None and not target.strip():
        raise FactError(f"target={target!r} is empty; give the words that shall follow the prompt")
    if lm.kind == "causal":
        return _continued(lm, prompt, target, lm.frame if frame is None else check_frame(frame))
    if frame is not None:
        lm.check_framed()
    return (_filled if lm.kind == "masked" else _answered)(lm, prompt, target)


def _continued(lm: LanguageModel, prompt: str, target: str | None, frame: Frame) -> Cloze:
    """Causal: the prompt's tokens in their frame, then the target's but the last."""
    whole, start = framed(frame, prompt)
    head, text = lm.encode(whole), whole[start:]
    said = "" if target is None else answer_text(lm, whole, target, behind=text[len(prompt) :])
    answer = continuation_ids(lm, whole, said) if said else []
    ids, offsets = head.ids + answer[:-1], head.offsets
    if len(answer) > 1:
        joint = lm.encode(whole + said)
        apart = [
            *offsets,
            *[(len(whole), len(joint.text))] * len(answer[:-1]),
        ]  # tokenised alone: see `continuation_ids`
        text, offsets = (
            joint.text[start:],
            joint.offsets[: len(ids)] if joint.ids[: len(ids)] == ids else apart,
        )
    offsets = [(max(a - start, 0), max(b - start, 0)) for a, b in offsets]
    return Cloze(
        ids, offsets, text, list(range(len(head.ids) - 1, len(ids))), answer, None, len(head.ids)
    )


def answer_text(lm: LanguageModel, whole: str, target: str, behind: str) -> str:
    """`target` with a leading space, or without one, as it follows the framed prompt `whole`.

    Words follow words after a space. Where the frame goes on behind the prompt, the answer begins
    something new: there is no space after white space, nor after a special token unless the model's
        chat template writes one there ("[/INST] Paris").

    Args:
        behind: what the frame has behind the prompt.
    """
    if not behind:
        return spaced(target)
    in_a_turn = behind[-1].isspace() or (
        whole.endswith(lm.special_texts) and not answers_spaced(lm.tokenizer)
    )
    return target.lstrip() if in_a_turn else spaced(target)


def _filled(lm: LanguageModel, prompt: str, target: str | None) -> Cloze:
    """Masked: the prompt and one mask for each of the target's tokens.

    The space before the mask goes where it would be a token of its own: the answer's first token
        takes it in.
    """
    mask = str(lm.tokenizer.mask_token)
    before, _, behind = lm.cloze_template.replace("{}", prompt).rpartition(mask)
    ids, offsets, text = min(
        (_encode(lm, space + mask + behind) for space in (before, before.rstrip())),
        key=lambda each: len(each[0]),
    )
    at = max(i for i, each in enumerate(ids) if each == lm.tokenizer.mask_token_id)
    answer = (
        [] if target is None else _in_place(lm, ids[:at], before.rstrip(), spaced(target), behind)
    )
    n = max(1, len(answer))
    ids, offsets = (
        ids[:at] + ids[at : at + 1] * n + ids[at + 1 :],
        offsets[:at] + offsets[at : at + 1] * n + offsets[at + 1 :],
    )
    return Cloze(
        _short_enough(lm, ids, text), offsets, text, list(range(at, at + n)), answer, None, len(ids)
    )


def _in_place(
    lm: LanguageModel, head: list[int], before: str, target: str, behind: str
) -> list[int]:
    """Tokens of the target in its place, after those of `head`; alone where it would merge with
    what is around it.
    """
    ids, offsets, _ = _encode(lm, before + target + behind)
    limit = len(before + target)
    end = next(
        (i for i in range(len(head), len(ids)) if offsets[i][0] >= limit or offsets[i] == (0, 0)),
        len(ids),
    )
    if ids[: len(head)] == head and len(head) < end and offsets[end - 1][1] <= limit:
        return ids[len(head) : end]
    return _tokens(lm, target)


def _answered(lm: LanguageModel, prompt: str, target: str | None) -> Cloze:
    """Encoder-decoder: the encoder reads the prompt, the decoder is made to begin and then says the
    answer.
    """
    ids, offsets, text = _encode(lm, lm.cloze_template.replace("{}", prompt))
    begun = lm.cloze_decoder.replace("{}", prompt)
    head, answer = _tokens(lm, begun), []
    if target is not None:
        said = spaced(target) if begun else target.strip()
        joint = _tokens(lm, begun + said)
        answer = (
            joint[len(head) :]
            if joint[: len(head)] == head and len(joint) > len(head)
            else _tokens(lm, said)
        )
    lead = next(i for i, span in enumerate(offsets) if span != (0, 0))
    head = _decoder_start(lm, ids[:lead]) + head
    decoder_ids = head + answer[:-1]
    read = list(range(len(head) - 1, len(decoder_ids)))
    return Cloze(_short_enough(lm, ids, text), offsets, text, read, answer, decoder_ids, len(ids))


def _decoder_start(lm: LanguageModel, lead: list[int]) -> list[int]:
    """What the decoder is always fed first: its start token, then the token forced on it or those
    that begin every text.
    """
    settings = (getattr(lm.model, "generation_config", None), lm.model.config)
    start, forced = (
        next((value for each in settings if (value := getattr(each, name, None)) is not None), None)
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    if start is None:
        raise UnsupportedModelError(
            f"{lm.name} does not say which token its decoder starts with; set lm.model.config.decoder_start_token_id "
            "(T5: the padding token, BART: the end-of-text token)"
        )
    return [int(start), *(lead if forced is None else [int(forced)])]


def _short_enough(lm: LanguageModel, ids: list[int], text: str) -> list[int]:
    if len(ids) > lm.max_tokens:
        raise FactError(
            f"text of {len(ids)} tokens, the model takes at most {lm.max_tokens}: {text[:60]!r}..."
        )
    return ids
