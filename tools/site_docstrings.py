"""Our docstrings as the documentation builder reads them: a griffe extension, named in mkdocs.yml.

In the source, sections follow without empty lines, several arguments or errors may share a line,
and sources are a line of text. Knows that house style and nothing of what a docstring says.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = ("Args", "Attributes", "Example", "Raises", "Returns", "Source", "Yields")
HEAD = re.compile(rf"^({'|'.join(SECTIONS)}):(.*)$")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
NAMES = re.compile(r"^    (\w+(?:, \w+)+): (.*)$")


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = spelled_out(obj.docstring.value)


def spelled_out(docstring: str) -> str:
    """`docstring` with sections apart, one name an entry, sources in bold, papers linked."""
    parts: list[list[str]] = [[]]
    for line in docstring.splitlines():
        if HEAD.match(line):
            parts.append([])
        parts[-1].append(line)
    text = "\n\n".join("\n".join(_section(part)).strip() for part in parts if part)
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _section(lines: list[str]) -> list[str]:
    head = HEAD.match(lines[0])
    if head is None:
        return lines
    name, rest, body = head[1], head[2], lines[1:]
    if name == "Source":
        return [f"**Source:**{rest}", *(line.strip() for line in body)]
    if name == "Example":
        return ["Examples:", *body]
    if name in ("Returns", "Yields") and body:
        return [
            lines[0],
            "    : " + body[0].strip(),
            *body[1:],
        ]  # no type in front: it is in the signature
    if name == "Raises":
        body = [
            each
            for line in body
            for each in re.sub(r"; (?=\w+Error: )", "\n    ", line).split("\n")
        ]
    if name in ("Args", "Attributes"):
        body = _one_name_an_entry(body)
    return [lines[0], *body]


def _one_name_an_entry(body: list[str]) -> list[str]:
    """Return `a, b: text` becomes two entries with the same text."""
    entries: list[list[str]] = []
    for line in body:
        if entries and not re.match(r"^    \S", line):
            entries[-1].append(line)
        else:
            entries.append([line])
    spelled = []
    for first, *more in entries:
        names = NAMES.match(first)
        for each in names[1].split(", ") if names else [None]:
            spelled += [f"    {each}: {names[2]}" if names else first, *more]
    return spelled
