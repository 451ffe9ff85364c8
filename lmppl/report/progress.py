"""Progress bars that are there when somebody watches.

A bar is written to stderr and wiped away when the work ends: results and logs never contain one. It
moves with every pass of a language model, and says how many tokens went through it.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from lmppl.lm.meter.work import total_usage, watching
from lmppl.report.tables import printable, show

_REFRESH_SECONDS = 0.1

_live = False  # two bars would overwrite each other, so work inside other work shows none


class progress_bar:
    """A progress bar around a piece of long work.

    ```python
    with progress_bar("training", total=steps, show=progress) as bar:
        for step in range(steps):
            ...
            bar.advance(loss=loss)
    ```

    ``total`` steps (None: not known) are to be done. ``show=None``: if stderr is a terminal, or in a
    notebook that has ipywidgets. A bar within the work of another one is not shown.
    """

    def __init__(self, description: str, total: int | None = None, show: bool | None = None):
        self._description, self._total = description, total
        self._show = _is_watched() if show is None else show
        self._bar: Any = None  # rich's, which is imported when one is shown
        self._refreshed = 0.0
        self._figures = ""
        self._ends = ExitStack()

    def __enter__(self) -> progress_bar:
        global _live
        if self._show and not _live:
            from rich import progress
            from rich.console import Console
            from rich.table import Column
            from rich.text import Text

            class Figures(progress.ProgressColumn):
                """Cut where there is no room, so that the bar keeps its width."""

                def render(self, task: progress.Task) -> Text:
                    return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")

            # No refresh thread: it would run beside programs that swap global state.
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=20),
                *([] if self._total is None else [progress.MofNCompleteColumn()]),
                progress.TimeElapsedColumn(),
                Figures(Column()),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
                # Rich would send what the program prints to the bar's stream: to stderr.
                redirect_stdout=sys.stdout.isatty(),
            )
            name = printable(self._description)
            self._task = self._bar.add_task(name, total=self._total, figures="")
            self._bar.start()
            self._usage, self._began = total_usage(), time.monotonic()
            self._ends.enter_context(watching(self._move))
            _live = True
        return self

    def __exit__(self, *exc: object) -> None:
        global _live
        if self._bar is not None:
            _live = False
            self._ends.close()
            self._bar.stop()
            self._bar = None

    def advance(self, steps: int = 1, **figures: Any) -> None:
        """Some steps are done. ``figures`` (name to number) are shown behind the bar."""
        if self._bar is None:
            return
        if figures:
            shown = (f"{name} {show(value, quote=False)}" for name, value in figures.items())
            self._figures = printable("  ".join(shown))
        self._bar.update(self._task, advance=steps, figures=self._figures)
        self._move()

    def _move(self) -> None:
        """Show the time, and the tokens so far, if it was long ago that they were shown."""
        now, bar = time.monotonic(), self._bar
        if bar is not None and now - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = now
            usage = total_usage() - self._usage
            tokens = usage.tokens_sampled + usage.tokens_scored + usage.tokens_trained
            rate = tokens / max(now - self._began, 1e-9)
            words = [f"{tokens:,} tokens  {rate:,.0f}/s"] if tokens else []
            bar.update(self._task, figures="  ".join([*words, self._figures]))
            bar.refresh()


def _is_watched() -> bool:
    """Whether somebody sees what is written to stderr, and it may be written over."""
    in_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
    return in_notebook or sys.stderr.isatty()
