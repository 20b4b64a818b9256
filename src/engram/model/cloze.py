"""One way to ask a model for a missing object, whatever its kind.

    causal            The tower is in                      -> Paris        the next tokens
    masked            [CLS] The tower is in [MASK]. [SEP]  -> Paris        one mask per answer token
    encoder-decoder   The tower is in <extra_id_0>. </s>   -> <pad> <extra_id_0> Paris
                                                              what the decoder writes (T5)

Knows tokenizers and templates. Refuses to know modules and logits: LanguageModel.cloze_logits reads
what is asked here.
Sources: fill-in-the-blank probing, Petroni et al. 2019 (LAMA), arXiv:1909.01066; the sentinels of
T5, Raffel et al. 2020, arXiv:1910.10683, Sec. 3.1.4; BART rewrites the whole text, Lewis et al.
2020, arXiv:1910.13461.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.model.chat_template import answers_spaced
from engram.model.frames import BARE, Frame, check_frame, framed
from engram.model.tokens import Tokens, spaced
from engram.modules.layouts import ModelKind

# T5 names its blanks by number; one blank is all that a fact needs
SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class Cloze:
    """A prompt made ready for a model of any kind to fill in its object.

    Attributes:
        ids: input of the stack that reads the prompt (the encoder, or the only stack there is),
            specials included.
        offsets: characters (start, end) of `text` for each of `ids`; (0, 0) for specials and for a
            frame's text in front.
        text: what was tokenised, from the prompt on, so that places in the prompt are places in it.
        read: positions whose logits predict the answer's tokens, one each: of `ids`, or of
            `decoder_ids` where there are any.
        answer: tokens of the target; [] where none was given (`read` then has one position).
        decoder_ids: input of an encoder-decoder model's decoder: start token, the text it begins
            with, and the answer except for its last token. None for the other kinds.
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
    """How a prompt is put to a model: `prompt` for the stack that reads it, `decoder` for what the
    decoder begins with.
    """

    prompt: Frame
    decoder: str = ""


def default_templates(kind: ModelKind, tokenizer: PreTrainedTokenizerBase) -> Templates:
    """Return the wording in which models of a kind were trained to fill a blank.

    Raises:
        UnsupportedModelError: a masked model's tokenizer has no mask token.
    """
    if kind == "causal":
        return Templates(BARE)
    if kind == "masked" and not tokenizer.mask_token:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no mask token, which a masked model is asked with; "
            "set tokenizer.mask_token"
        )
    if kind == "encoder-decoder" and _has_sentinel(tokenizer):
        return Templates(f"{{}} {SENTINEL}.", SENTINEL)
    if tokenizer.mask_token:
        return Templates(f"{{}} {tokenizer.mask_token}.", "{}" if kind == "encoder-decoder" else "")
    return Templates("{}")


def _has_sentinel(tokenizer: PreTrainedTokenizerBase) -> bool:
    sentinel = tokenizer.convert_tokens_to_ids(SENTINEL)
    # Not only None: a tokenizer without the token gives the id of its unknown word.
    return sentinel is not None and sentinel != tokenizer.unk_token_id


def check_prompt_template(
    template: str, kind: ModelKind, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the template, if a model of that kind can be asked with it.

    Raises:
        SettingError: it has not one place {} for the prompt; for kinds other than causal, text in
            front of it, or not the one blank that the kind needs.
    """
    if kind == "causal":
        return str(check_frame(template))
    if not template.startswith("{}") or template.count("{}") != 1:
        raise SettingError(
            f"cloze_template={template!r}: expected {{}} once, in front, for the prompt; "
            "words before it belong into the prompt"
        )
    mask = tokenizer.mask_token
    if kind == "masked" and template.count(str(mask)) != 1:
        raise SettingError(
            f"cloze_template={template!r}: expected the mask token {mask!r} once; a longer answer "
            "repeats it"
        )
    return template


def check_decoder_template(template: str, kind: ModelKind) -> str:
    """Return what the decoder begins with, if it is a text with {}, the prompt, at most once.

    Raises:
        SettingError: the model has no decoder of its own, or the text has {} twice.
    """
    if template and kind != "encoder-decoder":
        raise SettingError(
            f"cloze_decoder={template!r}: only an encoder-decoder model has a decoder to begin "
            f"for; this is a {kind} one"
        )
    if template.count("{}") > 1:
        raise SettingError(f"cloze_decoder={template!r}: expected {{}}, the prompt, at most once")
    return template


def check_target(target: str) -> None:
    """Raise where a target has no words."""
    if not target.strip():
        raise FactError(f"target={target!r} is empty; give the words that shall follow the prompt")


def continued(tokens: Tokens, frame: Frame, prompt: str, target: str | None) -> Cloze:
    """Return a causal model's cloze: the prompt's tokens in their frame, then the target's except
    the last.

    Example: pocket, "The tower is in" and the target "New Zealand", two tokens.

        position   0     1     2      3     4     5
        ids        413   275   1921   356   318   1606
        token      The    t    ower    is    in    New
        read                                ^     ^
        answer                              1606  4492 (" New", " Zealand")

    `tokens` is 5. The last answer token, 4492, is predicted and never read.
    """
    whole, start = framed(frame, prompt)
    head, text = tokens.encode(whole), whole[start:]
    # The frame decides whether a space comes first, so the answer is worded before it is tokenised.
    words = "" if target is None else answer_text(tokens, whole, target, text[len(prompt) :])
    answer = tokens.continuation_ids(whole, words) if words else []
    ids, offsets = head.ids + answer[:-1], head.offsets
    # With one token nothing is read after the prompt, whose offsets are known already.
    if len(answer) > 1:
        joint = tokens.encode(whole + words)
        text = joint.text[start:]
        if joint.ids[: len(ids)] == ids:
            offsets = joint.offsets[: len(ids)]
        else:  # the answer was tokenised alone, see `Tokens.continuation_ids`: no characters known
            offsets = offsets + [(len(whole), len(joint.text))] * len(answer[:-1])
    # Places are counted from the prompt on; those of the frame's text in front are all 0.
    offsets = [(max(a - start, 0), max(b - start, 0)) for a, b in offsets]
    read = list(range(len(head.ids) - 1, len(ids)))
    return Cloze(ids, offsets, text, read, answer, None, len(head.ids))


def answer_text(tokens: Tokens, whole: str, target: str, rest: str) -> str:
    """Return `target` with a leading space, or without one, as it follows the framed prompt.

    Words follow words after a space. Where the frame has text after the prompt, the answer begins
    something new: there is no space after white space, nor after a special token, unless the
    model's chat template writes one there ("[/INST] Paris").

    Args:
        whole: the framed prompt.
        rest: the frame's text after the prompt.
    """
    if not rest:
        return spaced(target)
    in_a_turn = rest[-1].isspace() or (
        whole.endswith(tokens.special_texts) and not answers_spaced(tokens.tokenizer)
    )
    return target.lstrip() if in_a_turn else spaced(target)


def filled(tokens: Tokens, template: str, prompt: str, target: str | None) -> Cloze:
    """Return a masked model's cloze: the prompt and one mask for each of the target's tokens.

    The space before the mask is dropped where it would be a token of its own: the answer's first
    token has it inside.

    Example: a word-piece tokenizer and a target of two tokens.

        position   0      1     2      3    4    5       6       7   8
        ids        2      118   148    132  131  4       4       9   3
        token      [CLS]  The   tower  is   in   [MASK]  [MASK]  .   [SEP]
        read                                     ^       ^

    The tokens of `answer` are those that stand in the masks' places when the sentence is tokenised
    with the target in it.
    """
    tokenizer = tokens.tokenizer
    mask = str(tokenizer.mask_token)
    before, _, rest = template.replace("{}", prompt).rpartition(mask)
    candidates = (before, before.rstrip())
    # Many tokenizers have the space inside a word's token; before a mask it would be a token.
    encoding = min(
        (tokens.encode_all(text + mask + rest) for text in candidates), key=lambda e: len(e.ids)
    )
    ids, offsets = encoding.ids, encoding.offsets
    # The last mask: a prompt may have masks of its own.
    at = max(i for i, token in enumerate(ids) if token == tokenizer.mask_token_id)
    answer = []
    if target is not None:
        answer = _in_place(tokens, ids[:at], before.rstrip(), spaced(target), rest)
    n = max(1, len(answer))
    ids = ids[:at] + ids[at : at + 1] * n + ids[at + 1 :]
    offsets = offsets[:at] + offsets[at : at + 1] * n + offsets[at + 1 :]
    tokens.check_length(ids, encoding.text)
    return Cloze(ids, offsets, encoding.text, list(range(at, at + n)), answer, None, len(ids))


def _in_place(tokens: Tokens, head: list[int], before: str, target: str, rest: str) -> list[int]:
    """Return the target's tokens in its place, after those of `head`; tokenised alone where it
    would merge with what is around it.
    """
    encoding = tokens.encode_all(before + target + rest)
    ids, offsets = encoding.ids, encoding.offsets
    limit = len(before + target)
    # Up to the first token that begins after the target, or that covers nothing: a special one.
    end = next(
        (i for i in range(len(head), len(ids)) if offsets[i][0] >= limit or offsets[i] == (0, 0)),
        len(ids),
    )
    if ids[: len(head)] == head and len(head) < end and offsets[end - 1][1] <= limit:
        return ids[len(head) : end]
    return tokens.bare_ids(target)


def answered(
    tokens: Tokens, templates: Templates, model: PreTrainedModel, prompt: str, target: str | None
) -> Cloze:
    """Return an encoder-decoder model's cloze: the encoder reads the prompt, the decoder begins as
    `templates` says and then writes the answer.

    Example: T5 with a tokenizer of whole words, the target "Paris".

        ids          64   94     78  77  98            3   8   1
        token        The  tower  is  in  <extra_id_0>  ''  .   </s>
        decoder_ids  0      98
        token        <pad>  <extra_id_0>
        read                ^
        answer              61 (Paris)
    """
    encoding = tokens.encode_all(str(templates.prompt).replace("{}", prompt))
    beginning = templates.decoder.replace("{}", prompt)
    head, answer = tokens.bare_ids(beginning), []
    if target is not None:
        words = spaced(target) if beginning else target.strip()
        # Together, as for a causal model: a tokenizer may cut a word otherwise at a text's start.
        joint = tokens.bare_ids(beginning + words)
        follows = joint[: len(head)] == head and len(joint) > len(head)
        answer = joint[len(head) :] if follows else tokens.bare_ids(words)
    # The special tokens in front of the encoder's text, as BART's decoder repeats them.
    lead = next(i for i, span in enumerate(encoding.offsets) if span != (0, 0))
    head = _decoder_start(model, encoding.ids[:lead]) + head
    decoder_ids = head + answer[:-1]
    read = list(range(len(head) - 1, len(decoder_ids)))
    ids, text = encoding.ids, encoding.text
    tokens.check_length(ids, text)
    return Cloze(ids, encoding.offsets, text, read, answer, decoder_ids, len(ids))


def _decoder_start(model: PreTrainedModel, lead: list[int]) -> list[int]:
    """Return what the decoder always reads first: its start token, then the token forced on it or
    those that begin every text.
    """
    # The generation config first: newer checkpoints keep these settings there and nowhere else.
    configs = (getattr(model, "generation_config", None), model.config)

    def setting(name: str) -> int | None:
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    start, forced = setting("decoder_start_token_id"), setting("forced_bos_token_id")
    if start is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say which token its decoder starts with; set "
            "lm.model.config.decoder_start_token_id (T5: the padding token, BART: the end-of-text "
            "token)"
        )
    return [int(start), *(lead if forced is None else [int(forced)])]
