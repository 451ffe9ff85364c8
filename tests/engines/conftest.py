"""Fixtures of the engines' tests."""

import pytest
from tables import remember_model_calls


@pytest.fixture
def remembered(monkeypatch):
    """Every answer of a language model is computed once, so that thousands of runs are cheap.

    What a model answers is tested elsewhere (tests/lm); here it is what the engines do with it.
    """
    remember_model_calls(monkeypatch)
