"""Context templates: short texts put before a prompt, so that an edit holds wherever the prompt
occurs. Sentences that the package brings, or texts that the model samples.

Texts are sampled once for a model and its settings, and read from the cache afterwards: every edit
of a model takes the same ones.

Knows templates, sampling and their files. Refuses to know what is optimised in them. Source: Meng
et al. 2022, arXiv:2202.05262, Sec. 3.1 and Appendix E.5, and arXiv:2210.07229; lengths as released.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Sequence
from typing import Literal

import torch

from engram.checks import Seed, checked_call
from engram.editors.second_moments.corpora import wikipedia_documents
from engram.errors import EngramFileError
from engram.files.atomic import atomic_file
from engram.files.cache_folder import cache_folder, written_if_possible
from engram.files.forms import read_json
from engram.model.chat import Style, chat_frame
from engram.model.generation import sample_texts
from engram.model.language_model import LanguageModel
from engram.modules.fingerprints import fingerprints
from engram.progress import Progress, no_progress, stage
from engram.runs.identity import identity_of

log = logging.getLogger(__name__)

# ROME's (tokens, number of texts); tokens count the start token too, so that 5 gives 4 new ones
RELEASED = ((5, 10), (10, 10))
STARTED = ("The", "Therefore", "Because", "I", "You")  # MEMIT's, each continued to 10 tokens
SENTENCES = 10  # of ROME, where they stand in for its 20 samples
_LENGTHS = range(25, 71)  # characters of such a sentence
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)]{2}\.) (?=[A-Z])")  # not after "St." or an initial
_PLAIN = re.compile(r'[A-Z][^"{}]*\.')

Source = Literal["wikipedia", "sampled"]


def contexts_of(
    lm: LanguageModel,
    given: Sequence[str] | Source | None,
    *,
    seed: int = 0,
    started: Sequence[str] = (),
    progress: Progress = no_progress,
) -> tuple[str, ...]:
    """Return templates with one `{}` each, the bare "{}" first.

    Args:
        given: the templates; "sampled" or None: `sample_contexts`; "wikipedia": `text_contexts`, as
            many as are sampled of `started`, otherwise `SENTENCES`.
        started, progress: see `sample_contexts`.
    """
    if given == "wikipedia":
        return text_contexts(len(started) or SENTENCES, seed)
    if given is None or given == "sampled":
        return sample_contexts(lm, seed=seed, started=started, progress=progress)
    return tuple(given)


def text_contexts(count: int, seed: int = 0) -> tuple[str, ...]:
    """Return templates: the bare "{}", then it after short sentences of the corpus "wikipedia".

    No model runs. A model whose texts begin without a start token samples little that is text: a
    fragment of it before each prompt is no context in which anybody asks.
    """
    sentences = (
        text for document in wikipedia_documents() for text in _SENTENCE_END.split(document)
    )
    short = [text for text in sentences if len(text) in _LENGTHS and _PLAIN.fullmatch(text)]
    return "{}", *(f"{text} {{}}" for text in random.Random(seed).sample(short, count))


def sample_contexts(
    lm: LanguageModel,
    *,
    seed: int = 0,
    started: Sequence[str] = (),
    progress: Progress = no_progress,
) -> tuple[str, ...]:
    """Return templates with one `{}` each: the bare "{}", then texts that `lm` samples (top-k 5),
    each ended by ". "; read from the cache where the same model sampled them before.

    Braces in sampled text become parentheses, since a template has one place only.

    Args:
        started: words that a text each begins with, 10 tokens in all (MEMIT); default: ROME's
            texts, see `RELEASED`.
        progress: called with (what is done, done, total).
    """
    about = json.dumps([seed, list(started), RELEASED])
    prints = fingerprints(lm.model, quick=True)
    path = cache_folder("contexts") / f"{identity_of(lm, prints, about)}.json"
    try:
        kept: list[str] = read_json(path, list[str])
        if any(template.count("{}") != 1 for template in kept) or kept[:1] != ["{}"]:
            raise EngramFileError(f"{path} does not hold templates with one {{}} each")
        return tuple(kept)
    except FileNotFoundError:
        pass
    except (EngramFileError, OSError) as error:
        log.warning("%s; sampling contexts again", error)
    with stage(progress, "contexts", "sampling contexts"):
        contexts = _sampled(lm, seed, started)
    with written_if_possible(path.parent), atomic_file(path) as temporary:
        temporary.write_text(json.dumps(contexts), encoding="utf-8")
    return contexts


def _sampled(lm: LanguageModel, seed: int, started: Sequence[str]) -> tuple[str, ...]:
    # a stream of the call's own. The released code samples once per process, without a seed, and
    # takes the same texts for whatever model is edited next
    generator = torch.Generator().manual_seed(seed)
    draws: list[tuple[int, int, str | None]] = [(1, 10, word) for word in started]
    texts = [
        text
        for count, tokens, start in draws or [(n, length - 1, None) for length, n in RELEASED]
        for text in sample_texts(lm, count, tokens, generator, top_k=5, start=start)
    ]
    # the released code fills templates by str.format, twice, which fails on a sampled brace
    return "{}", *(text.replace("{", "(").replace("}", ")") + ". {}" for text in texts)


@checked_call
def chat_contexts(
    lm: LanguageModel,
    *,
    seed: Seed = 0,
    styles: Sequence[Style] = ("continue",),
    system: str | None = None,
) -> tuple[str, ...]:
    """Return contexts for `engram.rewrite(..., contexts=...)`, half of which are in the chat's
    frames, so that an edit holds there too.

    They are the bare "{}", the bare frames, and then as many sampled texts as ROME has by default,
    every other one plain and the rest in the frames in turn.

    Args:
        seed: of the sampled texts, see `sample_contexts`.
        styles, system: see `chat_frame`. An edit of weights is optimised for words that follow its
            prompt; "continue" is the style in which they do.
    Raises:
        UnsupportedModelError: a tokenizer without a chat template.
    Example:
        >>> lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        >>> contexts = engram.chat_contexts(lm)
        >>> contexts[:2]
        ('{}', 'State a fact in one short sentence. {}')
        >>> lm.tokenizer.chat_template = None
    """
    frames = [chat_frame(lm, style, system=system) for style in styles]
    bare, *sampled = sample_contexts(lm, seed=seed)
    mixed = [
        context if i % 2 or not frames else frames[i // 2 % len(frames)].replace("{}", context)
        for i, context in enumerate(sampled)
    ]
    return (bare, *frames, *mixed)
