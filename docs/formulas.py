"""Formulas of the pages as MathML, which browsers typeset themselves: no scripts, no fonts to load.

A hook of mkdocs (see ``mkdocs.yml``). The Markdown extension ``pymdownx.arithmatex`` finds what
stands between dollar signs, and this replaces it.
"""

from __future__ import annotations

import html
import re

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
CONVERTER = LatexToMathML()


def on_page_content(content: str, *, page: Page, **_: object) -> str:
    """The page's HTML, with its formulas typeset. One that is wrong fails the build."""

    def typeset(formula: re.Match[str]) -> str:
        latex = html.unescape(formula[2])
        try:
            mathml = CONVERTER.convert_with_local_state(latex, displaystyle=formula[1] == "div")
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: the formula {latex!r}: {error}") from error
        return f'<{formula[1]} class="formula">{mathml}</{formula[1]}>'

    return FORMULA.sub(typeset, content)
