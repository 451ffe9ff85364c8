"""Who knows whom. The rooms are contracts in pyproject.toml (``make lint``); here, that no module
is in a circle, the faces of packages included, which those contracts do not look at."""

from __future__ import annotations

import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
HOUSE = (ROOT / "docs" / "design.md").read_text().partition("## The house")[2].partition("\n## ")[0]


def check(graph):
    """Raise a ``CycleError``, which names the circle, if there is one. Imports under TYPE_CHECKING
    and within functions count."""
    known = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    TopologicalSorter(known).prepare()


def test_no_module_is_in_a_circle():
    graph = grimp.build_graph("lmppl", cache_dir=None)
    assert len(graph.modules) > 80
    check(graph)


def test_a_circle_through_the_face_of_a_package_is_found():
    graph = grimp.ImportGraph()
    graph.add_import(importer="lmppl.runtime", imported="lmppl.runtime.particle")
    check(graph)
    graph.add_import(importer="lmppl.runtime.particle", imported="lmppl.runtime")
    with pytest.raises(CycleError, match="lmppl.runtime.particle"):
        check(graph)


def rooms_of(table):
    """Rows of a table of rooms: the files of the room, and its main names."""
    rows = re.findall(r"^\| (`.*?) \| .*? \| (`.*?) \| .*? \|$", table, re.M)
    return {room: re.findall(r"`(\w+)`", names) for room, names in rows}


def defined(name, source):
    return re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", source, re.M)


def test_the_page_of_the_house_names_what_is_there():
    rooms = rooms_of(HOUSE)
    assert len(rooms) == 22
    for room, names in rooms.items():
        files = []
        for part in re.findall(r"`([\w/.]+)`", room):
            path = ROOT / "lmppl" / (part if "/" in part or "." in part else f"lm/{part}.py")
            assert path.exists(), part
            files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
        sources = "\n".join(path.read_text() for path in files)
        assert names and all(defined(name, sources) for name in names), (room, names)


def test_the_page_of_the_house_has_the_rooms_of_the_contracts_in_their_order():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [contract["layers"] for contract in contracts["contracts"] if "layers" in contract]
    words = [re.findall(r"`(?:lm/)?(\w+)(?:/|\.py)?`", room) for room in rooms_of(HOUSE)]
    assert [word for row in words for word in row] == [room for layer in layers for room in layer]


def test_a_stranger_finds_what_the_path_says():
    path = HOUSE.partition("### A stranger's path")[2].partition("\n###")[0]
    steps = re.findall(r"`([\w/]+\.py)`(?: \(`([\w.]+)`\))?", path)
    assert len(steps) >= 10
    for file, name in steps:
        source = (ROOT / "lmppl" / file).read_text()
        assert all(defined(part, source) for part in name.split(".") if part), (file, name)
