"""Options that several commands share, and how a command takes a group of them as one value.

A group is a frozen dataclass whose fields are annotated as typer options. `expand_groups` shows
typer one option per field, and hands the command the group. Knows typer and no command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from engram.checks import briefly

if TYPE_CHECKING:
    from engram.edit.edit import Edit
    from engram.ledger.book import Ledger
    from engram.model.language_model import LanguageModel
    from engram.runs.workers import Workers


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with every parameter that is a group of options replaced by its fields.

    typer reads a command's options from its signature and has no way to share them. So the
    signature is rewritten: `f(model: Model, model_options: ModelOptions)` becomes
    `f(*, model: Model, dtype: ... = None, device_map: ... = None)`. Parameters become keyword-only,
    as typer passes them, so that an option without a default may follow one with a default.

    Raises:
        ValueError: two options of one name.
    """
    groups: dict[str, Any] = {}
    expanded: list[Parameter] = []
    for name, parameter in signature(command, eval_str=True).parameters.items():
        group = parameter.annotation
        if not is_dataclass(group):
            expanded.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        groups[name] = group
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            expanded.append(
                Parameter(
                    field.name,
                    Parameter.KEYWORD_ONLY,
                    # A field's default is an attribute of the class; without one there is none.
                    default=getattr(group, field.name, Parameter.empty),
                    annotation=hints[field.name],
                )
            )

    # `wraps` for the docstring, which typer shows as the command's help.
    @wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    call.__signature__ = signature(command).replace(  # type: ignore[attr-defined]
        parameters=expanded, return_annotation=None
    )
    # typer reads annotations besides the signature; those of `command` name groups.
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return call


Model = Annotated[
    str,
    typer.Argument(
        help="'pocket', 'smollm2', a folder, a GGUF file, or a model of the Hugging Face hub.",
        show_default=False,
    ),
]
EditFolder = Annotated[
    Path, typer.Argument(help="Folder that 'engram edit' wrote.", show_default=False)
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write; must not exist.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Explain the words of the output, one line each.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put prompts through the model's chat template.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.", min=0, max=2**63 - 1)]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE, any other setting of the method; repeat."),
]
Corpus = Annotated[
    Path | None,
    typer.Option(
        help="Text of second moments: wikipedia, bundled, sampled or a file; default: the preset's"
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own."),
    ] = None
    device_map: Annotated[
        str | None, typer.Option(help="Passed to transformers, such as 'auto' or 'cuda:0'.")
    ] = None

    def load(self, model: str) -> LanguageModel:
        """Load the model that is named `model`."""
        from engram.cli import terminal

        return terminal.load(model, self.dtype, self.device_map)


@dataclass(frozen=True)
class AdapterOptions:
    """For which library an adapter is written."""

    peft: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write a LoRA adapter of the peft library in; an adapter is replaced."
        ),
    ] = None
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="File to write a LoRA adapter of llama.cpp in (--lora); an adapter is replaced."
        ),
    ] = None
    base: Annotated[
        Path | None,
        typer.Option(
            help="With --gguf: the base's GGUF file, to check that the adapter fits it.",
            exists=True,
            dir_okay=False,
        ),
    ] = None

    def write(self, read: Callable[[], Edit | Ledger], as_json: bool) -> None:
        """Write the adapter of what `read` returns.

        Raises:
            SettingError: neither of two outputs is named, or both.
        """
        from engram.cli import outputs, terminal
        from engram.errors import SettingError

        if self.base is not None and self.gguf is None:
            raise SettingError("--base is read for --gguf FILE, and of no use without it")
        if self.peft is not None and self.gguf is None:
            with outputs.tried(outputs.adapter(self.peft)):
                written = read().to_peft(self.peft)
        elif self.gguf is not None and self.peft is None:
            with outputs.tried(outputs.adapter_file(self.gguf), reads=[self.base]):
                written = read().to_gguf(self.gguf, base=self.base)
        else:
            raise SettingError("give one of --peft FOLDER and --gguf FILE: what is to be written")
        terminal.print_path("adapter", "adapter", written, as_json)


@dataclass(frozen=True)
class WorkerOptions:
    """Where the work is done: in this process, or spread over processes with a model each."""

    workers: Annotated[
        Literal["ray"] | None,
        typer.Option("--workers", help="'ray': spread the work over processes with a model each."),
    ] = None
    num_workers: Annotated[int, typer.Option(help="Number of worker processes.", min=1)] = 2
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster, such as 'auto'; default: start one on this machine."
        ),
    ] = None

    def open(self) -> Workers | None:
        """Return the workers, or None for this process."""
        if self.workers is None:
            return None
        from engram.runs.workers import RayWorkers

        return RayWorkers(self.num_workers, address=self.ray_address)


def parse_settings(
    pairs: list[str] | None, options: Iterable[str] = (), example: str = "steps=30"
) -> dict[str, Any]:
    """Return NAME=VALUE pairs as settings; a value that is JSON is read as JSON.

    Args:
        options: names of settings that the command has options of their own for.
    Raises:
        SettingError: a pair without an equals sign, a name twice, one that has an option, or a
            value that is nested too deep.
    """
    from engram.errors import SettingError

    settings: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        given = f"--set {briefly(pair)}"
        if not (equals and name.isidentifier()):
            raise SettingError(f"{given}: expected NAME=VALUE, such as --set {example}")
        if name in settings:
            raise SettingError(f"{given}: expected one value of {name}, this is the second")
        if name in options:
            raise SettingError(f"{given}: {name} has an option of its own, see --help")
        try:
            settings[name] = json.loads(value)
        except ValueError:  # no JSON, or a number of thousands of digits
            settings[name] = value  # so that texts need no quotes: --set stop=argmax
        except RecursionError:
            raise SettingError(f"{given}: expected a plain value, not one nested deep") from None
    return settings
