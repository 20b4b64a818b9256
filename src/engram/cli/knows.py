"""`engram knows`: which facts of a file a model knows, by relation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, Model, ModelOptions, Seed


@dataclass(frozen=True)
class FactsOptions:
    """Which facts the model is tested on."""

    facts: Annotated[
        str,
        typer.Option(help="File of facts (JSON, JSON lines, CSV), or 'pocket': the bundled table."),
    ] = "pocket"
    limit: Annotated[
        int | None, typer.Option(help="Number of facts, drawn at random; default: all.", min=1)
    ] = None
    seed: Seed = 0


@dataclass(frozen=True)
class ScoreOptions:
    """How an answer is scored."""

    candidates: Annotated[
        Literal["vocabulary", "relation"],
        typer.Option(
            help="Rank the object among: vocabulary, or relation (the file's objects of it)."
        ),
    ] = "vocabulary"
    paraphrases: Annotated[
        Literal["first", "best", "mean", "none"],
        typer.Option(
            help="Prompt that counts: first, best (oracle), mean (of log-probs); none: first alone."
        ),
    ] = "first"
    length: Annotated[
        Literal["sum", "mean"],
        typer.Option(help="Log-probability of objects of several tokens: sum or mean."),
    ] = "sum"
    k: Annotated[int, typer.Option("-k", help="The k of P@k.", min=1)] = 10


def knows(
    model: Model,
    facts_options: FactsOptions,
    scores: ScoreOptions,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for every answer.")
    ] = None,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Measure which facts a model knows: P@1, P@k, MRR, and agreement between wordings.

    Example: engram knows pocket --limit 100
    """
    import engram
    from engram.cli import show, terminal
    from engram.facts import sample_facts

    def show_result() -> None:
        if as_json:
            terminal.print_json(knowledge.to_dict())
        else:
            show.show_knowledge(knowledge, facts_options.seed)

    answers = outputs.Output("answers", out, "JSON")
    with outputs.tried(answers, reads=[facts_options.facts]) as written:
        table = engram.read_facts(facts_options.facts)
        facts = sample_facts(table, facts_options.limit, facts_options.seed)
        lm = model_options.load(model)
        with terminal.progress() as progress:
            knowledge = engram.knows(
                lm,
                facts,
                candidates=scores.candidates,
                aggregate="first" if scores.paraphrases == "none" else scores.paraphrases,
                length=scores.length,
                paraphrases=scores.paraphrases != "none",
                k=scores.k,
                # Candidates are the objects of the whole file: ranks would be better among fewer.
                table=table,
                progress=progress,
            )
        written.finish(show_result, {answers: knowledge.save}, as_json=as_json)
