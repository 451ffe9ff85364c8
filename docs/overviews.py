"""An overview of the pages of a folder, which a hook of mkdocs writes into the folder's own page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.nav import Section
from mkdocs.structure.pages import Page


def with_overview(
    markdown: str, page: Page, config: MkDocsConfig, place: str, write: Callable[[list[Path]], str]
) -> str:
    """A page's Markdown with an overview of other pages in the place of the line ``place``: what
    ``write`` makes of those of its section that lie in its folder, in the order of the navigation."""
    uri, section = page.file.src_uri, page.parent
    if place not in markdown or not isinstance(section, Section):
        raise PluginError(f"{uri} needs a line {place}, and a place in a section of nav")
    folder, own = Path(config.docs_dir), Path(config.docs_dir, uri)
    files = [folder / child.file.src_uri for child in section.children if isinstance(child, Page)]
    others = [file for file in files if file.parent == own.parent and file != own]
    return markdown.replace(place, write(others))
