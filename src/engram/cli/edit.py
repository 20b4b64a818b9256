"""The commands, one function each. What they take is what the library takes; what they print is
what it returns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from engram.edit.edit import Edit
    from engram.edit.prompt_edit import PromptEdit
    from engram.facts import Fact
from engram.cli.options import (
    AsJson,
    Chat,
    DeviceMap,
    Dtype,
    EditFolder,
    Model,
    Out,
    Seed,
    settings_of,
)


def edit(
    model: Model,
    subject: Annotated[
        str | None, typer.Option("--subject", "-s", help="Name of the subject.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text with one {} for the subject, the object next."),
    ] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="The new object.")] = None,
    true: Annotated[
        str | None, typer.Option(help="The object so far; default: the model's own answer.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(help="File of facts (JSON, JSON lines, CSV), instead of the four above."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to keep the edit in.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to edit: rome, memit, alphaedit, lora, ...; a wrong name lists all."
        ),
    ] = "rome",
    layer: Annotated[
        str | None,
        typer.Option(
            help="Block to edit, or several as in 3,4,5, or 'auto'; default: the preset's."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, any setting of the method; repeat."),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Text file for second moments; default: what the model samples."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Rewrite it for a chat too; a receipt in plain text and one in the chat's turns.",
        ),
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Rewrite a fact, take the receipt, and keep the edit as a small folder. The model itself is
    not changed.
    """
    import engram
    from engram.cli import show, terminal

    wanted = _facts(subject, prompt, target, true, facts)
    settings = {**settings_of(setting), "seed": seed, **({"corpus": corpus} if corpus else {})}
    if layer is not None:
        settings |= _layers(method, layer)
    lm = terminal.load(model, dtype, device_map)
    frames = [None, engram.chat_frame(lm)] if chat else [None]
    if chat and "contexts" not in settings and method not in ("ultraedit", "in-context", "ike"):
        settings["contexts"] = engram.chat_contexts(lm, seed=seed)
    terminal.show_plan_if_large(lm, len(wanted), method, settings)
    with terminal.progress() as progress:
        made = engram.rewrite(lm, wanted, method, **settings, progress=progress)
        receipts = [engram.verify(lm, made, frame=frame, progress=progress) for frame in frames]
    made = made.with_receipt(
        receipts[-1]
    )  # of the chat, where there is one: that is how the model will be used
    if as_json:
        told = [receipt.to_dict() for receipt in receipts]
        typer.echo(json.dumps({"plain": told[0], "chat": told[1]} if chat else told[0]))
    else:
        for receipt in receipts:
            show.show_receipt(receipt)
    if out is not None:
        made.save(out)
        typer.echo(f"edit: {out} ({terminal.size(out)})", err=as_json)


def verify(
    model: Model,
    edits: Annotated[
        list[Path], typer.Argument(help="One edit or several, taken together.", show_default=False)
    ],
    store: Annotated[
        bool, typer.Option("--store", help="Keep the receipt in the edit's folder.")
    ] = False,
    chat: Chat = False,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure what an edit does: a receipt. Ends with 1 where it fails."""
    import engram
    from engram.cli import show, terminal
    from engram.errors import EngramError

    made = _loaded(edits)
    if store and len(edits) > 1:
        raise EngramError(
            f"--store keeps the receipt of one edit, {len(edits)} were given; verify them one by one"
        )
    lm = terminal.load(model, dtype, device_map)
    with terminal.progress() as progress:
        receipt = engram.verify(
            lm, made, frame=engram.chat_frame(lm) if chat else None, progress=progress
        )
    if as_json:
        typer.echo(json.dumps(receipt.to_dict()))
    else:
        show.show_receipt(receipt)
    if store:
        made.with_receipt(receipt).save(edits[0])
    if not receipt.passed:
        raise typer.Exit(1)


def apply(
    edit: EditFolder,
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint to edit: a folder, a hub name or 'pocket'.", show_default=False
        ),
    ],
    out: Out,
    force: Annotated[
        bool, typer.Option("--force", help="Also on weights that the edit was not made on.")
    ] = False,
) -> None:
    """Write a copy of a checkpoint with an edit in its weights."""
    from engram.edit.checkpoint import apply_to_checkpoint
    from engram.edit.edit import Edit

    written = apply_to_checkpoint(Edit.load(edit), model, out, force=force)
    typer.echo(f"edited checkpoint: {written}")


def revert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint that 'engram apply' wrote.", show_default=False)
    ],
    out: Out,
    edit: Annotated[
        Path | None, typer.Option(help="Take out only this one of several edits.")
    ] = None,
) -> None:
    """Write a copy of an edited checkpoint without its edits: every byte of the original."""
    from engram.edit.checkpoint import revert_checkpoint
    from engram.edit.edit import Edit

    written = revert_checkpoint(checkpoint, out, Edit.load(edit) if edit else None)
    typer.echo(f"checkpoint without {'the edit' if edit else 'edits'}: {written}")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    edits: Annotated[
        list[Path] | None,
        typer.Option("--edit", "-e", help="Edit to apply while generating; repeat."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="New tokens at most.", min=1)] = 40,
    temperature: Annotated[float, typer.Option(help="0: greedy; above, sample.", min=0.0)] = 0.0,
    chat: Chat = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Continue a text, with edits applied if wanted."""
    from contextlib import ExitStack

    from transformers import set_seed

    from engram.cli import terminal
    from engram.model.chat import chat_frame

    lm = terminal.load(model, dtype, device_map)
    set_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    with ExitStack() as stack:
        if chat:
            stack.enter_context(lm.asked_through(chat_frame(lm)))
        for each in _nested(edits or []):
            stack.enter_context(each.laid(lm))
        typer.echo(lm.generate(prompt, tokens, **options))


def _facts(
    subject: str | None, prompt: str | None, target: str | None, true: str | None, path: Path | None
) -> list[Fact]:
    from engram.errors import FactError
    from engram.fact_files import read_facts
    from engram.facts import Fact

    if path is None:
        missing = [
            name
            for name, given in (("--subject", subject), ("--prompt", prompt), ("--target", target))
            if given is None
        ]
        if missing:
            raise FactError(
                f"{', '.join(missing)} missing; give subject, prompt and target, or --facts FILE"
            )
        return [Fact(str(subject), str(prompt), str(target), true)]
    return read_facts(path)


def _layers(method: str, text: str) -> dict[str, Any]:
    """`--layer` as the method's own setting: `layers` of one that edits several, otherwise `layer`."""
    from engram.errors import SettingError

    several = _takes("layers", method)
    if text == "auto":
        return {"layers" if several else "layer": text}
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        raise SettingError(
            f"--layer {text!r}: expected a layer's number, from 0, several as in 3,4,5, or 'auto'"
        ) from None
    if several:
        return {"layers": numbers}
    if len(numbers) > 1:
        raise SettingError(f"--layer {text!r}: {method} edits one layer; give one number")
    return {"layer": numbers[0]}


def _takes(setting: str, method: str) -> bool:
    from inspect import signature

    from engram.editors.methods import method_named

    return setting in signature(method_named(method)).parameters


def _loaded(folders: list[Path]) -> Edit | PromptEdit:
    """The edit of one folder, or several edits of weights as one."""
    from engram.edit.edit import Edit, compose
    from engram.edit.files import load

    if len(folders) == 1:
        return load(folders[0])
    return compose([Edit.load(folder) for folder in folders])


def _nested(folders: list[Path]) -> list[Edit | PromptEdit]:
    """The edits of all folders in blocks that nest: those of weights as one, then each in-context
    edit.
    """
    from engram.edit.edit import Edit, compose
    from engram.edit.files import load

    edits = [load(folder) for folder in folders]
    weights = [each for each in edits if isinstance(each, Edit)]
    return [
        *([compose(weights)] if weights else []),
        *(each for each in edits if not isinstance(each, Edit)),
    ]
