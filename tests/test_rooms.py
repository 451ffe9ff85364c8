"""Who knows whom. The rooms are contracts in pyproject.toml (``make lint``); here, that no module
is in a circle, the faces of packages included, which those contracts do not look at."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


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
