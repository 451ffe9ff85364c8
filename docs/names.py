"""The overview of the reference: every name of its pages, with the first line of its docstring.

A hook of mkdocs (see ``mkdocs.yml``), which writes the tables into ``reference/index.md``. The pages
say which names there are: a line ``::: lmppl.infer`` a name.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

from overviews import with_overview

OVERVIEW = "reference/index.md"
PLACE = "<!-- names -->"
NAME = re.compile(r"^::: (\S+)$((?:\n    .*)*)", re.M)
SEVERAL = 4  # names
MEMBERS = re.compile(r"members: \[(.*)\]")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: object) -> str:
    """The overview, with a table for each page of the reference, in the order of the navigation."""
    if page.file.src_uri != OVERVIEW:
        return markdown
    _package.cache_clear()  # mkdocs serve: files may have changed
    return with_overview(markdown, page, config, PLACE, lambda pages: "\n".join(map(table, pages)))


def table(page: Path) -> str:
    """The names of a page: a heading that links to it, and tables in Markdown.

    A module of several names has a table of its own; elsewhere a name's line ends with its module, if
    that is not ``lmppl`` itself. So the column of names is narrow enough for a phone.
    """
    text = page.read_text()
    title = re.search(r"^# (.+)$", text, re.M)
    lines = [f"## [{title[1] if title else page.stem}]({page.name})"]
    sizes = Counter(module_of(name) for name in names(text))
    large = [module for module, size in sizes.items() if size >= SEVERAL and module != "lmppl"]
    for table_of, group in groupby(
        names(text), lambda n: module_of(n) if module_of(n) in large else ""
    ):
        lines += ["", f"In `{table_of}`:"] if table_of else []
        lines += ["", "| name | what it is |", "| --- | --- |"]
        for name in group:
            short, module = name.rpartition(".")[2], module_of(name)
            where = "" if module in ("lmppl", table_of) else f". In `{module}`"
            lines.append(f"| [`{short}`][{name}] | {summary(name)}{where} |")
    return "\n".join([*lines, ""])


def module_of(name: str) -> str:
    """What stands before the last dot of a name."""
    return name.rpartition(".")[0]


def names(text: str) -> list[str]:
    """The names that a page documents. Of a module that has no heading there, its members."""
    found: list[str] = []
    for name, options in NAME.findall(text):
        if "show_root_heading: false" not in options:
            found.append(name)
            continue
        members = MEMBERS.search(options)
        own = members[1].split(", ") if members else public_members(name)
        found += [f"{name}.{member}" for member in own]
    return found


def public_members(name: str) -> list[str]:
    """The functions and classes that a module defines, in its order."""
    members = resolved(name).members.values()
    own = [m for m in members if not m.is_alias and (m.is_function or m.is_class)]
    return [member.name for member in own if not member.name.startswith("_")]


def summary(name: str) -> str:
    """The first sentence of a docstring, in one line."""
    docstring = resolved(name).docstring
    if docstring is None:
        raise PluginError(f"{name} has no docstring")
    paragraph = " ".join(docstring.value.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.:])\s+(?=[A-Z`\"])", paragraph.replace("``", "`"))[0]
    # A bar would end the cell of the table, but not between backquotes, where a backslash is shown.
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", sentence.rstrip(".:"))


def resolved(name: str) -> griffe.Object | griffe.Alias:
    """What a name stands for, read from the sources."""
    try:
        return _package()[name.removeprefix("lmppl.")]
    except (KeyError, griffe.AliasResolutionError) as error:
        raise PluginError(f"the reference documents {name}, which is not there: {error}") from error


@cache
def _package() -> griffe.Object | griffe.Alias:
    root = Path(__file__).parent.parent
    return griffe.load("lmppl", search_paths=[root])
