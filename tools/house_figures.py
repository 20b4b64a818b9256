"""Figures of how a checkout is built, one a line: `python tools/house_figures.py [PATH]`.

Imports are read from the source, those in functions and for types included; nothing is imported.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens

PARAMETERS = 8  # from here on a function is counted as having many


def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree."""
    names = {}
    for path in sorted((root / "src/engram").rglob("*.py")):
        name = ".".join(path.relative_to(root / "src").with_suffix("").parts)
        names[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf8"))
    return names


def imports(tree: ast.Module, names: dict[str, ast.Module]) -> set[str]:
    """Return the modules of the package that one of them imports, the package itself left out."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                imported.add(inner if inner in names else node.module)
    return {name for name in imported if name in names and name != "engram"}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Largest sets of modules that all reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        reached[start], queue = set(), [start]
        while queue:
            new = graph[queue.pop()] - reached[start]
            reached[start] |= new
            queue += new
    rings = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return sorted((set(ring) for ring in rings if ring), key=len, reverse=True)


def upward(graph: dict[str, set[str]], root: Path) -> int | None:
    """How many imports go up or sideways between the storeys of pyproject, if there are any."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf8"))["tool"]
    for contract in settings.get("importlinter", {}).get("contracts", []):
        if contract["type"] == "layers":
            rows = [row.replace("|", " ").split() for row in contract["layers"]]
            depth = {name: at for at, row in enumerate(rows) for name in row}
            pairs = [
                (a.split(".")[1], b.split(".")[1]) for a in graph for b in graph[a] if "." in a
            ]
            return sum(a != b and depth.get(a, -1) >= depth.get(b, 99) for a, b in pairs)
    return None


def functions(trees: dict[str, ast.Module]) -> Iterator[tuple[str, int, int]]:
    """Name, parameters (without self and cls) and lines (without docstring) of each function."""
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                rows = [
                    *given.posonlyargs,
                    *given.args,
                    *given.kwonlyargs,
                    given.vararg,
                    given.kwarg,
                ]
                count = sum(row is not None and row.arg not in ("self", "cls") for row in rows)
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                yield f"{name}:{node.name}", count, (node.end_lineno or 0) - first.lineno + 1


def figures(root: Path) -> dict[str, object]:
    """Return what is printed: label -> value."""
    trees = modules(root)
    graph = {name: imports(tree, trees) - {name} for name, tree in trees.items()}
    texts = [path.read_text(encoding="utf8") for path in (root / "src/engram").rglob("*.py")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    tokens = [token for text in texts for token in generate_tokens(StringIO(text).readline)]
    comments = sum(token.type == COMMENT for token in tokens)  # those after code included
    alone = sum(line.startswith("#") for line in lines)
    strings = sum(
        (node.end_lineno or 0) - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    code = sum(map(bool, lines)) - alone - strings
    rings, defined = circles(graph), list(functions(trees))
    many = sorted({name for name, count, _ in defined if count >= PARAMETERS})
    longest = max(defined, key=lambda row: row[2])
    return {
        "files in the package's root": len(list((root / "src/engram").glob("*.py"))),
        "circles of imports": f"{len(rings)} (modules: {[len(ring) for ring in rings]})",
        "imports upwards": upward(graph, root),
        "lines of src": len(lines),
        "characters of src": sum(map(len, texts)),
        "lines of code": code,
        f"functions with {PARAMETERS} parameters or more": len(many),
        "comments per 100 lines of code": round(100 * comments / code, 1),
        "longest function": f"{longest[0]} ({longest[2]} lines)",
    }


if __name__ == "__main__":
    for label, value in figures(Path(sys.argv[1] if sys.argv[1:] else ".")).items():
        print(f"{label:<40} {value}")
