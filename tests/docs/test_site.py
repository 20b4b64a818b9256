"""The site has a place for every public name, its pages exist, and docstrings reach it as they are
meant.
"""

from __future__ import annotations

import re
from textwrap import dedent

import pytest
import yaml

import engram
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf8"))


def pages(nav):
    """Files of a nav: strings, or mappings of titles to files or navs."""
    if isinstance(nav, str):
        return [nav]
    return [
        page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)
    ]


def test_every_page_of_the_nav_exists_and_every_page_is_in_the_nav():
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(pages(SITE["nav"])) == there


def test_every_public_name_has_its_place_in_the_reference():
    reference = "\n".join(
        page.read_text(encoding="utf8") for page in (DOCS / "reference").glob("*.md")
    )
    told = set(re.findall(r"^::: engram\.(\w+)$", reference, re.MULTILINE))
    assert set(engram.__all__) - {"__version__"} <= told
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf8")
    assert all(f"engram.{name}" in index for name in engram.__all__)


def test_everything_in_the_reference_exists():
    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf8"), re.MULTILINE):
            assert _found(path), f"{page.name} asks for {path}"


def _found(path):
    from pydoc import locate

    return locate(path) is not None


def test_the_site_fetches_nothing_from_other_servers():
    assert SITE["theme"]["font"] is False
    assert not any("://" in str(SITE.get(name, "")) for name in ("extra_css", "extra_javascript"))


def test_docstrings_are_spelled_out_for_the_builder():
    pytest.importorskip("griffe")
    from site_docstrings import spelled_out

    ours = """\
        Does a thing.
        Args:
            low, high: the ends.
                In nats.
            seed: of draws.
        Returns:
            [n] values: one a fact.
        Raises:
            FactError: no facts; SettingError: other; settings.
        Source: Meng et al. 2022, arXiv:2202.05262,
            Sec. 2.
        Example:
            >>> f()
        """
    assert spelled_out(dedent(ours)) == dedent("""\
        Does a thing.

        Args:
            low: the ends.
                In nats.
            high: the ends.
                In nats.
            seed: of draws.

        Returns:
            : [n] values: one a fact.

        Raises:
            FactError: no facts
            SettingError: other; settings.

        **Source:** Meng et al. 2022, [arXiv:2202.05262](https://arxiv.org/abs/2202.05262),
        Sec. 2.

        Examples:
            >>> f()""")


def test_the_command_lines_page_has_every_command_and_no_entities():
    from site_pages import command_line

    page = command_line()
    assert page.startswith("# Command line\n")
    assert set(re.findall(r"^## `engram (\w+)`", page, re.MULTILINE)) >= {
        "demo",
        "trace",
        "edit",
        "verify",
        "generate",
    }
    assert "&#" not in page
    assert "--help" not in page
    assert "engram trace [OPTIONS] MODEL PROMPT" in page
