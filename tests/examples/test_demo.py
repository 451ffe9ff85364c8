"""The scenes of the demo, on a tiny language model: what doesn't depend on the model's taste."""

from __future__ import annotations

import string

import pytest

import demo
import lmppl
from lmppl.testing import tiny_lm
from paper.calculator import calculate

LM = tiny_lm(string.ascii_letters + string.digits + " .,:'()+-=_%?\n", seed=0)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name: LM)
    with lmppl.use(LM):
        yield


def rows(table):
    """A row's cells by its first."""
    return {row[0]: row[1:] for row in table.rows}


def test_engines_agree_on_the_blank():
    _, table = demo.blank(seed=0)
    exact = {value: cells[3] for value, cells in rows(table).items()}
    sampled = {value: cells[5] for value, cells in rows(table).items()}
    assert sum(exact.values()) > 0.5
    assert exact == pytest.approx(sampled, abs=0.1)


def test_every_sum_that_has_led_to_it_gives_seven():
    _, table = demo.sum_led_to(seed=0)
    likely = {terms: cells[3] for terms, cells in rows(table).items() if cells[3] > 0}
    assert len(likely) == 5 and all(calculate(terms) == 7 for terms in likely)


def test_no_text_of_the_lipogram_holds_the_letter():
    _, table = demo.without_e(seed=0)
    texts = [text for *_, text in table.rows if text != "none"]
    assert texts and not any("e" in text for text in texts)


def test_shares_of_critics_are_a_law():
    *_, table = demo.share_of_critics(seed=0)
    assert sum(cells[1] for cells in rows(table).values()) == pytest.approx(1.0, abs=1e-6)
    assert sum(cells[3] for cells in rows(table).values()) == pytest.approx(1.0, abs=1e-6)


def test_the_demo_prints_the_scenes_that_are_asked_for(capsys):
    demo.main(["--scene", "sum", "blank"])
    shown = capsys.readouterr().out
    assert shown.index("Which sum led to 7?") < shown.index("Fill a blank")


def test_an_unknown_scene_is_an_error(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--scene", "dance"])
    assert "invalid choice: 'dance'" in capsys.readouterr().err
