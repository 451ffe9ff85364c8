"""A picture is a link to its file, so that on a phone it can be opened and enlarged.

A hook of mkdocs (see ``mkdocs.yml``), for pictures that are paragraphs of their own.
"""

from __future__ import annotations

import re

PARAGRAPH = re.compile(r"<p>(?:<img [^>]*>\s*)+</p>")
PICTURE = re.compile(r'<img [^>]*src="([^"]*)"[^>]*>')


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML, in which paragraphs of pictures have the class ``picture`` and links."""

    def linked(paragraph: re.Match[str]) -> str:
        pictures = PICTURE.sub(r'<a href="\1">\g<0></a>', paragraph[0])
        return pictures.replace("<p>", '<p class="picture">', 1)

    return PARAGRAPH.sub(linked, content)
