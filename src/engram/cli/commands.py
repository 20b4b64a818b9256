"""The commands, one function each. What they take is what the library takes; what they print is what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.workers import NumWorkers, OnWorkers, RayAddress, workers_of

if TYPE_CHECKING:
    from engram.edit import Edit
    from engram.facts import Fact
    from engram.prompt_edit import PromptEdit

Model = Annotated[str, typer.Argument(help="'pocket', a folder, or a model of the Hugging Face hub.", show_default=False)]
EditFolder = Annotated[Path, typer.Argument(help="A folder that 'engram edit' wrote.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the checkpoint stores it.")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed on to transformers, such as 'auto' or 'cuda:0'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask as a user of the chat model does: through its chat template.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]


def edit(
    model: Model,
    subject: Annotated[str | None, typer.Option("--subject", "-s", help="Name of the subject.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text with one {} for the subject, the object next.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="The new object.")] = None,
    true: Annotated[str | None, typer.Option(help="The object so far; default: the model's own answer.")] = None,
    facts: Annotated[
        Path | None, typer.Option(help="File of facts (JSON, JSON lines, CSV), instead of the four above.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to keep the edit in.")] = None,
    method: Annotated[
        str, typer.Option(help="How to edit: rome, memit, alphaedit, lora, ...; a wrong name lists all.")
    ] = "rome",
    layer: Annotated[
        str | None,
        typer.Option(help="Block to edit, or several as in 3,4,5, or 'auto'; default: the preset's."),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, any setting of the method; repeat.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text file for second moments; default: what the model samples.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Rewrite it for a chat too; a receipt in plain text and one in the chat's turns.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Rewrite a fact, take the receipt, and keep the edit as a small folder. The model itself is not changed."""
    import engram
    from engram.cli import terminal

    wanted = _facts(subject, prompt, target, true, facts)
    settings = {**settings_of(setting), "seed": seed, **({"corpus": corpus} if corpus else {})}
    if layer is not None:
        settings |= _layers(method, layer)
    lm = terminal.load(model, dtype, device_map)
    frames = [None, engram.chat_frame(lm)] if chat else [None]
    if chat and "contexts" not in settings and method not in ("ultraedit", "in-context", "ike"):
        settings["contexts"] = engram.chat_contexts(lm, seed=seed)
    terminal.show_plan_if_large(lm, len(wanted), method, settings)
    with terminal.progress() as report:
        made = engram.rewrite(lm, wanted, method, **settings, progress=report)
        receipts = [engram.verify(lm, made, frame=frame, progress=report) for frame in frames]
    made = made.with_receipt(receipts[-1])  # of the chat, where there is one: that is how the model will be used
    if as_json:
        told = [receipt.to_dict() for receipt in receipts]
        typer.echo(json.dumps({"plain": told[0], "chat": told[1]} if chat else told[0]))
    else:
        for receipt in receipts:
            terminal.show_receipt(receipt)
    if out is not None:
        made.save(out)
        typer.echo(f"edit: {out} ({terminal.size(out)})", err=as_json)


def verify(
    model: Model,
    edits: Annotated[list[Path], typer.Argument(help="One edit or several, taken together.", show_default=False)],
    store: Annotated[bool, typer.Option("--store", help="Keep the receipt in the edit's folder.")] = False,
    chat: Chat = False,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure what an edit does: a receipt. Ends with 1 where it fails."""
    import engram
    from engram.cli import terminal
    from engram.errors import EngramError

    made = _loaded(edits)
    if store and len(edits) > 1:
        raise EngramError(f"--store keeps the receipt of one edit, {len(edits)} were given; verify them one by one")
    lm = terminal.load(model, dtype, device_map)
    with terminal.progress() as report:
        receipt = engram.verify(lm, made, frame=engram.chat_frame(lm) if chat else None, progress=report)
    if as_json:
        typer.echo(json.dumps(receipt.to_dict()))
    else:
        terminal.show_receipt(receipt)
    if store:
        made.with_receipt(receipt).save(edits[0])
    if not receipt.passed:
        raise typer.Exit(1)


def apply(
    edit: EditFolder,
    model: Annotated[str, typer.Argument(help="Checkpoint to edit: a folder, a hub name or 'pocket'.", show_default=False)],
    out: Out,
    force: Annotated[bool, typer.Option("--force", help="Also on weights that the edit was not made on.")] = False,
) -> None:
    """Write a copy of a checkpoint with an edit in its weights."""
    from engram.checkpoint import apply_to_checkpoint
    from engram.edit import Edit

    written = apply_to_checkpoint(Edit.load(edit), model, out, force=force)
    typer.echo(f"edited checkpoint: {written}")


def revert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that 'engram apply' wrote.", show_default=False)],
    out: Out,
    edit: Annotated[Path | None, typer.Option(help="Take out only this one of several edits.")] = None,
) -> None:
    """Write a copy of an edited checkpoint without its edits: every byte of the original."""
    from engram.checkpoint import revert_checkpoint
    from engram.edit import Edit

    written = revert_checkpoint(checkpoint, out, Edit.load(edit) if edit else None)
    typer.echo(f"checkpoint without {'the edit' if edit else 'edits'}: {written}")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    edits: Annotated[
        list[Path] | None, typer.Option("--edit", "-e", help="Edit to apply while generating; repeat.")
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

    from engram.chat import chat_frame
    from engram.cli import terminal

    lm = terminal.load(model, dtype, device_map)
    set_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    with ExitStack() as stack:
        if chat:
            stack.enter_context(lm.asked_through(chat_frame(lm)))
        for each in _nested(edits or []):
            stack.enter_context(each.laid(lm))
        typer.echo(lm.generate(prompt, tokens, **options))


def stats(
    model: Model,
    layers: Annotated[list[int] | None, typer.Option("--layer", "-l", help="Block, from 0; repeat. Default: all.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Text file; default: what the model samples.")] = None,
    data_set: Annotated[
        str | None, typer.Option(help="NAME or NAME:CONFIG of a Hugging Face data set (extra 'data').")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How many are measured; default: 20 x d_ff.", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for one file a layer, beside the cache.")] = None,
    workers: OnWorkers = None,
    num_workers: NumWorkers = 2,
    ray_address: RayAddress = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure second moments of keys, several layers in one pass; kept for later edits, resumed where it was stopped."""
    from engram.cli import terminal
    from engram.editors.corpora import DataSet
    from engram.editors.second_moment import second_moments
    from engram.errors import EngramError

    if corpus and data_set:
        raise EngramError("--corpus and --data-set both say where the text comes from; give one of them")
    lm = terminal.load(model, dtype, device_map)
    name, _, config = (data_set or "").partition(":")
    source = DataSet(name, config or None) if data_set else corpus
    with terminal.progress() as report:
        found = second_moments(
            lm,
            layers or range(lm.n_layers),
            source,
            tokens,
            seed=seed,
            workers=workers_of(workers, num_workers, ray_address),
            progress=lambda done, total: report("tokens", done, total),
        )
    terminal.console.print(f"{'layer':>5} {'d_ff':>6} {'tokens':>9} {'condition':>10}")
    for layer, moment in found.items():
        terminal.console.print(f"{layer:>5} {len(moment.matrix_ff):>6} {moment.count:>9} {moment.condition():>10.1e}")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            moment.save(out / f"layer{layer}.safetensors")


def plan(
    model: Model,
    facts: Annotated[int, typer.Option("--facts", "-n", help="How many are rewritten.", min=1)] = 1,
    method: Annotated[str, typer.Option(help="How to edit.")] = "rome",
    layers: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="Block, from 0; repeat. Default: the preset's.")
    ] = None,
    facts_at_once: Annotated[int, typer.Option(help="Facts optimised in one batch.", min=1)] = 32,
    as_json: AsJson = False,
    dtype: Dtype = None,
) -> None:
    """Tell what an edit will take in memory and on disk, from the model's config alone: no weight is read."""
    from dataclasses import asdict

    import engram
    from engram.language_model import load_shapes

    told = engram.memory_plan(load_shapes(model, dtype=dtype), facts, method, layers=layers, facts_at_once=facts_at_once)
    typer.echo(
        json.dumps({**asdict(told), "peak": told.peak, "beside": told.beside, "on_disk": told.on_disk})
        if as_json
        else str(told)
    )


def _facts(subject: str | None, prompt: str | None, target: str | None, true: str | None, path: Path | None) -> list[Fact]:
    from engram.errors import FactError
    from engram.fact_files import read_facts
    from engram.facts import Fact

    if path is None:
        missing = [
            name for name, given in (("--subject", subject), ("--prompt", prompt), ("--target", target)) if given is None
        ]
        if missing:
            raise FactError(f"{', '.join(missing)} missing; give subject, prompt and target, or --facts FILE")
        return [Fact(str(subject), str(prompt), str(target), true)]
    return read_facts(path)


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs as settings: a value is read as JSON where it is some."""
    from engram.errors import SettingError

    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--set {pair!r}: expected NAME=VALUE, such as --set steps=30")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _layers(method: str, text: str) -> dict[str, Any]:
    """`--layer` as the method's own setting: `layers` of one that edits several, otherwise `layer`."""
    from engram.errors import SettingError

    several = _takes("layers", method)
    if text == "auto":
        return {"layers" if several else "layer": text}
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        raise SettingError(f"--layer {text!r}: expected a layer's number, from 0, several as in 3,4,5, or 'auto'") from None
    if several:
        return {"layers": numbers}
    if len(numbers) > 1:
        raise SettingError(f"--layer {text!r}: {method} edits one layer; give one number")
    return {"layer": numbers[0]}


def _takes(setting: str, method: str) -> bool:
    from inspect import signature

    from engram.editors import method_named

    return setting in signature(method_named(method)).parameters


def _loaded(folders: list[Path]) -> Edit | PromptEdit:
    """The edit of one folder, or several edits of weights as one."""
    from engram import edit_files
    from engram.edit import Edit, compose

    if len(folders) == 1:
        return edit_files.load(folders[0])
    return compose([Edit.load(folder) for folder in folders])


def _nested(folders: list[Path]) -> list[Edit | PromptEdit]:
    """The edits of all folders in blocks that nest: those of weights as one, then each in-context edit."""
    from engram import edit_files
    from engram.edit import Edit, compose

    edits = [edit_files.load(folder) for folder in folders]
    weights = [each for each in edits if isinstance(each, Edit)]
    return [*([compose(weights)] if weights else []), *(each for each in edits if not isinstance(each, Edit))]
