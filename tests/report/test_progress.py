"""Progress bars: there on a terminal, nowhere else, and gone at the end."""

from __future__ import annotations

import io
import re
import sys
from types import ModuleType

import pytest

import lmppl
from lmppl import lm_sample
from lmppl.report import progress
from lmppl.report.progress import progress_bar
from lmppl.testing import tiny_lm


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def watched(monkeypatch):
    """Make stderr a terminal. To be called in the test: pytest swaps stderr after fixtures ran."""

    def make() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        return stream

    return make


def run(show=None, description="training", **figures):
    with progress_bar(description, total=3, show=show) as bar:
        for _ in range(3):
            bar.advance(**figures)


@pytest.mark.parametrize("show", [None, False])
def test_nothing_is_written_where_nobody_watches(capsys, show):
    run(show, loss=1.0)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_the_bar_keeps_its_width_where_figures_have_no_room(watched, monkeypatch):
    terminal = watched()
    monkeypatch.setenv("COLUMNS", "60")
    run(loss=0.123456, a_long_name=1.0, another=2.0)
    assert "━" * 20 in terminal.getvalue() and "…" in terminal.getvalue()
    assert "3/3" in terminal.getvalue() and "another 2" not in terminal.getvalue()


def test_progress_false_is_silent_on_a_terminal(watched):
    terminal = watched()
    run(False)
    assert terminal.getvalue() == ""


def test_a_terminal_sees_a_bar_that_is_wiped_at_the_end(watched):
    terminal = watched()
    run(loss=0.123456, best="x")
    written = terminal.getvalue()
    assert "training" in written and "3/3" in written
    assert "loss 0.1235  best x" in written
    assert written.rstrip("\n\r").endswith("\x1b[2K"), "the last thing written erases the line"


def test_results_go_to_stdout_even_while_a_bar_is_shown(watched, capsys):
    terminal = watched()
    with progress_bar("work", total=2) as bar:
        print("a result")
        bar.advance()
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()


def test_no_markup_and_no_control_characters(watched):
    terminal = watched()
    run(description="[bold]x[/nope]\x07\n:smile:", text="[red]\x07y")
    written = terminal.getvalue()
    assert "[bold]x[/nope]" in written and ":smile:" in written and "[red]" in written
    assert "\x07" not in written


def test_a_bar_within_a_bar_is_not_shown(watched):
    terminal = watched()
    with progress_bar("outer", total=1) as bar:
        run(description="inner")
        bar.advance()
    assert "outer" in terminal.getvalue() and "inner" not in terminal.getvalue()
    run(description="next")
    assert "next" in terminal.getvalue()


def test_an_exception_takes_the_bar_down(watched):
    terminal = watched()
    with pytest.raises(KeyboardInterrupt), progress_bar("work", total=2) as bar:
        bar.advance()
        raise KeyboardInterrupt
    run(description="after")
    assert "after" in terminal.getvalue()


def test_the_total_may_be_unknown(watched):
    terminal = watched()
    with progress_bar("work") as bar:
        bar.advance(5, stage=5)
    assert "stage 5" in terminal.getvalue() and "/?" not in terminal.getvalue()


def test_the_bar_moves_with_the_passes_of_a_language_model(watched, monkeypatch):
    monkeypatch.setattr("lmppl.report.progress._REFRESH_SECONDS", 0.0)
    terminal, lm = watched(), tiny_lm("ab.")
    with progress_bar("work"):
        lm.log_prob("ab", ["ba", "b"])
        lm.log_prob("ab", ["ba."])
        within = terminal.getvalue()
    assert "3 tokens" in within and "/s" in within
    written = len(terminal.getvalue())
    lm.log_prob("ab", ["ba"])
    assert len(terminal.getvalue()) == written, "nobody is told after the end"


def test_an_engine_says_its_tokens_while_it_draws(watched, monkeypatch):
    monkeypatch.setattr("lmppl.report.progress._REFRESH_SECONDS", 0.0)
    terminal = watched()
    program = lambda: lm_sample("z", "ab", max_tokens=40)  # noqa: E731
    lmppl.infer(program, lm=tiny_lm("ab.", eos=False), method="smc", num_samples=8, seed=0)
    seen = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens", terminal.getvalue())]
    assert len(set(seen)) > 30 and seen[-1] <= 320 and "stage 0" in terminal.getvalue()


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_with_widgets_shows_bars(monkeypatch, widgets):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(
        "lmppl.report.progress.find_spec", lambda name: "there" if widgets else None
    )
    assert progress._is_watched() == widgets
