"""Fixtures of the engines' tests."""

import pytest
from tables import remember_model_calls

from lmppl.runtime import Particle


@pytest.fixture
def remembered(monkeypatch):
    """Every answer of a language model is computed once, so that thousands of runs are cheap.

    What a model answers is tested elsewhere (tests/lm); here it is what the engines do with it.
    """
    remember_model_calls(monkeypatch)


@pytest.fixture
def particles(monkeypatch):
    """All particles that are made."""
    made: list[Particle] = []
    init = Particle.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(Particle, "__init__", remember)
    return made
