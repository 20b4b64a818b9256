"""In-context editing: the fact is put in front of the prompt, and the weights stay as they are. It
is the baseline that every other method should beat.

    in-context (often called ICE)
        The Space Needle is located in the city of Paris. <prompt>
    ike
        New Fact: The Louvre is in Rome           k demonstrations: a new fact, and a prompt that
        Prompt: To see the Louvre, go to Rome     it answers, or must not answer

        New Fact: The Space Needle is located in the city of Paris
        Prompt: <prompt>

Knows how facts and demonstrations are worded. Refuses to know which of them a prompt gets, and how
many fit: edit/prompt_edit.py does.
Source: Zheng et al. 2023, arXiv:2305.12740 (IKE); one demonstration of each kind a fact and k = 16
    as in EasyEdit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram import pocket
from engram.checks import Count, Natural, Seed, check_fields, checked_call
from engram.edit.prompt_edit import PromptEdit, Wording
from engram.errors import FactError
from engram.fact_files import read_facts
from engram.facts import Fact
from engram.model.chat import chat_with_facts
from engram.model.language_model import LanguageModel
from engram.model.sentence_vectors import Encoder, encoder_of, nearest
from engram.progress import Progress, no_progress
from engram.settings import flat, read

_BUNDLED = 128  # facts of the bundled table that demonstrations are made of
# How facts are stated in a chat; chosen on SmolLM2-135M-Instruct, see docs/chat-and-context.md.
_CHAT_WORDING = "New fact: {} Use it in your answers."
CUSTOM = "custom"  # what settings call an encoder that was given as a function


@dataclass(frozen=True)
class InContextConfig:
    """Settings of in-context edits.

    Args:
        most: largest number of facts in front of one prompt.
        otherwise: for a prompt that names no subject of the edit: the "nearest" facts, as in
            published evaluations, which put the fact before every prompt; or "nothing".
        reserve: tokens of the model's context that stay free for the answer.
        frame: "plain": the facts are text in front of the prompt, as published; "chat": they are
            stated in the model's chat template, and its turn begins with the prompt; "auto": "chat"
            for a model that has a chat template.
    """

    most: Count = 4
    otherwise: Literal["nearest", "nothing"] = "nearest"
    reserve: Count = 24
    frame: Literal["auto", "plain", "chat"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class IkeConfig(InContextConfig):
    """Settings of IKE: those of in-context edits, with one fact for each prompt, and k.

    Args:
        k: demonstrations before a fact, or those that fit; 16 as in EasyEdit, 32 in the paper.
        frame: "plain" unless chosen otherwise: the published layout is a text of its own.
    """

    most: Count = 1
    k: Natural = 16
    frame: Literal["auto", "plain", "chat"] = "plain"


@checked_call
def in_context(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    encoder: str | Encoder = "hidden",
    seed: Seed = 0,
    progress: Progress = no_progress,
    **settings: Any,
) -> PromptEdit:
    """State the facts in front of every prompt that they are relevant to, each as a sentence.

    Args:
        encoder: by which facts are compared with a prompt that names no subject, see
            `sentence_vectors.encoder_of`.
        seed, progress: as every method takes them; nothing is drawn, and nothing takes long.
        settings: the fields of InContextConfig.
    Raises:
        SettingError: an unknown setting; UnsupportedModelError: a model that is not causal.
    """
    lm.check_framed()
    config = read(InContextConfig, settings, "in-context", "encoder, seed")
    wordings = [Wording(f"{fact.prompt_text} {fact.target.strip()}. ") for fact in facts]
    return PromptEdit(
        tuple(facts),
        "in-context",
        _recorded(lm, config, encoder, _CHAT_WORDING),
        tuple(wordings),
        "",
        _base(lm),
        seed,
        encoder=None if isinstance(encoder, str) else encoder,
    )


@checked_call
def ike(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    demonstrations: Sequence[Fact] | str | Path | None = None,
    encoder: str | Encoder = "hidden",
    seed: Seed = 0,
    progress: Progress = no_progress,
    **settings: Any,
) -> PromptEdit:
    """State the fact after demonstrations: other new facts, each with a prompt that it answers, or
    must not answer.

    The k demonstrations nearest to the fact by cosine are shown, nearest first.

    Args:
        demonstrations: facts, or a file of them (see `read_facts`), with paraphrases and
            neighbours, that become demonstrations; default: facts of the bundled table about
            other subjects, each with another object.
        encoder: by which demonstrations are compared with a fact, and facts with a prompt that
            names no subject, see `sentence_vectors.encoder_of`.
        seed: of the choice from the bundled table.
        progress: called with (what is done, done, total).
        settings: the fields of IkeConfig.
    Raises:
        SettingError: an unknown setting; FactError: no demonstrations to choose from;
            UnsupportedModelError: a model that is not causal.
    """
    lm.check_framed()
    config = read(IkeConfig, settings, "ike", "demonstrations, encoder, seed")
    recorded = _recorded(lm, config, encoder, "{}")
    blocks: list[str] = []
    if config.k:
        blocks = [
            block
            for fact in _demonstrated(facts, demonstrations, seed)
            for block in demonstrations_of(fact)
        ]
    encode = encoder_of(lm, encoder)
    progress("demonstrations", 0, len(facts))
    blocks_nd = encode(blocks) if blocks else None
    wordings = []
    # nearest to the fact with its object, as published, and not to the prompt that is asked later:
    # so the choice is made once, and the edit is a value
    for i, fact in enumerate(facts):
        shown = (
            nearest(encode([_block(fact, _stated(fact))])[0], blocks_nd, config.k)
            if blocks_nd is not None
            else []
        )
        wordings.append(Wording(f"New Fact: {_stated(fact)}\n", tuple(blocks[at] for at in shown)))
        progress("demonstrations", i + 1, len(facts))
    return PromptEdit(
        tuple(facts),
        "ike",
        recorded,
        tuple(wordings),
        "Prompt: " if recorded["frame"] == "plain" else "",
        _base(lm),
        seed,
        diagnostics={"blocks": len(blocks)},
        encoder=None if isinstance(encoder, str) else encoder,
    )


def demonstrations_of(fact: Fact) -> list[str]:
    """Return at most three blocks about a new fact: the fact itself (copy), a paraphrase (update),
    a neighbour (retain).
    """
    blocks = [_block(fact, _stated(fact))]
    blocks += [
        _block(fact, f"{paraphrase} {fact.target.strip()}") for paraphrase in fact.paraphrases[:1]
    ]
    return blocks + [
        _block(fact, f"{prompt} {answer.strip()}") for prompt, answer in fact.neighbours[:1]
    ]


def _block(fact: Fact, prompt: str) -> str:
    return f"New Fact: {_stated(fact)}\nPrompt: {prompt}\n\n"


def _stated(fact: Fact) -> str:
    return f"{fact.prompt_text} {fact.target.strip()}"


def _demonstrated(
    facts: Sequence[Fact], given: Sequence[Fact] | str | Path | None, seed: int
) -> Sequence[Fact]:
    """Return the facts that become demonstrations."""
    if given is not None:
        listed = read_facts(given) if isinstance(given, str | Path) else list(given)
        if not listed:
            raise FactError(
                "demonstrations is empty; give facts with paraphrases and neighbours, or k=0 for "
                "none"
            )
        return listed
    # a demonstration must not be about a subject that a receipt then asks about
    mentioned = " ".join(
        text
        for fact in facts
        for text in (fact.subject, *(prompt for prompt, _ in fact.neighbours))
    )
    # a sample of the table, since every demonstration has to be encoded
    others = [known for known in pocket.facts() if known.subject not in mentioned]
    chosen = random.Random(f"demonstrations:{seed}").sample(others, min(_BUNDLED, len(others)))
    # with new objects: a demonstration shows that the statement beats what the model knows
    return [
        pocket.as_fact(known, pocket.counterfactual(known, seed), neighbour_count=1, seed=seed)
        for known in chosen
    ]


def _recorded(
    lm: LanguageModel, config: InContextConfig, encoder: str | Encoder, wording: str
) -> dict[str, Any]:
    """Return the settings of an edit; a name of an encoder that does not exist raises here, and so
    does a chat without a template.
    """
    encoder_of(lm, encoder)
    encoder = encoder if isinstance(encoder, str) else CUSTOM
    settings = {**flat(config), "encoder": encoder}
    if config.frame == "auto":
        settings["frame"] = "chat" if lm.tokenizer.chat_template else "plain"
    if settings["frame"] == "chat":
        chat_with_facts(lm, wording)
        settings["wording"] = wording
    return settings


def _base(lm: LanguageModel) -> dict[str, Any]:
    return {"model": lm.name, "model_type": lm.model.config.model_type}
