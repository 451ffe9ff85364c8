"""Long lines of what a program printed are wrapped, since they are sentences.

A hook of mkdocs (see ``mkdocs.yml``). Tables are at most 100 columns wide, and stay as they are.
"""

from __future__ import annotations

import html
import re

OUTPUT = re.compile(r'<div class="language-text highlight">(<pre>.*?</pre>)</div>', re.S)
TABLE_WIDTH = 100


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML, in which outputs with sentences have the class ``sentences``."""

    def marked(output: re.Match[str]) -> str:
        text = html.unescape(re.sub(r"<[^>]*>", "", output[1]))
        if max(map(len, text.splitlines()), default=0) <= TABLE_WIDTH:
            return output[0]
        return f'<div class="language-text highlight sentences">{output[1]}</div>'

    return OUTPUT.sub(marked, content)
