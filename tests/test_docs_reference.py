"""The reference: complete, each name in one place, and docstrings that say what is asked of them."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections import Counter
from pathlib import Path

import griffe
import pytest

import lmppl
import lmppl.diagnostics
import lmppl.engines
import lmppl.posterior
import lmppl.ray
import lmppl.testing
import lmppl.training
import names  # the hook of mkdocs that makes the overview

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reference"
PUBLIC = [
    lmppl, lmppl.constraints, lmppl.diagnostics, lmppl.engines, lmppl.posterior, lmppl.ray,
    lmppl.testing, lmppl.training,
]  # fmt: skip

PAGES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
DOCUMENTED = [name for text in PAGES.values() for name in names.names(text)]


def identity(name):
    """Of what it stands for: ``lmppl.infer`` and ``lmppl.engines.dispatch.infer`` are one."""
    return id(functools.reduce(getattr, name.split(".")[1:], lmppl))


def public_names():
    """All names that a user may import, but modules, whose own names are among them."""
    for module in PUBLIC:
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield f"{module.__name__}.{name}"
    yield from (f"lmppl.losses.{loss.__name__}" for loss in lmppl.losses.LOSSES.values())


def missing(documented):
    """What has no place among some names, and what has several."""
    places = Counter(map(identity, documented))
    lost = {name for name in public_names() if identity(name) not in places}
    return lost | {name for name in documented if places[identity(name)] > 1}


def test_every_public_name_stands_on_one_page():
    assert len(PAGES) > 10 and len(DOCUMENTED) > 70
    assert not missing(DOCUMENTED)
    assert missing(DOCUMENTED[1:]) and missing([*DOCUMENTED, "lmppl.engines.dispatch.infer"])


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": reference/{page}\n" in navigation for page in PAGES)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_overview_has_a_line_for_it(name):
    line = names.summary(name)
    assert 10 < len(line) < 200 and "\n" not in line
    assert line[0].isupper() or line.startswith(("`", "log q"))


# --- docstrings ------------------------------------------------------------------------------------


def shown():
    """All that the pages show: name to object, members of classes included."""
    found = {}
    for text in PAGES.values():
        options_of = dict(names.NAME.findall(text))
        for name in names.names(text):
            found[name] = thing = names.resolved(name)
            if not thing.is_class:
                continue
            options = options_of.get(name, "")
            chosen = re.search(r"members: \[(.*)\]", options)
            members = thing.all_members if "inherited_members" in options else thing.members
            wanted = chosen[1].split(", ") if chosen else members
            found |= {
                f"{name}.{member}": members[member]
                for member in wanted
                if member and not member.startswith("_") and members[member].docstring
            }
    return found


SHOWN = shown()


def text_of(thing):
    """A docstring, and that of a class's ``__init__`` with it."""
    own = [thing, thing.members.get("__init__")] if thing.is_class else [thing]
    return "\n".join(each.docstring.value for each in own if each is not None and each.docstring)


def parameters_of(thing):
    if thing.is_class:  # a dataclass has what griffe makes of its fields
        return [p.name for p in thing.parameters if p.name != "self"]
    return [p.name for p in thing.parameters if p.name not in ("self", "cls")]


def raised_in(source):
    """The exceptions that a function's own lines raise."""
    parsed = ast.parse(textwrap.dedent(source)).body  # nothing of the __init__ of a dataclass
    found, waiting = set(), [node for function in parsed for node in function.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func).rpartition(".")[2])
        waiting += ast.iter_child_nodes(node)
    return found - {"NotImplementedError"}


def unnamed_parameters(thing):
    """Those that stand neither between backquotes nor in a list, ``name: ...``."""
    entries = re.findall(r"^ *([*\w, ]+): |``(.+?)``", text_of(thing), re.M | re.S)
    named = set(re.findall(r"\w+", " ".join(map(" ".join, entries))))
    return [name for name in parameters_of(thing) if name.strip("*") not in named]


def unnamed_errors(thing):
    made_by = ("__init__", "__post_init__")
    makers = (
        [thing.members[n] for n in made_by if n in thing.members] if thing.is_class else [thing]
    )
    raised = set().union(*(raised_in(maker.source) for maker in makers))
    return [name for name in sorted(raised) if name not in text_of(thing)]


def calls():
    """What can be called among what is shown."""
    kinds = {name: thing for name, thing in SHOWN.items() if thing.is_class or thing.is_function}
    return [pytest.param(thing, id=name) for name, thing in kinds.items()]


@pytest.mark.parametrize("thing", calls())
def test_a_docstring_names_every_parameter_and_error(thing):
    assert not unnamed_parameters(thing)
    assert not unnamed_errors(thing)


def test_what_a_docstring_leaves_out_is_found():
    source = '''
def f(a, b):
    """Of ``a`` only, not of b."""
    def inner():
        raise KeyError("not f's own")
    if a:
        raise ValueError("a")
    raise NotImplementedError("of a base class")
'''
    with griffe.temporary_visited_module(source) as module:
        assert unnamed_parameters(module["f"]) == ["b"]
        assert unnamed_errors(module["f"]) == ["ValueError"]


def test_docstrings_are_markdown():
    roles = {name: re.findall(r":\w+:`", text_of(thing)) for name, thing in SHOWN.items()}
    assert not {name: found for name, found in roles.items() if found}
