"""Write the table of docs/families.md from `engram.modules.layouts.LAYOUTS`.

python tools/families_table.py      # after adding a row
"""

from __future__ import annotations

from engram.modules.layouts import LAYOUTS, Layout
from page_tables import DOCS, markdown, put

PAGE = DOCS / "families.md"
COLUMNS = (
    "Family (`model_type`)",
    "Kind",
    "`trace` by",
    "Sites",
    "`head`",
    "`neuron`",
    "`rewrite`",
    "`knows`",
)


def row(family: str, layout: Layout) -> tuple[str, ...]:
    """Return what is offered for one family; the kinds and sites are the row's own, the rest
    follows from them.
    """
    sites = [
        "residual",
        *(["mlp"] if layout.mlp else []),
        *(["attention"] if layout.attention else []),
        *layout.sites,
    ]
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
    """Return the table in markdown, families by kind and then by name."""
    by_kind = sorted(LAYOUTS.items(), key=lambda item: (describe(item[1]), item[0]))
    return markdown(COLUMNS, [row(family, layout) for family, layout in by_kind])


if __name__ == "__main__":
    put(PAGE, "tools/families_table.py", table())
