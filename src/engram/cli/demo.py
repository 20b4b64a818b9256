"""`engram demo`: find one fact of the bundled model, rewrite it, check, save and undo the edit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram.facts import Fact


def demo(
    subject: Annotated[
        str, typer.Option("--subject", "-s", help="Subject that the bundled model knows.")
    ] = "Eiffel Tower",
    target: Annotated[str, typer.Option("--target", "-t", help="New object.")] = "Rome",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the picture and the edit.")
    ] = Path("engram-demo"),
) -> None:
    """See it all in a minute: trace a fact of the bundled model, rewrite it, check, save, undo.

    No network is needed.
    """
    from engram.cli import show, terminal

    began = time.monotonic()
    say = terminal.console.print
    fact = _chosen(subject, target)
    lm = terminal.load("pocket")
    import engram
    from engram import pocket
    from engram.locate.settings import default_window
    from engram.modules.fingerprints import fingerprint

    say(
        f"[bold]1. The model[/]  {lm.name}: {lm.n_layers} layers of {lm.d_model}, "
        f"trained on {len(pocket.facts())} facts in {len(pocket.relations())} relations"
    )
    for text in (fact.prompt_text, *fact.paraphrases[:2]):
        token, probability = lm.next_tokens(text, 1)[0]
        say(f"   {text} →[bold]{token}[/] ({probability:.2f})")

    say(
        "\n[bold]2. Where is it?[/]  "
        "Corrupt the subject, restore one state at a time, watch the answer come back"
    )
    trace = engram.trace(
        lm, fact.prompt_text, subject=fact.subject, window=default_window(lm.n_layers)
    )
    show.show_trace(trace)
    out.mkdir(parents=True, exist_ok=True)
    trace.plot().savefig(out / "trace.png")

    say(
        f"\n[bold]3. Rewrite it[/]  {fact.target_true} becomes {fact.target}: "
        "one rank-one change of one matrix (ROME)"
    )
    before = {name: fingerprint(tensor) for name, tensor in lm.model.state_dict().items()}
    with terminal.progress() as progress:
        edit = engram.rewrite(lm, fact, progress=progress)
        receipt = engram.verify(lm, edit, progress=progress)
    show.show_receipt(receipt)

    folder = edit.with_receipt(receipt).save(out / "edit")
    say(f"\n[bold]4. Keep it[/]  {edit!r}")
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    say(f"   {folder}: {terminal.size(folder)}; the model has {weights / 1e6:.1f} million weights")
    with engram.Edit.load(folder).applied(lm):
        changed = [
            name
            for name, tensor in lm.model.state_dict().items()
            if fingerprint(tensor) != before[name]
        ]
        say(
            f"   loaded and applied: {len(changed)} of {len(before)} tensors differ "
            f"({', '.join(changed)})"
        )
        say(f"   {lm.generate(fact.prompt_text, 6)}")
    same = all(
        fingerprint(tensor) == before[name] for name, tensor in lm.model.state_dict().items()
    )
    say(f"   undone: {'every bit is as it was' if same else '[red]the weights differ[/]'}")
    say(f"   {lm.generate(fact.prompt_text, 6)}")
    say(
        f"\npicture {out / 'trace.png'}, edit {folder}, {time.monotonic() - began:.0f} s. "
        "Next: engram edit --help"
    )
    if not same:
        raise typer.Exit(1)


def _chosen(subject: str, target: str) -> Fact:
    """Return the fact that changes `subject` to `target`, with paraphrases and neighbours.

    Raises:
        FactError: the bundled model does not know the subject, or the target is no object of its
            relations.
    """
    from difflib import get_close_matches

    from engram import pocket
    from engram.errors import FactError

    if not target.strip():
        raise FactError(
            "--target is empty; give the object that the model shall say, such as 'Paris'"
        )
    known = pocket.find(subject)
    if not known:
        names = sorted({fact.subject for fact in pocket.facts()})
        near = get_close_matches(subject, names, n=3, cutoff=0.5) or [
            "Space Needle",
            "Miles Davis",
            "Eiffel Tower",
        ]
        raise FactError(
            f"the bundled model knows nothing of {subject!r}; "
            f"it knows {', '.join(near)} and {len(names)} other subjects"
        )
    objects = {
        old.relation: sorted({k.object for k in pocket.facts() if k.relation == old.relation})
        for old in known
    }
    fitting = [
        old
        for old in known
        if target.strip() in objects[old.relation] and old.object != target.strip()
    ]
    if not fitting:
        choices = "; ".join(
            f"{old.relation.replace('_', ' ')} {', '.join(objects[old.relation][:6])}..."
            for old in known
        )
        raise FactError(
            f"{target!r} cannot replace what the model knows of {subject!r}; "
            f"choose another of: {choices}"
        )
    prompt = fitting[0].trained()[0]  # the plainest wording
    return replace(pocket.as_fact(fitting[0], target.strip()), prompt=prompt)
