"""The index of papers: complete, and true to the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "papers.md").read_text()
NUMBER = re.compile(r"\d{4}\.\d{4,5}")


def test_every_paper_that_the_code_names_is_on_the_page():
    named = {}
    for path in sorted((ROOT / "lmppl").rglob("*.py")):
        for found in re.finditer(rf"arXiv\s+(?:#\s*)?({NUMBER.pattern})", path.read_text()):
            named.setdefault(found[1], path.name)
    assert len(named) > 15
    missing = {number: file for number, file in named.items() if number not in PAGE}
    assert not missing


def test_every_link_is_to_the_number_beside_it():
    links = re.findall(rf"\[arXiv ({NUMBER.pattern})\]\(https://arxiv.org/abs/([\d.]+)\)", PAGE)
    assert len(links) > 15 and all(number == target for number, target in links)


def test_what_implements_it_is_there():
    names = re.findall(r"`(lmppl\.[\w.]+)`", PAGE)
    assert len(names) > 20
    for name in names:
        parts, found = name.split("."), None
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ImportError:
                continue
            break
        for part in parts[cut:]:
            found = getattr(found, part)  # AttributeError names what is missing
