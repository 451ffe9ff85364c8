"""The overview of the tutorials: of each its picture, its title and the paragraph that opens it.

A hook of mkdocs (see ``mkdocs.yml``), which writes the table into ``tutorials/index.md``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

from overviews import with_overview

OVERVIEW = "tutorials/index.md"
PLACE = "<!-- tutorials -->"
BEGINNING = re.compile(r"# (?P<title>.+)\n\n\*(?P<opening>[^*]+)\*\n")
PICTURE = re.compile(r"^!\[(?P<alt>[^\]]*)\]\((?P<path>[^)]+)\)$", re.M)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: object) -> str:
    """The overview, with a row for each tutorial, in the order of the navigation."""
    if page.file.src_uri != OVERVIEW:
        return markdown
    return with_overview(markdown, page, config, PLACE, table)


def table(pages: list[Path]) -> str:
    """The tutorials, a row each, in Markdown."""
    return "\n".join(["| | |", "| --- | --- |", *map(row, pages)])


def row(page: Path) -> str:
    """A tutorial in one row of a table, in Markdown."""
    text = page.read_text()
    begins, picture = BEGINNING.match(text), PICTURE.search(text)
    if begins is None or picture is None:
        raise PluginError(
            f"{page.name}: a tutorial begins with a title and a paragraph in *italics*, which says "
            "what its reader will have at the end, and has a picture"
        )
    opening = " ".join(begins["opening"].split())
    # What is needed for the picture stands on the page itself.
    opening = re.sub(r"\s*The pictures? needs?\b.*", "", opening).replace("|", "\\|")
    link = f"[{begins['title']}]({page.name})"
    return f"| ![{picture['alt']}]({picture['path']}) | **{link}**. {opening} |"
