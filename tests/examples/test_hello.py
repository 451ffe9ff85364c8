"""The README's first program, on the embedded language model."""

from __future__ import annotations

import contextlib
import io
import string
from pathlib import Path

import pytest
from test_docs import BLOCK, agree

import hello
import lmppl
from lmppl.testing import tiny_lm

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_readme_prints_what_it_says_and_is_the_example(capsys, tmp_path):
    block = next(BLOCK.finditer(README.read_text()))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block["code"], str(README), "exec"), {"__name__": "__main__"})
    assert agree(block["output"], printed.getvalue(), 0.1)
    hello.main(["--plot", str(tmp_path / "hello.svg")])
    assert agree(block["output"], capsys.readouterr().out, 0.1)
    assert "posterior" in (tmp_path / "hello.svg").read_text()


def test_it_is_a_prior_and_with_what_happened_a_posterior(monkeypatch):
    lm = tiny_lm(string.ascii_letters + " .", seed=0)
    monkeypatch.setattr(hello, "THINGS", [" dog.", " pie."])
    prior = lmppl.infer(hello.bought, lm=lm, method="exact").probs("z")
    found = lmppl.infer(hello.bought, " It barked.", lm=lm, method="exact")
    assert prior != pytest.approx(found.probs("z"), abs=1e-3)
    assert sum(prior.values()) == pytest.approx(1.0) and found.log_evidence < 0
