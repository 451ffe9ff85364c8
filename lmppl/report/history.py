"""What training reports: the figures of every step, as a table and as plots."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmppl.checks import check_int
from lmppl.report.plots import BLUE, RED, drawing
from lmppl.report.tables import (
    NEGLIGIBLE,
    Block,
    Report,
    Table,
    as_text,
    duration,
    percent,
    plain,
    show,
    two_versions,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATE = "samples_per_second"  # computed, not stored

_COLUMNS = ("step", "loss", "log_z", "elbo", "ess", "alive", "length", _RATE)
# Of ``learn``: those of the program, and as many of the guide as there is room for.
_LEARNING = ("step", "log_evidence", "model_ess", "loss", "elbo", "ess", "length")
_LEARNING_HELD_OUT = ("eval_log_z", "eval_ess")
_LABELS = {
    "log_evidence": "log evidence", "model_loss": "model loss", "model_ess": "model ESS",
    "log_z": "log Z", "elbo": "ELBO", "eubo": "EUBO", "ess": "ESS", _RATE: "samples/s",
}  # fmt: skip
_HELD_OUT = "eval_"
_PANELS = (
    ("log_evidence",), ("model_ess",), ("loss",),
    ("log_z", "elbo", "eval_log_z", "eval_elbo", "eval_eubo"),
    ("ess", "eval_ess"), ("length",), (_RATE,),
)  # fmt: skip
_FRACTIONS = ("ess", "alive", "model_ess")
_NATS = ("log_z", "elbo", "eubo", "log_evidence")


class History(Report, list[dict[str, Any]]):
    """The figures of a training run: a list of dicts, one a step, printed as a table. A slice
    (``history[-100:]``) is a history too."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return History(found) if isinstance(key, slice) else found

    def column(self, name: str) -> list[float]:
        """One figure of every step; NaN at steps that lack it.

        ``name`` is a key of the steps' dicts, or ``"samples_per_second"`` (of the step's seconds
        without those of its evaluation).

        Raises:
            ValueError: if no step has it; says which there are.
        """
        if self and name != _RATE and not any(name in figures for figures in self):
            known = ", ".join(sorted(self._keys()))
            raise ValueError(f"no step has the figure {name!r}, allowed: {known}")
        return [_number(_figure(figures, name)) for figures in self]

    def smoothed(self, name: str, window: int) -> list[float]:
        """Running mean of a figure: one number a step.

        Args:
            name: the figure, as of ``column``.
            window: over how many steps around each (fewer at the ends). What is not finite is left
                out; NaN where nothing is left.

        Raises:
            ValueError: if no step has the figure, or for a window below 1.
        """
        window = check_int("window", window)
        values, back = self.column(name), (window - 1) // 2
        windows = [values[max(0, i - back) : i - back + window] for i in range(len(values))]
        finite = [list(filter(math.isfinite, near)) for near in windows]
        return [statistics.fmean(near) if near else math.nan for near in finite]

    def time_split(self) -> dict[str, float]:
        """The share of each part, ``seconds_*``, of all steps' seconds: ``"sampling"``,
        ``"truncations"`` (their rewards), ``"gradient"`` and, if there was one, ``"evaluation"``.
        Empty if no time was measured."""
        seconds = self._seconds()
        total = sum(seconds.values())
        return {name: part / total for name, part in seconds.items()} if total > 0 else {}

    def _keys(self) -> dict[str, None]:
        """The figures that any step has, in their order, and the rate."""
        return dict.fromkeys([*(key for figures in self for key in figures), _RATE])

    def _seconds(self) -> dict[str, float]:
        parts = [_parts(figures) for figures in self]
        names = dict.fromkeys(name for seconds in parts for name in seconds)
        return {name: sum(seconds.get(name, 0.0) for seconds in parts) for name in names}

    def table(self, rows: int = 10) -> str:
        """``rows`` steps, evenly spaced (but near those with held-out figures, ``eval_*``), as text no
        wider than the terminal. ESS and alive are shares of the samples; log Z and the ELBO are in
        nats. The last line says where the time went."""
        return as_text(self._blocks(rows))

    def _blocks(self, rows: int = 10) -> list[Block]:
        if not self:
            return ["History: no steps yet"]
        keys = self._keys()
        held_out = [name for name in keys if name.startswith(_HELD_OUT)]
        columns = _LEARNING if "log_evidence" in keys else _COLUMNS
        if columns is _LEARNING:
            held_out = [name for name in _LEARNING_HELD_OUT if name in keys]
        names = [name for name in columns if self._tells(name)] + held_out
        seconds, samples = self._seconds(), sum(_finite(self, "samples"))
        above = f"History: {len(self):,} step{'s' * (len(self) != 1)}, {samples:,.0f} samples"
        if seconds:
            above += f", {duration(sum(seconds.values()))}"
        split = [f"{plain(name)} {percent(share)}" for name, share in self.time_split().items()]
        table = Table(
            [(_label(name, gap="\n"), "figure") for name in names],
            [[_cell(name, self[i]) for name in names] for i in self._spaced(rows)],
            gap=1 if len(names) < 10 else 0,  # a terminal may have 80 columns
        )
        time = [f"time: {', '.join(split)}"] * bool(split)
        return [above, table, *time, *self._mismatch()]

    def _mismatch(self) -> list[str]:
        """How far draws and scores are apart, if that is more than rounding in float32."""
        nats, share = (_finite(self, name) for name in ("mismatch", "mismatch_ess"))
        if not nats or not share or statistics.fmean(nats) < NEGLIGIBLE:
            return []
        apart, left = f"{statistics.fmean(nats):.2g}", percent(statistics.fmean(share))
        return [f"{two_versions('drawn, scored')}: {apart} nats a token apart (ESS {left})"]

    def _tells(self, name: str) -> bool:
        """Whether a figure is known of any step (of a guide that draws nothing, some never are)."""
        there = any(name in figures for figures in self) or name == _RATE
        return there and (name == "loss" or not all(map(math.isnan, self.column(name))))

    def _spaced(self, rows: int) -> list[int]:
        """Which steps the table shows: the first, the last, and some between."""
        rows, last = check_int("rows", rows), len(self) - 1
        if len(self) <= rows or rows == 1:
            return list(range(len(self)))[-rows:]
        gap = last / (rows - 1)
        held_out = [i for i, f in enumerate(self) if any(key.startswith(_HELD_OUT) for key in f)]
        chosen = {0, last}
        for place in (k * gap for k in range(1, rows - 1)):
            near = min(held_out, key=lambda i: abs(i - place), default=-last)
            chosen.add(near if abs(near - place) <= gap / 2 else round(place))
        return sorted(chosen)

    def plot(
        self, path: str | os.PathLike[str] | None = None, columns: Sequence[str] | None = None
    ) -> Figure:
        """Draw the run: points are steps, lines their running means, rings held-out figures. The
        matplotlib ``Figure`` is shown by notebooks; pyplot does not know it.

        Args:
            path: also write it to this file; its ending says the format (none: PNG). The file is
                there either whole or not at all.
            columns: what to draw instead of the usual, a panel each; see ``column``.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if there is nothing to draw yet, or for an unknown column.
        """
        panels = self._panels(columns)
        across = min(3, len(panels))
        down = math.ceil(len(panels) / across)
        with drawing(3.6 * across, 2.6 * down, path) as figure:
            axes = figure.subplots(down, across, squeeze=False).flatten()
            for axis, names in zip(axes, panels, strict=False):
                self._draw(axis, names)
            for axis in axes[len(panels) :]:
                axis.remove()
        return figure

    def _panels(self, columns: Sequence[str] | None) -> list[list[str]]:
        """The names of each panel's figures: those of which some value can be drawn."""
        if columns is None:
            keys = self._keys()
            wanted = [[name for name in names if name in keys] for names in _PANELS]
        else:
            wanted = [[name] for name in ([columns] if isinstance(columns, str) else columns)]
            for (name,) in wanted:
                self.column(name)  # unknown ones are an error, not a panel less
        panels = [drawn for names in wanted if (drawn := [n for n in names if _finite(self, n)])]
        if not panels:
            raise ValueError("nothing to plot: no step has a finite figure yet")
        return panels

    def _draw(self, axis: Any, names: Sequence[str]) -> None:
        numbers = [_number(figures.get("step")) for figures in self]
        steps = [n if math.isfinite(n) else float(i) for i, n in enumerate(numbers)]
        window = min(math.isqrt(len(self)), 100)
        for name in names:
            colour, faint = RED if name.removeprefix(_HELD_OUT) == "elbo" else BLUE
            values = self.column(name)
            there = [i for i, value in enumerate(values) if math.isfinite(value)]
            at, points = [steps[i] for i in there], [values[i] for i in there]
            if name.startswith(_HELD_OUT):
                axis.plot(at, points, "o--", c=colour, mfc="white", ms=5, lw=1, label=_label(name))
                continue
            # A tint: where points are many, transparent ones would add up and hide the line.
            axis.plot(at, points, ".", c=faint, ms=4, mew=0, zorder=1.5)
            smooth = self.smoothed(name, window)
            axis.plot(at, [smooth[i] for i in there], c=colour, lw=1.5, label=_label(name))
        first = names[0].removeprefix(_HELD_OUT)
        if first == "loss" and min(_finite(self, names[0])) > 0:
            axis.set_yscale("log")
        elif first in _FRACTIONS:
            axis.set_ylim(0, 1.02)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        elif first in ("length", _RATE):
            axis.set_ylim(bottom=0)
        unit = " (nats)" * (first in _NATS) + " (tokens)" * (first == "length")
        shown = [_label(name) for name in names if not name.startswith(_HELD_OUT)]
        axis.set_title(" and ".join(shown or [_label(names[0])]) + unit)
        axis.set_xlabel("step")
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)


def _figure(figures: dict[str, Any], name: str) -> Any:
    if name != _RATE:
        return figures.get(name)
    # Without evaluations, which train on nothing: at their steps training would seem slow.
    seconds = sum(part for key, part in _parts(figures).items() if key != "evaluation")
    samples = _number(figures.get("samples"))
    return samples / seconds if seconds > 0 and math.isfinite(samples) else None


def _parts(figures: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, by what they were spent on."""
    return {
        key.removeprefix("seconds_"): seconds
        for key, value in figures.items()
        if key.startswith("seconds_") and math.isfinite(seconds := _number(value))
    }


def _finite(history: History, name: str) -> list[float]:
    there = any(name in figures for figures in history) or name == _RATE
    return list(filter(math.isfinite, history.column(name))) if there else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _label(name: str, gap: str = " ") -> str:
    base = name.removeprefix(_HELD_OUT)
    label = _LABELS.get(base) or plain(base.replace("_", " "))
    return f"eval{gap}{label}" if name.startswith(_HELD_OUT) else label


def _cell(name: str, figures: dict[str, Any]) -> str:
    value, base = _figure(figures, name), name.removeprefix(_HELD_OUT)
    if not math.isfinite(_number(value)):
        return show(value)
    if base in _FRACTIONS:
        return percent(value)
    if base in ("length", _RATE):
        return f"{value:,.1f}"
    return f"{value:.2f}" if base in _NATS and abs(value) < 1e6 else show(value)
