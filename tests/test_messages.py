"""What errors and warnings tell the user to call exists, and is public."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmppl
from lmppl import LM, LMGuide, LMText, Posterior

ROOT = Path(lmppl.__file__).parent

# What a variable in a message stands for.
OBJECTS = {
    "lm": LM, "LM": LM, "guide": LMGuide, "LMGuide": LMGuide, "posterior": Posterior,
    "Posterior": Posterior, "LMText": LMText,
}  # fmt: skip
NAMED = re.compile(rf"\b(lmppl(?:\.[A-Za-z]\w*)+|(?:{'|'.join(OBJECTS)})\.[A-Za-z_]\w*)")


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module that is no docstring, with ``{}`` where a value stands:
    those of errors and warnings among them."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    within = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and id(node) not in docs | within:
            yield node.lineno, str(node.value)


def exists(name: str) -> bool:
    """Whether a dotted name is there, and is public."""
    first, *rest = name.split(".")
    if any(part.startswith("_") for part in rest):
        return False
    found = OBJECTS.get(first, lmppl)
    for i, part in enumerate(rest):
        if first == "lmppl" and found is not None and not hasattr(found, part):
            try:  # a module that is not imported yet
                found = importlib.import_module(".".join([first, *rest[: i + 1]]))
                continue
            except ImportError:
                return False
        if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
            return _is_set_in_init(found, part)
        found = getattr(found, part, None)
    return True


def _is_set_in_init(cls: object, name: str) -> bool:
    """Whether a class documents an attribute of its objects."""
    return bool(re.search(rf"^\s+{name}: ", str(getattr(cls, "__doc__", "")), re.M))


NAMES = sorted(
    {
        (name, str(path.relative_to(ROOT)))
        for path in ROOT.rglob("*.py")
        for _, text in messages(ast.parse(path.read_text()))
        for name in NAMED.findall(text)
        if " " in text  # others are names of modules
    }
)


REFERENCE = sorted((ROOT.parent / "docs" / "reference").glob("*.md"))
API = "\n".join(page.read_text() for page in REFERENCE)


def is_documented(name: str) -> bool:
    """Whether an existing name is in the reference: by itself, as a module of what is, or as a member
    of a class."""
    first, *rest = name.split(".")
    if first == "lmppl" and re.search(rf"^::: {re.escape(name)}\b", API, re.M):
        return True
    owner = ".".join(
        ["lmppl", *rest[:-1]] if first == "lmppl" else ["lmppl", OBJECTS[first].__name__]
    )
    block = re.search(rf"^::: {re.escape(owner)}\n(?:    .*\n)*", API, re.M)
    if block is None:
        return False
    members = re.search(r"members: \[(.*)\]", block[0])
    return members is None or rest[-1] in members[1].split(", ")


def test_messages_are_found():
    names = {name for name, _ in NAMES}
    assert {"lmppl.LM.from_pretrained", "lm.merged", "lmppl.use", "lm.adapter"} <= names


@pytest.mark.parametrize("name, file", NAMES)
def test_what_a_message_names_exists(name, file):
    assert exists(name), f"{file} names {name}, which does not exist"
    assert is_documented(name), f"{file} names {name}, which docs/reference lacks"


@pytest.mark.parametrize("name", ["lmppl.nothing", "lm._runner", "guide.nothing", "posterior.mode"])
def test_a_name_that_is_not_there_is_noticed(name):
    assert not exists(name)
