"""Helper modules in this folder can be imported by all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")  # so that -m "not slow" leaves it out


def pytest_collection_finish() -> None:
    """What the imports made, about a million objects, lives until the end: no garbage collection
    need look at it again."""
    gc.collect()
    gc.freeze()
