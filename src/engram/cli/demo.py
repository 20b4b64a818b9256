"""`engram demo`: find one fact of a small model, rewrite it, check, save and undo the edit.

It is a script in four steps that print what they do. Refuses to compute: each step is a public
function, and docs/index.md shows the same calls in Python.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engram.cli import outputs
from engram.cli.options import AsJson, Explain

if TYPE_CHECKING:
    from engram.edit.edit import Edit
    from engram.facts import Fact
    from engram.model.language_model import LanguageModel


def _say(text: str) -> None:
    # Not imported above: rich draws a random number when it is imported, and imports must not.
    from engram.cli import terminal

    terminal.console.print(text)


def demo(
    subject: Annotated[
        str, typer.Option("--subject", "-s", help="Subject that the model knows.")
    ] = "Eiffel Tower",
    target: Annotated[str, typer.Option("--target", "-t", help="New object.")] = "Rome",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the picture and the edit.")
    ] = Path("engram-demo"),
    model: Annotated[
        str, typer.Option("--model", "-m", help="'pocket', or 'smollm2': a real model, minutes.")
    ] = "pocket",
    explain: Explain = False,
    as_json: AsJson = False,
) -> None:
    """See it all in a minute: trace a fact of the bundled model, rewrite it, check, save, undo.

    No network is needed. The same on a real model: --model smollm2.

    Example: engram demo -s "Eiffel Tower" -t Rome
    """
    from engram.cli import terminal
    from engram.cli.demo_facts import demo_fact

    began = time.monotonic()
    # Before torch is imported: a misspelt subject is reported at once.
    fact = demo_fact(model, subject, target)
    picture, folder = out / "trace.png", out / "edit"
    # The edit's name first: its folder is made for both.
    names = outputs.edit_folder(folder), outputs.picture(picture)
    with outputs.tried(*names) as written, terminal.no_results(as_json):
        lm = terminal.load(model)
        _introduce(lm, fact)
        written.write(names[1], partial(_locate, lm, fact))
        edit = _rewrite(lm, fact, explain)
        written.write(names[0], edit.save)
        undone = _keep(lm, fact, edit, folder)
        _say(
            f"\npicture {picture}, edit {folder}, {time.monotonic() - began:.0f} s. "
            "Next: engram edit --help"
        )
    if as_json:
        terminal.print_json(
            {
                "fact": fact.to_dict(),
                "picture": picture,
                "edit": folder,
                "receipt": edit.receipt,
                "undone": undone,
                "seconds": time.monotonic() - began,
            }
        )
    if not undone:
        raise typer.Exit(1)


def _introduce(lm: LanguageModel, fact: Fact) -> None:
    from engram import pocket
    from engram.model.named_models import canonical_name

    about = f"{sum(weight.numel() for weight in lm.model.parameters()) / 1e6:.0f} million weights"
    if canonical_name(lm.name) == "pocket":
        about = f"trained on {len(pocket.facts())} facts in {len(pocket.relations())} relations"
    _say(f"[bold]1. The model[/]  {lm.name}: {lm.n_layers} layers of {lm.d_model}, {about}")
    for text in (fact.prompt_text, *fact.paraphrases[:2]):
        token, probability = lm.next_tokens(text, 1)[0]
        _say(f"   {text} →[bold]{token}[/] ({probability:.2f})")


def _locate(lm: LanguageModel, fact: Fact, picture: Path) -> None:
    import engram
    from engram.cli import show, terminal

    _say(
        "\n[bold]2. Where is it?[/]  "
        "Corrupt the subject, restore one state at a time, watch the answer come back"
    )
    with terminal.progress() as progress:
        trace = engram.trace(lm, fact.prompt_text, subject=fact.subject, progress=progress)
    show.show_trace(trace)
    outputs.draw(trace.plot, picture)


def _rewrite(lm: LanguageModel, fact: Fact, explain: bool) -> Edit:
    """Return the edit, with its receipt."""
    import engram
    from engram.cli import show, terminal
    from engram.evaluate.words import RECEIPT_WORDS

    _say(
        f"\n[bold]3. Rewrite it[/]  {fact.target_true} becomes {fact.target}: "
        "one rank-one change of one matrix (ROME)"
    )
    with terminal.progress() as progress:
        edit = engram.rewrite(lm, fact, progress=progress)
        receipt = engram.verify(lm, edit, progress=progress)
    show.show_receipt(receipt)
    if explain:
        show.show_words(RECEIPT_WORDS)
    return edit.with_receipt(receipt)


def _keep(lm: LanguageModel, fact: Fact, edit: Edit, folder: Path) -> bool:
    """Apply the edit that was saved, undo it; return whether every bit is as it was."""
    import engram
    from engram.cli import terminal
    from engram.modules.fingerprints import fingerprints

    before = fingerprints(lm.model)
    _say(f"\n[bold]4. Keep it[/]  {edit!r}")
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    _say(f"   {folder}: {terminal.size(folder)}; the model has {weights / 1e6:.1f} million weights")
    # From the folder, not from memory: what is shown is what a user gets tomorrow.
    with engram.Edit.load(folder).applied(lm):
        now = fingerprints(lm.model)
        changed = [name for name in before if now[name] != before[name]]
        _say(
            f"   loaded and applied: {len(changed)} of {len(before)} tensors differ "
            f"({', '.join(changed)})"
        )
        _say(f"   {lm.generate(fact.prompt_text, 6)}")
    undone = fingerprints(lm.model) == before
    _say(f"   undone: {'every bit is as it was' if undone else '[red]the weights differ[/]'}")
    _say(f"   {lm.generate(fact.prompt_text, 6)}")
    return undone
