"""Helper modules in this folder can be imported by all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What the imports made, about a million objects, lives until the end: no garbage collection
    need look at it again."""
    gc.collect()
    gc.freeze()
