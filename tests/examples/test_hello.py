"""The README's first program, on the embedded language model."""

from __future__ import annotations

import contextlib
import io
import re
import string
from pathlib import Path

import pytest
from test_docs import BLOCK

import hello
import lmppl
from lmppl.testing import tiny_lm

README = Path(__file__).parents[2] / "README.md"


def figures(output):
    """Percent by value, and the log evidence: in bfloat16 they differ a little between processors."""
    shares = re.findall(r"([\d.]+)%[\s█▏▎▍▌▋▊▉]*('[^']*')", output)
    (log_evidence,) = re.findall(r"log evidence (\S+)", output)
    return {name: float(share) for share, name in shares} | {"log Z": float(log_evidence)}


@pytest.mark.slow
def test_the_readme_prints_what_it_says_and_is_the_example(capsys, tmp_path):
    (block,) = BLOCK.finditer(README.read_text())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block["code"], str(README), "exec"), {"__name__": "__main__"})
    hello.main(["--plot", str(tmp_path / "hello.svg")])
    said = figures(block["output"])
    assert len(said) == 6 and said == pytest.approx(figures(printed.getvalue()), abs=3)
    assert said == pytest.approx(figures(capsys.readouterr().out), abs=3)
    assert "posterior" in (tmp_path / "hello.svg").read_text()


def test_it_is_a_prior_and_with_what_happened_a_posterior(monkeypatch):
    lm = tiny_lm(string.ascii_letters + " .", seed=0)
    monkeypatch.setattr(hello, "THINGS", [" dog.", " pie."])
    prior = lmppl.infer(hello.bought, lm=lm, method="exact").probs("z")
    found = lmppl.infer(hello.bought, " It barked.", lm=lm, method="exact")
    assert prior != pytest.approx(found.probs("z"), abs=1e-3)
    assert sum(prior.values()) == pytest.approx(1.0) and found.log_evidence < 0
