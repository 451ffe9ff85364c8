"""Progress bars that are there when somebody watches.

On a terminal a bar is written to stderr and wiped away when the work ends: results and logs never
contain one. In a notebook it is an output of the cell that is emptied then. It moves with every pass of
a language model, and says how many tokens went through it.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from lmppl.lm.meter.work import stretch, total_usage, watching
from lmppl.report.tables import printable, show

_REFRESH_SECONDS = 0.1
_BAR_WIDTH = 20

_live = False  # two bars would overwrite each other, so work inside other work shows none


class progress_bar:
    """A progress bar around a piece of long work.

    ```python
    with progress_bar("training", total=steps, show=progress) as bar:
        for step in range(steps):
            ...
            bar.advance(loss=loss)
    ```

    ``total`` steps (None: not known) are to be done. While it is not known, the bar is that of the
    language model's present work: of the longest text that is being drawn (at most), or of the texts
    that are scored. ``show=None``: if stderr is a terminal, or in a notebook. A bar within the work of
    another one is not shown.
    """

    def __init__(self, description: str, total: int | None = None, show: bool | None = None):
        self._frame = _Frame(printable(description), total, counts_steps=total is not None)
        self._show = _is_watched() if show is None else show
        self._screen: _Screen | None = None
        self._refreshed = 0.0
        self._ends = ExitStack()

    def __enter__(self) -> progress_bar:
        global _live
        if self._show and not _live:
            self._usage, self._frame.began = total_usage(), time.monotonic()
            self._frame.counted_from = self._frame.began
            self._screen = _Notebook() if _in_notebook() else _Terminal(self._frame)
            self._ends.enter_context(watching(self._move))
            _live = True
        return self

    def __exit__(self, *exc: object) -> None:
        global _live
        if self._screen is not None:
            _live = False
            self._ends.close()
            self._refreshed = 0.0
            self._move()
            self._screen.close()
            self._screen = None

    def begin(self, total: int, unit: str = "") -> None:
        """``total`` steps, each called ``unit``, are to be done from here on."""
        frame = self._frame
        frame.done, frame.total, frame.unit, frame.counts_steps = 0, total, unit, True
        frame.counted_from = time.monotonic()

    def advance(self, steps: int = 1, **figures: Any) -> None:
        """Some steps are done. ``figures`` (name to number) are shown behind the bar."""
        if self._screen is None:
            return
        if figures:
            shown = (f"{name} {show(value, quote=False)}" for name, value in figures.items())
            self._frame.figures = printable("  ".join(shown))
        if self._frame.counts_steps and steps:
            self._frame.done += steps
            self._frame.advanced = time.monotonic()
        self._move()

    def _move(self) -> None:
        """Show how far the work has come, if it was long ago that this was shown."""
        now = time.monotonic()
        if self._screen is None or now - self._refreshed <= _REFRESH_SECONDS:
            return
        self._refreshed = now
        frame, part = self._frame, stretch()
        if part is not None and not frame.counts_steps:
            frame.unit, frame.done, frame.total = part.unit, part.done, part.total
        usage = total_usage() - self._usage
        frame.tokens = usage.tokens_sampled + usage.tokens_scored + usage.tokens_trained
        frame.now = now
        self._screen.draw(frame)


@dataclass
class _Frame:
    """What a bar shows; times in seconds."""

    description: str
    total: int | None
    counts_steps: bool  # of the work itself; else it counts what the language model does at present
    done: int = 0
    unit: str = ""
    tokens: int = 0
    figures: str = ""
    began: float = 0.0
    counted_from: float = 0.0  # when the first of the steps began
    advanced: float = 0.0  # when the last of those that are done was done
    now: float = 0.0

    def words(self) -> str:
        """All but the description and the bar."""
        words: list[str] = []
        if self.total is not None:
            words.append(f"{self.unit} {self.done:,}/{self.total:,}".strip())
        seconds = max(self.now - self.began, 0.0)
        words.append(_clock(seconds))
        if self.counts_steps and self.total is not None and 0 < self.done < self.total:
            each = (self.advanced - self.counted_from) / self.done
            rest = each * (self.total - self.done) - (self.now - self.advanced)
            words += [f"about {_clock(rest)} left"] * (rest >= 1.0)
        if self.tokens:
            words += [f"{self.tokens:,} tokens", f"{self.tokens / max(seconds, 1e-9):,.0f}/s"]
        return "  ".join([*words, self.figures])


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class _Screen(Protocol):
    """Where a bar is seen."""

    def draw(self, frame: _Frame) -> None:
        """Show it in place of what was shown."""

    def close(self) -> None:
        """Wipe it away."""


class _Terminal:
    def __init__(self, frame: _Frame) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column
        from rich.text import Text

        class Words(progress.ProgressColumn):
            """Cut where there is no room, so that the bar keeps its width."""

            def render(self, task: progress.Task) -> Text:
                return Text(task.fields["words"], no_wrap=True, overflow="ellipsis")

        # No refresh thread: it would run beside programs that swap global state.
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=_BAR_WIDTH),
            Words(Column()),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
            # Rich would send what the program prints to the bar's stream: to stderr.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(frame.description, total=frame.total, words="")
        self._bar.start()

    def draw(self, frame: _Frame) -> None:
        words = frame.words()
        self._bar.update(self._task, total=frame.total, completed=frame.done, words=words)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.stop()


class _Notebook:
    """One line of text, which needs no widgets. (An output can be replaced, but not removed: it ends
    empty.)"""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, frame: _Frame) -> None:
        share = frame.done / frame.total if frame.total else 0.0
        full = round(_BAR_WIDTH * min(share, 1.0))
        bar = "\u2501" * full + "\u2500" * (_BAR_WIDTH - full)
        self._show(f"{frame.description} {bar} {frame.words()}")

    def close(self) -> None:
        if self._handle is not None:
            self._show("")

    def _show(self, line: str) -> None:
        display = import_module("IPython.display").display
        data = {"text/plain": line}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return "ipykernel" in sys.modules and hasattr(shell and shell.get_ipython(), "kernel")


def _is_watched() -> bool:
    """Whether somebody sees what is written to stderr, and it may be written over."""
    return _in_notebook() or sys.stderr.isatty()
