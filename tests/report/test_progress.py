"""Progress bars: there on a terminal, nowhere else, and gone at the end."""

from __future__ import annotations

import io
import re
import sys
from types import ModuleType, SimpleNamespace

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


@pytest.fixture
def notebook(monkeypatch):
    """The kernel of a notebook, as far as a bar sees it: all that its cell shows, in turn."""
    shown: list[str] = []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        assert display_id
        Handle().update(data, raw)
        return Handle()

    shell = ModuleType("IPython")
    shell.get_ipython = lambda: SimpleNamespace(kernel=object())
    shell.display = ModuleType("IPython.display")
    shell.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", shell.display)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    return shown


def test_a_notebook_shows_bars_by_default_and_empties_them(notebook, capsys):
    run(loss=0.5)
    assert (
        notebook[0].startswith("training ━") and "1/3" in notebook[0] and "loss 0.5" in notebook[0]
    )
    assert notebook[-1] == "" and capsys.readouterr() == ("", "")


def test_an_ipython_that_is_no_notebook_is_not_taken_for_one(notebook, monkeypatch):
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert not progress._is_watched()


def test_smc_says_how_long_the_longest_text_can_become(watched, monkeypatch):
    monkeypatch.setattr("lmppl.report.progress._REFRESH_SECONDS", 0.0)
    terminal = watched()

    def program():
        z = lm_sample("z", "ab", max_tokens=7)
        lm_sample("y", z, obs="ab")
        lm_sample("w", [z, "a"], max_tokens=5)

    lmppl.infer(program, lm=tiny_lm("ab.", eos=False), method="smc", num_samples=4, seed=0)
    seen = terminal.getvalue()
    assert all(f"token {k}/7" in seen for k in range(7)) and "token 4/5" in seen
    assert re.search(r"text 0/[1-4] ", seen), "the texts of y that are scored"
    assert "/?" not in seen and re.search(r"\d tokens  \d+/s", seen)


def test_mcmc_counts_its_moves(watched, monkeypatch):
    monkeypatch.setattr("lmppl.report.progress._REFRESH_SECONDS", 0.0)
    terminal = watched()
    program = lambda: lm_sample("z", "ab", max_tokens=2)  # noqa: E731
    options = {"num_samples": 4, "num_chains": 2, "warmup": 3, "num_starts": 2}
    lmppl.infer(program, lm=tiny_lm("ab."), method="mcmc", seed=0, **options)
    assert "move 1/13" in terminal.getvalue() and "move 13/13" in terminal.getvalue()


def test_the_time_that_is_left_is_that_of_the_steps_so_far():
    frame = progress._Frame("exact", 50, counts_steps=True, done=10, unit="trace", tokens=600)
    frame.began, frame.counted_from, frame.advanced, frame.now = 100.0, 110.0, 120.0, 130.0
    # ten steps took 10 s, the other forty take 40 s, of which 10 s are over
    assert frame.words().split("  ")[:4] == [
        "trace 10/50", "0:00:30", "about 0:00:30 left", "600 tokens",
    ]  # fmt: skip
    assert "20/s" in frame.words()
