"""The table of docs/families.md, made from engram.architectures.LAYOUTS. Run it after adding a row:

python tools/families_table.py
"""

from __future__ import annotations

from pathlib import Path

from engram.architectures import LAYOUTS, Layout

PAGE = Path(__file__).parents[1] / "docs/families.md"
BEGIN, END = "<!-- made by tools/families_table.py -->", "<!-- end -->"
COLUMNS = ("Family (`model_type`)", "Kind", "`trace` by", "Sites", "`head`", "`neuron`", "`rewrite`", "`knows`")


def row(family: str, layout: Layout) -> tuple[str, ...]:
    """What is offered for one family; the kinds and sites are the row's own, the rest follows from them."""
    sites = ["residual", *(["mlp"] if layout.mlp else []), *(["attention"] if layout.attention else []), *layout.sites]
    replayed = layout.kind == "causal" and layout.attention is not None
    return (
        f"`{family}`",
        describe(layout),
        "replay" if replayed else "whole forward passes",
        ", ".join(sites),
        "yes" if layout.heads_out else "no",
        "yes" if layout.mlp_out else "no",
        "yes" if layout.mlp_out else "no",
        "yes",
    )


def describe(layout: Layout) -> str:
    if layout.kind == "causal" and layout.attention is None:
        return "causal, state space"
    if layout.kind == "causal" and layout.mlp_out is None:
        return "causal, mixture of experts"
    return layout.kind


def table() -> str:
    """The table in markdown, families by kind and then by name."""
    by_kind = sorted(LAYOUTS.items(), key=lambda item: (describe(item[1]), item[0]))
    rows = [row(family, layout) for family, layout in by_kind]
    return "\n".join("| " + " | ".join(each) + " |" for each in (COLUMNS, ["---"] * len(COLUMNS), *rows))


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
