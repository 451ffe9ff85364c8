"""The benchmark of drawn and scored log-probabilities runs on a tiny model; the page has its table."""

import json
from pathlib import Path

import pytest

from benchmarks import mismatch
from lmppl.testing import tiny_lm

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "diagnostics.md").read_text()


@pytest.mark.parametrize("drawn_by", mismatch.DRAWN_BY)
def test_a_row(monkeypatch, drawn_by):
    monkeypatch.setattr(mismatch, "OPENING", "ab")
    monkeypatch.setattr(mismatch, "ENDING", "cd")
    lm = tiny_lm("abcd", seed=0, eos=False)
    lm.model.requires_grad_(False)
    found = mismatch.row(lm, drawn_by, 5, steps=2, draws=3)
    pair = found["mismatch"]["drawn, scored"]
    assert pair["num_tokens"] == 15 and pair["per_token"] < 1e-4
    assert (found["in_training"] is None) == (drawn_by == "prior")
    (line,) = mismatch.table([found]).splitlines()[2:]
    assert line.startswith(f"| float32 | {drawn_by} | 5 (5) |") and line.count("100.0%") == 2


def test_the_page_has_the_table_of_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "mismatch.json").read_text())
    shown = PAGE.partition("<!-- mismatch:begin -->")[2].partition("<!-- mismatch:end -->")[0]
    assert shown.strip() == mismatch.table(rows)
    assert len(rows) == 8
