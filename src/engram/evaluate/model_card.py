"""The model card of an edit on the Hugging Face hub, made from the edit and its receipt.

Says what an edit does, how it was measured and how it is used; a receipt that failed, or that is
missing, is said first. Knows texts. Refuses to know the network.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from html import escape

from engram.edit.edit import Edit
from engram.edit.lora_export import public_name
from engram.edit.prompt_edit import PromptEdit
from engram.evaluate.receipt import Receipt

_SHOWN = 20  # facts that are listed; edit.json has all of them


def model_card(edit: Edit | PromptEdit, repo: str) -> str:
    """Return the README.md of an edit in the repository `repo`, with its head for the hub.

    Raises:
        EngramFileError: the receipt in the edit is damaged.
    """
    from huggingface_hub import ModelCardData  # not at the top: it takes 0.1 s

    model, public = str(edit.base["model"]), public_name(edit.base)
    head = ModelCardData(
        # A name without an owner is a folder's, or of a bundled model: nothing to link to.
        base_model=public if "/" in public else None,
        base_model_relation="adapter" if "/" in public else None,
        library_name="engram",
        tags=["engram", "model-editing", "knowledge-editing", edit.method],
    )
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(_lines(edit, repo, model)) + "\n"


def _lines(edit: Edit | PromptEdit, repo: str, model: str) -> Iterator[str]:
    receipt = None if edit.receipt is None else Receipt.from_dict(edit.receipt)
    first, more = edit.facts[0], len(edit.facts) - 1
    title = f"{first.subject.strip()} → {first.target.strip()}"
    yield f"# {_text(title)}{f' and {more} more' if more else ''}: an edit of {_text(model)}"
    yield ""
    yield (
        "A small change of a language model's weights, which makes it state another fact."
        if edit.changes_weights
        else "A text in front of prompts, which makes a language model state another fact. No "
        "weight changes."
    )
    yield "The model itself is not in this repository."
    yield ""
    yield f"**Receipt: {receipt.verdict if receipt else 'none, the edit was not verified'}.**"
    yield from ("", "## Facts", "", "| prompt | new object | object before |", "|---|---|---|")
    for fact in edit.facts[:_SHOWN]:
        before = "the model's own answer" if fact.target_true is None else fact.target_true
        yield f"| {_text(fact.prompt_text)} | {_text(fact.target)} | {_text(before)} |"
    if len(edit.facts) > _SHOWN:
        yield f"\nand {len(edit.facts) - _SHOWN} more in `edit.json`."
    yield from _receipt(receipt)
    yield from _use(edit, repo, model)
    yield from _made(edit)


def _receipt(receipt: Receipt | None) -> Iterator[str]:
    yield from ("", "## Receipt", "")
    if receipt is None:
        yield "There is none: what the edit changes, and what else it changes, was not measured."
        return
    yield f"Measured on {_text(receipt.model)} in {receipt.dtype}. {receipt.verdict}."
    yield from ("", "```text", str(receipt), "```")
    for prompt, before, after in receipt.continuations:
        yield from ("", f"- {_text(prompt)}", f"  - before: {_text(before)}")
        yield f"  - after: {_text(after)}"


def _use(edit: Edit | PromptEdit, repo: str, name: str) -> Iterator[str]:
    text = " ".join(edit.facts[0].prompt_text.split())
    # Somebody else's texts, in commands that readers paste: no shell may run them.
    model, prompt = shlex.quote(name), shlex.quote(text)
    yield f"""
## Use

```sh
pip install engram
hf download {repo} --local-dir edit
engram verify {model} edit
engram generate {model} {prompt} --edit edit"""
    if edit.changes_weights:
        yield f"engram apply edit {model} -o edited   # a checkpoint with the edit in its weights"
        yield "engram export edit --peft adapter     # a LoRA adapter for peft and vLLM"
        yield "engram export edit --gguf edit.gguf   # and for llama.cpp and Ollama"
    yield f"""```

```python
import engram
from engram.edit.edit import load_edit

lm = engram.load({name!r})
with load_edit("edit").applied(lm):
    print(lm.generate({text!r}, 20))
```"""


def _made(edit: Edit | PromptEdit) -> Iterator[str]:
    yield from ("", "## How it was made", "", f"- method: `{_code(edit.method)}`, seed {edit.seed}")
    yield f"- settings: `{_code(json.dumps(edit.settings, ensure_ascii=False)[:500])}`"
    yield "- versions: " + ", ".join(_text(f"{name} {one}") for name, one in edit.versions.items())
    if not isinstance(edit, Edit):
        return
    yield ""
    yield "It fits these weights and no others; engram compares them before it applies the edit:"
    yield from (
        "",
        "| weight | rank of the change | dtype | shape | sha256 |",
        "|---|---|---|---|---|",
    )
    for name, delta in edit.deltas.items():
        made_on = edit.changes.made_on(name)
        yield (
            f"| `{_code(name)}` | {delta.rank} | {made_on['dtype']} | {made_on['shape']} "
            f"| `{made_on['sha256'][:16]}…` |"
        )


def _text(text: str) -> str:
    """Return a text as one line of markdown that shows it as it is."""
    line = escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|#":
        line = line.replace(mark, f"\\{mark}")
    return line


def _code(text: str) -> str:
    return text.replace("`", "'").replace("|", "¦")
