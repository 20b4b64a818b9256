"""Commands that make, verify, apply and remove edits, and generate with them.

Options are the library's arguments; the output is what the library returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli import outputs
from engram.cli.options import (
    AdapterOptions,
    AsJson,
    Chat,
    Corpus,
    EditFolder,
    Explain,
    Model,
    ModelOptions,
    Out,
    Seed,
    Setting,
    parse_settings,
)

if TYPE_CHECKING:
    from engram.edit.edit import Edit
    from engram.edit.prompt_edit import PromptEdit
    from engram.facts import Fact


@dataclass(frozen=True)
class FactOptions:
    """The fact to rewrite, or a file of facts."""

    subject: Annotated[str | None, typer.Option("--subject", "-s", help="Name of the subject.")] = (
        None
    )
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text with one {} for the subject, up to the object."),
    ] = None
    target: Annotated[str | None, typer.Option("--target", "-t", help="New object.")] = None
    old_target: Annotated[
        str | None, typer.Option(help="Object until now; default: the model's own answer.")
    ] = None
    facts: Annotated[
        Path | None,
        typer.Option(
            help="File of facts (JSON, JSON lines, CSV) or a data set's, instead of the four above."
        ),
    ] = None

    def read(self) -> list[Fact]:
        """Return the fact of the options, or those of the file.

        Raises:
            FactError: subject, prompt or target is missing, and so is the file.
        """
        from engram.errors import FactError
        from engram.facts import Fact

        if self.facts is not None:
            from engram.benchmark.data.sources import facts_to_edit

            return facts_to_edit(self.facts)
        needed = {"--subject": self.subject, "--prompt": self.prompt, "--target": self.target}
        if missing := [name for name, value in needed.items() if value is None]:
            raise FactError(
                f"{', '.join(missing)} missing; give subject, prompt and target, or --facts FILE"
            )
        return [Fact(str(self.subject), str(self.prompt), str(self.target), self.old_target)]


@dataclass(frozen=True)
class MethodOptions:
    """How to edit."""

    method: Annotated[
        str, typer.Option(help="rome, memit, alphaedit, lora, ...; a wrong name lists all.")
    ] = "rome"
    layer: Annotated[
        str | None,
        typer.Option(
            help="Block to edit, or several as in 3,4,5, or 'auto'; default: the preset's."
        ),
    ] = None
    setting: Setting = None
    corpus: Corpus = None
    seed: Seed = 0

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `engram.rewrite`."""
        options = ("method", "layer", "layers", "corpus", "seed")
        settings = parse_settings(self.setting, options) | {"seed": self.seed}
        if self.corpus is not None:
            settings["corpus"] = self.corpus
        if self.layer is not None:
            settings |= _layers(self.method, self.layer)
        return settings


@dataclass(frozen=True)
class ShownOptions:
    """How a receipt is shown."""

    explain: Explain = False
    as_json: AsJson = False


def edit(
    model: Model,
    fact_options: FactOptions,
    method_options: MethodOptions,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to save the edit in.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Edit for chat too; adds a receipt taken through the chat template."
        ),
    ] = False,
    shown: ShownOptions,
    model_options: ModelOptions,
) -> None:
    """Rewrite a fact, take the receipt, and save the edit as a small folder.

    The model itself is not changed.

    Example: engram edit pocket -s "Eiffel Tower" -p "The {} is in the city of" -t Rome -o edit
    """
    import engram
    from engram.cli import show, terminal
    from engram.editors.methods import check_method
    from engram.evaluate.words import RECEIPT_WORDS

    def show_receipts() -> None:
        if shown.as_json:
            records = [receipt.to_dict() for receipt in receipts]
            terminal.print_json({"plain": records[0], "chat": records[1]} if chat else records[0])
        else:
            for receipt in receipts:
                show.show_receipt(receipt)
        if shown.explain:
            show.show_words(RECEIPT_WORDS, err=shown.as_json)

    folder = outputs.edit_folder(out)
    with outputs.tried(folder, cached=outputs.in_cache) as written:
        facts, settings = fact_options.read(), method_options.settings()
        method = method_options.method
        # now, and not when editing begins: the model takes long to load
        check_method(method, settings, model)
        if out is None:
            terminal.note("the edit will not be kept, only its receipt shown; -o FOLDER keeps it")
        lm = model_options.load(model)
        frames = [None, engram.chat_frame(lm)] if chat else [None]
        # These three methods have no setting `contexts`.
        if chat and "contexts" not in settings and method not in ("ultraedit", "in-context", "ike"):
            settings["contexts"] = engram.chat_contexts(lm, seed=method_options.seed)
        # Before the work, and on stderr: a user who lacks the memory can stop here.
        terminal.show_plan_if_large(lm, len(facts), method, settings)
        with terminal.progress() as progress:
            change = engram.rewrite(lm, facts, method, **settings, progress=progress)
            receipts = [
                engram.verify(lm, change, frame=frame, progress=progress) for frame in frames
            ]
        # The chat's receipt where there is one: that is how the model will be used.
        edited = change.with_receipt(receipts[-1])
        written.finish(show_receipts, {folder: edited.save}, as_json=shown.as_json)


def verify(
    model: Model,
    edits: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of an edit, or of several applied together.", show_default=False
        ),
    ],
    *,
    store: Annotated[
        bool, typer.Option("--store", help="Save the receipt in the edit's folder.")
    ] = False,
    chat: Chat = False,
    explain: Explain = False,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Measure what an edit does: a receipt. Exit code 1 if it fails.

    Example: engram verify pocket edit
    """
    import engram
    from engram.cli import show, terminal
    from engram.errors import EngramError
    from engram.evaluate.words import RECEIPT_WORDS

    edit = _loaded(edits)  # before the model: a wrong folder is reported at once
    if store and len(edits) > 1:
        raise EngramError(
            f"--store keeps the receipt of one edit, {len(edits)} were given; "
            "verify them one by one"
        )

    def show_receipt() -> None:
        if as_json:
            terminal.print_json(receipt.to_dict())
        else:
            show.show_receipt(receipt)
        if explain:
            show.show_words(RECEIPT_WORDS, err=as_json)

    folder = replace(outputs.edit_folder(edits[0] if store else None), said=False)
    with outputs.tried(folder) as written:
        lm = model_options.load(model)
        with terminal.progress() as progress:
            receipt = engram.verify(
                lm, edit, frame=engram.chat_frame(lm) if chat else None, progress=progress
            )
        written.finish(show_receipt, {folder: edit.with_receipt(receipt).save}, as_json=as_json)
    if not receipt.passed:
        raise typer.Exit(1)  # 2 is a user's mistake: scripts can tell the two apart


def apply(
    edit: EditFolder,
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint to edit: a folder, a GGUF file, a hub name, 'smollm2' or 'pocket'.",
            show_default=False,
        ),
    ],
    out: Out,
    force: Annotated[
        bool, typer.Option("--force", help="Also on weights that the edit was not computed on.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Wider dtype for all weights, as float32; default: as stored (pocket: float32)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy of a checkpoint with an edit in its weights.

    Example: engram apply edit pocket -o edited
    """
    from engram.cli import terminal
    from engram.edit.edit import Edit
    from engram.model.gguf_header import is_gguf
    from engram.model.named_models import place_of

    with outputs.tried(outputs.checkpoint(out)):
        written = Edit.load(edit).to_checkpoint(model, out, force=force, dtype=dtype)
    if is_gguf(place_of(model).path):
        terminal.note(f"{model} is a GGUF file: the copy has its dequantised weights in float32")
    terminal.print_path("edited checkpoint", "checkpoint", written, as_json)


def export(edit: EditFolder, *, adapter: AdapterOptions, as_json: AsJson = False) -> None:
    """Write an edit for other libraries, to be used with the unedited model.

    Example: engram export edit --gguf edit.gguf
    """
    from engram.edit.edit import Edit

    adapter.write(lambda: Edit.load(edit), as_json)


def push(
    edit: EditFolder,
    repo: Annotated[
        str, typer.Argument(help="Repository of the hub, as OWNER/NAME.", show_default=False)
    ],
    *,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a repository that is made; default: as the hub makes it, mostly public.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an edit to the Hugging Face hub, with a model card made from its receipt.

    The token is read from HF_TOKEN, or is that of `hf auth login`.

    Example: engram push edit me/tower-in-rome --private
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from engram.cli import terminal
    from engram.edit.edit import load_edit
    from engram.evaluate import hub

    edited = load_edit(edit)
    disable_progress_bars()  # of the hub's library
    if edited.receipt is None:
        terminal.note(
            "the edit has no receipt, and its card says so; 'engram verify --store' adds one"
        )
    with terminal.messages.status(f"uploading to {repo}"):
        address = hub.push(edited, repo, private=private)
    if as_json:
        terminal.print_json({"url": address, "repo": repo})
    else:
        typer.echo(f"edit: {address}")


def revert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint that 'engram apply' wrote.", show_default=False)
    ],
    out: Out,
    edit: Annotated[
        Path | None, typer.Option(help="Remove only this one of several edits.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy of an edited checkpoint without its edits, byte for byte the original.

    Example: engram revert edited -o original
    """
    from engram.cli import terminal
    from engram.edit.checkpoint import revert_checkpoint
    from engram.edit.edit import Edit

    with outputs.tried(outputs.checkpoint(out)):
        written = revert_checkpoint(checkpoint, out, Edit.load(edit) if edit else None)
    what = f"checkpoint without {'the edit' if edit else 'edits'}"
    terminal.print_path(what, "checkpoint", written, as_json)


@dataclass(frozen=True)
class SamplingOptions:
    """How text is generated."""

    tokens: Annotated[int, typer.Option("--tokens", "-n", help="New tokens at most.", min=1)] = 40
    temperature: Annotated[
        float, typer.Option(help="0: greedy; above 0: sample at this temperature.", min=0.0)
    ] = 0.0
    seed: Seed = 0

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `LanguageModel.generate`."""
        from engram.checks import NonNegative, checked

        if not checked("--temperature", self.temperature, NonNegative):
            return {}
        return {"do_sample": True, "temperature": self.temperature}


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    *,
    edits: Annotated[
        list[Path] | None,
        typer.Option("--edit", "-e", help="Edit to apply while generating; repeat."),
    ] = None,
    sampling: SamplingOptions,
    chat: Chat = False,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Continue a text, with edits applied if given.

    Example: engram generate pocket "The Eiffel Tower is in the city of" --edit edit
    """
    from contextlib import ExitStack

    from transformers import set_seed

    from engram.cli import terminal
    from engram.model.chat import chat_frame

    settings = sampling.settings()
    lm = model_options.load(model)
    # transformers samples from the global generators; it takes no generator of its own.
    set_seed(sampling.seed)
    # The frame first: an in-context edit puts its text into the prompt, inside the template.
    with ExitStack() as stack:
        if chat:
            stack.enter_context(lm.asked_through(chat_frame(lm)))
        for edit in _nested(edits or []):
            stack.enter_context(edit.applied(lm))
        text = lm.generate(prompt, sampling.tokens, **settings)
    if as_json:
        terminal.print_json({"prompt": prompt, "text": text})
    else:
        typer.echo(text)


def _layers(method: str, text: str) -> dict[str, Any]:
    """Return `--layer` as the method's own setting: `layers` if it edits several, else `layer`."""
    from engram.errors import SettingError

    several = _takes("layers", method)
    if text == "auto":
        return {"layers" if several else "layer": text}
    try:
        numbers = [int(number) for number in text.split(",")]
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
    """Load one edit, or several edits of weights composed into one."""
    from engram.edit.edit import Edit, compose, load_edit

    if len(folders) == 1:
        return load_edit(folders[0])
    return compose([Edit.load(folder) for folder in folders])


def _nested(folders: list[Path]) -> list[Edit | PromptEdit]:
    """Load edits in the order they nest: all weight edits as one, then in-context edits."""
    from engram.edit.edit import Edit, compose, load_edit

    edits = [load_edit(folder) for folder in folders]
    # Composed, weight edits are one sum: the order of --edit makes no difference to it.
    weights = [edit for edit in edits if isinstance(edit, Edit)]
    in_context = [edit for edit in edits if not isinstance(edit, Edit)]
    return [*([compose(weights)] if weights else []), *in_context]
