"""The overview of the tutorials: of each its picture, its title and the paragraph that opens it.

A hook of mkdocs (see ``mkdocs.yml``), which writes the table into ``tutorials/index.md``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.nav import Section
from mkdocs.structure.pages import Page

OVERVIEW = "tutorials/index.md"
PLACE = "<!-- tutorials -->"
BEGINNING = re.compile(r"# (?P<title>.+)\n\n\*(?P<opening>[^*]+)\*\n")
PICTURE = re.compile(r"^!\[(?P<alt>[^\]]*)\]\((?P<path>[^)]+)\)$", re.M)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: object) -> str:
    """The overview, with a row for each tutorial, in the order of the navigation."""
    if page.file.src_uri != OVERVIEW:
        return markdown
    section = page.parent
    if PLACE not in markdown or not isinstance(section, Section):
        raise PluginError(f"{OVERVIEW} needs a line {PLACE}, and a place in a section of nav")
    pages = [child.file.src_uri for child in section.children if isinstance(child, Page)]
    folder = Path(config.docs_dir)
    rows = [row(folder / uri) for uri in pages if uri != OVERVIEW]
    return markdown.replace(PLACE, "\n".join(["| | |", "| --- | --- |", *rows]))


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
